"""The processes of a command, as each of them sees them."""
import os
from typing import Any, NamedTuple


class Processes(NamedTuple):
    """This process among those of a command, and its device (a torch.device)."""
    device: Any
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def distributed(self) -> bool:
        """Whether there are other processes."""
        return self.world_size > 1


def launched() -> Processes:
    """Return the rank that torchrun or SLURM gave this process, before it has joined the others: without a device."""
    def number(*names: str, default: int) -> int:
        return next((int(os.environ[name]) for name in names if name in os.environ), default)
    return Processes(
        None, number('RANK', 'SLURM_PROCID', default=0), number('WORLD_SIZE', 'SLURM_NTASKS', default=1),
        number('LOCAL_RANK', 'SLURM_LOCALID', default=0))
