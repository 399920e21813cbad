"""Data sets and loaders: timm's, with every draw of the training pipeline seeded by its place in the run."""
import copy
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm.data.auto_augment
import torch
from PIL import Image, ImageOps
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader
from timm.data.loader import PrefetchLoader
from timm.data.readers.reader import Reader
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from .errors import RunError, UsageError
from .options import mixup_active
from .seeding import seed_all

_logger = logging.getLogger(__name__)

DIGITS = 'digits'
_DIGITS_TRAIN = 1437  # first 80 %; the pictures are in the order of their writers


class DigitsReader(Reader):
    """The 1,797 handwritten digits that come with the package, for timm's ImageDataset.

    Args:
        split: 'train' (1,437 images) or 'validation' (360).
    """

    def __init__(self, split: str = 'train'):
        super().__init__()
        if split not in ('train', 'validation'):
            raise ValueError(f"split is {split!r}, expected 'train' or 'validation'")
        with np.load(Path(__file__).parent / 'assets' / 'digits.npz', allow_pickle=False) as archive:
            part = slice(_DIGITS_TRAIN) if split == 'train' else slice(_DIGITS_TRAIN, None)
            self.images, self.labels = archive['images'][part], archive['labels'][part]
        self.class_to_idx = {str(digit): digit for digit in range(10)}

    def __getitem__(self, index):
        height, width = self.images[index].shape
        header = f'P5 {width} {height} 255\n'.encode()  # a PGM file: header and grey levels
        return io.BytesIO(header + (self.images[index] * 15).tobytes()), int(self.labels[index])

    def __len__(self):
        return len(self.labels)

    def _filename(self, index, basename=False, absolute=False):
        return f'{self.labels[index]}/{index}.pgm'


def create_split(args, split: str, is_training: bool, whole: bool = False) -> Dataset:
    """Create the data set of one split with timm's create_dataset, or from the embedded digits.

    Args:
        args: Options of the data set.
        split: Name of the split.
        is_training: Whether it is trained on.
        whole: Take a folder of class folders, or a tar, for the split itself.

    Raises:
        UsageError: The data can't be read as asked.
    """
    in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    img_mode = args.input_img_mode or ('L' if in_chans == 1 else 'RGB')
    try:
        bands = len(Image.new(img_mode, (1, 1)).getbands())
    except ValueError as e:
        raise UsageError(f'--input-img-mode {img_mode}: not an image mode (L, RGB, RGBA, CMYK, ...)') from e
    if bands != in_chans:
        raise UsageError(
            f'--in-chans {in_chans}: images of mode {img_mode} have {bands}; name another --input-img-mode')
    if args.dataset == DIGITS:
        return ImageDataset('', reader=DigitsReader(split), input_img_mode=img_mode)
    where = f'--data-dir {args.data_dir}' if args.data_dir else f'--dataset {args.dataset}'
    try:
        dataset = create_dataset(
            args.dataset,
            root=args.data_dir,
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            input_img_mode=img_mode,
            input_key=args.input_key,
            target_key=args.target_key,
            trust_remote_code=args.dataset_trust_remote_code,
        )
    except ImportError as e:
        raise UsageError(f'--dataset {args.dataset}: needs a package that is not installed ({e})') from e
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as e:
        raise UsageError(f'{where}: split {split!r} could not be read: {e}') from e
    if args.dataset.lower() in ('', 'torch/folder', 'torch/image_folder'):
        source = getattr(dataset, 'reader', dataset)
        root, data_dir = Path(source.root), Path(args.data_dir)
        if not (whole and (data_dir.is_file() or not _has_splits(data_dir))):
            _check_split(root, data_dir, split, is_training)
        if not args.class_map:
            _check_class_folders(root, _class_to_idx(source))
    return dataset


def _has_splits(data_dir):
    """Return whether the folders in a folder hold folders, so that they are not those of classes."""
    with os.scandir(data_dir) as entries:
        folders = [entry.path for entry in entries if entry.is_dir()]
    for folder in folders:
        with os.scandir(folder) as entries:
            if any(entry.is_dir() for entry in entries):
                return True
    return False


def _check_split(root, data_dir, split, is_training):
    if root == data_dir:
        # timm falls back to all that is there, which would train and validate on the same images.
        flag = '--train-split' if is_training else '--val-split'
        if data_dir.is_file():
            raise UsageError(
                f'--data-dir {data_dir}: one tar for all splits; give its folder, and each split its own tar '
                f'({flag} {data_dir.name})')
        entries = ', '.join(sorted(e.name for e in data_dir.iterdir() if e.is_dir() or e.suffix == '.tar')[:8])
        raise UsageError(f'{flag} {split}: no such folder or tar in {data_dir}, which has {entries or "none"}')


def _check_class_folders(root, class_to_idx):
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        if entry.is_dir() and entry.name not in class_to_idx and not entry.name.startswith('.'):
            if not any(child.is_dir() for child in entry.iterdir()):
                raise UsageError(
                    f'--data-dir: class folder {entry} holds no image; remove it from every split or fill it')


def _class_to_idx(source) -> dict[str, int] | None:
    """Return the classes of one of timm's readers (of tars by another name), or of a torchvision data set."""
    return getattr(source, 'class_to_idx', None) or getattr(source, 'class_name_to_idx', None)


def class_names(dataset) -> list[str] | None:
    """Return the names of a data set's classes in the order of their indices, None where it has no names."""
    class_to_idx = _class_to_idx(getattr(dataset, 'reader', dataset))
    return names_of(class_to_idx) if class_to_idx else None


def names_of(class_to_idx: dict[str, int]) -> list[str]:
    """Return the names of classes in the order of their indices."""
    names = [str(index) for index in range(max(class_to_idx.values()) + 1)]
    for name, index in reversed(class_to_idx.items()):  # a class map may give several names one index: the first
        names[index] = str(name)
    return names


def resolve_classes(args, dataset_train, dataset_eval) -> list[str] | None:
    """Set args.num_classes from the data where it was not given, and return the classes' names if they are known.

    Raises:
        UsageError: The splits have different classes, or the data does not have --num-classes.
    """
    names, eval_names = class_names(dataset_train), class_names(dataset_eval)
    if names and eval_names and names != eval_names:
        missing, extra = sorted(set(names) - set(eval_names))[:3], sorted(set(eval_names) - set(names))[:3]
        raise UsageError(
            f'--data-dir: {len(names)} classes in {args.train_split!r} and {len(eval_names)} in {args.val_split!r} '
            f'are not the same (only in the first: {missing}, only in the second: {extra}), so labels would disagree')
    if args.num_classes is None:
        if not names:
            raise UsageError('--num-classes: needed, the data set does not name its classes')
        args.num_classes = len(names)
    if names and len(names) > args.num_classes:
        raise UsageError(f'--num-classes {args.num_classes}: the data has {len(names)} classes')
    if names and len(names) < args.num_classes:
        _logger.warning(f'--num-classes {args.num_classes}: the data has only {len(names)} classes')
    return names


class Place(NamedTuple):
    """Where in a run a sample is drawn: what its augmentation is seeded with."""
    epoch: int
    position: int  # in the order of the epoch over all processes
    index: int  # in the data set


class SeededSampler(Sampler):
    """The order of an epoch, from (seed, epoch) alone: whole batches, dealt to the processes in turn.

    Global batch k holds the same samples for any number of processes. With `repeats` an image stands that many times
    in a row, its copies with different processes where there are several, and an epoch keeps its length (timm's
    RepeatAugSampler).

    Args:
        num_samples: Length of the data set.
        batch_size: Batch size of a process.
        seed: Seed of the run.
        rank: Rank of the process.
        world_size: Number of processes.
        repeats: Copies of each image, 0 or 1 for none, not necessarily whole.
    """

    def __init__(self, num_samples, batch_size, seed=0, rank=0, world_size=1, repeats=0.):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.num_batches = num_samples // (batch_size * world_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Draw the order of an epoch and choose its first batch."""
        self.epoch = epoch
        self.first_batch = first_batch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
        if self.repeats > 1:
            order = order[(np.arange(self.num_samples) / self.repeats).astype(np.int64)]
        self._indices = order[self.rank::self.world_size][:len(self)]

    def sample_ids(self, batch: int) -> torch.Tensor:
        """Return the data set indices (batch_size,) of this process's share of a batch."""
        return torch.from_numpy(self._indices[batch * self.batch_size:(batch + 1) * self.batch_size])

    def __len__(self):
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[Place]:
        for i in range(self.first_batch * self.batch_size, len(self)):
            yield Place(self.epoch, i * self.world_size + self.rank, int(self._indices[i]))


class SeededDataset(Dataset):
    """A map-style data set, read at a Place, whose transforms draw from generators seeded for that place."""

    def __init__(self, dataset, seed):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, place: Place):
        seed_all(self.seed, 'sample', place.epoch, place.position)
        return (*self.dataset[place.index][:2], place)

    def __len__(self):
        return len(self.dataset)


class SeededCollate:
    """A collate function that draws (mixup in the workers) from generators seeded for the batch's first place."""

    def __init__(self, collate, seed, mixup_off_epoch=0):
        self.collate = collate
        self.seed = seed
        self.mixup_off_epoch = mixup_off_epoch

    def __call__(self, batch):
        epoch, position, _ = batch[0][2]
        seed_all(self.seed, 'batch', epoch, position)
        if isinstance(self.collate, Mixup) and self.mixup_off_epoch:
            # Here, since a worker that persists never sees what the main process sets later.
            self.collate.mixup_enabled = epoch < self.mixup_off_epoch
        return self.collate([sample[:2] for sample in batch])


class TrainLoader:
    """Batches of an epoch, on the device, from timm's loader.

    Every draw (order, augmentation, mixup, erasing) is a function of the seed and its place in the run, not of a
    generator's state: independent of the number of workers, and the same when an epoch is entered at a later batch.
    Data sets that are streams keep their reader's own order.

    Args:
        loader: timm's training loader.
        args: Options of the run.
        device: Where batches go.
        mixup_fn: Mixup on the device, without a prefetcher.
    """

    def __init__(self, loader, args, device, mixup_fn=None):
        self.device = device
        self.mixup_fn = mixup_fn
        self.mixup_off_epoch = args.mixup_off_epoch
        self.seed, self.rank = args.seed, args.rank
        self.loader = loader
        self.sampler = None
        inner = loader.loader if isinstance(loader, PrefetchLoader) else loader
        if not isinstance(inner.dataset, IterableDataset):
            self.sampler = SeededSampler(
                len(inner.dataset),
                args.batch_size,
                seed=args.seed,
                rank=args.rank,
                world_size=args.world_size,
                repeats=args.aug_repeats,
            )
            inner = DataLoader(
                SeededDataset(inner.dataset, args.seed),
                batch_size=args.batch_size,
                sampler=self.sampler,
                collate_fn=SeededCollate(inner.collate_fn, args.seed, args.mixup_off_epoch),
                num_workers=inner.num_workers,
                pin_memory=inner.pin_memory,
                drop_last=True,
                persistent_workers=inner.num_workers > 0,
            )
            if isinstance(loader, PrefetchLoader):
                self.loader.loader = inner
            else:
                self.loader = inner
        self.dataset = inner.dataset
        self.erasing = getattr(self.loader, 'random_erasing', None)
        if self.erasing is not None:
            self.loader.random_erasing = self._erase
        self._place = (0, 0)

    def __len__(self):
        return len(self.loader)

    def _erase(self, input):
        epoch, batch = self._place
        self._place = (epoch, batch + 1)
        seed_all(self.seed, 'erase', epoch, batch, self.rank, device=self.device)
        return self.erasing(input)

    def epoch(self, epoch: int, first_batch: int = 0):
        """Yield (batch, input, target, sample_ids) from `first_batch` to the epoch's end.

        sample_ids (N,) is None unless images are repeated.
        """
        self._place = (epoch, first_batch)
        if self.sampler is not None:
            self.sampler.set_epoch(epoch, first_batch)
        elif hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)
        repeated = self.sampler is not None and self.sampler.repeats > 1
        for batch, (input, target) in enumerate(read(self.loader), start=first_batch):
            if not isinstance(self.loader, PrefetchLoader):
                input, target = input.to(self.device), target.to(self.device)
                if self.mixup_fn is not None:
                    self.mixup_fn.mixup_enabled = not self.mixup_off_epoch or epoch < self.mixup_off_epoch
                    seed_all(self.seed, 'batch', epoch, batch, self.rank)
                    input, target = self.mixup_fn(input, target)
            yield batch, input, target, self.sampler.sample_ids(batch).to(self.device) if repeated else None


def read(loader):
    """Yield a loader's batches; samples that can't be read end the run with one line.

    Raises:
        RunError: timm gave up after skipping several unreadable samples in a row.
    """
    try:
        yield from loader
    except RuntimeError as e:
        if 'consecutive samples' not in str(e):
            raise
        message = str(e).strip().splitlines()[-1].removeprefix('RuntimeError: ')
        raise RunError(f'data: {message}; the warnings above name them') from e


def create_train_loader(args, dataset, data_config: dict, device: torch.device) -> TrainLoader:
    """Create the training loader from timm's options.

    Raises:
        UsageError: An augmentation policy that timm does not know, or fewer images than a batch.
    """
    _guard_posterize()
    collate_fn = mixup_fn = None
    if mixup_active(args):
        mixup_args = {
            'mixup_alpha': args.mixup,
            'cutmix_alpha': args.cutmix,
            'cutmix_minmax': args.cutmix_minmax,
            'prob': args.mixup_prob,
            'switch_prob': args.mixup_switch_prob,
            'mode': args.mixup_mode,
            'label_smoothing': args.smoothing,
            'num_classes': args.num_classes,
        }
        if args.prefetcher:
            collate_fn = FastCollateMixup(**mixup_args)
        else:
            mixup_fn = Mixup(**mixup_args)
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config['interpolation']
    try:
        loader = create_loader(
            dataset,
            input_size=data_config['input_size'],
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            re_split=args.resplit,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob or 0.,
            gaussian_blur_prob=args.gaussian_blur_prob or 0.,
            auto_augment=args.aa,
            interpolation=interpolation,
            mean=data_config['mean'],
            std=data_config['std'],
            num_workers=args.workers,
            collate_fn=collate_fn,
            pin_memory=args.pin_mem,
            device=device,
            use_prefetcher=args.prefetcher,
        )
    except (AssertionError, KeyError, ValueError) as e:
        raise UsageError(f'--aa {args.aa}: not an augmentation policy of timm ({type(e).__name__} {e})') from e
    loader = TrainLoader(loader, args, device, mixup_fn=mixup_fn)
    if loader.sampler is not None and not len(loader):
        raise UsageError(
            f'--batch-size {args.batch_size}: {args.world_size} batch(es) of it are more than the '
            f'{loader.sampler.num_samples} training images')
    return loader


class PairEvalLoader:
    """Validation batches of branches that differ in how their images are prepared: ({side: images}, target).

    Args:
        loaders: timm's validation loader of each side, over the same images in the same order.
    """

    def __init__(self, loaders: dict[str, Any]):
        self.loaders = loaders
        first = next(iter(loaders.values()))
        self.dataset, self.sampler = first.dataset, first.sampler

    def __len__(self):
        return len(next(iter(self.loaders.values())))

    def __iter__(self):
        for batches in zip(*self.loaders.values(), strict=True):
            yield {side: images for side, (images, _) in zip(self.loaders, batches, strict=True)}, batches[0][1]


def create_eval_loaders(args, dataset, configs: dict[str, dict], device: torch.device):
    """Create the validation loader of a pair: timm's own where both branches' images are prepared alike."""
    first, *others = configs.values()
    if all(config == first for config in others):
        return create_eval_loader(args, dataset, first, device)
    # A loader gives its data set the transform, so each has its own.
    return PairEvalLoader({
        side: create_eval_loader(args, copy.copy(dataset), config, device) for side, config in configs.items()})


def create_eval_loader(args, dataset, data_config: dict, device: torch.device):
    """Create timm's validation loader: each image once, in order, dealt to the processes in turn."""
    return create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        distributed=args.distributed,
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        pin_memory=args.pin_mem,
        device=device,
        use_prefetcher=args.prefetcher,
    )


def _guard_posterize() -> None:
    """Let timm's posterize take 0 bits again, which Pillow 13 refuses: a black image, as before."""
    operations = timm.data.auto_augment.NAME_TO_OP
    for name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
        operations[name] = _posterize


def _posterize(img: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    if bits_to_keep >= 8:
        return img
    if bits_to_keep < 1:
        return Image.new(img.mode, img.size)
    return ImageOps.posterize(img, bits_to_keep)
