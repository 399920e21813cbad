"""The terms of a loss: functions of a pair's output and the labels, each with its learner."""
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from . import distillation, losses
from .features import EMBED
from .names import DEFAULT_TAU, SAME_CLASS, SIDES, SIMILARITIES, partner_of
from .pair import PairOutput

TermFunction = Callable[[PairOutput, torch.Tensor], torch.Tensor]
BaseLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _always(epoch: int) -> float:
    return 1.


class Term(NamedTuple):
    """One term of a loss: `function(output, target)` -> scalar, and how much it weighs at each epoch.

    Args:
        name: Ends in '_loss'.
        function: May have attributes: `uses_embeddings`, whether it reads embed_a or embed_b; `features`, the names of
            the features that it reads, by side. A module is trained with the branch of `learner`.
        weight: Its weight.
        schedule: The factor of its weight at an epoch; 0 or False switches it off.
        phase: Optimizer phase of a batch in which it counts.
        learner: Branch by whose learning rate and weight decay its own parameters are trained.
        gate: (learner, leader): it is on only while the accuracy of the leader is the higher one
            (`StagedLoss.accuracies`).

    Examples:
        >>> def difference(output, target):
        ...     return (output.logits_b - output.logits_a.detach()).square().mean()
        >>> term = Term('difference_loss', difference, weight=0.1, schedule=lambda epoch: epoch < 5)
        >>> term.function(PairOutput(torch.zeros(2, 10), torch.ones(2, 10)), None)
        tensor(1.)
    """
    name: str
    function: TermFunction
    weight: float = 1.0
    schedule: Callable[[int], float] = _always
    phase: int = 0
    learner: str = 'b'
    gate: tuple[str, str] | None = None


def base_term(side: str, base_loss: BaseLoss | None = None) -> Term:
    """Return the term of one branch and the labels, 'ce_a_loss' or 'ce_b_loss' (VPL, eq. 1 and 2).

    Args:
        side: 'a' or 'b'.
        base_loss: base_loss(logits, target) -> scalar, by default cross-entropy.

    Examples:
        >>> term = base_term('a', torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> term.name, round(term.function(PairOutput(torch.zeros(2, 10), None), torch.tensor([0, 1])).item(), 3)
        ('ce_a_loss', 2.303)
    """
    return Term(f'ce_{side}_loss', partial(_label_loss, base_loss or losses.cross_entropy, f'logits_{side}'))


def _label_loss(base_loss: BaseLoss, field: str, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
    return base_loss(getattr(output, field), target)


class ContrastiveLoss(nn.Module):
    """The contrastive term of a PairOutput (VPL, eq. 3 to 5).

    Args:
        learner: Who learns from it: 'a', 'b' or 'both'; the affine layer always does.
        tau: Temperature.
        similarity: 'cosine' or 'dot'.
        same_class: What other images of an anchor's class are to it: 'negative', 'ignore' or 'positive'.
        gather: Take negatives from all processes, in training.
        leader: 'teacher' for a frozen one beside the pair; by default the learner's partner.
        projection: Maps the learner's embedding to the width of the teacher's, where they differ.

    Raises:
        ValueError: An argument outside its range; embeddings that are missing or of different shape.
        RuntimeError: A batch that is larger than all processes' first of the epoch, with gathered negatives.

    Examples:
        >>> embed = torch.eye(4)  # of four images, the same in both branches
        >>> output = PairOutput(torch.zeros(4, 10), torch.zeros(4, 10), embed, embed)
        >>> term = ContrastiveLoss(learner='b', tau=0.2, same_class='ignore')
        >>> round(term(output, torch.tensor([0, 0, 1, 1])).item(), 3)
        0.027
    """

    def __init__(
            self,
            learner: str = 'b',
            tau: float = DEFAULT_TAU,
            similarity: str = 'cosine',
            same_class: str = 'negative',
            gather: bool = True,
            leader: str | None = None,
            projection: nn.Module | None = None,
    ):
        super().__init__()
        _check_positive('tau', tau)
        _check_choice('contrastive_to', learner, (*SIDES, 'both'))
        _check_choice('similarity', similarity, SIMILARITIES)
        _check_choice('same_class', same_class, SAME_CLASS)
        self.learner = learner
        self.tau = tau
        self.similarity = similarity
        self.same_class = same_class
        self.gather = gather
        self.projection = projection
        self.uses_embeddings = leader != 'teacher'
        self.features: dict[str, tuple[str, ...]] = {} if self.uses_embeddings else {learner: (EMBED,)}
        self._gathered_rows: int | None = None

    def start_epoch(self) -> None:
        """Let the processes agree on a new batch size at the next batch."""
        self._gathered_rows = None

    def forward(self, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
        embed_a, embed_b = self._embeds(output)
        logits_shape = getattr(output.logits_a, 'shape', ())
        if embed_a.shape != embed_b.shape or embed_a.shape[:1] != logits_shape[:1]:
            raise ValueError(
                f'embeddings have shapes {tuple(embed_a.shape)} (a) and {tuple(embed_b.shape)} (b) for logits of '
                f'shape {tuple(logits_shape)}, expected (N, d) each')
        if output.sample_ids is not None and output.sample_ids.shape != embed_a.shape[:1]:
            raise ValueError(
                f'sample_ids has shape {tuple(output.sample_ids.shape)}, expected ({len(embed_a)},), one an image')
        gather = self.gather and is_distributed_step(self) and dist.get_world_size() > 1
        return losses.contrastive(
            embed_a,
            embed_b,
            tau=self.tau,
            similarity=self.similarity,
            same_class=self.same_class,
            classes=target.argmax(dim=1) if target.ndim == 2 else target,
            sample_ids=output.sample_ids,
            gather_rows=self._agreed_rows(len(embed_a), embed_a.device) if gather else None,
        )

    def _embeds(self, output: PairOutput) -> Any:
        if self.uses_embeddings:
            return [self._embed(output, side) for side in SIDES]
        embed = feature_of(output, self.learner, EMBED)
        if output.embed_teacher is None:
            raise ValueError('embed_teacher is None, the contrastive term follows it')
        return embed if self.projection is None else self.projection(embed), output.embed_teacher.detach()

    def _embed(self, output: PairOutput, side: str) -> torch.Tensor:
        """Return a side's embedding with the gradient that it may have."""
        embed: torch.Tensor | None = getattr(output, f'embed_{side}')
        stopped: torch.Tensor | None = getattr(output, f'stopped_{side}')
        if embed is None:
            raise ValueError(f'embed_{side} is None, the contrastive term needs it (pair(x) with project=True)')
        if self.learner in (side, 'both'):
            return embed
        return embed.detach() if stopped is None else stopped

    def _agreed_rows(self, rows: int, device: torch.device) -> int:
        """Return how many rows each process gathers: the largest batch among the processes' first of the epoch."""
        if self._gathered_rows is None:
            most = torch.tensor([rows], device=device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            self._gathered_rows = int(most)
        if rows > self._gathered_rows:
            raise RuntimeError(
                f'a batch has {rows} images, the epoch began with {self._gathered_rows} a process: negatives are '
                f'gathered from batches of at most that size (let the largest batch come first, or gather=False)')
        return self._gathered_rows


def kl_loss(learner: str = 'a', rho: float = 1.0, leader: str | None = None) -> TermFunction:
    """Return the KL term of a PairOutput as a function (VPL, eq. 6): KL(p_leader || p_follower).

    Args:
        learner: Who learns from it: 'a', 'b', or 'both'.
        rho: Temperature.
        leader: Whose prediction is followed, also 'teacher' or 'average'; by default the learner's partner, b where
            both learn.

    Raises:
        ValueError: An argument outside its range; logits of different shape.

    Examples:
        >>> term = kl_loss('a', rho=4)
        >>> logits_a, logits_b = torch.randn(2, 4, 10, requires_grad=True)
        >>> term(PairOutput(logits_a, logits_a), None)
        tensor(0., grad_fn=<MeanBackward0>)
    """
    _check_positive('rho', rho)
    _check_choice('kl_to', learner, (*SIDES, 'both'))
    return LogitLoss(learner, leader, partial(distillation.kl_divergences, temperature=rho), temperature=rho)


class LogitLoss:
    """A term of a PairOutput by which a branch follows logits, as a function: the mean over the images of a distance.

    Args:
        learner: Who learns from it: 'a', 'b' or 'both', where the leader is followed without a stop-gradient.
        leader: Who is followed: 'a', 'b', 'teacher', or 'average', the mean of both branches' probabilities; by default
            the learner's partner, b where both learn.
        distances: distances(logits, reference) -> (N,), or a scalar.
        temperature: At which the branches' probabilities are averaged.
        uses_classes: Whether `distances` takes the classes (N,) of the images too; of soft targets those of the largest
            share.
        standardize: Standardise all logits over the classes first.
        confidence: Weigh each image by AdaptConf.

    Raises:
        ValueError: Logits that are missing or of different shape.
    """

    def __init__(
            self,
            learner: str,
            leader: str | None,
            distances: Callable[..., torch.Tensor],
            temperature: float = 1.0,
            uses_classes: bool = False,
            standardize: bool = False,
            confidence: bool = False,
    ):
        self.leader = leader or ('a' if learner == 'b' else 'b')
        self.both_learn = learner == 'both'
        self.learner = partner_of(self.leader) if self.both_learn else learner
        self.distances = distances
        self.temperature = temperature
        self.uses_classes = uses_classes
        self.standardize = standardize
        self.confidence = confidence

    def __call__(
            self,
            output: PairOutput,
            target: torch.Tensor,
            logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the term; `logits` (N, C), if given, replace the learner's."""
        said = self._said(output, self.learner) if logits is None else logits
        logits = self._standardized(said)
        if self.leader == 'average':
            log_p = torch.stack([(self._logits(output, side) / self.temperature).log_softmax(dim=-1) for side in SIDES])
            reference = self.temperature * (log_p.logsumexp(dim=0) - math.log(len(SIDES)))
        else:
            reference = self._logits(output, self.leader)
        if logits.shape != reference.shape:
            raise ValueError(
                f'logits have shapes {tuple(reference.shape)} ({self.leader}) and {tuple(logits.shape)} '
                f'({self.learner}), expected equal')
        if not self.both_learn:
            reference = reference.detach()
        classes = [distillation.classes_of(target)] if self.uses_classes else []
        distances = self.distances(logits, reference, *classes)
        if self.confidence:
            distances = distances * distillation.confidence_weights(said, reference)
        return distances.mean()

    def _logits(self, output: PairOutput, side: str) -> torch.Tensor:
        return self._standardized(self._said(output, side))

    @staticmethod
    def _said(output: PairOutput, side: str) -> torch.Tensor:
        logits: torch.Tensor | None = getattr(output, f'logits_{side}')
        if logits is None:
            raise ValueError(f'logits_{side} is None, a term follows them')
        return logits

    def _standardized(self, logits: torch.Tensor) -> torch.Tensor:
        return distillation.standardized(logits) if self.standardize else logits


class FeatureLoss(nn.Module):
    """A term by which a branch follows features, through layers that it trains: the mean over pairs of features.

    Args:
        learner: Who learns from it, 'a' or 'b'.
        leader: Who is followed: 'a', 'b' or 'teacher'.
        names: The pairs of features, (learner's, leader's).
        projections: A module for each pair, applied to the learner's feature; or None.
        distances: distances(feature, leader's feature) -> (N,).

    Raises:
        ValueError: A feature is missing.
    """

    def __init__(
            self,
            learner: str,
            leader: str,
            names: Sequence[tuple[str, str]],
            projections: Sequence[nn.Module] | None,
            distances: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ):
        super().__init__()
        self.learner = learner
        self.leader = leader
        self.names = tuple(names)
        self.projections = nn.ModuleList(projections or [nn.Identity() for _ in names])
        self.distances = distances
        self.features = {learner: tuple(name for name, _ in names), leader: tuple(name for _, name in names)}

    def forward(self, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
        distances = []
        for (name, led), projection in zip(self.names, self.projections, strict=True):
            own, followed = feature_of(output, self.learner, name), feature_of(output, self.leader, led)
            distances.append(self.distances(projection(own), followed.detach()).mean())
        return torch.stack(distances).mean()


class StageLogitLoss(FeatureLoss):
    """A term by which heads at the stages of a branch follow logits: the sum over the stages (OFA-KD).

    Args:
        learner: Who learns from it, 'a' or 'b'.
        names: The stages.
        heads: The module that classifies each, from a map (N, d, h, w).
        term: The term of the logits, which those of each head follow too.
    """

    def __init__(self, learner: str, names: Sequence[str], heads: Sequence[nn.Module], term: LogitLoss):
        super().__init__(learner, learner, [(name, name) for name in names], heads, torch.sub)
        self.term = term

    def forward(self, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
        total = self.term(output, target)
        for (name, _), head in zip(self.names, self.projections, strict=True):
            total = total + self.term(output, target, head(feature_of(output, self.learner, name)))
        return total


def feature_of(output: PairOutput, side: str, name: str) -> torch.Tensor:
    """Return a feature of a PairOutput.

    Raises:
        ValueError: It was not asked for.

    Examples:
        >>> pair = PairWrapper(timm.create_model('test_resnet'), timm.create_model('test_vit', img_size=64))
        >>> pair.tap({'a': ['stage4'], 'b': ['stage4']})
        >>> output = pair(torch.randn(2, 3, 64, 64))
        >>> feature_of(output, 'a', 'stage4').shape, feature_of(output, 'b', 'stage4').shape
        (torch.Size([2, 96, 2, 2]), torch.Size([2, 64, 4, 4]))
    """
    features: dict[str, torch.Tensor] = getattr(output, f'features_{side}') or {}
    if name not in features:
        raise ValueError(
            f'features_{side} has no {name!r}, a term reads it: call pair.tap(criterion.features) before an epoch')
    return features[name]


def token_loss(student: str, temperature: float | None = None, leader: str | None = None) -> TermFunction:
    """Return the term of a distillation token as a function (DeiT, arXiv 2012.12877, eq. 2 and 3).

    Hard: cross-entropy of the token's logits and the class that the partner predicts. Soft, at temperature T:
    T^2 KL(softmax(z_partner / T) || softmax(z_token / T)), the mean over the batch.

    Args:
        student: Side of the branch with the token.
        temperature: T; None for hard labels.
        leader: Who teaches it, by default the partner.

    Raises:
        ValueError: The branch gives no logits of a token, or others than its partner.
    """
    if temperature is not None:
        _check_positive('distillation_tau', temperature)
    return partial(_token_loss, student, leader or partner_of(student), temperature)


def _token_loss(
        student: str,
        leader: str,
        temperature: float | None,
        output: PairOutput,
        target: torch.Tensor,
) -> torch.Tensor:
    token: torch.Tensor | None = getattr(output, f'dist_logits_{student}')
    reference: torch.Tensor | None = getattr(output, f'logits_{leader}')
    if token is None:
        raise ValueError(f'dist_logits_{student} is None: model_{student}.set_distilled_training(True) is missing')
    if reference is None:
        raise ValueError(f'logits_{leader} is None, the token follows them')
    reference = reference.detach()
    if token.shape != reference.shape:
        raise ValueError(f'the token has logits {tuple(token.shape)}, its teacher {tuple(reference.shape)}')
    if temperature is None:
        return losses.cross_entropy(token, reference.argmax(dim=-1))
    return temperature ** 2 * losses.kl_divergence(token, reference, temperature)


def submodel_loss(side: str, sum_classes: bool = False) -> TermFunction:
    """Return the term by which a submodel follows the other, as a function (cosub, arXiv 2212.04884, eq. 3).

    B(o_side, stop_gradient(sigmoid(o_other))), B the binary cross-entropy with logits.

    Args:
        side: Side of the submodel that learns.
        sum_classes: Sum over classes, not mean, as the labels' loss does with --bce-sum.
    """
    return partial(_submodel_loss, side, sum_classes)


def _submodel_loss(side: str, sum_classes: bool, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = getattr(output, f'logits_{side}')
    loss = F.binary_cross_entropy_with_logits(logits, getattr(output, f'logits_{partner_of(side)}').detach().sigmoid())
    return loss * logits.shape[1] if sum_classes else loss


def is_distributed_step(module: nn.Module) -> bool:
    """Return whether this is a training step of several processes."""
    return module.training and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()


def _check_positive(name: str, value: float) -> None:
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f'{name} is {value}, expected a finite number above 0')


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{name} is {value!r}, expected one of {choices}')
