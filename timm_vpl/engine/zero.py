"""The optimizer's state, shared out over the processes of a run."""
import io
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """torch's ZeroRedundancyOptimizer, of which the groups of some branches may step alone.

    Each process keeps the state of its share of the parameters, updates these, and sends them to the others. The
    exposed groups, and the `state_dict` after `consolidate_state_dict`, are those of the optimizer that is sharded.

    Args:
        optimizer: The optimizer to shard, which has taken no step; its groups have names.
        create: Creates it for other groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, create: Callable[[list[dict]], torch.optim.Optimizer]):
        super().__init__(
            optimizer.param_groups, optimizer_class=lambda groups, **_: create(groups), **optimizer.defaults)
        self._host = None  # a group of the processes' hosts

    def step(self, closure: Callable | None = None, **kwargs) -> Any:
        """Step with the groups that the loop has left in `param_groups`; all processes call it."""
        groups = self.optim.param_groups
        names = {group['name'] for group in self.param_groups}
        self.optim.param_groups = [group for group in groups if group['name'] in names]
        try:
            return super().step(closure, **kwargs)
        finally:
            self.optim.param_groups = groups

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the whole state to the memory of one process, for its `state_dict`; all processes call it.

        torch's own takes a second for 12 MB, and sends it through the devices' memory, as NCCL does with any object.
        """
        self._host = self._host or torch.distributed.new_group(backend='gloo')
        buffer = io.BytesIO()
        torch.save(self.optim.state_dict(), buffer)
        states = [None] * self.world_size if self.rank == to else None
        torch.distributed.gather_object(buffer.getvalue(), states, to, group=self._host)
        self._all_state_dicts = [
            torch.load(io.BytesIO(state), map_location='cpu', weights_only=True) for state in states or ()]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the whole optimizer, and keep this process's share.

        torch's own keeps the share twice, and the counters of fused kernels on the CPU.
        """
        torch.optim.Optimizer.load_state_dict(self, {**state_dict, 'state': {}})
        groups = [{**group, 'params': local['params']} for group, local in zip(
            state_dict['param_groups'], self.optim.state_dict()['param_groups'], strict=True)]
        places = {parameter: i for i, parameter in enumerate(_parameters(self))}
        state = {
            i: state_dict['state'][places[parameter]] for i, parameter in enumerate(_parameters(self.optim))
            if places[parameter] in state_dict['state']}
        self.optim.load_state_dict({'state': state, 'param_groups': groups})


def _parameters(optimizer):
    """Return the parameters in the order of their indices in a state_dict."""
    return itertools.chain.from_iterable(group['params'] for group in optimizer.param_groups)
