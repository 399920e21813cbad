"""The command `timm-vpl validate`: the accuracy of trained models."""
import csv
import json
import logging
import math
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.utils import setup_default_logging
from torch.utils.data import Dataset, IterableDataset, Subset

from ..data.data import (
    DIGITS,
    check_labels,
    class_names,
    create_eval_loader,
    create_split,
    data_errors,
    shared_images,
    skipped_images,
)
from ..engine.device import agreement, from_all, init_device
from ..engine.evaluate import PAD, evaluate
from ..engine.trained import TrainedModel, load_branches, load_trained
from ..errors import RunError, UsageError
from ..files import replacing
from ..text import one_line
from .card import VALIDATION

_logger = logging.getLogger('validate')

COLUMNS = (
    'model', 'epoch', 'branch', 'weights', 'data', 'set', 'images', 'loss', 'top1', 'top5', 'img_size', 'crop_pct',
    'interpolation', 'images_per_second')
CLASS_COLUMNS = ('model', 'branch', 'weights', 'class', 'images', 'top1')
_KEY = ('model', 'epoch', 'branch', 'weights', 'data', 'set', 'img_size', 'crop_pct', 'interpolation')
_IMAGENET_VAL = 50000  # images

_FOREIGN = -2  # in a set of labels: a class that the model does not have


# Classes: the data's labels as indices of a model's classes


def _wnids() -> list[str]:
    return ImageNetInfo().label_names()


def _model_classes(trained: TrainedModel) -> dict[str, int] | None:
    """Return a model's classes with their indices: those that it names, or ImageNet's if it has as many."""
    names = trained.class_names
    if names:
        by_index = names.items() if isinstance(names, dict) else enumerate(names)
        return {name: int(index) for index, name in by_index}
    subset = infer_imagenet_subset(trained.model)
    return {wnid: index for index, wnid in enumerate(ImageNetInfo(subset).label_names())} if subset else None


def target_indices(trained: TrainedModel, names: list[str] | None, data: str) -> list[int] | None:
    """Return a model's index of each class of a data set, by name; None where the data's own indices are the model's.

    Args:
        trained: The model.
        names: The data's classes in order of their indices, None if it does not name them.
        data: Name of the data set.

    Raises:
        UsageError: A class of the data is none of the model's, or neither names nor numbers tell.
    """
    num_classes = trained.model.num_classes
    if names is None:
        return None
    classes = _model_classes(trained)
    if not trained.class_names and not (classes and classes.keys() >= set(names)):
        if len(names) != num_classes:
            raise UsageError(
                f'{trained.source}: does not name its {num_classes} classes, and {data} has {len(names)}; --class-map '
                f'FILE says which is which')
        return None
    missing = [name for name in names if name not in classes]
    if missing:
        raise UsageError(
            f'{trained.source}: {len(missing)} of the {len(names)} classes of {data} are none of its {num_classes} '
            f'({", ".join(missing[:3])}); --class-map FILE says which is which')
    indices = [classes[name] for name in names]
    if indices == list(range(num_classes)):
        return None
    _logger.info(f'{data}: its {len(names)} classes are mapped by name to those of {trained.architecture}')
    return indices


def _imagenet_v2_names(names: list[str] | None, data: str) -> list[str]:
    """Return the wnid of each folder of ImageNet-V2, whose names are numbers of classes."""
    wnids = _wnids()
    for name in names or ['']:
        if not (name.isascii() and name.isdecimal() and int(name) < len(wnids)):
            raise UsageError(f'--imagenet-v2: {data} has a class {name!r}, which is not a number from 0 to 999')
    return [wnids[int(name)] for name in names]


# Images by file name


def _file_names(dataset: Dataset, flag: str) -> list[str]:
    """Return the path of each image in its data set."""
    if isinstance(dataset, FilePart):
        names = _file_names(dataset.dataset, flag)
        return [names[index] for index in dataset.indices]
    try:
        if hasattr(dataset, 'filenames') and not isinstance(dataset, IterableDataset):
            return [os.path.normpath(name) for name in dataset.filenames()]
        return [os.path.relpath(path, dataset.root) for path, _ in dataset.samples]  # torchvision's
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UsageError(f'{flag}: needs a folder or .tar of images, this data set does not name its files') from e


class FilePart(Subset):
    """Some images of a data set, whose transform is that of the whole."""

    @property
    def transform(self):
        """The transform of the images."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform):
        self.dataset.transform = transform


def select_files(dataset: Dataset, path: str, data: str) -> FilePart:
    """Return the part of a data set that a file lists, one file name a line, with or without its folder.

    Raises:
        UsageError: A name that the data does not have, or has in several folders.
    """
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(_file_names(dataset, '--file-list')):
        for key in {name, os.path.basename(name)}:
            indices.setdefault(key, []).append(index)
    try:
        with open(path, encoding='utf-8') as f:
            wanted = [os.path.normpath(line.strip()) for line in f if line.strip()]
    except (OSError, ValueError) as e:
        raise UsageError(f'--file-list {path}: can not be read ({e})') from e
    missing = [name for name in wanted if name not in indices]
    if missing or not wanted:
        what = f'{len(missing)} of its {len(wanted)} files are not in {data}, {missing[0]}' if missing else 'names none'
        raise UsageError(f'--file-list {path}: {what}')
    for name in wanted:
        if len(indices[name]) > 1:
            raise UsageError(f'--file-list {path}: {data} has {len(indices[name])} files {name}; write FOLDER/{name}')
    return FilePart(dataset, sorted({indices[name][0] for name in wanted}))


def real_label_sets(
        dataset: Dataset,
        path: str,
        trained: TrainedModel,
        names: list[str] | None = None,
) -> torch.Tensor:
    """Return the ReaL labels (https://arxiv.org/abs/2006.07159) of ImageNet validation images, found by file name.

    Args:
        dataset: The images, or some of them.
        path: JSON file of the labels of all 50,000 images, '' for those that timm has.
        trained: The model whose class indices to return.
        names: Classes of the data in order of the model's indices, for a model that does not name its own.

    Returns:
        Sets of labels [images, labels], padded with -1.

    Raises:
        UsageError: An image that is none of the 50,000, a file of something else, or classes that are not ImageNet's.
    """
    wnids, classes = _wnids(), _model_classes(trained)
    if not classes and names and len(names) == trained.model.num_classes:
        classes = {name: index for index, name in enumerate(names)}
    if not classes or not classes.keys() & set(wnids):
        raise UsageError(f"--real-labels: {trained.source} does not name its classes by ImageNet's wnids "
                         f"(n01440764, ...), so that it is not known which of them are meant")
    images = [f'ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, _IMAGENET_VAL + 1)]  # timm insists on all of them
    files = [os.path.basename(name) for name in _file_names(dataset, '--real-labels')]
    try:
        labels = RealLabelsImagenet(images, real_json=path or None).real_labels
        sets = {
            image: [classes.get(wnids[label], _FOREIGN) for label in labels[image] if label >= 0] for image in images}
    except (AssertionError, IndexError, OSError, TypeError, ValueError) as e:
        raise UsageError(f'--real-labels {path}: not a JSON list of the labels of {_IMAGENET_VAL} images '
                         f'({str(e) or "another number of them"})') from e
    missing = [name for name in files if name not in sets]
    if missing:
        raise UsageError(f"--real-labels: {len(missing)} of {len(files)} images are none of ImageNet's validation set, "
                         f"{missing[0]}")
    width = max([1, *(len(sets[name]) for name in files)])
    return torch.tensor([sets[name] + [PAD] * (width - len(sets[name])) for name in files])


# The command


class Pass(NamedTuple):
    """Models that share one pass over the data, and the data as they need it."""
    models: list[TrainedModel]
    loader: Any
    data: str
    real_labels: torch.Tensor | None
    class_names: list[str]


def validate(args) -> list[dict[str, Any]]:
    """Validate as the options of `timm-vpl validate` say; print the results, write them, and return them.

    Raises:
        UsageError: The options, the model and the data do not go together.
        RunError: Something can't be read or written.
    """
    if not logging.getLogger().handlers:
        setup_default_logging()
    device = init_device(args)
    if args.rank:
        logging.getLogger().setLevel(logging.ERROR)
    try:
        with agreement(args):
            models = [_prepare(trained, args) for trained in load_all(args.model)]
            passes = [
                _create_pass(args, list(group), device)
                for _, group in groupby(models, key=lambda trained: (trained.data_config, trained.class_names))]
            if args.check_data:
                held_out = passes[0].loader.dataset
                trained_on = create_split(
                    Namespace(**vars(args), seed=0), args.check_data, is_training=False, flag='--check-data')
                names = [_file_names(each, '--check-data') for each in (held_out, trained_on)]
        rows, classes = [], []
        with data_errors():
            for each in passes:
                pass_rows, pass_classes = _run_pass(args, each, device)
                rows += pass_rows
                classes += pass_classes
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()
    if args.rank == 0:
        print('\n'.join([*_table(rows, models), *_class_lines(classes)]))
        write_results(args, rows)
        if args.per_class:
            _write(args.per_class, CLASS_COLUMNS, classes)
        if args.check_data:
            shared = shared_images(held_out, trained_on)
            print(f'{passes[0].data}: {len({index for index, _ in shared})} of {len(held_out)} images lie in the split '
                  f'{args.check_data!r} too')
            for index, twin in shared:
                print(one_line(f'{names[0][index]} is {args.check_data}/{names[1][twin]}'))
    return rows


def load_all(source: str) -> list[TrainedModel]:
    """Load what a source names; a branch of a pair twice, with raw and averaged weights, where it has both."""
    models = []
    for trained in load_trained(source, ema=False):
        models.append(trained)
        if trained.ema is not None:
            models += load_branches(source, trained.side, ema=True)
    return models


def _prepare(trained: TrainedModel, args) -> TrainedModel:
    """Return a model with the data configuration that it has under the options, and resized for it if need be."""
    model, own = trained.model, trained.data_config
    if model.num_classes < 1:
        raise UsageError(f'{trained.source}: {trained.architecture} has no classifier')
    height, width = (args.img_size,) * 2 if args.img_size else own['input_size'][-2:]
    size = tuple(args.input_size or (args.in_chans or own['input_size'][0], height, width))
    for name in ('mean', 'std'):
        values = getattr(args, name)
        if values and len(values) not in (1, size[0]):
            raise UsageError(f'--{name}: {len(values)} values, the images of {trained.architecture} have {size[0]} '
                             f'channels')
    given = {name: getattr(args, name) for name in ('crop_pct', 'mean', 'std', 'interpolation')}
    config = resolve_data_config({**given, 'input_size': size}, pretrained_cfg=own)
    for name in ('mean', 'std'):
        config[name] = tuple(adapt_to_chs(config[name], size[0]))
    try:
        if size[1:] != tuple(own['input_size'][-2:]) and hasattr(model, 'set_input_size'):
            model.set_input_size(img_size=size[1:])
        with torch.inference_mode():
            model(torch.zeros(1, *size))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as e:
        raise UsageError(f'{trained.source}: {trained.architecture} can not take images of size {size}: '
                         f'{(str(e).strip() or type(e).__name__).splitlines()[0]}') from e
    return trained._replace(data_config=config)


def _create_pass(args, models: list[TrainedModel], device: torch.device) -> Pass:
    """Create what one pass over the data needs, for models of the same data configuration and classes."""
    trained = models[0]
    args = Namespace(**{
        **vars(args), 'input_size': trained.data_config['input_size'], 'seed': 0, 'validation_batch_size': None})
    dataset = create_split(args, args.val_split, is_training=False, whole=args.val_split == 'validation')
    data = _data_name(args, dataset)
    names = class_names(dataset)
    if args.class_map and names:  # has the model's indices
        if len(names) > trained.model.num_classes:
            raise UsageError(f'--class-map {args.class_map}: has the index {len(names) - 1}, {trained.source} has only '
                             f'{trained.model.num_classes} classes')
    else:
        if args.imagenet_v2:
            names = _imagenet_v2_names(names, data)
        indices = target_indices(trained, names, data)
        if indices is not None:
            dataset.target_transform = indices.__getitem__
    check_labels(dataset, trained.model.num_classes)
    if args.file_list:
        dataset = select_files(dataset, args.file_list, data)
        data = f'{data} ({os.path.basename(args.file_list)})'
    real_labels = None if args.real_labels is None else real_label_sets(dataset, args.real_labels, trained, names)
    loader = create_eval_loader(args, dataset, trained.data_config, device)
    shown = trained.class_names or names or []
    return Pass(models, loader, data, real_labels, list(shown))


def _data_name(args, dataset) -> str:
    """Return what the images are called in the results: their folder, or data set and split."""
    root = getattr(getattr(dataset, 'reader', dataset), 'root', None)
    if args.dataset and (args.dataset == DIGITS or not isinstance(root, (str, os.PathLike))):
        return f'{args.dataset}/{args.val_split}'
    return os.path.normpath(root)


def _run_pass(args, each: Pass, device: torch.device) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Evaluate the models of a pass and return their rows of the results, and of the results by class."""
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    dtype = torch.float16 if args.amp_dtype == 'float16' else torch.bfloat16
    models = [trained.model.to(device, memory_format=memory_format) for trained in each.models]

    def forward(input):
        input = input.contiguous(memory_format=memory_format)
        return {i: model(input) for i, model in enumerate(models)}

    started = time.perf_counter()
    results = evaluate(
        forward,
        range(len(models)),
        each.loader,
        device,
        autocast=partial(torch.autocast, device.type, dtype=dtype) if args.amp else nullcontext,
        distributed=args.distributed,
        real_labels=each.real_labels,
        per_class=None if args.per_class is None else models[0].num_classes,
    )
    seconds = time.perf_counter() - started
    skipped = sum(from_all(args, skipped_images(each.loader)))
    if skipped and args.rank == 0:
        _logger.warning(f'{each.data}: {skipped} images could not be read; others took their places, and their ReaL '
                        f'labels' if args.real_labels is not None else f'{each.data}: {skipped} images could not be '
                        f'read, others took their places')
    rows, classes = [], []
    for i, trained in enumerate(each.models):
        config, figures = trained.data_config, results[i]
        if not math.isfinite(figures['loss']):
            figures = {'images': figures['images']}
            if args.rank == 0:
                _logger.warning(f'{trained.source}: {trained.label}: the loss is not finite, so there is no figure')
        height, width = config['input_size'][-2:]
        subsets = ['v2' if args.imagenet_v2 else args.val_split, *(['real'] if args.real_labels is not None else [])]
        for subset in subsets:
            prefix = 'real_' if subset == 'real' else ''
            rows.append({
                'model': trained.source,
                'epoch': trained.checkpoint.get('epoch'),
                'branch': trained.side,
                'weights': trained.side and ('ema' if trained.ema else 'raw'),
                'data': each.data,
                'set': subset,
                **{metric: figures.get(f'{prefix}{metric}') for metric in ('images', 'loss', 'top1', 'top5')},
                'img_size': height if height == width else f'{height}x{width}',
                'crop_pct': config['crop_pct'],
                'interpolation': config['interpolation'],
                'images_per_second': round(figures['images'] / seconds, 2),
            })
        for index, (images, right) in enumerate(figures['classes'].tolist() if 'classes' in figures else ()):
            if images:
                classes.append({
                    **{column: rows[-1][column] for column in ('model', 'branch', 'weights')},
                    'class': each.class_names[index] if index < len(each.class_names) else str(index),
                    'images': images,
                    'top1': 100 * right / images,
                })
    return rows, classes


# Results


def _class_lines(classes) -> list[str]:
    """Return a line for each model: the mean of its classes' accuracies, and the lowest of them."""
    lines = []
    for (model, branch, weights), group in groupby(
            classes, key=lambda row: (row['model'], row['branch'], row['weights'])):
        group = sorted(group, key=lambda row: row['top1'])
        mean = sum(row['top1'] for row in group) / len(group)
        lowest = ', '.join(f'{row["class"]} {row["top1"]:.1f} ({row["images"]})' for row in group[:5])
        name = ' '.join(part for part in (model, branch, weights) if part)
        lines.append(f'{name}: mean top-1 of {len(group)} classes {mean:.3f}, lowest: {lowest}')
    return lines


def _table(rows, models) -> list[str]:
    """Return the lines of the table on the screen."""
    architectures = {(trained.source, trained.side): trained.architecture for trained in models}
    lines = [('model', 'branch', 'weights', 'epoch', 'set', 'images', 'top-1', 'top-5', 'loss', 'images/s', 'size')]
    for row in rows:
        lines.append((
            architectures[row['model'], row['branch']],
            *('-' if row[column] is None else str(row[column])
              for column in ('branch', 'weights', 'epoch', 'set', 'images')),
            *('-' if row[column] is None else f'{row[column]:.3f}' for column in ('top1', 'top5', 'loss')),
            f'{row["images_per_second"]:.1f}',
            str(row['img_size']),
        ))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        '  '.join(cell.ljust(width) if i < 5 else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines]


def write_results(args, rows: list[dict[str, Any]]) -> None:
    """Write the results to --results-file, or else add them to those in the folder of the run, if it is one.

    Raises:
        RunError: The file can't be written, or is none of this command.
    """
    path = args.results_file
    if not path:
        folder = args.model if os.path.isdir(args.model) else os.path.dirname(args.model)
        if not (os.path.exists(args.model) and os.path.isfile(os.path.join(folder, 'args.yaml'))):
            return
        path = os.path.join(folder, VALIDATION)
        rows = [{**row, 'model': os.path.basename(row['model'])} for row in rows]
        rows = _other_rows(path, rows) + rows
    _write(path, COLUMNS, rows)
    _logger.info(f'Results: {path}')


def _write(path: str, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV, or as JSON to a file of that name; a file that is there stays until the new one is whole."""
    try:
        with replacing(path, newline='', encoding='utf-8') as f:
            if path.lower().endswith('.json'):
                json.dump(rows, f, indent=2)
                f.write('\n')
            else:
                writer = csv.DictWriter(f, columns)
                writer.writeheader()
                writer.writerows(rows)
    except OSError as e:
        raise RunError(f'{path}: can not be written: {e.strerror}') from e


def _other_rows(path, rows) -> list[dict[str, str]]:
    """Return the rows of a file of results that none of the new ones replaces."""
    if not os.path.exists(path):
        return []
    try:
        with open(path, newline='', encoding='utf-8') as f:
            reader = csv.DictReader(f)
            old = list(reader)
    except (OSError, ValueError, csv.Error) as e:
        raise RunError(f'{path}: can not be read ({e})') from e
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise RunError(f'{path}: is not a file of results of this command; move it away, or give --results-file')
    new = {tuple('' if row[column] is None else str(row[column]) for column in _KEY) for row in rows}
    return [row for row in old if tuple(row[column] for column in _KEY) not in new]
