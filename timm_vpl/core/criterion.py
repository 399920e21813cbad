"""The criterion: a staged, weighted sum of named terms, and VPL's as one of these."""
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import CellType
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from . import losses
from .names import DEFAULT_TAU, SAME_CLASS, SIDES, SIMILARITIES
from .pair import PairOutput
from .stages import StageSchedule


def _always(epoch):
    return True


class Term(NamedTuple):
    """One term of a loss: `function(output, target)` -> scalar, its weight, and the epochs at which it is on."""
    name: str  # ends in '_loss'
    function: Callable[[PairOutput, torch.Tensor], torch.Tensor]  # may have an attribute uses_embeddings
    weight: float = 1.0
    active: Callable[[int], bool] = _always
    phase: int = 0  # optimizer phase of a batch in which it counts


class StagedLoss(nn.Module):
    """Weighted sum of terms, each on at its own epochs.

    `criterion(output, target)` is the scalar total for a PairOutput; `criterion.terms(output, target)` the dict of
    its parts, unweighted, absent when off, and 'loss', the total. A weight of 0 switches a term off. All arithmetic
    is in float32 at least, whatever autocast says.

    Args:
        terms: The terms in the order in which they are logged. Modules among their functions, and those that these
            hold, follow the criterion to its device; functions that pickle knows let the criterion be pickled.
        phases: Branches that learn in each optimizer phase of a batch, 'ab' for both at once.
        views: 2 for one network that gives two outputs for a batch, in the places of the branches.

    Raises:
        ValueError: Two terms of one name, a name that doesn't end in '_loss', a negative or non-finite weight, a
            term of a phase that there is not.
    """

    def __init__(self, terms: Sequence[Term], phases: Sequence[str] = ('ab',), views: int = 1):
        super().__init__()
        names = [term.name for term in terms]
        for term in terms:
            if names.count(term.name) > 1 or not term.name.endswith('_loss') or term.name == 'loss':
                raise ValueError(f"term {term.name!r}: names are unique and end in '_loss'")
            if not math.isfinite(term.weight) or term.weight < 0:
                raise ValueError(f'{term.name}: weight is {term.weight}, expected a finite number of at least 0')
            if not 0 <= term.phase < len(phases):
                raise ValueError(f'{term.name}: phase is {term.phase}, expected one of {len(phases)}')
        self.all_terms = tuple(terms)
        self.functions = nn.ModuleList(term.function for term in terms if isinstance(term.function, nn.Module))
        self.phases = tuple(phases)
        self.views = views
        self._epoch = None

    def _apply(self, fn, *args, **kwargs):
        """Convert also what the terms hold, such as class weights: no submodule, so that it keeps its own mode."""
        registered = set(self.modules())
        for module in _held_modules(term.function for term in self.all_terms):
            if module not in registered:
                module._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    @property
    def epoch(self) -> int:
        """The epoch that decides which terms are on, 0 until `set_epoch` was called."""
        return self._epoch or 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the terms of this epoch, counted from 0."""
        if epoch < 0:
            raise ValueError(f'epoch is {epoch}, expected 0 or more')
        self._epoch = epoch
        for function in self.functions:
            if hasattr(function, 'start_epoch'):
                function.start_epoch()

    def active_terms(self):
        """Return the terms that are on at the present epoch."""
        return [term for term in self.all_terms if term.weight and term.active(self.epoch)]

    def describe(self) -> str:
        """Return a line that names the terms that are on."""
        return 'terms ' + ', '.join(f'{term.weight:g} x {term.name}' for term in self.active_terms())

    @property
    def uses_embeddings(self) -> bool:
        """Whether a term that is on reads the embeddings."""
        return any(getattr(term.function, 'uses_embeddings', False) for term in self.active_terms())

    def terms(self, output: PairOutput, target: torch.Tensor, phase: int | None = None) -> dict[str, torch.Tensor]:
        """Return the unweighted terms that are on, and 'loss', their weighted sum.

        Args:
            output: What the pair computed.
            target: Class indices (N,) or soft targets (N, C).
            phase: Only the terms of this optimizer phase; None for all.

        Raises:
            ValueError: No PairOutput, or a target of another length.
        """
        if not isinstance(output, PairOutput):
            raise ValueError(
                f'{type(self).__name__} got a {type(output).__name__}, expected a PairOutput: wrap the two models, '
                f'pair = PairWrapper(model_a, model_b), and give the criterion what pair(images) returns')
        if self._epoch is None and self.training and torch.is_grad_enabled():
            warnings.warn(
                f'{type(self).__name__}.set_epoch() was never called: the terms of epoch 0 are used', stacklevel=4)
            self._epoch = 0
        logits = next(output[SIDES.index(side)] for side in SIDES if output[SIDES.index(side)] is not None)
        if len(target) != len(logits):
            raise ValueError(f'target has shape {tuple(target.shape)} for logits of shape {tuple(logits.shape)}')
        with torch.autocast(logits.device.type, enabled=False):
            output = PairOutput(*(_at_least_float32(field) for field in output))
            active = [term for term in self.active_terms() if phase in (None, term.phase)]
            values = {term.name: term.function(output, target) for term in active}
            values['loss'] = sum(term.weight * values[term.name] for term in active)
        if not self.uses_embeddings and _distributed(self):
            # Only an affine layer that was run is not in the graph by the other terms.
            unused = [getattr(output, f'embed_{side}') for side in SIDES
                      if getattr(output, f'stopped_{side}') is not None]
            values['loss'] = losses.keep_in_graph(values['loss'], *unused)
        return values

    def forward(self, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
        return self.terms(output, target)['loss']


def base_term(side: str, base_loss: Callable | None = None) -> Term:
    """Return the term of one branch and the labels, 'ce_a_loss' or 'ce_b_loss' (VPL, eq. 1 and 2).

    Args:
        side: 'a' or 'b'.
        base_loss: base_loss(logits, target) -> scalar, by default cross-entropy.
    """
    base_loss = base_loss or losses.cross_entropy
    return Term(f'ce_{side}_loss', partial(_label_loss, base_loss, f'logits_{side}'))


def _label_loss(base_loss, field, output, target):
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
        _check_positive(tau=tau)
        _check_choice('contrastive_to', learner, (*SIDES, 'both'))
        _check_choice('similarity', similarity, SIMILARITIES)
        _check_choice('same_class', same_class, SAME_CLASS)
        self.learner = learner
        self.tau = tau
        self.similarity = similarity
        self.same_class = same_class
        self.gather = gather
        self._gathered_rows = None

    def start_epoch(self) -> None:
        """Let the processes agree on a batch size anew, at the next batch."""
        self._gathered_rows = None

    def forward(self, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
        embed_a, embed_b = (self._embed(output, side) for side in SIDES)
        if embed_a.shape != embed_b.shape or len(embed_a) != len(output.logits_a):
            raise ValueError(
                f'embeddings have shapes {tuple(embed_a.shape)} (a) and {tuple(embed_b.shape)} (b) for logits of '
                f'shape {tuple(output.logits_a.shape)}, expected (N, d) each')
        if output.sample_ids is not None and output.sample_ids.shape != embed_a.shape[:1]:
            raise ValueError(
                f'sample_ids has shape {tuple(output.sample_ids.shape)}, expected ({len(embed_a)},), one an image')
        gather = self.gather and _distributed(self) and dist.get_world_size() > 1
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

    def _embed(self, output, side):
        """Return a side's embedding with the gradient that it may have."""
        embed, stopped = getattr(output, f'embed_{side}'), getattr(output, f'stopped_{side}')
        if embed is None:
            raise ValueError(f'embed_{side} is None, the contrastive term needs it (pair(x) with project=True)')
        if self.learner in (side, 'both'):
            return embed
        return embed.detach() if stopped is None else stopped

    def _agreed_rows(self, rows, device):
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


def kl_loss(
        learner: str = 'a',
        rho: float = 1.0,
        leader: str | None = None,
) -> Callable[[PairOutput, torch.Tensor], torch.Tensor]:
    """Return the KL term of a PairOutput as a function (VPL, eq. 6): KL(p_leader || p_follower).

    Args:
        learner: Who learns from it: 'a', 'b', or 'both'.
        rho: Temperature.
        leader: Whose prediction is followed; by default the learner's partner, b where both learn.

    Raises:
        ValueError: An argument outside its range; logits of different shape.
    """
    _check_positive(rho=rho)
    _check_choice('kl_to', learner, (*SIDES, 'both'))
    return partial(_kl_loss, leader or ('a' if learner == 'b' else 'b'), learner == 'both', rho)


def _kl_loss(leader, both_learn, rho, output, target):
    z_a, z_b = output.logits_a, output.logits_b
    if z_a.shape != z_b.shape:
        raise ValueError(f'logits have shapes {tuple(z_a.shape)} (a) and {tuple(z_b.shape)} (b), expected equal')
    follower, followed = (z_a, z_b) if leader == 'b' else (z_b, z_a)
    return losses.kl_divergence(follower, followed if both_learn else followed.detach(), rho)


def token_loss(
        student: str,
        temperature: float | None = None,
) -> Callable[[PairOutput, torch.Tensor], torch.Tensor]:
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
        _check_positive(distillation_tau=temperature)
    return partial(_token_loss, student, temperature)


def _token_loss(student, temperature, output, target):
    partner = SIDES[student == SIDES[0]]
    token, reference = getattr(output, f'dist_logits_{student}'), getattr(output, f'logits_{partner}').detach()
    if token is None:
        raise ValueError(f'dist_logits_{student} is None: model_{student}.set_distilled_training(True) is missing')
    if token.shape != reference.shape:
        raise ValueError(f'the token has logits {tuple(token.shape)}, its teacher {tuple(reference.shape)}')
    if temperature is None:
        return losses.cross_entropy(token, reference.argmax(dim=-1))
    return temperature ** 2 * losses.kl_divergence(token, reference, temperature)


def submodel_loss(side: str, sum_classes: bool = False) -> Callable[[PairOutput, torch.Tensor], torch.Tensor]:
    """Return the term by which a submodel follows the other, as a function (cosub, arXiv 2212.04884, eq. 3).

    B(o_side, stop_gradient(sigmoid(o_other))), B the binary cross-entropy with logits.

    Args:
        side: Place of the submodel that learns.
        sum_classes: Sum over classes, not mean, as the labels' loss does with --bce-sum.
    """
    return partial(_submodel_loss, side, sum_classes)


def _submodel_loss(side, sum_classes, output, target):
    other = SIDES[side == SIDES[0]]
    logits, reference = getattr(output, f'logits_{side}'), getattr(output, f'logits_{other}').detach().sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, reference)
    return loss * logits.shape[1] if sum_classes else loss


class VPLLoss(StagedLoss):
    """The loss of Vision Pair Learning (VPL, eq. 1 to 7).

    L = L_CE-a + L_CE-b + w_c L_CL [first (100 - y) % of the epochs] + w_k L_KL [last (100 - x) %]

    The contrastive term moves only branch b (and the affine layer), the KL term only branch a, unless
    `contrastive_to` and `kl_to` say otherwise: 'both' is the same expression without a stop-gradient, kl_to='b' is
    KL(p_a || p_b). With 'gather' the negatives are those of all processes, in training only; with gradient
    accumulation those of the micro-batch.

    Args:
        epochs: Number of epochs that the learning rate scheduler runs.
        x: Percentage of epochs before the KL term starts.
        y: Percentage of epochs after the contrastive term has ended.
        tau: Temperature of the contrastive term (not given in the paper).
        rho: Temperature of the KL term (not given in the paper).
        similarity: 'cosine', the dot product of L2-normalised embeddings, or 'dot', the plain one.
        contrastive_to: Who learns from the contrastive term: 'a', 'b' or 'both'.
        kl_to: Who learns from the KL term: 'a', 'b' or 'both'.
        contrastive_weight: w_c, 0 for off.
        kl_weight: w_k, 0 for off.
        same_class: What other images of an anchor's class are to it: 'negative' (the paper), 'ignore', 'positive'.
        base_loss: base_loss(logits, target) for both branches, by default cross-entropy.
        gather: Take negatives from all processes.

    Raises:
        ValueError: An argument outside its range; embeddings of different shape.
        RuntimeError: A batch that is larger than all processes' first of the epoch, with gathered negatives.
    """

    def __init__(
            self,
            epochs: int,
            x: float = 20,
            y: float = 20,
            tau: float = DEFAULT_TAU,
            rho: float = 1.0,
            similarity: str = 'cosine',
            contrastive_to: str = 'b',
            kl_to: str = 'a',
            contrastive_weight: float = 1.0,
            kl_weight: float = 1.0,
            same_class: str = 'negative',
            base_loss: Callable | None = None,
            gather: bool = True,
    ):
        for name, value in (('contrastive_weight', contrastive_weight), ('kl_weight', kl_weight)):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f'{name} is {value}, expected a finite number of at least 0')
        schedule = StageSchedule(epochs, x, y)
        super().__init__([
            base_term('a', base_loss),
            base_term('b', base_loss),
            Term('contrastive_loss', ContrastiveLoss(contrastive_to, tau, similarity, same_class, gather),
                 contrastive_weight, schedule.contrastive),
            Term('kl_loss', kl_loss(kl_to, rho), kl_weight, schedule.kl),
        ])
        self.base_loss = base_loss  # a module's tensors follow the criterion to its device
        self.schedule = schedule
        self.tau = tau
        self.rho = rho
        self.similarity = similarity
        self.contrastive_to = contrastive_to
        self.kl_to = kl_to
        self.same_class = same_class
        self.gather = gather

    def stage(self) -> int:
        """Return the present stage: 1 contrastive term only, 2 both, 3 KL term only."""
        return self.schedule.stage(self.epoch)

    def describe(self) -> str:
        """Return a line that names the stage and the terms that are on."""
        return f'stage {self.stage()}, {super().describe()}'


def _distributed(module) -> bool:
    """Return whether this is a training step of several processes."""
    return module.training and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()


def _held_modules(functions):
    """Yield the modules that functions hold: as attributes, as arguments of a partial, in a closure; each once."""
    held, seen = list(functions), set()
    while held:
        item = held.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield item
        elif isinstance(item, partial):
            held += item.func, *item.args, *item.keywords.values()
        elif callable(item):
            held += (getattr(item, '__self__', None), *getattr(item, '__dict__', {}).values(),
                     *(cell.cell_contents for cell in getattr(item, '__closure__', None) or ()
                       if cell != CellType()))  # of a name that has no value yet


def _check_positive(**values) -> None:
    for name, value in values.items():
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f'{name} is {value}, expected a finite number above 0')


def _check_choice(name, value, choices) -> None:
    if value not in choices:
        raise ValueError(f'{name} is {value!r}, expected one of {choices}')


def _at_least_float32(tensor):
    if tensor is not None and tensor.is_floating_point() and tensor.itemsize < 4:
        return tensor.float()
    return tensor
