"""The command `timm-vpl inspect`: two models, or the branches of a pair, on the same images."""
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import to_pil_image

from ..bars import bar
from ..core.names import SIDES
from ..data.images import StreamImages
from ..data.loaders import create_eval_loaders
from ..engine.evaluate import evaluate, outputs_of
from ..engine.models import loader_config
from ..errors import RunError, UsageError
from ..files import writing
from ..options.commands import Inspect
from ..text import html, one_line
from .page import make_page
from .tables import Part, screen_page, write_rows
from .together import forward_together, load_sides, start_alone
from .validate import Row, class_line, loader_options, open_data, warn_of_replaced

_logger = logging.getLogger('inspect')
CLASS_COLUMNS = ('class', 'images', 'top1_a', 'top1_b', 'difference', 'top1_ens')
SHOWN = 10  # classes on the screen, and confusions
TILE, LINE, GAP = 160, 16, 8  # pixels of the contact sheet: side of an image, height of a line of text, between images
Tile = tuple[Image.Image, list[str]]  # an image and the lines below it


def calibration_error(confidence: torch.Tensor, right: torch.Tensor, bins: int = 15) -> float:
    """Return the expected calibration error, in percent.

    ECE = sum over m of |B_m| / n * |acc(B_m) - conf(B_m)|, where B_m are the images whose confidence lies in
    ((m - 1) / M, m / M]: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3 (M = 15).

    Args:
        confidence: Probability of each prediction (n,).
        right: Whether it is right (n,).
        bins: M.
    """
    bin = torch.bucketize(confidence.double(), torch.arange(1, bins, dtype=torch.float64) / bins)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin, right.double() - confidence.double())
    return 100 * gaps.abs().sum().item() / len(confidence)


def confusions(target: torch.Tensor, predicted: torch.Tensor) -> list[tuple[int, int, int]]:
    """Return (class, predicted class, images) of wrong predictions, the most frequent first."""
    wrong = predicted != target
    counts = Counter(zip(target[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    return [(*pair, count) for pair, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


class Disagreements:
    """The images on which two models disagree; those are kept on which the less confident one is most confident.

    Args:
        number: Images to keep.
        configs: Data configuration of both models' images, by side; of two sizes the larger are kept.
    """

    def __init__(self, number: int, configs: dict[str, dict[str, Any]]):
        config = loader_config(configs)
        self.side = next(side for side in configs if configs[side] is config)
        self.mean, self.std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))
        self.number, self.seen = number, 0
        self.kept: list[torch.Tensor] = []  # confidence, or -1 where they agree; index; images

    def add(self, input: Any, first: torch.Tensor, second: torch.Tensor) -> None:
        """Take a batch: images [N, C, H, W], or those of each side, and the logits [N, classes] of both models."""
        images = input[self.side] if isinstance(input, dict) else input
        (sure, prediction), (other_sure, other) = (logits.softmax(dim=-1).max(dim=-1) for logits in (first, second))
        score = torch.minimum(sure, other_sure).masked_fill(prediction == other, -1)
        found = self._best([score, torch.arange(len(score), device=score.device) + self.seen, images])
        self.kept = self._best([torch.cat(parts) for parts in zip(self.kept, found, strict=False)] or found)
        self.seen += len(score)

    def _best(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        best = parts[0].argsort(descending=True, stable=True)[:self.number]
        return [part[best] for part in parts]

    def images(self) -> Iterator[tuple[int, Image.Image]]:
        """Yield index and image of those on which they disagree, the most confident first."""
        for score, index, image in zip(*(part.cpu() for part in self.kept), strict=True):
            if score >= 0:
                pixels = (255 * (image * self.std + self.mean)).round().clamp(0, 255).byte()
                yield int(index), thumbnail(to_pil_image(pixels[:3 if len(pixels) >= 3 else 1]).convert('RGB'))


def thumbnail(image: Image.Image) -> Image.Image:
    """Return an image of TILE x TILE; a small one is enlarged."""
    small = max(image.size) < TILE
    return ImageOps.pad(image, (TILE, TILE), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def contact_sheet(title: str, tiles: list[Tile], columns: int = 6) -> Image.Image:
    """Return images with their lines, side by side below a title; a line that is too long is cut in the middle."""
    columns, height = min(columns, len(tiles)), TILE + (1 + len(tiles[0][1])) * LINE + GAP
    sheet = Image.new('RGB', (GAP + columns * (TILE + GAP), LINE + GAP - len(tiles) // -columns * height), 'white')
    _write(sheet, title, (GAP, GAP // 2), sheet.width - GAP)
    for i, (image, lines) in enumerate(tiles):
        x, y = GAP + i % columns * (TILE + GAP), LINE + GAP + i // columns * height
        sheet.paste(image, (x, y))
        for j, line in enumerate(lines):
            _write(sheet, line, (x, y + TILE + j * LINE), TILE)
    return sheet


def _write(image: Image.Image, line: str, place: tuple[int, int], width: int) -> None:
    font: Any = ImageFont.load_default(13)
    texts = (one_line(line, length) for length in range(120, 0, -1))
    fits = next((text for text in texts if font.getlength(text) <= width), '')
    ImageDraw.Draw(image).text(place, fits, fill='black', font=font)


# The command


def inspect_models(options: Inspect) -> list[Row]:
    """Compare two models by the options of `timm-vpl inspect`; print and write the results.

    Returns:
        The accuracy of each class in the data.

    Raises:
        UsageError: The options, the models and the data do not fit together.
        RunError: Something can't be read or written, or an output is NaN.
    """
    processes = start_alone(options)
    models = load_sides(options, options.models)
    if len(models) < 2:
        raise UsageError(f'{options.models[0]}: contains one model; name a second one to compare it with')
    data = open_data(options, models['a'])
    configs = {side: trained.data_config for side, trained in models.items()}
    loader = create_eval_loaders(loader_options(options), data.images, configs, processes)
    forward, autocast = forward_together(options, models, processes.device, data.class_names, data.classes)
    disagreements = Disagreements(options.num_images, configs)

    def watched(input):
        logits = forward(input)
        disagreements.add(input, logits['a'], logits['b'])
        return logits

    classes = models['a'].model.num_classes
    with bar('Inspect', 'batches', len(loader)) as shown:
        figures = evaluate(
            watched, outputs_of(SIDES), loader, processes.device, autocast, per_class=classes, per_image=True,
            after_batch=shown.update)
    for side, trained in models.items():
        if not math.isfinite(figures[side]['loss']):
            raise RunError(
                f'{trained.source}: {trained.label}: the loss is not finite, so the models cannot be compared')
    warn_of_replaced(data.name, int(loader.dataset.replaced.sum()))
    replaced = [] if isinstance(data.images, StreamImages) else data.images.replaced.nonzero().flatten().tolist()
    found = Comparison(figures, [data.class_names.get(index, str(index)) for index in range(classes)])
    tiles = [
        (image, found.lines_of(index, data.images.name(index) or f'index {index}'))
        for index, image in disagreements.images() if index not in replaced]
    names = [f'{side}: {trained.label}, {trained.source}' for side, trained in models.items()]
    title = f'{data.name}: {figures["a"]["images"]} images'
    print('\n'.join(screen_page([('p', one_line(title)), *found.parts(names, one_line, SHOWN)])))
    if options.results_file:
        write_rows(options.results_file, CLASS_COLUMNS, found.classes)
    if options.contact_sheet and not tiles:
        _logger.warning(f'--contact-sheet {options.contact_sheet}: not written, the models agree on all images')
    elif options.contact_sheet:
        with writing(options.contact_sheet, 'wb') as file:
            contact_sheet('; '.join(names), tiles).save(file, 'PNG')
    if options.html:
        images = ('h2', 'Images on which they disagree'), ('figures', tiles)
        with writing(options.html, encoding='utf-8') as file:
            file.write(make_page(title, [*found.parts(names, html), *images]))
    return found.classes


class Comparison:
    """Predictions of two models, and of the average of their probabilities, on the same images.

    Args:
        figures: What `evaluate` counted of 'a', 'b' and 'ens', by class and by image.
        labels: Names of the classes.
    """

    def __init__(self, figures: dict[Any, dict[str, Any]], labels: list[str]):
        self.figures, self.labels = figures, labels
        self.target = figures['a']['predictions'][0]
        self.predictions, self.sure = ({name: figures[name]['predictions'][i] for name in figures} for i in (1, 2))
        self.right = {name: prediction == self.target for name, prediction in self.predictions.items()}
        self.classes: list[Row] = []  # those in the data
        for label, *counts in zip(labels, *(figures[name]['classes'].tolist() for name in figures), strict=True):
            images = counts[0][0]
            if images:
                row = {f'top1_{name}': 100 * right / images for name, (_, right) in zip(figures, counts, strict=True)}
                difference = row['top1_b'] - row['top1_a']
                self.classes.append({'class': label, 'images': images, 'difference': difference, **row})

    def lines_of(self, index: int, name: str) -> list[str]:
        """Return the lines of an image of this name: its class, the prediction of each model and its probability."""
        lines = [
            f'{side}: {self.labels[self.predictions[side][index]]} {self.sure[side][index]:.2f}' for side in SIDES]
        return [f'true: {self.labels[self.target[index]]}', *lines, name]

    def parts(self, names: list[str], safe: Callable[[Any], str], limit: int | None = None) -> Iterator[Part]:
        """Yield all results, for a limited number of classes.

        Args:
            names: Names of the two models.
            safe: Escapes foreign text for display.
            limit: Number of classes, None for all.
        """
        def percent(part):
            return f'{100 * part.double().mean().item():.2f} %'

        yield from (('p', safe(name)) for name in names)
        yield 'h2', 'Accuracy'
        yield 'table', (['', 'top-1 %', 'top-5 %', 'loss', 'ECE %'], [
            (name, f'{each["top1"]:.2f}', f'{each["top5"]:.2f}', f'{each["loss"]:.3f}',
             f'{calibration_error(self.sure[name], self.right[name]):.2f}') for name, each in self.figures.items()])
        a, b = (self.right[side] for side in SIDES)
        shares = {'both right': a & b, 'only a': a & ~b, 'only b': b & ~a, 'neither': ~(a | b)}
        agreement = percent(self.predictions['a'] == self.predictions['b'])
        yield 'p', (f'The models agree on {agreement} of the images; ' + ', '.join(
            f'{name} {percent(share)}' for name, share in shares.items()) + '.')
        better = max(SIDES, key=lambda side: self.figures[side]['top1'])
        gain = self.figures['ens']['top1'] - self.figures[better]['top1']
        yield 'p', f'Their averaged probabilities (ens): {gain:+.2f} points of top-1 against {better}, the better one.'
        yield 'h2', 'Classes, the largest differences first'
        yield 'table', (['class', 'images', 'a %', 'b %', 'ens %', 'b - a'], [
            (safe(one_line(row['class'], 40)), row['images'], *(f'{row[f"top1_{name}"]:.1f}' for name in self.figures),
             f'{row["difference"]:+.1f}')
            for row in sorted(self.classes, key=lambda row: -abs(row['difference']))[:limit]])
        for side in SIDES:
            yield 'p', safe(class_line(side, [{**row, 'top1': row[f'top1_{side}']} for row in self.classes]))
        labels = [safe(one_line(label, 40)) for label in self.labels]
        for side in SIDES:
            yield 'h2', f'Confusions of {side}'
            yield 'table', (['class', 'predicted as', 'images', '% of class'], [
                (labels[true], labels[prediction], count, f'{100 * count / int((self.target == true).sum()):.1f}')
                for true, prediction, count in confusions(self.target, self.predictions[side])[:SHOWN]])
