"""Curves as data: the curves of curves.png, reports and their pages, from summary.csv."""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import Any

from ..core.names import SIDES
from .runs import data_title, number, short_name

# Okabe and Ito: safe for the colour-blind. Their yellow is too pale for a line on white.
INK, BLUE, RED, GREEN, ORANGE, PURPLE, SKY = (
    '#000000', '#0072B2', '#D55E00', '#009E73', '#E69F00', '#CC79A7', '#56B4E9')
BRANCH = {'a': BLUE, 'b': RED}
ROWS = (INK, BLUE, RED, GREEN, ORANGE, PURPLE, SKY)
BAND = (
    "A line is the mean of a row's runs (their number in brackets); its band is their range. Low values "
    'of the first half of the epochs may be cut off.')
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
        thin: Whether it is drawn thin, behind others.
        low: Lower edge of its band; [] for no band.
        high: Upper edge.
        runs: Number of runs in its mean.
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
        spans: (first epoch, last epoch, its terms) of each stage.
        format: Of a value.
        late: Whether low values in the lines' first halves may be cut off.
    """
    title: str
    unit: str
    lines: list[Line]
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    format: str = '.2f'
    late: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest value to show, and the highest."""
        lists = [ys for line in self.lines for ys in (line.y, line.low, line.high)]
        shown = [y for ys in lists for y in ys if y is not None]
        bottom, top = min(shown), max(shown)
        if self.late:
            late = [y for ys in lists for y in ys[len(ys) // 2 if len(ys) >= 8 else 0:] if y is not None]
            bottom = min(top - (top - bottom) / 4, *late)
        return bottom, top

    @property
    def is_log(self) -> bool:
        """Whether y needs a logarithmic scale: all values are positive, and some lines are far above others."""
        values = [[y for y in line.y if y is not None] for line in self.lines]
        tops = [max(ys) for ys in values]
        return min(map(min, values)) > 0 and max(tops) > 10.5 * min(tops)


def run_panels(rows: Iterable[Mapping[str, Any]], options: Mapping[str, Any]) -> list[Panel]:
    """Return the panels of one run: top-1, the terms of its loss, learning rates; no line without a value.

    Args:
        rows: Rows of its summary.csv, each a mapping of columns.
        options: Options of the run, by dest.
    """
    by_epoch = {int(row['epoch']): row for row in rows}
    names = dict.fromkeys(name for row in by_epoch.values() for name in row)
    columns = {name: {epoch: number(row.get(name)) for epoch, row in by_epoch.items()} for name in names}
    columns = {name: cells for name, cells in columns.items() if set(cells.values()) != {None}}
    terms = {name: columns[column] for column in columns if (name := _term(column))}
    spans = _stages(columns.get('stage', {}), terms, list(by_epoch), options)

    def top1(column: str, label: str, side: str, thin: bool) -> Line:  # an epoch may not be validated yet
        found = {epoch: cell for epoch, cell in columns[column].items() if cell is not None}
        return Line(label, list(found), list(found.values()), BRANCH.get(side, INK), thin=thin)

    averaged = any(name.startswith('eval_ema_top1_') for name in columns)
    kinds = list(dict.fromkeys(map(_kind, terms)))
    accuracies = [
        top1(column, f'{title}{weights}', side, averaged and not prefix)
        for side, title in (*zip(SIDES, SIDES, strict=True), ('ens', 'average'))
        for prefix, weights in (('', ' raw' if averaged else ''), ('ema_', ' EMA'))
        if (column := f'eval_{prefix}top1_{side}') in columns]
    losses = [  # where it has no value, a term is off
        Line(name, list(cells), list(cells.values()), BRANCH.get(_learner(name, options), INK),
             DASHES[kinds.index(_kind(name)) % len(DASHES)]) for name, cells in terms.items()]
    rates = [Line(side, list(cells), list(cells.values()), BRANCH[side])
             for side in SIDES if (cells := columns.get(f'lr_{side}'))]
    title = 'Accuracy of averaged weights (EMA, thick) and raw ones (thin)' if averaged else 'Accuracy'
    panels = [
        Panel(title, 'top-1 (%)', accuracies, spans),
        Panel('Terms of the loss, unweighted', 'loss', losses, spans, '#.3g'),
        Panel('Learning rate', 'rate', rates, spans, '#.3g')]
    return [panel for panel in panels if panel.lines]


def run_title(options: Mapping[str, Any]) -> str:
    """Return the title of one run's curves: its method and models."""
    models = [f'{side} {short_name(options[f"model_{side}"])}' for side in SIDES if options.get(f'model_{side}')]
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


def _stages(stages: Mapping[int, Any], terms: Mapping[str, Mapping[int, Any]], epochs: list[int],
            options: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """Return the spans of epochs with the same terms besides the labels' loss; [] for a run that never has any."""
    def at(epoch: int) -> str:
        on = [name for name, cells in terms.items() if cells[epoch] is not None]
        pair = ', '.join(_directed(name, options) for name in on if not name.startswith('ce_'))
        stage = stages.get(epoch)
        return (f'stage {stage}: ' if stage else '') + (pair or ('labels alone' if on else 'not finite'))

    spans = [(within[0], within[-1], text) for text, group in groupby(epochs, key=at) for within in [list(group)]]
    return spans if any(text != 'labels alone' for *_, text in spans) else []


def _directed(term: str, options: Mapping[str, Any]) -> str:
    return f'{term} → {options[f"{term}_to"]}' if options.get(f'{term}_to') else term


def group_panels(groups: Sequence[Any], further: bool = False) -> list[Panel]:
    """Return panels with the curves of a report's rows: the mean of a row's runs, and their range.

    Args:
        groups: Groups of finished runs (`make_groups`).
        further: Instead of a panel for each model, those of the branches' average and of each term of the loss.
    """
    rows = [(group, i) for group in groups for i in range(len(group.run.sides))]
    labels = [_row_label(*row, rows) for row in rows]
    looks = {label: (ROWS[i % len(ROWS)], DASHES[i // len(ROWS) % len(DASHES)])
             for i, label in enumerate(dict.fromkeys(labels))}
    unit = 'top-1 (%), EMA' if {group.run.weights for group in groups} == {'ema'} else 'top-1 (%)'
    several = len({data_title(group.run) for group in groups}) > 1
    panels: dict[tuple, Panel] = {}
    for (group, i), label in zip(rows, labels, strict=True):
        curves = {group.run.models[i]: [run.column(run.sides[i]) for run in group.runs]}
        if further:
            curves = {'average of the branches': [run.column('ens') for run in group.runs], **{
                name: [column] * len(group.runs) for column in group.run.rows[0] if (name := _term(column))}}
        for name, columns in curves.items() if not (further and i) else ():  # a row has them once
            found = {epoch: values for epoch in group.run.rows if None not in (
                values := [run.rows[epoch].get(column) for run, column in zip(group.runs, columns, strict=True)])}
            if not found:
                continue
            place = (name, data_title(group.run)) if several else (name,)
            look = {'unit': 'loss', 'format': '#.3g'} if _term(columns[0]) else {'unit': unit, 'late': True}
            low, high = (list(map(edge, found.values())) if len(group.runs) > 1 else [] for edge in (min, max))
            panels.setdefault(place, Panel(', '.join(map(short_name, place)), lines=[], **look)).lines.append(Line(
                label, list(found), list(map(fmean, found.values())), *looks[label], False, low, high, len(group.runs)))
    return sorted(panels.values(), key=lambda panel: not panel.late)


def _row_label(group: Any, index: int, rows: Sequence[tuple[Any, int]]) -> str:
    """Return the name of a row, and what distinguishes it from others of that name."""
    def models(group: Any) -> str:
        return ' + '.join(str(group.run.options.get(f'model_{side}')) for side in SIDES)

    named = [(other, i) for other, i in rows if other.name == group.name]
    pairs = {(other.run.models[i], models(other)) for other, i in named}
    further = {
        f'{group.run.num_epochs} epochs': len({other.run.num_epochs for other, _ in named}) > 1,
        models(group): len({model for model, _ in pairs}) < len(pairs),
        group.run.sides[index]: len({*group.run.models}) < len(group.run.models)}
    return ', '.join([group.name, *(text for text, wanted in further.items() if wanted)])
