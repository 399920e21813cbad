"""The order of an epoch and every draw in it, as functions of the seed and the position in the run; who reads what."""
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from torch.utils.data import Dataset, Sampler

from ..core.seeding import seed_all


class SampleDraw(NamedTuple):
    """A sample's position in the run, which seeds its augmentation."""
    epoch: int
    position: int  # in the order of the epoch over all processes
    index: int  # type: ignore[assignment]  # in the data set


@dataclass(eq=False)
class SeededSampler(Sampler):
    """The order of an epoch, from (seed, epoch) alone: whole batches, assigned to the processes in turn.

    Global batch k holds the same samples for any number of processes. With `repeats` an image occurs that many times in
    a row, its copies with different processes where there are several, and an epoch keeps its length (timm's
    RepeatAugSampler).

    Args:
        num_samples: Length of the data set.
        batch_size: Batch size of a process.
        seed: Seed of the run.
        rank: Rank of the process.
        world_size: Number of processes.
        repeats: Copies of each image, 0 or 1 for none, not necessarily whole.
    """
    num_samples: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    repeats: float = 0.

    def __post_init__(self):
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Draw the order of an epoch and choose its first batch."""
        self.epoch, self.first_batch = epoch, first_batch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
        if self.repeats > 1:
            order = order[(np.arange(self.num_samples) / self.repeats).astype(np.int64)]
        self._indices = order[self.rank::self.world_size][:len(self)]

    def sample_ids(self, batch: int) -> torch.Tensor:
        """Return the data set indices (batch_size,) of this process's share of a batch."""
        return torch.from_numpy(self._indices[batch * self.batch_size:(batch + 1) * self.batch_size])

    def __len__(self):
        return self.num_samples // (self.batch_size * self.world_size) * self.batch_size

    def __iter__(self) -> Iterator[SampleDraw]:
        for i in range(self.first_batch * self.batch_size, len(self)):
            yield SampleDraw(self.epoch, i * self.world_size + self.rank, int(self._indices[i]))


@dataclass(eq=False)
class SeededDataset(Dataset):
    """A map-style data set, read by SampleDraw, whose transforms draw from generators that it seeds."""
    dataset: Dataset
    seed: int

    def __getitem__(self, draw: SampleDraw):
        seed_all(self.seed, 'sample', draw.epoch, draw.position)
        return (*self.dataset[draw.index], draw)

    def __len__(self):
        return len(self.dataset)


@dataclass
class SeededCollate:
    """A collate function that draws (mixup in the workers) from generators seeded for the batch's first sample.

    Args:
        collate: The collate function.
        seed: Seed of the run.
        mixup_off_epoch: Epoch from which mixup is off, 0 for never.
    """
    collate: Callable
    seed: int
    mixup_off_epoch: int

    def __call__(self, batch):
        epoch, position, _ = batch[0][2]
        seed_all(self.seed, 'batch', epoch, position)
        if isinstance(self.collate, Mixup) and self.mixup_off_epoch:
            # Here, since a persistent worker never sees what the main process sets later.
            self.collate.mixup_enabled = epoch < self.mixup_off_epoch
        return self.collate([sample[:2] for sample in batch])


@dataclass
class SeededErasing:
    """timm's random erasing, drawn from a generator that is seeded for the batch.

    Not a method of the loader: in a cycle of references torch can't end the workers, but waits 5 s for each.
    """
    erasing: Callable
    seed: int
    rank: int
    device: torch.device
    position: tuple[int, int] = (0, 0)  # epoch, batch

    def __call__(self, input):
        epoch, batch = self.position
        self.position = (epoch, batch + 1)
        seed_all(self.seed, 'erase', epoch, batch, self.rank, device=self.device)
        return self.erasing(input)


_UNIT = 2 ** 32  # of a shard
_STEP = 2654435769  # of a unit, the golden ratio: however few multiples fill the unit, or any stretch of it, evenly


class Piece(NamedTuple):
    """One reader's part of a shard: the samples whose positions are between two bounds."""
    shard: int
    first: int
    last: int

    def holds(self, index):
        """Return whether it has a sample, by its number in the shard (or an array of numbers)."""
        position = index * _STEP % _UNIT
        return (self.first <= position) & (position < self.last)


def part_of(first: int, last: int, whole: int, lengths: Sequence[int]) -> list[Piece]:
    """Return a reader's part of a stream: [first, last) of `whole` equal parts.

    Readers whose parts adjoin share the shard at their border, and each sample of it has one reader. So all parts
    together hold each sample once, whatever the lengths. If there are more shards than readers, most shards have one
    reader.

    Args:
        first: First part.
        last: Part after the last.
        whole: Number of parts.
        lengths: Samples of each shard, or as many as others if that is not known: parts are as equal as this is right.
    """
    pieces, start = [], 0
    bounds = [sum(lengths) * _UNIT * bound // whole for bound in (first, last)]
    for shard, length in enumerate(lengths):
        low, high = (min(max(bound - start, 0) // length, _UNIT) for bound in bounds)
        if low < high:
            pieces.append(Piece(shard, low, high))
        start += length * _UNIT
    return pieces


def shuffled(samples: Iterable, size: int, rng: random.Random) -> Iterator:
    """Yield samples in random order within a buffer, which fills while it is used, as webdataset's."""
    samples = iter(samples)
    buffer: list = []

    def draw():
        i = rng.randrange(len(buffer))
        buffer[i], buffer[-1] = buffer[-1], buffer[i]
        return buffer.pop()

    for sample in samples:
        buffer += [sample, *islice(samples, int(len(buffer) < size))]
        if len(buffer) > size // 4:
            yield draw()
    while buffer:
        yield draw()
