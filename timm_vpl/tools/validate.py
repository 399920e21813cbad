"""The command `timm-vpl validate`: the accuracy of trained models."""
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset, resolve_data_config
from timm.data.loader import adapt_to_chs

from ..bars import bar, set_output
from ..core.processes import Processes
from ..data.images import Images, Split, StreamImages
from ..data.loaders import create_eval_loader
from ..data.splits import class_names, create_split, shared_images
from ..engine import peers
from ..engine.device import from_all, init_device
from ..engine.evaluate import PAD, evaluate
from ..engine.models import try_images
from ..engine.trained import TrainedModel, load_branches, load_trained
from ..errors import UsageError
from ..options.commands import Evaluation, Forward, Validate
from ..options.sections import Loader
from ..text import one_line
from .runs import COLUMNS, VALIDATION
from .tables import read_csv, screen_table, write_rows

_logger = logging.getLogger('validate')

CLASS_COLUMNS = ('model', 'branch', 'weights', 'class', 'images', 'top1')
_KEY = ('model', 'epoch', 'branch', 'weights', 'data', 'set', 'img_size', 'crop_pct', 'interpolation')
_IMAGENET_VAL = 50000  # images
_FOREIGN = -2  # in a set of labels: a class that the model does not have


Row = dict[str, Any]  # of the results, by column


# Classes: the data's labels as indices of a model's classes


def model_classes(trained: TrainedModel) -> dict[str, int]:
    """Return a model's classes with their indices: those that it names, else those of ImageNet if it has as many."""
    names = trained.class_names
    if names:
        by_index = names.items() if isinstance(names, dict) else enumerate(names)
        return {name: int(index) for index, name in by_index}
    subset = infer_imagenet_subset(trained.model)
    return {wnid: index for index, wnid in enumerate(ImageNetInfo(subset).label_names())} if subset else {}


def target_indices(trained: TrainedModel, names: list[str] | None, data: str) -> list[int] | None:
    """Return a model's index of each class of a data set, by name; None where the data's own indices are the model's.

    Args:
        trained: The model.
        names: The data's classes in order of their indices, None if it does not name them.
        data: Name of the data set.

    Raises:
        UsageError: A class of the data is not one of the model's, or neither names nor numbers decide.
    """
    classes, count = model_classes(trained), trained.model.num_classes
    missing = [name for name in names or () if name not in classes]
    if names is None or (missing and not trained.class_names and len(names) == count):
        return None
    if missing:
        what = (f'{len(missing)} of the {len(names)} classes of {data} are not among its {count} '
                f'({", ".join(missing[:3])});' if trained.class_names else
                f'does not name its {count} classes, and {data} has {len(names)};')
        raise UsageError(f'{trained.source}: {what} --class-map FILE says which is which')
    indices = [classes[name] for name in names]
    if indices == list(range(count)):
        return None
    _logger.info(f'{data}: its {len(names)} classes are mapped by name to those of {trained.architecture}')
    return indices


def _imagenet_v2_names(names: list[str], data: str) -> list[str]:
    """Return the wnid of each folder of ImageNet-V2, whose names are class numbers."""
    wnids = ImageNetInfo().label_names()
    for name in names:
        if not (name.isascii() and name.isdecimal() and int(name) < len(wnids)):
            raise UsageError(f'--imagenet-v2: {data} has a class {name!r}, which is not a number from 0 to 999')
    return [wnids[int(name)] for name in names]


# Images by file name


def _file_names(dataset: Split, flag: str) -> list[str]:
    """Return the path of each image in its data set."""
    with suppress(KeyError, TypeError):  # None for a name
        if not isinstance(dataset, StreamImages):
            return [os.path.normpath(name) for name in dataset.reader.filenames()]
    raise UsageError(f'{flag}: needs a folder or .tar of images, since this data set does not name its files')


def real_label_sets(dataset: Images, path: str, trained: TrainedModel, names: list[str] | None = None) -> torch.Tensor:
    """Return the ReaL labels (https://arxiv.org/abs/2006.07159) of ImageNet validation images, found by file name.

    Args:
        dataset: The images, or some of them.
        path: JSON file of the labels of all 50,000 images, '' for timm's.
        trained: The model whose class indices to return.
        names: Classes of the data in order of the model's indices, for a model that does not name its own.

    Returns:
        Sets of labels [images, labels], padded with -1.

    Raises:
        UsageError: An image that is not one of the 50,000, an invalid file, or classes that are not ImageNet's.
    """
    wnids, classes = ImageNetInfo().label_names(), model_classes(trained)
    if not classes and names and len(names) == trained.model.num_classes:
        classes = {name: index for index, name in enumerate(names)}
    if not classes or not classes.keys() & set(wnids):
        raise UsageError(f"--real-labels: {trained.source} does not name its classes by ImageNet's wnids "
                         f"(n01440764, ...), so its classes cannot be matched")
    images = [f'ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, _IMAGENET_VAL + 1)]  # timm requires all of them
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
        raise UsageError(f"--real-labels: {len(missing)} of {len(files)} images are not in ImageNet's validation set, "
                         f"{missing[0]}")
    width = max([1, *(len(sets[name]) for name in files)])
    return torch.tensor([sets[name] + [PAD] * (width - len(sets[name])) for name in files])


# The command


class Data(NamedTuple):
    """A split with a model's labels for its classes."""
    images: Any
    name: str
    classes: list[str] | None  # in the order of their indices in the data
    class_names: dict[int, str]  # by the index that the model has


class Pass(NamedTuple):
    """Models that share one pass over the data, and the data for them."""
    models: list[TrainedModel]
    loader: Any
    data: Data
    real_labels: torch.Tensor | None


@peers.together()
def validate_models(options: Validate) -> list[Row]:
    """Validate by the options of `timm-vpl validate`; print, write and return the results.

    Raises:
        UsageError: The options, the model and the data do not fit together.
        RunError: Something can't be read or written.
    """
    set_output(options.quiet, options.no_progress)
    processes = init_device(options.device, options.workers)
    set_output(options.quiet, options.no_progress, processes.rank == 0)
    models = [prepare(trained, options) for trained in load_all(options.model)]
    passes = [
        _create_pass(options, list(group), processes)
        for _, group in groupby(models, key=lambda trained: (trained.data_config, trained.class_names))]
    if options.check_data:
        trained_on = create_split(options, options.check_data, options.in_chans or 3, flag='--check-data')
        splits: Any = passes[0].loader.dataset, trained_on
        files = [_file_names(dataset, '--check-data') for dataset in splits]
    results = [result for each in passes for result in _run_pass(options, each, processes)]
    rows = [row for of_model, _ in results for row in of_model]
    if processes.rank == 0:
        print('\n'.join(_table(rows)))
        for classes in (classes for _, classes in results if classes):
            names = (classes[0][column] for column in ('model', 'branch', 'weights'))
            print(class_line(' '.join(filter(None, names)), classes))
        write_results(options, rows)
        if options.per_class:
            write_rows(options.per_class, CLASS_COLUMNS, [row for _, classes in results for row in classes])
        if options.check_data:
            shared = shared_images(*splits)
            count = len({index for index, _ in shared})
            split = options.check_data
            print(f'{passes[0].data.name}: {count} of {len(splits[0])} images are also in the split {split!r}')
            for index, twin in shared:
                print(one_line(f'{files[0][index]} is {split}/{files[1][twin]}'))
    return rows


def load_all(source: str) -> list[TrainedModel]:
    """Load what a source names; a branch of a pair twice, with raw and averaged weights, where it has both."""
    models = []
    for trained in load_trained(source, ema=False):
        models.append(trained)
        if trained.ema is not None:
            models += load_branches(source, trained.side, ema=True)
    return models


def prepare(trained: TrainedModel, options: Forward) -> TrainedModel:
    """Return a model with the data configuration that it has under the options, and resized for it if need be.

    Without options it is that of timm's validate script: test images may be larger than training images.
    """
    model, built_for = trained.model, trained.data_config['input_size']
    if model.num_classes < 1:
        raise UsageError(f'{trained.source}: {trained.architecture} has no classifier')
    own = resolve_data_config({}, model=model, use_test_size=True)
    sides = (options.img_size,) * 2 if options.img_size else own['input_size'][1:]
    size = tuple(options.input_size or (options.in_chans or own['input_size'][0], *sides))
    for name in ('mean', 'std'):
        values = getattr(options, name)
        if values and len(values) not in (1, size[0]):
            raise UsageError(f'--{name}: {len(values)} values, but the images of {trained.architecture} have {size[0]} '
                             f'channels')
    given = {name: getattr(options, name) for name in ('crop_pct', 'mean', 'std', 'interpolation')}
    config = resolve_data_config({**given, 'input_size': size}, pretrained_cfg=own)
    for name in ('mean', 'std'):
        config[name] = tuple(adapt_to_chs(config[name], size[0]))

    def forward(images):
        if size[1:] != tuple(built_for[-2:]) and hasattr(model, 'set_input_size'):
            model.set_input_size(img_size=size[1:])
        return model(images)

    try_images(forward, size, f'{trained.source}: {trained.architecture}')
    return trained._replace(data_config=config)


def open_data(options: Evaluation, trained: TrainedModel) -> Data:
    """Open the split that the options name.

    Args:
        options: Options.
        trained: The model whose labels the images get.

    Raises:
        UsageError: The data can't be read as asked, or its classes are not the model's.
    """
    dataset: Any = create_split(
        options, options.val_split, trained.data_config['input_size'][0], options.batch_size,
        whole=options.val_split == 'validation')
    root = getattr(dataset.reader, 'root', None)
    data = os.path.normpath(root) if root else f'{options.dataset}/{options.val_split}'
    names, indices = class_names(dataset), None
    if not (options.class_map and names):  # whose indices are the model's
        if options.imagenet_v2:
            names = _imagenet_v2_names(names or [''], data)
        indices = target_indices(trained, names, data)
        if indices is not None:
            dataset.label_map = indices.__getitem__
    dataset.num_classes = trained.model.num_classes
    own = dict(enumerate(names or ()))
    if trained.class_names or indices is not None or not own:
        own = {index: name for name, index in model_classes(trained).items()}
    return Data(dataset, data, names, own)


def loader_options(options: Forward) -> Loader:
    """Return the options of the loader."""
    return Loader(options.batch_size, workers=options.workers, pin_mem=options.pin_mem)


def _create_pass(options: Validate, models: list[TrainedModel], processes: Processes) -> Pass:
    """Create what one pass over the data needs, for models of the same data configuration and classes."""
    data = open_data(options, models[0])
    real_labels = None if options.real_labels is None else real_label_sets(
        data.images, options.real_labels, models[0], data.classes)
    loader = create_eval_loader(loader_options(options), data.images, models[0].data_config, processes)
    return Pass(models, loader, data, real_labels)


def create_forward(options: Forward, models: dict[Any, TrainedModel], device: Any) -> tuple[Callable, Callable]:
    """Return a forward pass, which gives the logits of each model by name, and its autocast, by the options.

    Args:
        options: Options.
        models: The models by name; they are moved.
        device: Where the batches are: images [N, C, H, W], or those of each name.
    """
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    dtype = torch.float16 if options.amp_dtype == 'float16' else torch.bfloat16
    moved = {name: trained.model.to(device, memory_format=memory_format) for name, trained in models.items()}

    def forward(input):
        images = input if isinstance(input, dict) else dict.fromkeys(moved, input)
        return {name: model(images[name].contiguous(memory_format=memory_format)) for name, model in moved.items()}

    return forward, partial(torch.autocast, device.type, dtype=dtype) if options.amp else nullcontext


def _run_pass(options: Validate, each: Pass, processes: Processes) -> list[tuple[list[Row], list[Row]]]:
    """Evaluate the models of a pass; return the rows of results of each, and its results by class."""
    forward, autocast = create_forward(options, dict(enumerate(each.models)), processes.device)
    per_class = None if options.per_class is None else each.models[0].model.num_classes
    started = time.perf_counter()
    with bar('Validate', 'batches', len(each.loader)) as shown:
        results = evaluate(
            forward, range(len(each.models)), each.loader, processes.device, autocast, processes.distributed,
            each.real_labels, per_class, after_batch=shown.update)
    seconds = time.perf_counter() - started
    warn_of_replaced(
        each.data.name, sum(from_all(processes, int(each.data.images.replaced.sum()))), each.real_labels is not None)
    return [_rows(options, each, trained, results[i], seconds) for i, trained in enumerate(each.models)]


def warn_of_replaced(data: str, number: int, real_labels: bool = False) -> None:
    """Warn where images of the data were replaced."""
    if number:
        _logger.warning(f'{data}: {number} images could not be read; others replaced them'
                        f'{", and their ReaL labels" if real_labels else ""}')


def _rows(
        options: Validate, each: Pass, trained: TrainedModel, figures: Row, seconds: float,
) -> tuple[list[Row], list[Row]]:
    """Return the rows of the results of a model, one for each set of labels, and those of its classes."""
    if not math.isfinite(figures['loss']):
        figures = {'images': figures['images']}
        _logger.warning(f'{trained.source}: {trained.label}: the loss is not finite, so there are no figures')
    config = trained.data_config
    height, width = config['input_size'][-2:]
    model = {
        'model': trained.source, 'architecture': trained.architecture, 'epoch': trained.checkpoint.get('epoch'),
        'branch': trained.side, 'weights': trained.side and ('ema' if trained.ema else 'raw'), 'data': each.data.name,
        'img_size': height if height == width else f'{height}x{width}', 'crop_pct': config['crop_pct'],
        'interpolation': config['interpolation'], 'images_per_second': round(figures['images'] / seconds, 2)}
    sets = {'v2' if options.imagenet_v2 else options.val_split: ''}
    if each.real_labels is not None:
        sets['real'] = 'real_'
    rows = [
        {**model, 'set': name, **{
            metric: figures.get(f'{prefix}{metric}') for metric in ('images', 'loss', 'top1', 'top5')}}
        for name, prefix in sets.items()]
    classes = [
        {**model, 'class': each.data.class_names.get(index, str(index)), 'images': images, 'top1': 100 * right / images}
        for index, (images, right) in enumerate(figures['classes'].tolist() if 'classes' in figures else ()) if images]
    return rows, classes


# Results


def class_line(name: str, classes: list[Row]) -> str:
    """Return a line for a model: the mean of its classes' accuracies, and the lowest of them."""
    rows = sorted(classes, key=lambda row: row['top1'])
    mean = sum(row['top1'] for row in rows) / len(rows)
    lowest = ', '.join(f'{row["class"]} {row["top1"]:.1f} ({row["images"]})' for row in rows[:5])
    return one_line(f'{name}: mean top-1 of {len(rows)} classes {mean:.3f}, lowest: {lowest}')


def _table(rows: list[Row]) -> list[str]:
    """Return the lines of the table on the screen."""
    return screen_table(
        ('model', 'branch', 'weights', 'epoch', 'set', 'images', 'top-1', 'top-5', 'loss', 'images/s', 'size'),
        [(*(row[column] for column in ('architecture', 'branch', 'weights', 'epoch', 'set', 'images')),
          *(row[column] if row[column] is None else f'{row[column]:.3f}' for column in ('top1', 'top5', 'loss')),
          f'{row["images_per_second"]:.1f}', row['img_size']) for row in rows])


def write_results(options: Validate, rows: list[Row]) -> None:
    """Write the results to --results-file, or else append them to those in the folder of a run.

    Raises:
        RunError: The file can't be written, or is not a results file.
    """
    path = options.results_file
    if not path:
        folder = options.model if os.path.isdir(options.model) else os.path.dirname(options.model)
        if not (os.path.exists(options.model) and os.path.isfile(os.path.join(folder, 'args.yaml'))):
            return
        path = os.path.join(folder, VALIDATION)
        rows = [{**row, 'model': os.path.basename(row['model'])} for row in rows]
        new = {tuple('' if row[column] is None else str(row[column]) for column in _KEY) for row in rows}
        rows = [row for row in read_csv(path, COLUMNS) if tuple(row[column] for column in _KEY) not in new] + rows
    write_rows(path, COLUMNS, rows)
    _logger.info(f'Results: {path}')
