"""Randomness as a function: every draw of a run is seeded from what it is for, so no generator state is kept."""
import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts) -> int:
    """Return a 63-bit seed for a tuple of numbers and names; other parts, unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def seed_all(*parts, device: torch.device | None = None) -> None:
    """Seed Python's, numpy's and torch's generators, and that of a device, from a tuple of numbers and names."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == 'cuda':
        torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index] \
            .manual_seed(seed)
    elif device is not None and device.type != 'cpu':
        getattr(torch, device.type).manual_seed(seed)


class BranchStreams:
    """A stream of random numbers for each branch, so that its dropout and drop path do not depend on its partner.

    Args:
        seed: Seed of the run.
        rank: Rank of the process.
        device: Where the branches run.
    """

    def __init__(self, seed: int, rank: int, device: torch.device):
        self.seed = seed
        self.rank = rank
        self.device = device
        self.position = (0, 0)

    def set_position(self, epoch: int, batch: int) -> None:
        """Choose the streams of this batch of this epoch."""
        self.position = (epoch, batch)

    def enter(self, side: str, what: str = 'forward') -> None:
        """Start the stream of a branch, for one of its forwards of the batch."""
        seed_all(self.seed, what, side, *self.position, self.rank, device=self.device)
