"""A study: a plan of rows and seeds as plain `timm-vpl train` commands, run one after the other, and compared."""
import fcntl
import functools
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from ..bars import bar, set_output
from ..errors import RunError, UsageError
from ..options.commands import Study
from ..options.parser import did_you_mean, show
from ..options.recipes import option_tokens, read_recipe, recipe_path
from ..options.train import build_parser, read_args, recipe_values
from ..text import one_line
from .comparison import paired_difference
from .report import make_groups, make_records, to_markdown
from .runs import Run, read_options, read_run
from .tables import screen_table

PLAN_KEYS = ('base', 'options', 'data', 'seeds', 'rows')
MARGIN = 1.1  # of an estimate, before a run that must end in time is started


@dataclass(frozen=True)
class PlannedRun:
    """A run of a plan.

    Attributes:
        row: Name of its row.
        seed: Its seed.
        folder: Its folder.
        options: Command line of its row's options and seed.
        data_dir: Folder of its images.
        processes: Number of processes that train it.
        teacher: The run whose weights teach it.
    """
    row: str
    seed: str
    folder: Path
    options: tuple[str, ...]
    data_dir: str | None
    processes: int
    teacher: 'PlannedRun | None' = None

    @property
    def launcher(self) -> list[str]:
        """What its arguments follow."""
        if self.processes == 1:
            return ['timm-vpl', 'train']
        return ['torchrun', '--standalone', '--nproc-per-node', str(self.processes), '-m', 'timm_vpl', 'train']

    @property
    def command(self) -> list[str]:
        """Arguments of `timm-vpl train`."""
        data = ['--data-dir', self.data_dir] if self.data_dir else []
        teacher = ['--teacher', str(self.teacher.folder)] if self.teacher else []
        return [*self.options, *data, *teacher, '--output', str(self.folder.parent), '--experiment',
                f'{self.row}-seed-{self.seed}', '--resume', 'auto']

    @property
    def log(self) -> Path:
        """File of the run's output, beside its folder."""
        return self.folder.with_name(f'{self.folder.name}.log')

    def finished(self) -> Run | None:
        """Return the run, if it is finished."""
        if read_options(self.folder) is None:
            return None
        run = read_run(self.folder)
        return None if run.progress else run

    def has_weights(self) -> bool:
        """Return whether there is a checkpoint to teach from."""
        return any(self.folder.glob('best_*.pth.tar'))


def read_plan(path: Path, data_dir: str | None, output: Path, processes: int = 1) -> list[PlannedRun]:
    """Return the runs of a plan: a seed has all rows before the next begins, a teacher comes before its students.

    Raises:
        UsageError: The plan, or the command line of a row, is wrong.
    """
    plan: Any = read_recipe(path)
    for key in plan:
        if key not in PLAN_KEYS:
            raise UsageError(f'{path}: {key} is not a key of a plan{did_you_mean(key, PLAN_KEYS)}')
    base, rows, seeds, common = plan.get('base'), plan.get('rows'), plan.get('seeds'), plan.get('options', {})
    rows = rows if isinstance(rows, list) else []
    if not isinstance(common, dict):
        raise UsageError(f'{path}: options: expected a mapping of options of all rows')
    names: Any = [row.get('name') if isinstance(row, dict) else None for row in rows]
    for key, wanted, values in (
            ('base', 'a recipe', [base]), ('rows', 'a list of mappings, each with a name', names),
            ('seeds', 'a list of numbers', seeds if isinstance(seeds, list) else [])):
        if not values or not all(isinstance(value, str) and value for value in values):
            raise UsageError(f'{path}: {key}: expected {wanted}')
        if len(set(values)) < len(values):
            raise UsageError(f'{path}: {key}: given twice: {", ".join(values)}')
    beside = path.parent / base
    config = str(beside if beside.is_file() else recipe_path(base))
    if data_dir and plan.get('data'):
        data_dir = os.path.join(data_dir, plan['data'])
    by_name = dict(zip(names, rows, strict=True))
    teachers = {name: [other for other in names if other == row.get('teacher')] for name, row in by_name.items()}
    try:
        order = list(TopologicalSorter(teachers).static_order())
    except CycleError as e:
        raise UsageError(f'{path}: {e.args[1][0]}: its teacher depends on itself') from None
    runs: dict[tuple[str, str], PlannedRun] = {}
    for seed, name in product(seeds, order):
        own = ('name', 'teacher') if teachers[name] else ('name',)  # which are not options of its command
        given = {**common, **{key: value for key, value in by_name[name].items() if key not in own}}
        runs[seed, name] = PlannedRun(
            name, seed, output / f'{name}-seed-{seed}',
            ('--config', config, *_tokens(given, f'{path}: {name}'), '--seed', seed),
            data_dir and data_dir.replace('{seed}', seed), processes,
            *(runs[seed, teacher] for teacher in teachers[name]))
    return list(runs.values())


def _tokens(given: dict[str, Any], where: str) -> list[str]:
    """Return the command line of a row's options."""
    entries = build_parser().entries
    tokens = []
    for key, value in given.items():
        dest = key.replace('-', '_')
        if dest not in entries:
            raise UsageError(f'{where}: {key} is not an option{did_you_mean(key, entries)}')
        try:
            tokens += option_tokens(entries[dest], value)
        except UsageError as e:
            raise UsageError(f'{where}: {key}: {e}') from None
    return tokens


def check_plan(runs: Iterable[PlannedRun]) -> None:
    """Refuse a command line that `timm-vpl train` would refuse, and a finished run with other options.

    Raises:
        UsageError: With the row and the seed.
    """
    for run in runs:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        # A teacher's folder may not exist yet.
        teacher = run.teacher and replace(run.teacher, folder=run.folder.parent)
        try:
            options, _ = read_args(replace(run, teacher=teacher).command)
        except UsageError as e:
            raise UsageError(f'{run.row}, seed {run.seed}: {e}') from None
        if run.finished() is None:
            continue
        then, now = read_options(run.folder) or {}, recipe_values(options)
        for dest, entry in build_parser().entries.items():
            before, after = then.get(dest, entry.default), now.get(dest, entry.default)
            is_compared = dest == 'seed' or not (entry.row.how or dest == 'teacher' or entry.side == 'both')
            if is_compared and show(before) != show(after):  # '' and none are alike
                raise UsageError(
                    f'{run.folder}: was finished with {dest} {show(before)}, but the plan has {show(after)}; '
                    f'rename the row, or move the folder away')


def run_study(options: Study) -> int:
    """Train the remaining runs of a plan by the options of `timm-vpl study`, and print the comparison.

    Returns:
        Exit status: 0, 1 where a run failed, 128 + N after signal N.

    Raises:
        UsageError: The plan is wrong, or a finished run has other options.
        RunError: Another study is running in this folder.
    """
    plan = Path(options.plan)
    output = Path(options.output or Path('output', 'study', plan.stem))
    set_output(options.quiet, options.no_progress)
    runs = read_plan(plan, options.data_dir, output, options.nproc_per_node)
    check_plan(runs)
    left = [run for run in runs if run.finished() is None]
    # A run whose weights are gone is repeated for its students.
    again = {run.teacher for run in left if run.teacher and not run.teacher.has_weights()}
    left = [run for run in runs if run in left or run in again]
    if options.print_commands:
        print('\n'.join(shlex.join([*run.launcher, *run.command]) for run in left))
        return 0
    with open(output / '.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f'{output}: another study, or a run of one, is running here') from None
        if options.dry_run:
            print('\n'.join(dry_run(runs, left)))
            return 0
        with bar('Study', 'runs', len(runs), initial=len(runs) - len(left)) as shown:
            failed = Runner(runs, left, options, lock.fileno(), shown).train_all()
    print(conclusion(runs))
    for line in failed:
        print(f'Failed: {line}', file=sys.stderr)
    return bool(failed)


@dataclass
class Runner:
    """Trains runs in their order, some at a time.

    Attributes:
        runs: All runs of the study.
        waiting: Those to do.
        options: Options of the study.
        lock: File descriptor that the runs inherit, so that the folder stays locked while one of them runs.
        shown: Bar of the runs.
    """
    runs: Sequence[PlannedRun]
    waiting: list[PlannedRun]
    options: Study
    lock: int
    shown: Any
    active: dict[PlannedRun, tuple[float, subprocess.Popen]] = field(default_factory=dict)
    failed: dict[PlannedRun, str] = field(default_factory=dict)
    left_out: list[PlannedRun] = field(default_factory=list)  # since they would not finish in time

    def train_all(self) -> list[str]:
        """Train all; return a line for each run that failed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        end = time.time() + 60 * (self.options.limit_minutes or math.inf)
        while self.waiting or self.active:
            for run in list(self.waiting):
                if len(self.active) < self.options.jobs and run.teacher not in (*self.active, *self.waiting):
                    self.waiting.remove(run)
                    self._start(run, end)
            time.sleep(0.2)
            for run, (started, process) in list(self.active.items()):
                if process.poll() is not None:
                    del self.active[run]
                    self._ended(run, process.returncode, time.time() - started)
        return list(self.failed.values())

    def _start(self, run: PlannedRun, end: float) -> None:
        """Start a run, unless its teacher failed, its row can't be trained or the time is too short."""
        try:
            if run.teacher in self.failed:
                raise RunError(f'{run.folder.name}: its teacher {run.teacher.folder.name} failed')
            is_late = run.teacher in self.left_out or (
                end < math.inf and time.time() + MARGIN * expected_seconds(run, self.runs) > end)
        except RunError as e:
            self.failed[run] = str(e)
            return
        if is_late:
            self.left_out.append(run)
            self.shown.write(f'{run.folder.name}: not started, since it would not finish in time')
            return
        with open(run.log, 'ab') as log:
            self.active[run] = time.time(), subprocess.Popen(
                [*_python(run.launcher), *run.command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[self.lock])

    def _ended(self, run: PlannedRun, status: int, seconds: float) -> None:
        result = f'{seconds / 60:.1f} min'
        if status or run.finished() is None:
            line = _last_line(run.log.read_text(errors='replace'))
            self.failed[run] = f'{run.folder.name}: status {status}, {line}'
            result += f', FAILED: {line}'
        self.shown.write(f'{run.folder.name}: {result}; runs left: {len(self.waiting) + len(self.active)}')
        sys.stdout.flush()
        self.shown.update()

    def _stop(self, number: int, frame: Any) -> None:
        for _, process in self.active.values():
            process.terminate()
        for _, process in self.active.values():
            process.wait()
        raise SystemExit(128 + number)


def _python(launcher: Sequence[str]) -> list[str]:
    """Return a launcher as a module of this Python."""
    module = {'timm-vpl': 'timm_vpl', 'torchrun': 'torch.distributed.run'}[launcher[0]]
    return [sys.executable, '-m', module, *launcher[1:]]


def _last_line(text: str) -> str:
    return one_line((text.strip().splitlines() or [''])[-1], 200)


def expected_seconds(run: PlannedRun, runs: Iterable[PlannedRun]) -> float:
    """Return the seconds that a run would take: by a finished run of its row, or else by a trial of one epoch.

    Raises:
        RunError: The trial failed.
    """
    row = [other for other in runs if other.row == run.row]
    return _seconds(next(filter(None, (other.finished() for other in row)), None) or trial(row[0])[0])


def _seconds(run: Run) -> float:
    """Return the seconds of all epochs of a run, at the speed of those that it has done."""
    rows, epochs = run.rows.values(), run.num_epochs
    evaluations = [row['eval_seconds'] for row in rows if row.get('eval_seconds')]
    share = -(-epochs // int(run.options['val_interval'])) if evaluations else 0
    return epochs * fmean(row['seconds'] for row in rows) + share * fmean(evaluations or [0])


_scratch = functools.cache(tempfile.TemporaryDirectory)  # of all trials, removed when the process ends


@functools.cache
def trial(run: PlannedRun) -> tuple[Run, float]:
    """Train a run for an epoch in another folder, and its teacher if that has no weights yet.

    Returns:
        The run, and how many cores it kept busy.

    Raises:
        RunError: It failed.
    """
    there = replace(run, folder=Path(_scratch().name, run.folder.name))
    if run.teacher and not run.teacher.has_weights():
        there = replace(there, teacher=replace(run.teacher, folder=trial(run.teacher)[0].path))
    begun, before = time.time(), os.times()
    done = subprocess.run(
        [*_python(there.launcher), *there.command, '--stop-epoch', '1', '--no-export'],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RunError(f'{run.folder.name}: its trial failed: {_last_line(done.stdout)}')
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return read_run(there.folder), cpu / (time.time() - begun)


def dry_run(runs: Sequence[PlannedRun], left: Sequence[PlannedRun]) -> list[str]:
    """Return a table of the estimated time of the remaining runs, by an epoch of each row; it names rows that fail."""
    table: list[tuple] = []
    broken: list[str] = []
    hours = core_hours = 0.
    for row, count in Counter(run.row for run in left).items():
        try:
            tried, cores = trial(next(run for run in runs if run.row == row))
        except RunError as e:
            broken.append(str(e))
            continue
        each = _seconds(tried) / 3600
        hours, core_hours = hours + count * each, core_hours + count * each * cores
        table.append((row, count, f'{60 * each:.1f}', f'{count * each * cores:.2f}'))
    return [
        *screen_table(('row', 'runs left', 'minutes a run', 'core-hours'), table), *broken,
        f'{len(left)} of {len(runs)} runs left: {hours:.2f} hours one after the other, {core_hours:.2f} core-hours']


def conclusion(runs: Sequence[PlannedRun]) -> str:
    """Return the report of the finished runs and, for each model, a sentence on what to run."""
    finished = {run: done for run in runs if (done := run.finished())}
    if not finished:
        return 'No run is finished.'
    names = {str(run.folder): run.row for run in finished}
    records = make_records(make_groups(finished.values(), names))
    commands = {
        run.row: shlex.join(['timm-vpl', 'train', *run.options[:-2], *(
            ['--data-dir', run.data_dir] if run.data_dir else [])])
        for run in finished}
    return '\n'.join([to_markdown(records, []), '', '## Verdict', '', *(
        _verdict(model, [record for record in records if record['model'] == model], commands)
        for model in dict.fromkeys(record['model'] for record in records))])


def _verdict(model: str, records: list[dict[str, Any]], commands: dict[str, str]) -> str:
    """Return which row is best for a model, by how much, at what cost, and what to run.

    The interval is valid for the best of all compared rows (Bonferroni).
    """
    found = []
    for record in records:
        by_kind = {kind: each for kind, each in record['baselines'].items() if 'gains' in each}
        kind = 'flops' if 'flops' in by_kind else 'epochs'
        if len(by_kind.get(kind, {}).get('gains', ())) > 1:
            found.append((record, by_kind[kind], kind.replace('flops', 'FLOPs')))
    if not found:
        return f'- {model}: not decided: no row has two seeds in common with the model alone.'
    record, baseline, kind = max(found, key=lambda item: item[1]['mean'])
    gain = paired_difference(baseline['gains'], 1 - 0.05 / len(found))
    flops = record['flops'], baseline['solo_flops']
    cost = f' at {flops[0] / flops[1]:.2f} times its FLOPs' if all(flops) else ''
    text = (f'{record["framework"]} is {gain} points above {model} alone at the same {kind} ({baseline["name"]}, '
            f'{baseline["num_epochs"]} epochs){cost}; the interval is that of the best of {len(found)} rows')
    if gain.low is not None and gain.low > 0:
        return f'- {model}: {text}. Run: {commands[record["framework"]]}'
    return f'- {model}: not decided by these seeds: at best {text}. Cheapest: {commands[baseline["name"]]}'
