"""Curves as data: what curves.png, the figures of a report and its page show, from the numbers of summary.csv."""
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import Any

from ..core.names import SIDES
from .runs import number

# Okabe and Ito: told apart by the colour-blind too. Their yellow is too pale for a line on white.
INK, BLUE, RED, GREEN, ORANGE, PURPLE, SKY = (
    '#000000', '#0072B2', '#D55E00', '#009E73', '#E69F00', '#CC79A7', '#56B4E9')
BRANCH = {'a': BLUE, 'b': RED}
ROWS = (INK, BLUE, RED, GREEN, ORANGE, PURPLE, SKY)
BAND = (
    "A line is the mean of a row's runs (of so many), its band goes from the lowest of them to the highest. Low values "
    'of the first half of the epochs may lie below what is shown.')
DASHES = ('', '6 2', '2 1.5', '7 2 1.5 2')  # lengths of line and gap


@dataclass
class Line:
    """A line over epochs; it breaks where y is None.

    Attributes:
        label: What it is.
        x: Epochs.
        y: A value each.
        color: Its colour.
        dash: One of DASHES.
        thin: Whether it stands behind others.
        low: Lower edge of its band; [] for no band.
        high: Upper edge.
        runs: Number of runs that it is the mean of.
    """
    label: str
    x: list[int]
    y: list[float | None]
    color: str = INK
    dash: str = ''
    thin: bool = False
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    runs: int = 1

    @property
    def last(self) -> float:
        """Its last value."""
        return [y for y in self.y if y is not None][-1]


@dataclass
class Panel:
    """Lines over the same epochs.

    Attributes:
        title: What they are of.
        unit: What y is.
        lines: The lines, each with a value at least.
        spans: (first epoch, last epoch, what is learnt) of each stage.
        format: Of a value.
        late: Whether the low values of the lines' first halves need not be seen.
    """
    title: str
    unit: str
    lines: list[Line]
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    format: str = '.2f'
    late: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest value that is to be seen, and the highest."""
        lists = [ys for line in self.lines for ys in (line.y, line.low, line.high)]
        shown = [y for ys in lists for y in ys if y is not None]
        bottom, top = min(shown), max(shown)
        if self.late:
            bottom = min(top - (top - bottom) / 4, *(y for ys in lists for y in ys[len(ys) // 2:] if y is not None))
        return bottom, top

    @property
    def is_log(self) -> bool:
        """Whether y is better seen on a logarithmic scale: all is positive, some lines far above others."""
        values = [[y for y in line.y if y is not None] for line in self.lines]
        tops = [max(ys) for ys in values]
        return min(map(min, values)) > 0 and max(tops) > 10.5 * min(tops)


def run_panels(rows: Iterable[Mapping[str, Any]], options: Mapping[str, Any]) -> list[Panel]:
    """Return the panels of one run: top-1, the terms of its loss, learning rates.

    Args:
        rows: Rows of its summary.csv, each a mapping of columns.
        options: Options of the run, by dest.
    """
    cells: dict[str, dict[int, float | None]] = {}  # of a column, by epoch
    for row in rows:
        for name in row:
            cells.setdefault(name, {})[int(row['epoch'])] = number(row[name])
    epochs = list(cells.get('epoch', ()))
    spans = _stages(cells, epochs, options)

    def line(column: str, label: str, color: str, dash: str = '', thin: bool = False) -> Line:
        found = cells[column]
        # A term is off where it has no value; an epoch may just not have been validated.
        x = [epoch for epoch in epochs if column.startswith('train_') or found[epoch] is not None]
        return Line(label, x, [found[epoch] for epoch in x], color, dash, thin)

    averaged = any(name.startswith('eval_ema_top1_') for name in cells)
    top1 = [
        line(f'eval_{prefix}top1_{name}', f'{title}{weights}', BRANCH.get(name, INK), thin=averaged and not prefix)
        for name, title in (*zip(SIDES, SIDES, strict=True), ('ens', 'average'))
        for prefix, weights in (('', ' raw' if averaged else ''), ('ema_', ' EMA'))
        if any(value is not None for value in cells.get(f'eval_{prefix}top1_{name}', {}).values())]
    terms = [name for name in cells if _term(name) and any(value is not None for value in cells[name].values())]
    kinds = list(dict.fromkeys(_kind(_term(name)) for name in terms))
    losses = [
        line(name, _term(name), BRANCH.get(_learner(_term(name), options), INK),
             DASHES[kinds.index(_kind(_term(name))) % len(DASHES)])
        for name in terms]
    lrs = [line(f'lr_{side}', side, BRANCH[side]) for side in SIDES if f'lr_{side}' in cells]
    title = 'Accuracy of averaged weights (EMA, thick) and raw ones (thin)' if averaged else 'Accuracy'
    panels = [
        Panel(title, 'top-1 (%)', top1, spans),
        Panel('Terms of the loss, unweighted', 'loss', losses, spans, '#.3g'),
        Panel('Learning rate', 'learning rate', lrs, spans, '#.3g')]
    return [panel for panel in panels if panel.lines]


def run_title(options: Mapping[str, Any]) -> str:
    """Return the title of one run's curves: its method and models."""
    models = [f'{side} {options[f"model_{side}"]}' for side in SIDES if options.get(f'model_{side}')]
    return f'{options["method"]}: {", ".join(models)}'


def _term(column: str) -> str:
    """Return the name of the term that a column is of; '' for another column."""
    is_term = column.startswith('train_') and column.endswith('_loss') and column != 'train_loss'
    return column[len('train_'):-len('_loss')] if is_term else ''


def _kind(term: str) -> str:
    return '_'.join(part for part in term.split('_') if part not in SIDES)


def _learner(term: str, options: Mapping[str, Any]) -> str:
    """Return the branch that learns from a term; '' for both."""
    named = [part for part in term.split('_') if part in SIDES]
    alone = [side for side in SIDES if options.get(f'model_{side}')]
    return str(options.get(f'{term}_to') or next(iter(named), alone[0] if len(alone) == 1 else ''))


def _stages(cells, epochs: list[int], options: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """Return the spans of epochs with the same terms beside the labels' own; [] for a run that never has any."""
    def at(epoch: int) -> tuple:
        stage = cells.get('stage', {}).get(epoch)
        return stage, tuple(
            _title(_term(name), options) for name in cells
            if _term(name) and not _term(name).startswith('ce_') and cells[name][epoch] is not None)

    spans = []
    for (stage, terms), group in groupby(epochs, key=at):
        within = list(group)
        name = f'stage {stage}: ' if stage else ''
        spans.append((within[0], within[-1], f'{name}{", ".join(terms) or "labels alone"}'))
    return spans if len(spans) > 1 or any(label != 'labels alone' for *_, label in spans) else []


def _title(term: str, options: Mapping[str, Any]) -> str:
    return f'{term} → {options[f"{term}_to"]}' if options.get(f'{term}_to') else term


class _Overlay:
    """Panels in which the rows of a report lie over each other, and what a row looks like in each of them."""

    def __init__(self, records: Sequence[Mapping[str, Any]], groups: Sequence[Any]):
        by_runs = {tuple(str(run.path) for run in group.runs): group.runs for group in groups}
        self.rows = [(record, _row_label(record, records), by_runs[tuple(record['runs'])]) for record in records]
        self.looks = list(dict.fromkeys(label for _, label, _ in self.rows))
        self.unit = 'top-1 (%), EMA' if {record['weights'] for record in records} == {'ema'} else 'top-1 (%)'
        self.several = len({record['data'] for record in records}) > 1
        self.panels: dict[str, Panel] = {}

    def add(self, title: str, row: tuple, value: Callable[[Any, int], Any], **look: Any) -> None:
        """Add a line: the mean of a row's runs at the epochs at which each has a value, and their range."""
        record, label, runs = row
        x = [epoch for epoch in runs[0].rows if all(value(run, epoch) is not None for run in runs)]
        values = [[value(run, epoch) for run in runs] for epoch in x]
        if not values:
            return
        title = f'{title}, {record["data"]}' if self.several else title
        turn, i = divmod(self.looks.index(label), len(ROWS))
        low, high = (list(map(min, values)), list(map(max, values))) if len(runs) > 1 else ([], [])
        self.panels.setdefault(title, Panel(title, lines=[], **look)).lines.append(Line(
            label, x, list(map(fmean, values)), ROWS[i], DASHES[turn % len(DASHES)], False, low, high, len(runs)))


def _top1(number: int) -> Callable[[Any, int], Any]:
    return lambda run, epoch: run.figure(run.sides[number], epoch)


def _cell(column: str) -> Callable[[Any, int], Any]:
    return lambda run, epoch: run.rows[epoch].get(column)


def group_panels(records: Sequence[Mapping[str, Any]], groups: Sequence[Any]) -> list[Panel]:
    """Return a panel for each model, in which the rows of a report lie over each other.

    Args:
        records: Records of the report (`make_records`), in their order.
        groups: The groups that they are of.
    """
    overlay = _Overlay(records, groups)
    for row in overlay.rows:
        record, _, runs = row
        overlay.add(record['model'], row, _top1(runs[0].sides.index(record['branch'])), unit=overlay.unit, late=True)
    return list(overlay.panels.values())


def term_panels(records: Sequence[Mapping[str, Any]], groups: Sequence[Any]) -> list[Panel]:
    """Return the further panels of a report: the average of the branches, and each term of the loss."""
    overlay = _Overlay(records, groups)
    rows = list({id(runs): (record, label, runs) for record, label, runs in overlay.rows}.values())
    for row in rows:
        overlay.add('average of the branches', row, lambda run, epoch: run.figure('ens', epoch), unit=overlay.unit,
                    late=True)
    for row in rows:
        for name in filter(_term, row[2][0].rows[0]):
            overlay.add(_term(name), row, _cell(name), unit='loss', format='#.3g')
    return list(overlay.panels.values())


def _row_label(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of a row, and what else tells it from the others of that name."""
    named = [other for other in records if other['framework'] == record['framework']]
    pairs = {(other['model'], other['model_a'], other['model_b']) for other in named}
    further = {
        f'{record["num_epochs"]} epochs': len({other['num_epochs'] for other in named}) > 1,
        f'{record["model_a"]} + {record["model_b"]}': len({model for model, *_ in pairs}) < len(pairs),
        record['branch']: record['model_a'] == record['model_b']}
    return ', '.join([record['framework'], *(text for text, wanted in further.items() if wanted)])
