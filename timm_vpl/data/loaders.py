"""Loaders: torch's, with timm's transforms, mixup and prefetching; every draw is seeded by its position in the run."""
import copy
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from timm.data import FastCollateMixup, create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset

from ..compat import guard_posterize
from ..core.processes import Processes
from ..errors import UsageError
from ..options.sections import Loader
from ..options.train import Options
from .images import Images, Split, StreamImages
from .order import SeededCollate, SeededDataset, SeededErasing, SeededSampler


def init_worker(worker_id: int) -> None:
    """Let a worker ignore the signals of its process group, which the main process handles."""
    signal.set_wakeup_fd(-1)  # the main process's, if this is a fork of it
    for name in ('SIGINT', 'SIGUSR1'):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # SIGTERM is blocked, see Batches
        threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    """End this worker when the main process sends SIGTERM, as Python does at its exit; from others it is ignored."""
    main = multiprocessing.parent_process().pid  # type: ignore[union-attr]
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
        pass
    os._exit(0)


class Batches(DataLoader):
    """torch's loader, whose workers are started with SIGTERM blocked in all their threads, the first ones too."""

    def __iter__(self):
        if not hasattr(signal, 'sigwaitinfo'):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batches(loader: Loader, dataset: Dataset, **kwargs) -> Batches:
    return Batches(
        dataset,
        num_workers=loader.workers,
        pin_memory=loader.pin_mem,
        worker_init_fn=init_worker,
        persistent_workers=loader.workers > 0,
        **kwargs,
    )


def _normalization(data_config) -> dict[str, Any]:
    return {
        'mean': data_config['mean'], 'std': data_config['std'], 'channels': data_config['input_size'][0]}


class TrainLoader(PrefetchLoader):
    """Batches of an epoch, on the device.

    `skipped` is the number of images in the batches that `epoch` has yielded that could not be read, and are replaced,
    on this process.

    Every draw (order, augmentation, mixup, erasing) is a function of the seed and its position in the run, not of a
    generator's state: independent of the number of workers, and the same when an epoch is resumed at a later batch. A
    stream always starts at its beginning, and its order depends on the workers.

    Args:
        options: Options of the run.
        images: The images, with their transform.
        collate: Makes a batch.
        processes: The processes that share an epoch.
        **kwargs: Further arguments of timm's PrefetchLoader.
    """

    def __init__(self, options: Options, images: Split, collate: Callable, processes: Processes, **kwargs):
        self.images, self.skipped, size = images, 0, options.loader.batch_size
        self._num_batches = len(images) // (size * processes.world_size)
        dataset: Dataset = images
        self.order: Any = None  # of a stream none
        if isinstance(images, Images):
            dataset = SeededDataset(images, options.run.seed)
            self.order = SeededSampler(
                len(images), size, options.run.seed, processes.rank, processes.world_size,
                options.augmentation.aug_repeats)
        else:
            images.distribute(options.loader.workers, processes, options.run.seed, self._num_batches, size)
        batches = _batches(
            options.loader, dataset, batch_size=size, sampler=self.order, drop_last=True,
            collate_fn=SeededCollate(collate, options.run.seed, options.augmentation.mixup_off_epoch))
        super().__init__(batches, device=processes.device, **kwargs)
        if self.random_erasing is not None:
            self.random_erasing = SeededErasing(  # type: ignore[assignment]
                self.random_erasing, options.run.seed, processes.rank, processes.device)

    def __len__(self):
        return self._num_batches

    def epoch(self, epoch: int, first_batch: int = 0):
        """Yield (batch, input, target, sample_ids) from `first_batch` to the epoch's end.

        sample_ids (N,) is None unless images are repeated.
        """
        self.skipped = 0
        if self.random_erasing is not None:
            self.random_erasing.position = (epoch, first_batch)  # type: ignore[attr-defined]
        self.images.replaced.zero_()
        if isinstance(self.images, StreamImages):
            self.images.set_epoch(epoch)
            for batch, (input, target) in enumerate(self):
                self.skipped = int(self.images.replaced.sum())
                yield batch, input, target, None
            return
        self.order.set_epoch(epoch, first_batch)
        for batch, (input, target) in enumerate(self, start=first_batch):
            ids = self.order.sample_ids(batch)
            self.skipped += int(self.images.replaced[ids].sum())
            yield batch, input, target, ids.to(self.device, non_blocking=True) if self.order.repeats > 1 else None


def create_train_loader(
        options: Options,
        images: Split,
        data_config: dict[str, Any],
        num_classes: int,
        processes: Processes,
) -> TrainLoader:
    """Create the training loader from timm's options.

    Raises:
        UsageError: An unknown augmentation policy, or fewer images than a batch.
    """
    asked = options.augmentation
    guard_posterize()
    collate = fast_collate
    if asked.mixes:
        collate = FastCollateMixup(
            mixup_alpha=asked.mixup,
            cutmix_alpha=asked.cutmix,
            cutmix_minmax=asked.cutmix_minmax,
            prob=asked.mixup_prob,
            switch_prob=asked.mixup_switch_prob,
            mode=asked.mixup_mode,
            label_smoothing=asked.smoothing,
            num_classes=num_classes,
        )
    names = (
        'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob',
        'grayscale_prob', 'gaussian_blur_prob')
    augmentation = {name: getattr(asked, name) for name in names}
    if asked.train_interpolation and not asked.no_aug:
        augmentation['interpolation'] = asked.train_interpolation
    images = copy.copy(images)  # with a transform of its own
    try:
        images.transform = create_transform(
            **{**data_config, **augmentation}, is_training=True, auto_augment=asked.aa, use_prefetcher=True)
    except (AssertionError, KeyError, ValueError) as e:
        raise UsageError(f'--aa {asked.aa}: not an augmentation policy of timm ({type(e).__name__} {e})') from e
    loader = TrainLoader(
        options,
        images,
        collate,
        processes,
        **_normalization(data_config),
        re_prob=0. if asked.no_aug else asked.reprob,
        re_mode=asked.remode,
        re_count=asked.recount,
        re_num_splits=2 if asked.resplit else 0,
    )
    if not len(loader):
        raise UsageError(
            f'--batch-size {options.loader.batch_size}: {processes.world_size} batch(es) of that size are more than '
            f'the {len(images)} training images')
    return loader


class EvalLoader(PrefetchLoader):
    """Validation batches (images, target): each image once, in order, assigned to the processes in turn.

    After a pass `dataset.replaced` holds the images that could not be read on this process. Of a stream a process has
    some batches more or fewer than its length.
    """

    def __len__(self):
        images = self.dataset
        if isinstance(images, StreamImages):
            return math.ceil(len(images) / (images.processes.world_size * self.loader.batch_size))
        return len(self.loader)

    def __iter__(self):
        self.dataset.replaced.zero_()
        yield from super().__iter__()


class PairEvalLoader:
    """Validation batches of branches that differ in how their images are prepared: ({side: images}, target).

    Args:
        loaders: The validation loader of each side, over the same images in the same order.
    """

    def __init__(self, loaders: dict[str, EvalLoader]):
        self.loaders = loaders
        first = next(iter(loaders.values()))
        self.dataset, self.sampler = first.dataset, first.sampler

    def __len__(self):
        return len(next(iter(self.loaders.values())))

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for batches in zip(*self.loaders.values(), strict=True):
            yield {side: images for side, (images, _) in zip(self.loaders, batches, strict=True)}, batches[0][1]


def create_eval_loaders(loader: Loader, images: Split, configs: dict[str, dict], processes: Processes):
    """Create the validation loader of a pair, one for both where the branches' images are prepared alike."""
    first, *others = configs.values()
    if all(config == first for config in others):
        return create_eval_loader(loader, images, first, processes)
    return PairEvalLoader({
        side: create_eval_loader(loader, images, config, processes) for side, config in configs.items()})


def create_eval_loader(
        loader: Loader,
        images: Split,
        data_config: dict[str, Any],
        processes: Processes,
) -> EvalLoader:
    """Create a validation loader, with timm's transform for a data configuration."""
    images = copy.copy(images)  # with a transform of its own; what is replaced, they share
    images.transform = create_transform(**data_config, use_prefetcher=True)
    size = loader.validation_batch_size or loader.batch_size
    if isinstance(images, StreamImages):
        images.distribute(loader.workers, processes)
    else:  # no worker without a batch, as with one image to predict
        loader = replace(loader, workers=min(loader.workers, math.ceil(len(images) / size)))
    batches = _batches(
        loader,
        images,
        batch_size=size,
        sampler=OrderedDistributedSampler(images) if processes.distributed and isinstance(images, Images) else None,
        collate_fn=fast_collate,
    )
    return EvalLoader(batches, device=processes.device, **_normalization(data_config))
