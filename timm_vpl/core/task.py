"""The pair as a timm training task: forward and loss, distribution, compilation, stages, state."""
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch.nn.parallel import DistributedDataParallel

from .criterion import StagedLoss, features_of
from .ema import Ema
from .pair import Images, PairOutput, PairWrapper
from .seeding import BranchStreams
from .teacher import Teacher

_logger = logging.getLogger(__name__)


class PairTask(TrainingTask):
    """Training of a pair, instead of timm's ClassificationTask.

    timm's own loop knows nothing of stages and reports its progress to a task only by `update_ema(step=...)`, after
    each optimizer update. So that call updates the stage too, also without an EMA; the count is part of the checkpoint.
    A loop that counts epochs calls `set_epoch` and leaves `updates_per_epoch` out.

    Args:
        pair: The pair to train.
        criterion: VPLLoss or another StagedLoss.
        updates_per_epoch: Optimizer updates in an epoch; None: the loop sets the stages (`set_epoch`).
        streams: Seeds each branch's dropout and drop path for a batch, whose position the loop sets before it
            (`streams.set_position`); None leaves the generators alone.
        teacher: Frozen network, instead of a missing branch or beside a pair.
        device: Device for task tensors/buffers.
        dtype: Dtype for task tensors/buffers.
        verbose: Enable info logging.

    Examples:
        >>> pair = PairWrapper(timm.create_model('test_resnet'), timm.create_model('test_vit', img_size=64))
        >>> task = PairTask(pair, VPLLoss(epochs=10), updates_per_epoch=100)
        >>> result = task(torch.randn(4, 3, 64, 64), torch.tensor([3, 1, 4, 1]))
        >>> list(result)
        ['ce_a_loss', 'ce_b_loss', 'contrastive_loss', 'loss', 'output']
        >>> task.update_ema(step=200)  # as timm's loop does after each update
        >>> task.criterion.stage()
        2
    """

    def __init__(
            self,
            pair: PairWrapper,
            criterion: StagedLoss,
            updates_per_epoch: int | None = None,
            streams: BranchStreams | None = None,
            teacher: Teacher | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ):
        if updates_per_epoch is not None and updates_per_epoch < 1:
            raise ValueError(f'updates_per_epoch is {updates_per_epoch}, expected at least 1')
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module = pair
        self.criterion = criterion.to(self.device)
        self.streams = streams
        self.teacher = None if teacher is None else teacher.to(self.device)
        self.updates_per_epoch = updates_per_epoch
        self._epoch: int | None = None
        self._output: PairOutput | None = None  # between the optimizer phases of a batch
        # One DistributedDataParallel a part, outside the module tree: a part that a stage does not use is not called,
        # so no step has unused parameters, and the keys of the state_dict stay the pair's.
        self._ddp: dict[str, DistributedDataParallel] = {}
        self._count(0)
        if verbose:
            _logger.info(f'{type(self).__name__}: criterion={type(criterion).__name__}, {criterion.describe()}')

    def set_epoch(self, epoch: int) -> None:
        """Choose the terms of this epoch, counted from 0, and log a change."""
        before = self.criterion.describe()
        self._epoch = epoch
        self.criterion.set_epoch(epoch)
        if self.verbose and self.criterion.describe() != before:
            _logger.info(f'Epoch {epoch}: {self.criterion.describe()}')

    def _count(self, num_updates: int) -> None:
        """Record the optimizer updates done, and enter the epoch that they have reached."""
        self.num_updates = num_updates
        if self.updates_per_epoch is not None and num_updates // self.updates_per_epoch != self._epoch:
            self.set_epoch(num_updates // self.updates_per_epoch)

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> 'PairTask':
        """Wrap each part and each term that has trainable parameters in DistributedDataParallel.

        Args:
            device_ids: List of device IDs for DDP, [local_rank] on a GPU; not used on a CPU.
            **ddp_kwargs: Additional arguments of DistributedDataParallel.
        """
        if self.device.type == 'cpu':  # timm's script names it, torch refuses it
            device_ids = None
        for name, part in {**self.trainable_module.parts, **self.criterion.parts}.items():
            if any(parameter.requires_grad for parameter in part.parameters()):
                self._ddp[name] = DistributedDataParallel(part, device_ids=device_ids, **ddp_kwargs)
        return self

    def settle(self, input: Images, autocast: Callable[[], Any] = contextlib.nullcontext) -> None:
        """Run each part and each term that has layers forward and backward once, on arbitrary images.

        A layer of a term that gets no gradient is refused. After its first backward DistributedDataParallel rearranges
        its buckets, which changes the order in which three or more processes sum a gradient: a resumed run would differ
        from an uninterrupted one. Nothing is learnt here; running statistics are restored.

        Args:
            input: Images of the shape of the training batches.
            autocast: Context of the forward passes.

        Raises:
            ValueError: A term does not train its own layers.
        """
        pair = self.trainable_module
        buffers = [(buffer, buffer.clone()) for buffer in [*pair.buffers(), *self.criterion.buffers()]]
        terms = [term for term in self.criterion.all_terms if term.name in self.criterion.parts]
        output = PairOutput(None, None)
        self._tap(features_of(terms))
        for side in pair.sides:
            with autocast():
                *said, features = self._run(side, pair.images(side, input))
                outputs = [x for x in said if x is not None]
                if pair.affine is not None and side == pair.affine_side:
                    said[1] = self._run('affine', said[1].detach())
                    outputs.append(said[1])
            wanted = [x.float().sum() for x in outputs if x.requires_grad]
            if wanted:
                sum(wanted).backward()
            fields: dict[str, Any] = {f'features_{side}': {name: x.detach() for name, x in (features or {}).items()}}
            for name, x in zip(('logits', 'embed', 'dist_logits'), said, strict=True):
                fields[f'{name}_{side}'] = None if x is None else x.detach()
            output = output._replace(**fields)
        if terms:
            if self.teacher is not None:
                output = output._replace(**self.teacher(input))
            target = torch.zeros(len(said[0]), dtype=torch.int64, device=said[0].device)
            sum(self.criterion.compute(terms, output, target, self._ddp).values()).backward()
            _check_trained(self.criterion.parts)
        self.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without reducing them, inside this context."""
        with contextlib.ExitStack() as stack:
            for part in self._ddp.values():
                stack.enter_context(part.no_sync())
            yield

    def compile(  # type: ignore[override]  # as timm's
            self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile each branch, for training and evaluation, before the distributed wrapping."""
        for module in (self.trainable_module, *([] if self.teacher is None else [self.teacher.branch])):
            module.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def compile_ema(
            self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module | None:
        """Compile each branch of the EMA pair, if there is one."""
        if not self.has_ema():
            return None
        pair: PairWrapper = self.trainable_module_ema.module
        pair.compile(backend=backend, mode=mode, **compile_kwargs)
        return pair

    def setup_ema(
            self,
            decay: float = 0.9999,
            use_warmup: bool = False,
            device: torch.device | None = None,
            **kwargs: Any,
    ) -> nn.Module:
        """Create the EMA of the pair."""
        self.trainable_module_ema = Ema(
            self.trainable_module, decay=decay, use_warmup=use_warmup, device=device, **kwargs)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Update the EMA, if there is one, and the stage: timm's loop calls nothing else.

        Args:
            step: Optimizer updates done so far, counted over the whole run; None counts the calls.
        """
        super().update_ema(step=step)
        self._count(self.num_updates + 1 if step is None else step)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the optimizer updates done, which decide the stage, and the state of the terms."""
        if ema:
            return {}
        state: dict[str, Any] = {'num_updates': self.num_updates}
        if self.criterion.gates:
            state['accuracies'] = self.criterion.accuracies
        if self.criterion.parts:
            state['criterion'] = self.criterion.state_dict()
        return state

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Restore the number of updates and with it the stage, and the state of the terms."""
        if state and not ema:
            self.criterion.accuracies = dict(state.get('accuracies', {}))
            self.criterion.load_state_dict(state.get('criterion', {}), strict=strict and bool(self.criterion.parts))
            self._count(state['num_updates'])

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that an optimizer that was made elsewhere has all that the pair and its terms train.

        Raises:
            ValueError: It lacks some, such as the affine layer or the layers of a term.
        """
        given = {id(parameter) for group in optimizer.param_groups for parameter in group['params']}
        trained = [*self.trainable_module.named_parameters(), *self.criterion.named_parameters()]
        lacking = [name for name, parameter in trained if parameter.requires_grad and id(parameter) not in given]
        if lacking:
            raise ValueError(
                f'the optimizer lacks {len(lacking)} parameters to be trained, {", ".join(lacking[:3])}'
                f'{", ..." if lacking[3:] else ""}: '
                f'give it those of task.trainable_module and of task.criterion, or freeze them (requires_grad_(False))')

    def clip_groups(self, exclude_head: bool = False) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that share a gradient norm, by branch; terms' own belong to that of their learner."""
        pair = self.trainable_module
        groups = {}
        for side in pair.sides:
            heads = pair.parts[side].heads if exclude_head else []
            excluded = {parameter for head in heads for parameter in head.parameters()}
            groups[side] = [parameter for parameter in pair.branch(side).parameters() if parameter not in excluded]
        if pair.affine is not None:
            groups[pair.sides[-1]] += pair.affine.parameters()
        for side, part in self.criterion.parts_of(pair.sides):
            groups[side] += part.parameters()
        return groups

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return all parameters to clip, for a loop that clips them by one norm."""
        return [parameter for group in self.clip_groups(exclude_head).values() for parameter in group]

    def clip_gradients(self, limits: dict[str, float | None], mode: str = 'norm', sides: str = 'ab') -> None:
        """Clip each branch's gradients by that branch's own norm.

        Args:
            limits: Limit by side, None for no clipping.
            mode: 'norm', 'value' or 'agc', as timm's --clip-mode.
            sides: The branches to clip.
        """
        if all(limit is None for limit in limits.values()):
            return
        for side, group in self.clip_groups(exclude_head='agc' in mode).items():
            limit = limits.get(side)
            if side in sides and limit is not None:
                dispatch_clip_grad(group, limit, mode=mode)

    @property
    def phases(self) -> tuple[str, ...]:
        """The branches that learn in each optimizer phase of a batch: the loop does one backward and step for each."""
        return self.criterion.phases

    def _run(self, name: str, input: torch.Tensor) -> Any:
        if self.streams is not None and name in self.trainable_module.sides:
            self.streams.enter(name)
        part = self.trainable_module.parts[name]
        run = self._ddp.get(name, part)
        if run is not part and run.module is not part:
            raise RuntimeError(
                f'part {name!r} of the pair was replaced after prepare_distributed(), which wrapped the old one: '
                f'replace it before')
        return run(input)

    def _tap(self, features: Mapping[str, tuple[str, ...]]) -> None:
        """Let the networks give these features, by side, and no others."""
        self.trainable_module.tap(features)
        if self.teacher is not None:
            self.teacher.tap(features.get(self.teacher.side, ()))

    def _outputs(self, input: Images) -> PairOutput:
        """Run each network once."""
        project = self.criterion.uses_embeddings
        pair = self.trainable_module
        self._tap(self.criterion.features)
        if self.criterion.views == 2:
            # One forward of the doubled batch: its halves differ by what the network draws.
            [side] = pair.sides
            return PairOutput(*self._run(side, torch.cat([pair.images(side, input)] * 2))[0].chunk(2))
        output: PairOutput = pair(input, project=project, run=self._run)
        return output if self.teacher is None else output._replace(**self.teacher(input))

    @torch.no_grad()
    def _refresh(self, output: PairOutput, sides: str, input: Images) -> PairOutput:
        """Return the output with new logits and embeddings of these branches after their update, in training mode."""
        fields = {}
        for side in sides:
            if self.streams is not None:
                self.streams.enter(side, 'refresh')
            pair = self.trainable_module
            with _resting_statistics(pair.branch(side)):
                fields[f'logits_{side}'] = pair.run(side, pair.images(side, input))[0]
        return output._replace(**fields)

    def forward(
            self,
            input: Images,
            target: torch.Tensor,
            sample_ids: torch.Tensor | None = None,
            phase: int | None = None,
    ) -> dict[str, Any]:
        """Run the pair and its criterion.

        Args:
            input: Images (N, C, H, W).
            target: Class indices (N,) or soft targets (N, num_classes).
            sample_ids: (N,) int64, equal for copies of one image; None if there are none.
            phase: Optimizer phase of the batch, of several: each is a call, a backward and a step.

        Returns:
            Dictionary with 'loss', 'output' (a PairOutput, whose first element is branch a's logits) and each term
            that is on, unweighted.

        Raises:
            RuntimeError: The method has several phases and the loop gives none.
        """
        if phase is None and len(self.phases) > 1:
            raise RuntimeError(f'this method has {len(self.phases)} optimizer phases a batch: call task(input, target, '
                               f'phase=i) with a backward and a step for each i (or use --dml-joint)')
        if not phase:
            output = self._outputs(input)._replace(sample_ids=sample_ids)
        elif self._output is None:
            raise RuntimeError(f'phase {phase} of a batch comes after phase {phase - 1}, which was not run')
        else:
            output = self._refresh(self._output, self.phases[phase - 1], input)
        # The graph of a branch that learns later waits for its phase.
        self._output = output if phase is not None and phase + 1 < len(self.phases) else None
        return {**self.criterion.terms(output, target, phase, self._ddp), 'output': output}


def _check_trained(parts: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where a layer of a term got no gradient."""
    for name, part in parts.items():
        for which, parameter in part.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                raise ValueError(f'{name}: {which} gets no gradient from the term that it belongs to')


@contextlib.contextmanager
def _resting_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by the batch, as in training, and leave its running statistics alone."""
    norms: list[Any] = [module for module in model.modules() if hasattr(module, 'running_var')]
    tracking = [module for module in norms if getattr(module, 'track_running_stats', False)]
    # timm's own norms have no such switch.
    others = [(buffer, buffer.clone()) for module in norms if not hasattr(module, 'track_running_stats')
              for buffer in module.buffers(recurse=False)]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
        for buffer, before in others:
            buffer.copy_(before)
