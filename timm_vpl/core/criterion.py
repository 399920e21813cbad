"""The criterion: a staged, weighted sum of named terms, and VPL's as one of these."""
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CellType, MappingProxyType
from typing import Any

import torch
import torch.nn as nn

from . import losses
from .names import DEFAULT_TAU, SIDES
from .pair import PairOutput
from .stages import StageSchedule
from .terms import BaseLoss, ContrastiveLoss, Term, base_term, is_distributed_step, kl_loss


class StagedLoss(nn.Module):
    """Weighted sum of terms, each on at its own epochs.

    `criterion(output, target)` is the scalar total for a PairOutput; `criterion.terms(output, target)` the dict of its
    parts, unweighted, absent when off, and 'loss', the total. A weight of 0 switches a term off. All arithmetic is on
    float32 or float64, whatever autocast says; TF32 rounds matrix products if torch is set to use it.

    Args:
        terms: The terms in the order in which they are logged. Modules among their functions are its submodules; those
            that functions hold otherwise follow it to its device. It can be pickled if its functions can.
        phases: Branches that learn in each optimizer phase of a batch, 'ab' for both at once.
        views: 2 for one network that gives two outputs for a batch, as if they were the two branches.

    Raises:
        ValueError: Two terms of one name, a name that doesn't end in '_loss', a negative or non-finite weight, a term
            of a phase that does not exist, trainable parameters that nothing would train.

    Attributes:
        accuracies: Of what gates compare: 'a', 'b', 'teacher' and 'average', on images that are not trained on; the
            loop sets them before an epoch. Until then terms with a gate are off.

    Examples:
        >>> from timm_vpl.core.stages import Span
        >>> late = Term('kl_loss', kl_loss('a', rho=4), weight=16, schedule=Span(epochs=10, start=50))
        >>> criterion = StagedLoss([base_term('a'), base_term('b'), late])
        >>> criterion.set_epoch(4)
        >>> criterion.describe()
        'terms 1 x ce_a_loss, 1 x ce_b_loss'
        >>> criterion.set_epoch(5)
        >>> criterion.describe()
        'terms 1 x ce_a_loss, 1 x ce_b_loss, 16 x kl_loss'
    """

    def __init__(self, terms: Sequence[Term], phases: Sequence[str] = ('ab',), views: int = 1):
        super().__init__()
        names = [term.name for term in terms]
        for term in terms:
            if names.count(term.name) > 1 or not term.name.endswith('_loss') or term.name == 'loss':
                raise ValueError(f"term {term.name!r}: a name must be unique and end in '_loss'")
            if not math.isfinite(term.weight) or term.weight < 0:
                raise ValueError(f'{term.name}: weight is {term.weight}, expected a finite number of at least 0')
            if not 0 <= term.phase < len(phases):
                raise ValueError(f'{term.name}: phase is {term.phase}, expected one of {len(phases)}')
        self.all_terms = tuple(terms)
        self.functions = nn.ModuleDict(
            {term.name: term.function for term in terms if isinstance(term.function, nn.Module)})
        self.accuracies: dict[str, float] = {}
        for term in terms:
            _check_held(term, set(self.modules()))
        self.phases = tuple(phases)
        self.views = views
        self._epoch: int | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Convert also what the terms hold, such as class weights: no submodule, so that it keeps its own mode."""
        registered = set(self.modules())
        for module in _held_modules(term.function for term in self.all_terms):
            if module not in registered:
                module._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch that decides which terms are on, 0 until `set_epoch` was called."""
        return self._epoch or 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the terms of this epoch, counted from 0."""
        if epoch < 0:
            raise ValueError(f'epoch is {epoch}, expected 0 or more')
        self._epoch = epoch
        if epoch > 0 and not self.accuracies and self.gates:
            warnings.warn(
                f'{type(self).__name__}: no accuracies were set, its terms with a gate are off', stacklevel=2)
        for function in self.functions.values():
            start_epoch = getattr(function, 'start_epoch', None)
            if start_epoch is not None:
                start_epoch()

    def weight_of(self, term: Term) -> float:
        """Return the weight of a term at the present epoch, 0 where it is off."""
        if term.gate is not None:
            learner, leader = (self.accuracies.get(name, -math.inf) for name in term.gate)
            if not leader > learner:
                return 0.
        return term.weight * term.schedule(self.epoch)

    def active_terms(self) -> list[Term]:
        """Return the terms that are on at the present epoch."""
        return [term for term in self.all_terms if self.weight_of(term)]

    @property
    def gates(self) -> set[str]:
        """What the terms' gates compare: some of 'a', 'b', 'teacher' and 'average'."""
        return {name for term in self.all_terms for name in term.gate or ()}

    @property
    def parts(self) -> dict[str, Any]:
        """The functions of terms that have parameters to train, by name of the term."""
        return {
            name: function for name, function in self.functions.items()
            if any(parameter.requires_grad for parameter in function.parameters())}

    def parts_of(self, sides: Sequence[str]) -> list[tuple[str, Any]]:
        """Return the same with the branch that each is trained with, the last one where both learn from the term."""
        learners = {term.name: term.learner for term in self.all_terms}
        return [(learners[name] if learners[name] in sides else sides[-1], part) for name, part in self.parts.items()]

    @property
    def features(self) -> dict[str, tuple[str, ...]]:
        """The features that the terms that are on read, by side."""
        return features_of(self.active_terms())

    def describe(self) -> str:
        """Return a line that names the terms that are on."""
        return 'terms ' + ', '.join(f'{term.weight:g} x {term.name}' for term in self.active_terms())

    @property
    def uses_embeddings(self) -> bool:
        """Whether a term that is on reads the embeddings."""
        return any(getattr(term.function, 'uses_embeddings', False) for term in self.active_terms())

    def terms(
            self,
            output: PairOutput,
            target: torch.Tensor,
            phase: int | None = None,
            wrapped: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, torch.Tensor]:
        """Return the unweighted terms that are on, and 'loss', their weighted sum.

        Args:
            output: What the pair computed.
            target: Class indices (N,) or soft targets (N, C).
            phase: Only the terms of this optimizer phase; None for all.
            wrapped: Replacements for terms' functions, by name: each function in its DistributedDataParallel.

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
        [logits, *_] = [logits for logits in (output.logits_a, output.logits_b) if logits is not None]
        if len(target) != len(logits):
            raise ValueError(f'target has shape {tuple(target.shape)} for logits of shape {tuple(logits.shape)}')
        active = [term for term in self.active_terms() if phase in (None, term.phase)]
        values = self.compute(active, output, target, wrapped)
        values['loss'] = sum(self.weight_of(term) * values[term.name] for term in active)
        if not self.uses_embeddings and is_distributed_step(self):
            # Only an affine layer that was run is not in the graph by the other terms.
            unused = [getattr(output, f'embed_{side}') for side in SIDES
                      if getattr(output, f'stopped_{side}') is not None]
            values['loss'] = losses.keep_in_graph(values['loss'], *unused)
        return values

    @staticmethod
    def compute(
            terms: Iterable[Term],
            output: PairOutput,
            target: torch.Tensor,
            wrapped: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return these terms, unweighted, as float32 or float64; the arguments are those of `terms`."""
        with torch.autocast(target.device.type, enabled=False):
            output = PairOutput(*(_at_least_float32(field) for field in output))
            return {term.name: wrapped.get(term.name, term.function)(output, target) for term in terms}

    def forward(self, output: PairOutput, target: torch.Tensor) -> torch.Tensor:
        return self.terms(output, target)['loss']


class VPLLoss(StagedLoss):
    """The loss of Vision Pair Learning (VPL, eq. 1 to 7).

    L = L_CE-a + L_CE-b + w_c L_CL [first (100 - y) % of the epochs] + w_k L_KL [last (100 - x) %]

    The contrastive term trains only branch b (and the affine layer), the KL term only branch a, unless `contrastive_to`
    and `kl_to` say otherwise: 'both' is the same expression without a stop-gradient, kl_to='b' is KL(p_a || p_b). With
    'gather' the negatives are those of all processes, in training only; with gradient accumulation those of the
    micro-batch.

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

    Examples:
        >>> criterion = VPLLoss(epochs=300)
        >>> criterion.set_epoch(100)
        >>> criterion.describe()
        'stage 2, terms 1 x ce_a_loss, 1 x ce_b_loss, 1 x contrastive_loss, 1 x kl_loss'
        >>> output = PairOutput(*torch.randn(2, 4, 10), *torch.randn(2, 4, 32))
        >>> list(criterion.terms(output, torch.tensor([3, 1, 4, 1])))
        ['ce_a_loss', 'ce_b_loss', 'contrastive_loss', 'kl_loss', 'loss']
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
            base_loss: BaseLoss | None = None,
            gather: bool = True,
    ):
        schedule = StageSchedule(epochs, x, y)
        super().__init__([
            base_term('a', base_loss),
            base_term('b', base_loss),
            Term('contrastive_loss', ContrastiveLoss(contrastive_to, tau, similarity, same_class, gather),
                 contrastive_weight, schedule.contrastive),
            Term('kl_loss', kl_loss(kl_to, rho), kl_weight, schedule.kl),
        ])
        self.schedule = schedule

    def stage(self) -> int:
        """Return the present stage: 1 contrastive term only, 2 both, 3 KL term only."""
        return self.schedule.stage(self.epoch)

    def describe(self) -> str:
        """Return a line that names the stage and the terms that are on."""
        return f'stage {self.stage()}, {super().describe()}'


def _held_modules(functions: Iterable[Any]) -> Iterator[nn.Module]:
    """Yield the modules that functions hold: as attributes, as arguments of a partial, in a closure; each once."""
    held, seen = list(functions), set()
    while held:
        item = held.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield item
            held += [each for module in item.modules() for each in vars(module).values() if not isinstance(each, dict)]
        elif isinstance(item, (list, tuple)):
            held += item
        elif isinstance(item, dict):
            held += item.values()
        elif isinstance(item, partial):
            held += item.func, *item.args, *item.keywords.values()
        elif callable(item):
            held += (getattr(item, '__self__', None), *getattr(item, '__dict__', {}).values(),
                     *(cell.cell_contents for cell in getattr(item, '__closure__', None) or ()
                       if cell != CellType()))  # of a name that has no value yet


def _check_held(term: Term, trained: set[nn.Module]) -> None:
    """Raise ValueError where a term's function holds parameters to train that no optimizer would be given."""
    for module in _held_modules([term.function]):
        if module not in trained and any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(
                f'{term.name}: its function holds a {type(module).__name__} with parameters that nothing trains: let '
                f'the function be a module that has it as a submodule, or freeze it (requires_grad_(False))')


def features_of(terms: Iterable[Term]) -> dict[str, tuple[str, ...]]:
    """Return the features that terms read, by side."""
    wanted: dict[str, dict[str, None]] = {}
    for term in terms:
        for side, names in getattr(term.function, 'features', {}).items():
            wanted.setdefault(side, {}).update(dict.fromkeys(names))
    return {side: tuple(names) for side, names in wanted.items()}


def _at_least_float32(field: Any) -> Any:
    if isinstance(field, dict):
        return {name: _at_least_float32(tensor) for name, tensor in field.items()}
    if field is not None and field.is_floating_point() and field.itemsize < 4:
        return field.float()
    return field
