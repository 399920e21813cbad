"""The command `timm-vpl predict`: classification of images with trained models."""
import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from ..bars import bar
from ..data.folders import find_images
from ..data.images import LoneImages
from ..data.loaders import create_eval_loaders
from ..data.sources import SOURCES, FolderReader
from ..data.splits import image_mode
from ..engine.evaluate import outputs_of
from ..engine.trained import TrainedModel
from ..errors import RunError
from ..options.commands import Predict
from ..text import one_line
from .tables import screen_table, write_rows
from .together import forward_together, load_sides, start_alone
from .validate import loader_options, model_classes

Row = dict[str, Any]  # of an image and a rank: the label and the probability of each output


def predict_images(options: Predict) -> int:
    """Predict by the options of `timm-vpl predict`; print or write the results.

    Returns:
        The exit status: 1 where an image could not be read.

    Raises:
        UsageError: The options, the models and the images do not fit together.
        RunError: Something can't be read or written, or an output is NaN.
    """
    processes = start_alone(options)
    paths = [path for each in options.images for path in find_images(each, 'IMAGE')]
    models = load_sides(options, options.models)
    first, outputs = next(iter(models.values())), outputs_of(tuple(models))
    configs = {side: trained.data_config for side, trained in models.items()}
    images = LoneImages(
        FolderReader('', [(path, 0) for path in paths], {}), SOURCES[''],
        image_mode(options.input_img_mode, first.data_config['input_size'][0]))
    loader = create_eval_loaders(loader_options(options), images, configs, processes)
    names = {index: name for name, index in model_classes(first).items()}
    forward, autocast = forward_together(options, models, processes.device, names)

    as_csv = bool(options.results_file) or any(map(os.path.isdir, options.images))
    topk = min(options.topk or (1 if as_csv else 5), first.model.num_classes)
    parts = [f'{part}_{name}' if name else part for name in outputs for part in ('label', 'prob')]
    columns = ['file', *(['rank'] if topk > 1 else []), *parts]
    screen = csv.DictWriter(sys.stdout, columns, extrasaction='ignore', lineterminator='\n')
    if not options.results_file:
        named = (f'{side}: {trained.label}' if side else trained.label for side, trained in models.items())
        print(','.join(columns) if as_csv else '\n'.join(named))
    results: list[Row] = []
    labels = _labels(first, names)
    for index, rows in enumerate(_predict(forward, autocast, loader, topk, labels, parts)):
        rows = [{'file': paths[index], 'rank': rank, **row} for rank, row in enumerate(rows, start=1)]
        if images.replaced[index]:
            print(one_line(f'{paths[index]}: cannot be read ({images.failure(index)})'), file=sys.stderr)
        elif options.results_file:
            results += rows
        elif as_csv:
            screen.writerows({key: one_line(value) for key, value in row.items()} for row in rows)
        else:
            cells = [[one_line(cell, 40) if isinstance(cell, str) else f'{cell:.3f}' for cell in (
                row[part] for part in parts)] for row in rows]
            print('\n'.join(['', one_line(paths[index]), *screen_table(parts, cells)]))
    if options.results_file:
        write_rows(options.results_file, columns, results)
    return int(bool(images.replaced.any()))


def _labels(trained: TrainedModel, names: dict[int, str]) -> list[str]:
    """Return the name of each class of a model, for ImageNet's wnids their descriptions."""
    known: Any = ImageNetInfo(infer_imagenet_subset(trained.model) or 'imagenet-1k').label_descriptions(as_dict=True)
    labels = [names.get(index, str(index)) for index in range(trained.model.num_classes)]
    return [known.get(label, label) for label in labels]


@torch.inference_mode()
def _predict(
        forward: Callable, autocast: Callable, loader: Any, topk: int, labels: Sequence[str], parts: Sequence[str],
) -> Iterator[list[Row]]:
    """Yield the rows of each image, the most probable class first, and draw a bar."""
    with bar('Predict', 'batches', len(loader)) as shown:
        for input, _ in loader:
            with autocast():
                top = {name: logits.softmax(dim=-1).topk(topk) for name, logits in forward(input).items()}
            columns: list[list[list]] = []
            for name, (probabilities, indices) in top.items():
                if not probabilities.isfinite().all():
                    raise RunError(f'the outputs of branch {name or "the model"} are NaN')
                columns.append([[labels[index] for index in row] for row in indices.tolist()])
                columns.append([[round(value, 6) for value in row] for row in probabilities.tolist()])
            for of_image in zip(*columns, strict=True):
                yield [dict(zip(parts, ranked, strict=True)) for ranked in zip(*of_image, strict=True)]
            shown.update()
