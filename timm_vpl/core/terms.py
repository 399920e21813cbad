"""The terms of a loss: functions of a pair's output and the labels, each of which knows who learns from it."""
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from . import losses
from .names import DEFAULT_TAU, SAME_CLASS, SIDES, SIMILARITIES, partner_of
from .pair import PairOutput

TermFunction = Callable[[PairOutput, torch.Tensor], torch.Tensor]
BaseLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _always(epoch: int) -> bool:
    return True


class Term(NamedTuple):
    """One term of a loss: `function(output, target)` -> scalar, its weight, and the epochs at which it is on."""
    name: str  # ends in '_loss'
    function: TermFunction  # may have an attribute uses_embeddings
    weight: float = 1.0
    active: Callable[[int], bool] = _always
    phase: int = 0  # optimizer phase of a batch in which it counts


def base_term(side: str, base_loss: BaseLoss | None = None) -> Term:
    """Return the term of one branch and the labels, 'ce_a_loss' or 'ce_b_loss' (VPL, eq. 1 and 2).

    Args:
        side: 'a' or 'b'.
        base_loss: base_loss(logits, target) -> scalar, by default cross-entropy.
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

    Raises:
        ValueError: An argument outside its range; embeddings that are missing or of different shape.
        RuntimeError: A batch that is larger than all processes' first of the epoch, with gathered negatives.
    """

    uses_embeddings = True

    def __init__(
            self,
            learner: str = 'b',
            tau: float = DEFAULT_TAU,
            similarity: str = 'cosine',
            same_class: str = 'negative',
            gather: bool = True,
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
        self._gathered_rows: int | None = None

    def start_epoch(self) -> None:
        """Let the processes agree on a batch size anew, at the next batch."""
        self._gathered_rows = None

    def forward(self, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
        embed_a, embed_b = (self._embed(output, side) for side in SIDES)
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
        leader: Whose prediction is followed; by default the learner's partner, b where both learn.

    Raises:
        ValueError: An argument outside its range; logits of different shape.
    """
    _check_positive('rho', rho)
    _check_choice('kl_to', learner, (*SIDES, 'both'))
    return partial(_kl_loss, leader or ('a' if learner == 'b' else 'b'), learner == 'both', rho)


def _kl_loss(leader: str, both_learn: bool, rho: float, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
    followed: torch.Tensor = getattr(output, f'logits_{leader}')
    follower: torch.Tensor = getattr(output, f'logits_{partner_of(leader)}')
    if followed.shape != follower.shape:
        raise ValueError(
            f'logits have shapes {tuple(followed.shape)} ({leader}) and {tuple(follower.shape)} '
            f'({partner_of(leader)}), expected equal')
    return losses.kl_divergence(follower, followed if both_learn else followed.detach(), rho)


def token_loss(student: str, temperature: float | None = None) -> TermFunction:
    """Return the term of a distillation token as a function (DeiT, arXiv 2012.12877, eq. 2 and 3).

    Hard: cross-entropy of the token's logits and the class that the partner predicts. Soft, at temperature T:
    T^2 KL(softmax(z_partner / T) || softmax(z_token / T)), the mean over the batch.

    Args:
        student: Side of the branch with the token.
        temperature: T; None for hard labels.

    Raises:
        ValueError: The branch gives no logits of a token, or others than its partner.
    """
    if temperature is not None:
        _check_positive('distillation_tau', temperature)
    return partial(_token_loss, student, temperature)


def _token_loss(student: str, temperature: float | None, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
    token: torch.Tensor | None = getattr(output, f'dist_logits_{student}')
    reference: torch.Tensor = getattr(output, f'logits_{partner_of(student)}').detach()
    if token is None:
        raise ValueError(f'dist_logits_{student} is None: model_{student}.set_distilled_training(True) is missing')
    if token.shape != reference.shape:
        raise ValueError(f'the token has logits {tuple(token.shape)}, its teacher {tuple(reference.shape)}')
    if temperature is None:
        return losses.cross_entropy(token, reference.argmax(dim=-1))
    return temperature ** 2 * losses.kl_divergence(token, reference, temperature)


def submodel_loss(side: str, sum_classes: bool = False) -> TermFunction:
    """Return the term by which a submodel follows the other, as a function (cosub, arXiv 2212.04884, eq. 3).

    B(o_side, stop_gradient(sigmoid(o_other))), B the binary cross-entropy with logits.

    Args:
        side: Place of the submodel that learns.
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
