"""The processes of a command, as each of them finds out."""
from typing import Any, NamedTuple


class Processes(NamedTuple):
    """This process among those of a command, and its device (a torch.device)."""
    device: Any
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def distributed(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    @property
    def speaks(self) -> bool:
        """Whether this one logs and writes for all."""
        return self.rank == 0
