"""An optimizer update, from the forward passes of its batches to the step, and its statistics."""
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compat import found_bad
from ..core.task import PairTask
from .measures import gradient_norms, likeness, term_norms
from .optim import only

_logger = logging.getLogger('train')

GRADIENTS = 'gradients'


@dataclass
class Progress:
    """The progress of a run: the present epoch, and what this process has done of it."""
    epoch: int = 0
    batch: int = 0  # batches done
    terms: list[str] = field(default_factory=list)
    sums: torch.Tensor | None = None  # of each term over the batches
    kept: torch.Tensor | None = None  # batches that they are sums over
    skipped: int = 0  # unreadable images
    seconds: float = 0.
    lrs: dict[str, float] = field(default_factory=dict)  # of each branch, at its start

    def add(self, terms: list[str], losses: torch.Tensor, good: torch.Tensor, batches: int) -> None:
        """Add the losses of an update, sums over its batches, if they are finite."""
        if self.sums is None or self.kept is None:
            self.terms = terms
            self.sums = torch.zeros_like(losses)
            self.kept = torch.zeros((), device=losses.device)
        self.sums += torch.where(good, losses, 0.)
        self.kept.add_(good, alpha=batches)


@dataclass(eq=False)
class Update:
    """Takes the batches of a run one by one, and lets the optimizer step with the last of each update.

    Losses and gradients that are not finite are counted on the device. The host reads the counts only in `read`: for a
    log line, and before anything is saved.

    Args:
        task: The task to train.
        optimizer: Its optimizer, whose groups have a 'side'.
        num_batches: Batches of an epoch.
        accum_steps: Batches of an update.
        autocast: Context of the forward passes.
        scaler: Gradient scaler of fp16, which skips updates itself.
        clip_limits: Limit of each branch's gradients, None for no clipping.
        clip_mode: As timm's --clip-mode.
        skip: Skip updates whose gradients are not finite; else the first such number ends the run.
        limit: Maximum number of updates in a row that are skipped.
    """

    task: PairTask
    optimizer: torch.optim.Optimizer
    num_batches: int
    accum_steps: int = 1
    autocast: Callable = contextlib.nullcontext
    scaler: torch.amp.GradScaler | None = None
    clip_limits: dict[str, float | None] = field(default_factory=dict)
    clip_mode: str = 'norm'
    skip: bool = False
    limit: int = 10
    error: str | None = field(default=None, init=False)  # why the run must end
    measures: bool = field(default=False, init=False)  # whether the next update is measured, for `read`
    measures_terms: bool = field(default=False, init=False)  # likewise, the gradient of each term; in all processes

    def __post_init__(self):
        # Checks gradients in one pass; some versions of torch lack this kernel for MPS.
        device = self.task.device
        self._unit = torch.amp.GradScaler(device.type, init_scale=1., enabled=self.skip or device.type != 'mps')
        self._unit.scale(torch.ones((), device=device))  # so that it has its scale
        self._losses: dict[str, torch.Tensor] = {}  # of the present update, sums over its batches
        self._found: list[torch.Tensor] = []  # for each phase, whether a gradient is bad
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._last: torch.Tensor | None = None  # mean losses of the last update
        self._measured: dict[str, torch.Tensor] = {}  # of the last update that was measured
        self._names: list[str] = []
        self._counts = self._row = self._longest = torch.zeros(0, device=device)

    def __call__(
            self,
            progress: Progress,
            input: torch.Tensor,
            target: torch.Tensor,
            sample_ids: torch.Tensor | None = None,
    ) -> bool:
        """Take the next batch; return whether it was the last one of an update, which is done then."""
        batch = progress.batch
        tail = self.num_batches % self.accum_steps or self.accum_steps  # batches in the last update
        size = tail if batch >= self.num_batches - tail else self.accum_steps
        is_last = batch + 1 == self.num_batches or (batch + 1) % self.accum_steps == 0
        if self.task.streams is not None:
            self.task.streams.set_position(progress.epoch, batch)
        if batch % self.accum_steps == 0:
            self._begin()
        with contextlib.nullcontext() if is_last else self.task.no_sync():
            for phase, learners in enumerate(self.task.phases):
                with self.autocast():
                    result = self.task(input, target, sample_ids, phase=phase)
                loss = result['loss'] / size
                if is_last:
                    self._measure(result, phase)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                self._collect(result)
                if is_last:
                    self.step(learners)
        progress.batch += 1
        if is_last:
            self._account(progress, size)
        return is_last

    def _begin(self):
        self._losses, self._found = {}, []
        if self.skip or self.accum_steps > 1:
            self._statistics = [
                (buffer, buffer.clone()) for name, buffer in self.task.trainable_module.named_buffers()
                if 'running_' in name or 'num_batches_tracked' in name]

    def abandon(self, progress: Progress) -> None:
        """Undo the changes of an update's first batches if its other batches do not come."""
        begun = progress.batch % self.accum_steps
        if begun and progress.batch < self.num_batches:
            progress.batch -= begun
            self.optimizer.zero_grad()
            for buffer, before in self._statistics:
                buffer.copy_(before)

    def _measure(self, result: dict[str, Any], phase: int):
        found: dict[str, torch.Tensor] = {}
        if self.measures and phase == 0:  # before a branch is updated
            found = {name: values.detach().mean() for name, values in likeness(result['output']).items()}
        if self.measures_terms:
            scale = 1. if self.scaler is None else self.scaler.scale(torch.ones((), device=self.task.device))
            found.update(term_norms(self.task, result, scale))
        if self.measures:
            self._measured.update(found)

    def _collect(self, result: dict[str, Any]):
        for name, value in result.items():
            if name.endswith('loss'):
                value = value.detach()
                self._losses[name] = self._losses[name] + value if name in self._losses else value

    def step(self, learners: str) -> None:
        """Clip the gradients of the branches that learn in this phase, and step the optimizer on these only."""
        scaler = self.scaler or self._unit
        with only(self.optimizer, learners):
            scaler.unscale_(self.optimizer)
            if self.measures:
                self._measured.update(gradient_norms(self.task, learners))
            found = found_bad(scaler, self.optimizer) if self.scaler is None and scaler.is_enabled() else None
            if found is not None:
                self._found.append(found)
            self.task.clip_gradients(self.clip_limits, self.clip_mode, learners)
            if self.scaler is not None or (self.skip and found is not None):
                scaler.step(self.optimizer)
            else:
                self.optimizer.step()
            scaler.update(1. if self.scaler is None else None)
            self.optimizer.zero_grad()

    def _account(self, progress: Progress, size: int) -> None:
        """Add an update to the sums and counts; restore running statistics if it was skipped."""
        terms = list(self._losses)
        losses = torch.stack(list(self._losses.values()))
        bad = left_out = ~losses.isfinite()
        if self._found:
            left_out = torch.stack(self._found) > 0
            bad = torch.cat([bad, left_out.any()[None]])
        good = ~bad.any()
        progress.add(terms, losses, good, size)
        names = terms + [GRADIENTS] * bool(self._found)
        if names != self._names:
            self._names = names
            self._counts = torch.zeros(len(names), device=losses.device)
            self._row, self._longest = torch.zeros(2, 1, device=losses.device)
        self._counts += bad
        self._last = losses / size
        if self.skip:
            self._row.add_(1).mul_(~good)
            torch.maximum(self._longest, self._row, out=self._longest)
            left_out = left_out.any()
            for buffer, before in self._statistics:
                buffer.copy_(torch.where(left_out, before, buffer))

    def read(self, progress: Progress) -> dict[str, float]:
        """Return the mean losses of the last update, and what was measured of one; the host waits for the device.

        Numbers that are not finite are logged, or set `error` if the run must end.
        """
        if self._last is None:
            return {}
        measured, self._measured = self._measured, {}
        kept = (value.to(self._last).view(1) for value in measured.values())
        parts = [self._last, self._counts, self._longest, *kept]
        numbers = iter(torch.cat(parts).tolist())
        losses, counts, [longest], *values = ([next(numbers) for _ in range(len(part))] for part in parts)
        longest = int(longest)
        most = int(max(counts))
        if most:
            # The first term to become non-finite is non-finite most often.
            names = ', '.join(name for name, count in zip(self._names, counts, strict=True) if count == most)
            line = f'epoch {progress.epoch}, up to batch {progress.batch - 1}: not finite: {names}, in {most} update(s)'
            if not self.skip:
                self.error = self.error or line
            elif longest > self.limit:
                self.error = self.error or f'{line}, {longest} in a row (--nonfinite-limit {self.limit})'
            else:
                left_out = int(counts[-1]) if GRADIENTS in self._names else most
                _logger.warning(f'{line}; {left_out} skipped, at most {longest} in a row')
        self._counts.zero_()
        self._longest.copy_(self._row)
        found = dict(zip(self._names, losses, strict=False))
        return {**found, **{name: value for name, [value] in zip(measured, values, strict=True)}}
