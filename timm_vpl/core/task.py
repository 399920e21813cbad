"""The pair as a timm training task: forward and loss, distribution, compilation, stages, state."""
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, unwrap_model
from torch.nn.parallel import DistributedDataParallel

from .criterion import StagedLoss
from .ema import Ema
from .pair import PairOutput, PairWrapper
from .seeding import BranchStreams
from .stages import StageHook
from .teacher import Teacher

_logger = logging.getLogger(__name__)


class PairTask(TrainingTask):
    """Training of a pair, in the place of timm's ClassificationTask.

    In a loop that knows nothing of pairs the stages follow from the steps passed to `update_ema` (optimizer updates);
    that count is part of the checkpoint.

    Args:
        pair: The pair to train.
        criterion: VPLLoss or another StagedLoss.
        updates_per_epoch: Optimizer updates in an epoch; None: the stages are the loop's to set (`set_epoch`).
        streams: Seeds each branch's dropout and drop path for a batch, whose place the loop sets before it
            (`streams.set_position`); None leaves the generators alone.
        teacher: Frozen network in the place of the branch that the pair has not.
        device: Device for task tensors/buffers.
        dtype: Dtype for task tensors/buffers.
        verbose: Enable info logging.
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
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module = pair
        self.criterion = criterion.to(self.device)
        self.streams = streams
        self.teacher = None if teacher is None else teacher.to(self.device)
        self.num_updates = 0
        self._output: PairOutput | None = None  # between the optimizer phases of a batch
        # One DistributedDataParallel a part, outside the module tree: a part that a stage does not use is not called,
        # so no step has unused parameters, and the keys of the state_dict stay the pair's.
        self._ddp: dict[str, DistributedDataParallel] = {}
        self._stage_hook = StageHook(criterion, updates_per_epoch, verbose=verbose)
        if verbose:
            _logger.info(f'{type(self).__name__}: criterion={type(criterion).__name__}, {criterion.describe()}')

    def set_epoch(self, epoch: int) -> None:
        """Choose the terms of this epoch, in a loop that counts epochs itself."""
        self._stage_hook.set_epoch(epoch)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> 'PairTask':
        """Wrap each part that has trainable parameters in DistributedDataParallel.

        Args:
            device_ids: List of device IDs for DDP, [local_rank] on a GPU.
            **ddp_kwargs: Additional arguments of DistributedDataParallel.
        """
        for name, part in self.trainable_module.parts.items():
            if any(parameter.requires_grad for parameter in part.parameters()):
                self._ddp[name] = DistributedDataParallel(part, device_ids=device_ids, **ddp_kwargs)
        return self

    def settle_buckets(self, input: torch.Tensor, autocast: Callable = contextlib.nullcontext) -> None:
        """Run each distributed part forward and backward once, on images that do not matter.

        After its first backward DistributedDataParallel arranges its buckets anew, which changes the order in which
        three or more processes sum a gradient: a run that was resumed would differ from one that went on. Nothing is
        learnt here; running statistics are put back.

        Args:
            input: Images of the shape of the training batches.
            autocast: Context of the forward passes.
        """
        pair = self.trainable_module
        buffers = [(buffer, buffer.clone()) for buffer in pair.buffers()]
        for side in pair.sides:
            with autocast():
                outputs = [x for x in self._run(side, pair.images(side, input)) if x is not None]
                if 'affine' in self._ddp and side == pair.affine_side:
                    outputs.append(self._ddp['affine'](outputs[1].detach()))
            wanted = [x.float().sum() for x in outputs if x.requires_grad]
            if wanted:
                sum(wanted).backward()
        pair.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    @contextlib.contextmanager
    def no_sync(self):
        """Accumulate gradients without reducing them, inside this context."""
        with contextlib.ExitStack() as stack:
            for part in self._ddp.values():
                stack.enter_context(part.no_sync())
            yield

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs) -> nn.Module:
        """Compile each branch, for training and evaluation, before the distributed wrapping."""
        if self.teacher is not None:
            self.teacher.branch.compile(backend=backend, mode=mode, **compile_kwargs)
        return self._compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)

    def compile_ema(
            self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs) -> nn.Module | None:
        """Compile each branch of the EMA pair, if there is one."""
        if not self.has_ema():
            return None
        return self._compile(self.get_trainable_module(ema=True).module, backend=backend, mode=mode, **compile_kwargs)

    @staticmethod
    def _compile(pair, **compile_kwargs):
        for side in pair.sides:
            pair.parts[side].compile(**compile_kwargs)
        return pair

    def setup_ema(
            self,
            decay: float = 0.9999,
            use_warmup: bool = False,
            device: torch.device | None = None,
            **kwargs,
    ) -> nn.Module:
        """Create the EMA of the pair."""
        self.trainable_module_ema = Ema(
            self.get_trainable_module(), decay=decay, use_warmup=use_warmup, device=device, **kwargs)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        """Update the EMA, if there is one, and the stage.

        Args:
            step: Optimizer updates done so far, counted over the whole run; None counts the calls.
        """
        self.num_updates = self.num_updates + 1 if step is None else step
        super().update_ema(step=step)
        self._stage_hook.update(self.num_updates)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the number of optimizer updates done, which decides the stage."""
        return {} if ema else {'num_updates': self.num_updates}

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Restore the number of updates and with it the stage."""
        if state and not ema:
            self.num_updates = state['num_updates']
            self._stage_hook.update(self.num_updates)

    def clip_groups(self, exclude_head: bool = False) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that share a gradient norm, by branch; the affine layer belongs to the last."""
        pair = unwrap_model(self.trainable_module)
        groups = {}
        for side in pair.sides:
            heads = pair.parts[side].heads if exclude_head else []
            excluded = {parameter for head in heads for parameter in head.parameters()}
            groups[side] = [parameter for parameter in pair.branch(side).parameters() if parameter not in excluded]
        if pair.affine is not None:
            groups[pair.sides[-1]] += pair.affine.parameters()
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
            if side in sides and limits.get(side) is not None:
                dispatch_clip_grad(group, limits[side], mode=mode)

    @property
    def phases(self) -> tuple[str, ...]:
        """The branches that learn in each optimizer phase of a batch: the loop does one backward and step for each."""
        return self.criterion.phases

    def _run(self, name, input):
        if self.streams is not None and name in self.trainable_module.sides:
            self.streams.enter(name)
        part = self.trainable_module.parts[name]
        run = self._ddp.get(name, part)
        if run is not part and run.module is not part:
            raise RuntimeError(
                f'part {name!r} of the pair was replaced after prepare_distributed(), which wrapped the old one: '
                f'replace it before')
        return run(input)

    def _outputs(self, input) -> PairOutput:
        """Run each network once."""
        project = self.criterion.uses_embeddings
        if self.criterion.views == 2:
            # One forward of the doubled batch: its halves differ by what the network draws.
            [side] = self.trainable_module.sides
            output = self.trainable_module(torch.cat([input, input]), project=project, run=self._run)
            return PairOutput(*getattr(output, f'logits_{side}').chunk(2))
        output = self.trainable_module(input, project=project, run=self._run)
        return output if self.teacher is None else output._replace(**self.teacher(input))

    @torch.no_grad()
    def _refresh(self, output: PairOutput, sides: str, input) -> PairOutput:
        """Return the output with what these branches say after their update, in training mode."""
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
            input: torch.Tensor,
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
            RuntimeError: The method has several phases and the loop names none.
        """
        if phase is None and len(self.phases) > 1:
            raise RuntimeError(f'this method has {len(self.phases)} optimizer phases a batch: call task(input, target, '
                               f'phase=i) with a backward and a step for each i (or use --dml-joint)')
        if phase and self._output is None:
            raise RuntimeError(f'phase {phase} of a batch follows on phase {phase - 1}, which was not run')
        if not phase:
            output = self._outputs(input)
            if sample_ids is not None:
                output = output._replace(sample_ids=sample_ids)
        else:
            output = self._refresh(self._output, self.phases[phase - 1], input)
        # The graph of a branch that learns later waits for its phase.
        self._output = output if phase is not None and phase + 1 < len(self.phases) else None
        return {**self.criterion.terms(output, target, phase), 'output': output}


@contextlib.contextmanager
def _resting_statistics(model: nn.Module):
    """Let BatchNorm normalise by the batch, as in training, and leave its running statistics alone."""
    norms = [module for module in model.modules() if hasattr(module, 'running_var')]
    tracking = [module for module in norms if getattr(module, 'track_running_stats', False)]
    # Norms of timm's own that know no such switch.
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
