"""Numbers gone bad: losses and gradients that are not finite, found without waiting for the device."""
import logging
from collections import deque

import torch

_logger = logging.getLogger(__name__)

KEPT = 'batches'  # among the sums of the losses: the batches that they are sums over


class FiniteCheck:
    """Looks at the losses and gradients of each update, and says when a run has to end.

    On a CPU the flags are read at once; from a GPU they travel behind the computation and are read when they have
    arrived, some updates later.

    Args:
        device: Where losses and gradients are.
        skip: Go on after an update that was left out; else the first one ends the run.
        limit: Updates in a row that may be left out.
    """

    def __init__(self, device: torch.device, skip: bool = False, limit: int = 10):
        self.device = device
        self.skip = skip
        self.limit = limit
        self.error: str | None = None  # why the run has to end
        self._row = 0
        self._under_way: deque = deque()
        self._one = torch.ones((), dtype=torch.float32, device=device)
        self._statistics: list = []

    def gradients(self, groups: list[dict]) -> dict[str, torch.Tensor]:
        """Return for each branch of these optimizer groups a flag (0-d, 1 for bad) of its gradients.

        It is the same in all processes, whose gradients are already averaged.
        """
        found = {}
        for side in sorted({group['name'][0] for group in groups}):
            grads = [
                parameter.grad for group in groups if group['name'][0] == side
                for parameter in group['params'] if parameter.grad is not None]
            found[side] = torch.zeros((), dtype=torch.float32, device=self.device)
            if grads and self.device.type in ('cpu', 'cuda'):
                # The kernel behind GradScaler.unscale_, at scale 1: one pass over all gradients.
                torch._amp_foreach_non_finite_check_and_unscale_(grads, found[side], self._one)
            elif grads:
                found[side] = (~torch.stack([grad.isfinite().all() for grad in grads])).any().float()
        return found

    def step(self, optimizer: torch.optim.Optimizer, found: dict[str, torch.Tensor]) -> None:
        """Let the optimizer step, unless a gradient is bad.

        On a CPU the host reads the flag. On a GPU torch's fused Adam leaves the update out on the device; for others
        the host waits for the flag where updates are to be skipped, but not in a run that stops anyway.
        """
        bad = torch.stack(list(found.values())).amax()
        inner = getattr(optimizer, 'optim', optimizer)  # of a sharded one
        if self.device.type == 'cpu':
            if not bad:
                optimizer.step()
        # torch's fused SGD would leave the momentum of a first step that is left out uninitialised.
        elif getattr(inner, '_step_supports_amp_scaling', False) and not isinstance(inner, torch.optim.SGD):
            inner.grad_scale, inner.found_inf = None, bad
            try:
                optimizer.step()
            finally:
                del inner.grad_scale, inner.found_inf
        elif not self.skip or not bad:
            optimizer.step()

    def keep_statistics(self, module: torch.nn.Module) -> None:
        """Note running statistics before an update that may be left out."""
        if self.skip:
            self._statistics = [
                (buffer, buffer.clone()) for name, buffer in module.named_buffers() if 'running_' in name]

    def record(self, where: str, losses: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
        """Note what of an update is bad; put running statistics back where it is to be left out.

        Args:
            where: Place of the update, for the log.
            losses: Loss terms (0-d) by name.
            found: Flags of the gradients, by branch.
        """
        flags = ~torch.stack(list(losses.values())).isfinite()
        if found:
            flags = torch.cat([flags, torch.stack(list(found.values())) > 0])
        names = [*losses, *(f'gradient of branch {side}' for side in found)]
        if self.skip:
            # By the gradients, which are the same in all processes; a GradScaler keeps its own to itself.
            self._bad = flags[len(losses):].any() if found else flags.any()
            for buffer, before in self._statistics:
                buffer.copy_(torch.where(self._bad, before, buffer))
        if self.device.type != 'cuda':
            self._read(where, names, flags)
            return
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._under_way.append((arrived, where, names, host))
        while self._under_way and self._under_way[0][0].query():
            self._read(*self._under_way.popleft()[1:])

    def kept(self, losses: dict[str, torch.Tensor], batches: int) -> dict[str, torch.Tensor]:
        """Return the losses of the update that was recorded last and its number of batches, 0 where it is left out."""
        losses = {**losses, KEPT: torch.full((), float(batches), device=self.device)}
        if not self.skip:
            return losses
        return {name: torch.where(self._bad, 0., loss) for name, loss in losses.items()}

    def settle(self) -> None:
        """Wait for all flags."""
        while self._under_way:
            self._under_way[0][0].synchronize()
            self._read(*self._under_way.popleft()[1:])

    def _read(self, where, names, flags):
        if not flags.any():
            self._row = 0
            return
        self._row += 1
        bad = ', '.join(name for name, flag in zip(names, flags.tolist(), strict=True) if flag)
        line = f'{where}: not finite: {bad}'
        if self.skip and self._row <= self.limit:
            left_out = 'gradient' in bad or not any('gradient' in name for name in names)
            done = 'this update is left out' if left_out else 'the gradients are finite, the update was made'
            _logger.warning(f'{line}; {done} ({self._row} in a row)')
        elif self.error is None:
            self.error = f'{line}; {self._row} updates in a row' if self.skip else line
