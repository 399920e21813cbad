"""The report: finished runs side by side, averaged over seeds, as Markdown (the paper's tables), CSV or JSON."""
import csv
import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .errors import UsageError
from .methods import METHOD_OPTIONS, METHODS
from .names import SIDES
from .parsing import read_yaml

# Options that may differ between runs that are averaged: they say where and how a run was done, not what was trained.
# The data set and the models are compared by themselves.
_NOT_RECIPE = (
    'checkpoint_hist', 'config', 'data', 'data_dir', 'dataset', 'dataset_download', 'dataset_trust_remote_code',
    'device', 'eval_metric', 'experiment', 'export', 'local_rank', 'no_prefetcher', 'no_resume_opt', 'output',
    'pin_mem', 'recovery_interval', 'resume', 'save_epochs', 'save_images', 'seed', 'start_epoch', 'stop_epoch',
    'val_interval', 'validation_batch_size', 'workers')
_NOT_RECIPE_PREFIXES = ('log_', 'wandb_')
_SINGLE = ('model_a', 'model_b', 'seed', 'contrastive_to', 'kl_to')
_ORDER = tuple(dict.fromkeys(['solo', *METHODS]))

# Titles of the figures by (epoch, set, metric), and the costs that add up over the epochs.
_FIGURES = {
    (when, set_, metric): f'{"best " if when == "best" else ""}{set_title} {metric_title}'
    for when, (set_, set_title), (metric, metric_title) in product(
        ('last', 'best'), (('val', 'val'), ('real', 'ReaL'), ('v2', 'V2')), (('top1', 'top-1'), ('top5', 'top-5')))}
_COSTS = ('image_passes', 'seconds', 'device_hours')

FIELDS = [
    'framework', 'method', 'model_a', 'model_b', 'branch', 'model', 'data', 'num_epochs', 'weights', 'processes',
    'status', 'n', 'seeds', 'runs',
    *('_'.join((*figure, part)) for figure in _FIGURES for part in ('mean', 'std', 'n')), 'best_epochs', *_COSTS,
    'baseline', 'baseline_differs', 'delta', 'solo_top1', 'solo_image_passes', 'solo_seconds',
    'reached_epochs', 'reached_image_passes', 'reached_seconds']


def report(run_dirs: list[str], format: str = 'md') -> str:
    """Return the comparison of runs as text.

    Runs that agree in all options that count are a group, averaged over its runs. Unfinished and missing runs are
    listed and never averaged in. Paths of the same run, and copies of it, count once.

    Args:
        run_dirs: Folders of runs.
        format: 'md'; or 'csv', 'json' for a record a branch of a group, with numbers that are not rounded.

    Raises:
        UsageError: A folder is not that of a run, none is there, or the format is unknown.
    """
    if format not in _FORMATS:
        raise UsageError(f'--format {format}: expected one of {", ".join(_FORMATS)}')
    if not run_dirs:
        raise UsageError('no run folder is given')
    runs: dict[Any, Run] = {}
    paths = list(dict.fromkeys(map(Path, run_dirs)))
    missing = [path for path in paths if not path.exists()]
    if len(missing) == len(paths):
        raise UsageError(f'{missing[0]}: no such folder')
    for path in paths:
        if path in missing:
            continue
        run = read_run(path)
        runs.setdefault(repr((run.options, run.rows)) if run.rows else path.resolve(), run)
    records = make_records(list(runs.values())) + [
        {**dict.fromkeys(FIELDS), 'runs': [str(path)], 'n': 0, 'status': 'missing'} for path in missing]
    return _FORMATS[format](records).rstrip('\n')


# Reading a run's folder


@dataclass
class Run:
    """A run's folder: its options, its completed epochs and what was measured afterwards.

    Attributes:
        path: The folder, as given.
        options: Options of the run.
        rows: Numbers of `summary.csv` by epoch, in order, and the costs; None for an empty cell.
        measured: Figures of `validation.csv` by (epoch, branch, weights, set, metric).
    """
    path: Path
    options: dict[str, Any]
    rows: dict[int, dict[str, float | None]]
    measured: dict[tuple, float | None]

    def __post_init__(self):
        options, rows = self.options, self.rows
        last = rows[max(rows)] if rows else {}
        self.num_epochs = _num_epochs(last, options)
        # The branches that learn: a frozen one has no learning rate.
        self.sides = tuple(side for side in _given_sides(options) if not rows or f'lr_{side}' in last)
        self.models = tuple(str(options[f'model_{side}']) for side in self.sides)
        self.weights = 'ema' if any(f'eval_ema_top1_{side}' in last for side in self.sides) else 'raw'
        self.processes = list(dict.fromkeys(row['processes'] for row in rows.values() if row.get('processes')))
        self.framework = framework(self)
        self.recipe = make_recipe(options, self.sides)
        self.recipe.update(num_epochs=self.num_epochs, weights=self.weights, processes=self.processes)

    @property
    def progress(self) -> str:
        """What there is of an unfinished run; '' for a finished one."""
        if not self.rows or len(self.rows) < self.num_epochs:
            return f'{len(self.rows)} of {self.num_epochs} epochs'
        if not self.sides or any(self.figure(side, self.num_epochs - 1) is None for side in self.sides):
            return f'{len(self.rows)} of {self.num_epochs} epochs, the last one not evaluated'
        return ''

    def figure(self, side: str, epoch: int, set_: str = 'val', metric: str = 'top1') -> float | None:
        """Return a figure of the weights that count; None where it was not measured."""
        if set_ == 'val':
            return self.rows[epoch].get(f'eval_{"ema_" if self.weights == "ema" else ""}{metric}_{side}')
        return self.measured.get((epoch, side, self.weights, set_, metric))

    def best_epoch(self, side: str) -> int:
        """Return the first epoch with the branch's highest top-1."""
        evaluated = [epoch for epoch in self.rows if self.figure(side, epoch) is not None]
        return max(evaluated, key=lambda epoch: self.figure(side, epoch))


def read_run(path: Path) -> Run:
    """Read a run's folder.

    A torn row of a table counts as absent; of two rows of one epoch, the later one counts.

    Raises:
        UsageError: It is not the folder of a run.
    """
    if not path.is_dir():
        raise UsageError(f'{path}: no such folder')
    options = _read_options(path)
    if options is None:
        raise UsageError(f'{path} is not the folder of a run: it has no args.yaml that names a method')
    rows = {}
    method = METHODS.get(options['method'])  # None: a method of the user's own
    passes = method and method.passes(options)
    for cells in _read_table(path / 'summary.csv'):
        row = {name: _number(cell) for name, cell in cells.items()}
        row['image_passes'] = _product(row.get('images'), passes)
        row['device_hours'] = _product(row.get('seconds'), row.get('processes'), 1 / 3600)
        epoch = row.get('epoch')
        if epoch is not None and 0 <= epoch < _num_epochs(row, options):
            rows[int(epoch)] = row
    measured = {
        (_number(cells.get('epoch')), *(cells.get(name) for name in ('branch', 'weights', 'set')), metric):
            _number(cells.get(metric))
        for cells in _read_table(path / 'validation.csv') for metric in ('top1', 'top5')}
    return Run(path, options, dict(sorted(rows.items())), measured)


def _num_epochs(row: dict[str, float | None], options: dict[str, Any]) -> int:
    return int(row.get('num_epochs') or _number(options.get('epochs')) or 0)


def _given_sides(options: dict[str, Any]) -> tuple[str, ...]:
    return tuple(side for side in SIDES if options.get(f'model_{side}'))


def _read_options(path: Path) -> dict[str, Any] | None:
    """Return the options of the run in this folder, or None where it is not one."""
    try:
        options = read_yaml(path / 'args.yaml')
    except (OSError, UsageError, ValueError):
        return None
    if not isinstance(options.get('method'), str):
        return None
    # Where the report expects one value, there is one.
    return {name: str(value) if name in _SINGLE and isinstance(value, (dict, list)) else value
            for name, value in options.items()}


def _read_table(path: Path) -> list[dict[str, str]]:
    if path.exists() and not path.is_file():
        raise UsageError(f'{path} can not be read: not a file')
    try:
        text = path.read_text(encoding='utf-8', errors='replace').replace('\0', '')
        # A killed run leaves a line that is cut short, at the end or, if something was appended, in the middle.
        header, *lines = [*csv.reader(io.StringIO(text[:text.rfind('\n') + 1]))] or [[]]
    except FileNotFoundError:
        return []
    except (OSError, csv.Error) as e:
        raise UsageError(f'{path} can not be read: {e}') from e
    return [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        return None
    if not abs(number) < 1e15:
        return None
    return int(number) if number.is_integer() else number


def _product(*factors: float | None) -> float | None:
    return None if None in factors else math.prod(factors)


# Which runs belong together, and their names


def make_recipe(options: dict[str, Any], sides: tuple[str, ...]) -> dict[str, Any]:
    """Return the options that say what these branches learn from; those of one branch without its letter.

    A teacher that is from a run's folder counts by the recipe of that run, not by its path: students of several seeds,
    each with a teacher of its own, are one group.
    """
    method = options['method']
    idle = () if method not in METHODS else set(METHOD_OPTIONS).difference(METHODS[method].options)
    absent = tuple(f'_{side}' for side in SIDES if side not in sides)
    recipe = {
        name[:-2] if len(sides) == 1 and name.endswith(f'_{sides[0]}') else name: value
        for name, value in options.items()
        if value is not None and name not in _NOT_RECIPE and not name.startswith(_NOT_RECIPE_PREFIXES)
        and name not in idle and not name.endswith(absent)
        # What was given for both branches; their own values count.
        and not any(f'{name}_{side}' in options for side in SIDES)
    }
    if len(sides) == 1 and method in METHODS and METHODS[method].teacher != 'never':
        recipe['branch'] = sides[0]  # the terms depend on it
    if recipe.get('teacher'):
        taught, file = _teacher_run(recipe['teacher'])
        if taught:
            recipe['teacher'] = file, make_recipe({**taught, 'teacher': None}, _given_sides(taught))
    return {**recipe, 'data': _data(options)}


def _teacher_run(teacher: Any) -> tuple[dict[str, Any] | None, str]:
    """Return the options of the run that a teacher, a run's folder or a checkpoint in it, is from, and its file."""
    path = Path(str(teacher))
    if path.is_file():
        return _read_options(path.parent), path.name
    return _read_options(path), ''


def _data(options: dict[str, Any]) -> str:
    """Return what identifies the data: its name, or the folder where a name does not tell."""
    dataset, folder = str(options.get('dataset') or ''), str(options.get('data_dir') or '')
    generic = dataset.lower().startswith('wds/') or dataset.lower() in ('torch/folder', 'torch/image_folder')
    return dataset if dataset and not generic else os.path.normpath(folder)


def framework(run: Run) -> str:
    """Return the name of a run's method and variant, as in the paper's tables."""
    options, method = run.options, run.options['method']
    if method == 'vpl':
        route = options.get('contrastive_to', 'b'), options.get('kl_to', 'a')
        known = {('b', 'a'): '', ('a', 'b'): ' swapped', ('both', 'both'): '-Bi'}
        stages = ' '.join(f'{name}={_number(options.get(name, 20))}' for name in ('x', 'y'))
        return 'VPL' + known.get(route, f' CL->{route[0]} KL->{route[1]}') + f' {stages}'.replace(' x=20 y=20', '')
    if method == 'dml':
        return 'DML joint' if options.get('dml_joint') else 'DML'
    if method in ('distill', 'deit'):
        name = 'DIS' if method == 'distill' else f'DeiT {options.get("distillation_type") or ""}'.rstrip()
        teacher = _teacher_name(run)
        return f'{name} {teacher} -> {" + ".join(run.models)}' if teacher else f'{name} online'
    return method


def _teacher_name(run: Run) -> str:
    options, sides = run.options, [side for side in _given_sides(run.options) if side not in run.sides]
    teacher = options.get('teacher')
    if teacher and not sides:
        options = _teacher_run(teacher)[0]
        if options is None:
            return Path(str(teacher)).name
        sides = _given_sides(options)
    return ' + '.join(str(options[f'model_{side}']) for side in sides)


@dataclass
class Group:
    """Finished runs of one recipe; `name` tells it from the other groups of the same models, data and epochs."""
    runs: list[Run]
    name: str = ''

    @property
    def place(self) -> tuple:
        run = self.runs[0]
        return run.framework, run.models, run.recipe['data'], run.num_epochs

    def total(self, cost: str, epochs: int | None = None) -> float | None:
        """Return the mean over the runs of what the first epochs cost (default: all); None where a row lacks it."""
        costs = [[row.get(cost) for row in list(run.rows.values())[:epochs]] for run in self.runs]
        return None if any(None in values for values in costs) else fmean(map(sum, costs))


def make_groups(runs: Iterable[Run]) -> list[Group]:
    """Return the groups of runs; those that would look the same are named by the options that differ."""
    groups: list[Group] = []
    for run in runs:
        group = next((group for group in groups if group.runs[0].recipe == run.recipe), None)
        if group is None:
            groups.append(Group([run]))
        else:
            group.runs.append(run)
    for group in groups:
        run = group.runs[0]
        alike = [other.runs[0].recipe for other in groups if other.place == group.place]
        values = {**run.recipe, 'teacher': run.options.get('teacher')}
        parts = ', '.join(f'{name}={_flat(values.get(name))}' for name in _differing(*alike))
        group.name = f'{run.framework} ({parts})' if parts else run.framework
    return groups


def _flat(value: Any) -> Any:
    return ' '.join(map(str, value)) if isinstance(value, list) else value


def _differing(*recipes: dict[str, Any]) -> list[str]:
    names = sorted({name for recipe in recipes for name in recipe})
    return [name for name in names if any(recipe.get(name) != recipes[0].get(name) for recipe in recipes)]


def find_baseline(group: Group, side: str, groups: list[Group]) -> tuple[Group | None, list[str]]:
    """Return the solo runs that a branch is compared with, and the options in which they differ from it.

    They have the same model, data and number of epochs; of several groups, the one with the fewest differing options.
    """
    run = group.runs[0]
    recipe = {**run.recipe, **make_recipe(run.options, (side,))}
    found = []
    for solo in groups:
        names = _differing(recipe, solo.runs[0].recipe)
        names = [
            name for name in names
            if name not in (*METHOD_OPTIONS, 'method', 'branch') and not name.endswith(('_a', '_b'))]
        if solo.runs[0].options['method'] == 'solo' and not {'data', 'model', 'num_epochs'}.intersection(names):
            found.append((solo, names))
    if run.options['method'] == 'solo' or not found:
        return None, []
    return min(found, key=lambda item: len(item[1]))


# Records


def make_records(runs: list[Run]) -> list[dict[str, Any]]:
    """Return a record a branch of a group, and one a run that is not finished; see FIELDS."""
    groups = make_groups(run for run in runs if not run.progress)
    records = [_record(group, index, groups) for group in groups for index in range(len(group.runs[0].sides))]
    rank = {method: i for i, method in enumerate(_ORDER)}
    records.sort(key=lambda r: (r['data'], r['num_epochs'], rank.get(r['method'], len(rank))))
    return records + [
        {**dict.fromkeys(FIELDS), **_describe([run]), 'n': 0, 'status': f'unfinished, {run.progress}'}
        for run in runs if run.progress]


def _describe(runs: list[Run]) -> dict[str, Any]:
    run = runs[0]
    return {
        'framework': run.framework,
        'method': run.options['method'],
        'model_a': run.options.get('model_a') or None,
        'model_b': run.options.get('model_b') or None,
        'data': run.recipe['data'],
        'num_epochs': run.num_epochs,
        'weights': run.weights,
        'processes': run.processes,
        'n': len(runs),
        'seeds': [run.options.get('seed') for run in runs],
        'runs': [str(run.path) for run in runs],
    }


def _record(group: Group, index: int, groups: list[Group]) -> dict[str, Any]:
    branches = [(run, run.sides[index]) for run in group.runs]  # a solo model may be a in one run, b in another
    run, side = branches[0]
    best = [run.best_epoch(side) for run, side in branches]
    record = {
        **dict.fromkeys(FIELDS), **_describe(group.runs), 'framework': group.name, 'status': 'finished',
        'branch': side, 'model': run.models[index], 'best_epochs': best,
        **{cost: group.total(cost) for cost in _COSTS}}
    for when, set_, metric in _FIGURES:
        epochs = best if when == 'best' else [run.num_epochs - 1] * len(best)
        values = [run.figure(side, epoch, set_, metric) for (run, side), epoch in zip(branches, epochs, strict=True)]
        values = [value for value in values if value is not None]
        name = f'{when}_{set_}_{metric}'
        record[f'{name}_n'] = len(values)
        record[f'{name}_mean'] = fmean(values) if values else None
        record[f'{name}_std'] = stdev(values) if len(values) > 1 else None

    solo, differing = find_baseline(group, side, groups)
    if solo is not None:
        target = fmean(run.figure(run.sides[0], run.num_epochs - 1) for run in solo.runs)
        reached = _epochs_until(target, branches)
        record.update(
            baseline=solo.name, baseline_differs=differing, delta=record['last_val_top1_mean'] - target,
            solo_top1=target, solo_image_passes=solo.total('image_passes'), solo_seconds=solo.total('seconds'),
            reached_epochs=reached)
        if reached:
            for cost in ('image_passes', 'seconds'):
                record[f'reached_{cost}'] = group.total(cost, reached)
    return record


def _epochs_until(target: float, branches: list[tuple[Run, str]]) -> int | None:
    """Return after how many epochs the mean top-1 over the runs reaches a target; None if it never does."""
    for epoch in branches[0][0].rows:
        values = [run.figure(side, epoch) for run, side in branches]
        if None not in values and fmean(values) >= target - 1e-9:
            return epoch + 1
    return None


# Formats


def to_csv(records: list[dict[str, Any]]) -> str:
    """Return the records as CSV; lists are separated by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator='\n')
    writer.writeheader()
    for record in records:
        writer.writerow({name: _flat(value) for name, value in record.items()})
    return text.getvalue()


def to_json(records: list[dict[str, Any]]) -> str:
    """Return the records as JSON."""
    return json.dumps(records, indent=2)


def to_markdown(records: list[dict[str, Any]]) -> str:
    """Return the page of tables: for each data set accuracy, each branch, cost and convergence."""
    finished = [r for r in records if r['status'] == 'finished']
    unfinished = [r for r in records if r['status'] != 'finished']
    datas = list(dict.fromkeys(r['data'] for r in finished))
    lines: list[str] = []
    for data in datas:
        rows = _titled([r for r in finished if r['data'] == data])
        lines += [
            f'## {data}', '',
            f'Top-1 (percent) of the last epoch, mean ± standard deviation (runs). {_weights(rows)}', '',
            *_pivot(rows, {'num_epochs': 'Epochs', 'title': 'Framework'}, 'model'),
            '### Each branch', '', *_branches(rows), '### Cost', '', *_costs(rows), *_convergence(rows)]
    if len(datas) > 1:
        lines += [
            '## All data sets', '', 'Top-1 of the last epoch; several figures in a cell: by number of epochs.', '',
            *_pivot(_titled(finished), {'title': 'Framework', 'model': 'Model'}, 'data')]
    if unfinished:
        lines += ['## Unfinished, in no figure of this report', '', *_table(
            ['Run', 'Framework', 'Models', 'Progress'],
            [(*r['runs'], r['framework'] or '-', _models(r) or '-', r['status'].removeprefix('unfinished, '))
             for r in unfinished])]
    if finished:
        lines += ['## Notes', '', *(f'- {note}' for note in dict.fromkeys(_notes(finished)))]
    return '\n'.join(lines)


_FORMATS = {'md': to_markdown, 'csv': to_csv, 'json': to_json}


def _table(header: Iterable[str], rows: Iterable[Iterable]) -> list[str]:
    cells = [[str(cell).replace('|', '\\|').replace('\n', ' ') for cell in row] for row in (header, *rows)]
    head, *body = [f'| {" | ".join(row)} |' for row in cells]
    return [head, '|' + '---|' * len(cells[0]), *body, '']


def _columns(records, field: str) -> list[str]:
    """Return the values of a field, those of branches a first."""
    return list(dict.fromkeys(r[field] for r in sorted(records, key=lambda r: r['branch'])))


def _pivot(records, first: dict[str, str], field: str) -> list[str]:
    """Return a table of the last top-1: a row for the values of the first fields, a column for each of another one."""
    cells: dict[tuple, dict[str, list]] = {}
    for r in records:
        cells.setdefault(tuple(r[name] for name in first), {}).setdefault(r[field], []).append(
            _figure(r, 'last_val_top1'))
    columns = _columns(records, field)
    return _table([*first.values(), *columns], [
        (*key, *(' / '.join(row.get(name, ['-'])) for name in columns)) for key, row in cells.items()])


def _branches(records) -> list[str]:
    names = {'_'.join(figure): title for figure, title in _FIGURES.items()}
    names = {name: title for name, title in names.items() if any(r[f'{name}_n'] for r in records)}
    models = _columns(records, 'model')
    return _table(['Epochs', 'Framework', 'Model', *names.values(), 'best epoch', 'Δ solo'], [
        (r['num_epochs'], r['title'], r['model'], *(_figure(r, name) for name in names),
         ', '.join(map(str, r['best_epochs'])), '-' if r['delta'] is None else f'{r["delta"]:+.2f}')
        for r in sorted(records, key=lambda r: (r['num_epochs'], models.index(r['model'])))])


def _costs(records) -> list[str]:
    groups: dict[tuple, list] = {}
    for r in records:
        groups.setdefault(tuple(r['runs']), []).append(r)
    rows = []
    for (r, *_), solos in ((group, [branch['solo_seconds'] for branch in group]) for group in groups.values()):
        seconds = r['seconds']
        rows.append((
            r['num_epochs'], r['framework'], _models(r), ' then '.join(map(str, r['processes'])) or '-',
            _scaled(r['image_passes'], _COUNT),
            _scaled(seconds, _TIME), _scaled(seconds and seconds / r['num_epochs'], _TIME),
            '-' if (hours := r['device_hours']) is None else f'{hours:.2f}' if hours >= 1 else f'{hours:.3g}',
            '-' if None in (seconds, *solos) or not sum(solos) else f'{seconds / sum(solos):.2f}'))
    return _table([
        'Epochs', 'Framework', 'Models', 'Processes', 'Image-passes', 'Time', 'Time an epoch', 'Device-hours',
        "Time / solo's"], rows)


def _convergence(records) -> list[str]:
    rows = [
        (r['num_epochs'], r['title'], r['model'], f'{r["solo_top1"]:.2f}',
         r['reached_epochs'] or 'not reached', _scaled(r['reached_image_passes'], _COUNT),
         _scaled(r['reached_seconds'], _TIME), _scaled(r['solo_image_passes'], _COUNT),
         _scaled(r['solo_seconds'], _TIME))
        for r in records if r['baseline']]
    return rows and ["### Until solo's final top-1", '', *_table([
        'Epochs', 'Framework', 'Model', "Solo's top-1", 'After epochs', 'Image-passes', 'Time', "Solo's image-passes",
        "Solo's time"], rows)]


def _notes(records) -> list[str]:
    notes = [
        'The best epoch (counted from 0, as in summary.csv) has the highest top-1 on the evaluation set itself, which '
        'flatters it: compare last epochs.',
        'An image-pass is one image through one network, forward, whatever its size. Time is that of training, without '
        'validation and without the training of a frozen teacher. Device-hours are time x processes: GPU hours, where '
        'each process has a GPU.',
        "Δ solo: points above the mean of the solo runs of the same model, data and epochs. Time / solo's: 1 is to "
        "train each branch alone, one after the other. Until solo's final top-1: by the mean over a group's runs.",
    ]
    for r in records:
        if r['baseline_differs']:
            notes.append(
                f'{r["framework"]}, {r["model"]}, {r["num_epochs"]} epochs: its baseline, {r["baseline"]}, differs '
                f'in {", ".join(r["baseline_differs"])}.')
        if len(set(r['seeds'])) < r['n']:
            notes.append(
                f'{r["framework"]}, {_models(r)}, {r["num_epochs"]} epochs: the seeds are not all different '
                f'({", ".join(map(str, r["seeds"]))}).')
    return notes


def _weights(records) -> str:
    raw = dict.fromkeys(f'{r["framework"]} ({_models(r)})' for r in records if r['weights'] == 'raw')
    if not raw:
        return 'Weights: EMA.'
    return 'Weights: raw.' if all(r['weights'] == 'raw' for r in records) else f'Weights: EMA; raw: {", ".join(raw)}.'


def _models(record) -> str:
    return ' + '.join(filter(None, (record['model_a'], record['model_b'])))


def _titled(records) -> list[dict[str, Any]]:
    """Return the records with the title of their row: the group's name, and its pair where there are several."""
    pairs = {_models(r) for r in records if r['model_a'] and r['model_b']}
    with_pair = pairs if len(pairs) > 1 else ()
    return [
        {**r, 'title': f'{r["framework"]}, {_models(r)}' if _models(r) in with_pair else r['framework']}
        for r in records]


def _figure(record, name: str) -> str:
    mean, std, n = (record[f'{name}_{part}'] for part in ('mean', 'std', 'n'))
    return '-' if mean is None else f'{mean:.2f} ({n})' if std is None else f'{mean:.2f} ± {std:.2f} ({n})'


_COUNT = ((1e9, ' G'), (1e6, ' M'), (1e3, ' k'), (1, ''))
_TIME = ((3600, ' h'), (60, ' min'), (1, ' s'))


def _scaled(value: float | None, units: tuple) -> str:
    if value is None:
        return '-'
    size, unit = next((step for step in units if value >= step[0]), units[-1])
    return f'{value / size:.2f}{unit}'
