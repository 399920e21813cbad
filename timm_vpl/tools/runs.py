"""Runs, read from their folders: options, epochs, figures, and which runs belong together."""
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..core.method_options import TeacherOptions
from ..core.methods import METHODS
from ..core.names import SIDES
from ..errors import RunError, UsageError, first_line
from ..options.recipes import read_yaml
from ..options.train import METHOD_OPTIONS, build_parser, idle_options, make_options
from ..text import one_line
from .tables import read_csv

VALIDATION = 'validation.csv'  # where `timm-vpl validate` writes its figures, in the folder of a run
COLUMNS = (
    'model', 'epoch', 'branch', 'weights', 'data', 'set', 'images', 'loss', 'top1', 'top5', 'img_size', 'crop_pct',
    'interpolation', 'images_per_second')
COSTS = ('flops', 'image_passes', 'seconds', 'device_hours')  # they add up over the epochs
_SINGLE = ('model_a', 'model_b', 'seed', 'val_split')


@dataclass
class Run:
    """A run's folder: its options, its completed epochs and what was measured afterwards.

    Attributes:
        path: The folder, as given.
        options: Options of the run.
        rows: Numbers of `summary.csv` by epoch, in order, and the costs; None for an empty cell.
        measured: Figures of `validation.csv` by (epoch, branch, weights, set, metric).
        data: Identity of the training and of the validation images; {} if it is not known.
        environment: What it was trained on; [] if it is not known.
        teacher: The run of its frozen teacher; None if there is none.
    """
    path: Path
    options: dict[str, Any]
    rows: dict[int, dict[str, Any]]
    measured: dict[tuple, Any]
    data: dict[str, dict]
    environment: list[dict]
    teacher: 'Run | None' = None

    def __post_init__(self):
        options, rows = self.options, self.rows
        last = rows[max(rows)] if rows else {}
        self.num_epochs = _num_epochs(last, options)
        given = {side: str(options[f'model_{side}']) for side in SIDES if options.get(f'model_{side}')}
        # The branches that learn: a frozen one has no learning rate.
        self.sides = tuple(side for side in given if not rows or f'lr_{side}' in last)
        self.models = tuple(given[side] for side in self.sides)
        self.frozen = [name for side, name in given.items() if side not in self.sides]
        self.weights = 'ema' if any(f'eval_ema_top1_{side}' in last for side in self.sides) else 'raw'
        self.processes = list(dict.fromkeys(row['processes'] for row in rows.values() if row.get('processes')))
        self.val_set = str(options.get('val_split') or 'validation')
        self.recipe = {
            **make_recipe(options, self.sides, self.teacher), 'data': _data(self), 'num_epochs': self.num_epochs,
            'weights': self.weights, 'processes': self.processes}
        self.framework = framework(self)

    @property
    def progress(self) -> str:
        """The progress of an unfinished run; '' for a finished one."""
        done = f'{len(self.rows)} of {self.num_epochs} epochs'
        if not self.rows or len(self.rows) < self.num_epochs:
            return done
        evaluated = self.sides and all(self.figure(side, self.num_epochs - 1) is not None for side in self.sides)
        return '' if evaluated else f'{done}, the last one without top-1'

    @property
    def pairing(self) -> str | None:
        """What two runs must have in common, besides the seed, to be paired; None if not known."""
        return repr((self.data, self.environment)) if self.data and self.environment else None

    @property
    def sets(self) -> list[str]:
        """The sets of images that the figures are of, the run's own validation split first."""
        return list(dict.fromkeys([self.val_set, *(key[3] for key in self.measured)]))

    def column(self, side: str, metric: str = 'top1') -> str:
        """Return the column of `rows` with a figure of the weights that count."""
        return f'eval_{"ema_" if self.weights == "ema" else ""}{metric}_{side}'

    def figure(self, side: str, epoch: int, set_: str | None = None, metric: str = 'top1') -> Any:
        """Return a figure of the weights that count; None where it was not measured."""
        if set_ in (None, self.val_set):
            return self.rows[epoch].get(self.column(side, metric))
        return self.measured.get((epoch, side, self.weights, set_, metric))

    def best_epoch(self, side: str) -> int:
        """Return the first epoch with the branch's highest top-1."""
        evaluated = [epoch for epoch in self.rows if self.figure(side, epoch) is not None]
        return max(evaluated, key=lambda epoch: self.figure(side, epoch))

    def total(self, cost: str, epochs: int | None = None) -> Any:
        """Return the cost of the first epochs (default: all); None if a row lacks it."""
        values = [row.get(cost) for row in list(self.rows.values())[:epochs]]
        return None if None in values else sum(values)


def read_run(path: Path, taught: bool = True) -> Run:
    """Read a run's folder.

    Args:
        path: The folder.
        taught: Read that of its teacher too.

    Raises:
        UsageError: It is not the folder of a run.
        RunError: A file of it can't be read.
    """
    if not path.is_dir():
        raise UsageError(f'{path}: no such folder')
    options = read_options(path)
    if options is None:
        raise UsageError(f'{path} is not the folder of a run: it has no args.yaml that names a method')
    rows = {}
    made = make_options(options) if options['method'] in METHODS else None  # None: a method of the user's own
    passes = made and METHODS[made.method].passes(made.own, made.sides)
    for cells in read_csv(path / 'summary.csv'):
        row = {name: number(cell) for name, cell in cells.items()}
        row['image_passes'] = _product(row.get('images'), passes)
        row['device_hours'] = _product(row.get('seconds'), row.get('processes'), 1 / 3600)
        epoch = row.get('epoch')
        if epoch is not None and 0 <= epoch < _num_epochs(row, options):
            rows[int(epoch)] = row
    measured = {
        (number(cells['epoch']), *(cells[name] for name in ('branch', 'weights', 'set')), metric): number(cells[metric])
        for cells in read_csv(path / VALIDATION, COLUMNS) for metric in ('top1', 'top5')}
    data, environment = (_read_facts(path / f'{name}.yaml') for name in ('data', 'environment'))
    if data:
        data.pop('contents', None)  # unread files do not change the data
    teacher = _read_teacher(options['teacher'], path) if taught and options.get('teacher') else None
    return Run(path, options, dict(sorted(rows.items())), measured, data or {}, environment or [], teacher)


def _read_teacher(teacher: Any, path: Path) -> Run | None:
    """Return the run of a teacher that is a run's folder or a checkpoint in it, else None.

    If its folder no longer exists, it is searched for beside the student's.

    Args:
        teacher: The option --teacher.
        path: Folder of the student's run.
    """
    place = Path(str(teacher))
    for folder in (place, place.parent if place.is_file() else path.parent / place.name):
        if read_options(folder) is not None:
            return read_run(folder, taught=False)
    return None


def _num_epochs(row: dict[str, Any], options: dict[str, Any]) -> int:
    return int(row.get('num_epochs') or number(options.get('epochs')) or 0)


def short_name(model: Any) -> str:
    """Return a model's name, of one in a folder without the path to it."""
    name = one_line(model)
    return os.path.basename(name.rstrip('/')) if name.startswith('local-dir:') else name


def read_options(path: Path) -> dict[str, Any] | None:
    """Return the options of the run in this folder, or None if it is not one."""
    try:
        options = read_yaml(path / 'args.yaml')
    except (OSError, UsageError, ValueError):
        return None
    if not isinstance(options.get('method'), str):
        return None
    # The report needs a value here.
    return {name: str(value) if name in _SINGLE and isinstance(value, (dict, list)) else value
            for name, value in options.items()}


def _read_facts(path: Path) -> Any:
    import yaml
    try:
        return yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, yaml.YAMLError) as e:
        raise RunError(f'{path}: cannot be read ({first_line(e)})') from e


def number(value: Any) -> float | None:
    """Return a number, None for anything else: NaN and infinity are not results."""
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        return None
    if not abs(number) < 1e18:
        return None
    return int(number) if number.is_integer() else number


def _product(*factors: Any) -> Any:
    return None if None in factors else math.prod(factors)


# Which runs belong together, and their names


def make_recipe(options: dict[str, Any], sides: tuple[str, ...], teacher: Run | None = None) -> dict[str, Any]:
    """Return the options of what these branches learn; those of one branch without its letter.

    A teacher from a run's folder counts by the recipe of that run, not by its path: students of several seeds with one
    teacher each are one group.

    Args:
        options: Options of a run.
        sides: Branches that learn.
        teacher: The run of the teacher.
    """
    method = options['method']
    idle = {dest for dest, entry in build_parser().entries.items() if entry.row.how}
    idle.add('dataset')  # the data are compared by themselves
    if method in METHODS:
        idle |= set(METHOD_OPTIONS).difference(field.name for field in fields(METHODS[method].options))
        idle.update(*idle_options(make_options(options)).values())
    absent = tuple(f'_{side}' for side in SIDES if side not in sides)
    recipe = {
        name[:-2] if len(sides) == 1 and name.endswith(f'_{sides[0]}') else name: value
        for name, value in options.items()
        if value is not None and name not in idle and not name.endswith(absent)
        # Values for both branches; the branches' own values count.
        and not any(f'{name}_{side}' in options for side in SIDES)
    }
    if len(sides) == 1 and method in METHODS and METHODS[method].teacher != 'never':
        recipe['branch'] = sides[0]  # the terms depend on it
    if recipe.get('teacher') and teacher:
        place = Path(recipe['teacher'])
        recipe['teacher'] = place.name if place.is_file() else '', {**teacher.recipe, 'teacher': None}
    return recipe


def differing(*recipes: dict[str, Any]) -> list[str]:
    """Return the options in which recipes differ."""
    names = sorted({name for recipe in recipes for name in recipe})
    return [name for name in names if any(recipe.get(name) != recipes[0].get(name) for recipe in recipes)]


def _data(run: Run) -> tuple:
    """Return what runs of one row share of their data; their training images may be several subsets."""
    dataset, folder = str(run.options.get('dataset') or ''), str(run.options.get('data_dir') or '')
    if run.data:
        train, held_out = run.data['train'], run.data['validation']
        return dataset, train['images'], *held_out.items()
    generic = dataset.lower().startswith('wds/') or dataset.lower() in ('torch/folder', 'torch/image_folder')
    return (dataset if dataset and not generic else os.path.normpath(folder),)


def data_title(run: Run) -> str:
    """Return the name of the data of a run."""
    dataset, folder = str(run.options.get('dataset') or ''), str(run.options.get('data_dir') or '')
    if not run.data or dataset:
        return dataset or os.path.normpath(folder)
    train, held_out = run.data['train'], run.data['validation']
    classes = f', {len(train["classes"])} classes' if train['classes'] else ''
    return f'{train["images"]:,} images in {train["split"]}, {held_out["images"]:,} in {held_out["split"]}{classes}'


def own_options(run: Run) -> list[str]:
    """Return the options of a run's method, without its teacher, that have an effect and are not at their defaults."""
    entries, method = build_parser().entries, METHODS.get(run.options['method'])
    names = {field.name for field in fields(method.options)} if method else set()
    names -= {field.name for field in fields(TeacherOptions)}
    return [name for name in names if run.recipe.get(name, entries[name].default) != entries[name].default]


def terms_off(run: Run) -> list[str]:
    """Return the weights of the terms of a run's method that are off."""
    return sorted(name for name in own_options(run) if name.endswith('_weight') and number(run.recipe[name]) == 0)


def framework(run: Run) -> str:
    """Return the name of a run's method, with the terms that are off and the models that teach."""
    off, given = ' and '.join(name.removesuffix('_weight') for name in terms_off(run)), run.options.get('teacher')
    teachers = run.frozen or (run.teacher.models if run.teacher else [Path(str(given)).name] if given else [])
    return run.options['method'] + (f' without {off}' if off else '') + (
        f' from {" + ".join(teachers)}' if teachers else '')
