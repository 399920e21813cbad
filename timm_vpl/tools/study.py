"""A study: a plan of rows and seeds as plain `timm-vpl train` commands, run one after the other, and compared."""
import fcntl
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError, UsageError
from ..options.options import build_parser, read_args, recipe_path, recipe_values
from ..options.parsing import did_you_mean, option_tokens, read_recipe, show
from ..text import one_line
from .comparison import paired_difference
from .report import find_baselines, make_groups, report
from .runs import Run, read_options, read_run

PLAN_KEYS = ('base', 'data', 'seeds', 'rows')
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
        teacher: The run whose weights teach it.
    """
    row: str
    seed: str
    folder: Path
    options: tuple[str, ...]
    data_dir: str | None
    teacher: 'PlannedRun | None' = None

    def command(self, output: Path | None = None, teacher: Path | None = None) -> list[str]:
        """Return the arguments of `timm-vpl train`, in another output folder or with another teacher if need be."""
        words = list(self.options)
        if self.data_dir:
            words += ['--data-dir', self.data_dir]
        if self.teacher:
            words += ['--teacher', str(teacher or self.teacher.folder)]
        return [*words, '--output', str(output or self.folder.parent), '--experiment', f'{self.row}-seed-{self.seed}',
                '--resume', 'auto']

    @property
    def log(self) -> Path:
        """File of what the run prints, beside its folder."""
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


def read_plan(path: Path, data_dir: str | None, output: Path) -> list[PlannedRun]:
    """Return the runs of a plan: a seed has all rows before the next begins, a teacher comes before its students.

    Raises:
        UsageError: The plan, or the command line that comes of a row, is wrong.
    """
    plan = read_recipe(path)
    for key in plan:
        if key not in PLAN_KEYS:
            raise UsageError(f'{path}: {key} is not a key of a plan{did_you_mean(key, PLAN_KEYS)}')
    base, rows, seeds = plan.get('base'), plan.get('rows'), plan.get('seeds')
    names = [row.get('name') if isinstance(row, dict) else None for row in rows] if isinstance(rows, list) else []
    for key, wanted, good in (
            ('base', 'a recipe', isinstance(base, str)),
            ('rows', 'a list of mappings, each with a name',
             names and all(isinstance(name, str) and name for name in names)),
            ('seeds', 'a list of numbers',
             isinstance(seeds, list) and seeds and all(isinstance(seed, str) for seed in seeds))):
        if not good:
            raise UsageError(f'{path}: {key}: expected {wanted}')
    for kind, values in (('row', names), ('seed', seeds)):
        if len(set(values)) < len(values):
            raise UsageError(f'{path}: a {kind} is given twice: {", ".join(values)}')
    beside = path.parent / base
    config = str(beside if beside.is_file() else recipe_path(base))
    if data_dir and plan.get('data'):
        data_dir = os.path.join(data_dir, plan['data'])
    runs: dict[tuple[str, str], PlannedRun] = {}
    pending = [(seed, row) for seed in seeds for row in rows]
    while pending:
        ready = next((key for key in pending if (key[0], key[1].get('teacher')) in runs
                      or key[1].get('teacher') not in names), None)
        if ready is None:
            raise UsageError(f'{path}: {pending[0][1]["name"]}: its teacher is taught by itself')
        pending.remove(ready)
        seed, row = ready
        teacher = runs.get((seed, row.get('teacher')))
        given = {key: value for key, value in row.items() if key != 'name' and not (key == 'teacher' and teacher)}
        runs[seed, row['name']] = PlannedRun(
            row['name'], seed, output / f'{row["name"]}-seed-{seed}',
            ('--config', config, *_tokens(given, f'{path}: {row["name"]}'), '--seed', seed),
            data_dir and data_dir.replace('{seed}', seed), teacher)
    return list(runs.values())


def _tokens(given: dict[str, Any], where: str) -> list[str]:
    """Return the command line of a row's options."""
    actions = build_parser().actions()
    tokens = []
    for key, value in given.items():
        dest = key.replace('-', '_')
        if dest not in actions:
            raise UsageError(f'{where}: {key} is not an option{did_you_mean(key, actions)}')
        try:
            tokens += option_tokens(actions[dest], value)
        except UsageError as e:
            raise UsageError(f'{where}: {key}: {e}') from None
    return tokens


def check_plan(runs: Iterable[PlannedRun]) -> None:
    """Refuse a command line that `timm-vpl train` would refuse, and a finished run of other options.

    Raises:
        UsageError: With the row and the seed.
    """
    for run in runs:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A teacher's folder may not be there yet.
            args, parser, _ = read_args(run.command(teacher=run.folder.parent))
        except UsageError as e:
            raise UsageError(f'{run.row}, seed {run.seed}: {e}') from None
        if run.finished() is None:
            continue
        then, now = read_options(run.folder), recipe_values(args)
        for dest in sorted({*then, *now} - parser.how - {'teacher'} | {'seed'}):
            preset = parser.presets.get(dest)
            before, after = then.get(dest, preset), now.get(dest, preset)
            if before != after and show(before) != show(after):  # '' and none are alike
                raise UsageError(f'{run.folder}: is finished with {dest} {show(before)}, the plan says {show(after)}; '
                                 f'name the row otherwise, or move the folder away')


def study(args) -> int:
    """Do the runs of a plan that are not done, as the options of `timm-vpl study` say, and print the comparison.

    Returns:
        Exit status: 0, 1 where a run failed, 128 + N after signal N.

    Raises:
        UsageError: The plan is wrong, or a finished run has other options.
        RunError: Another study is at work in this folder.
    """
    plan = Path(args.plan)
    output = Path(args.output or Path('output', 'study', plan.stem))
    runs = read_plan(plan, args.data_dir, output)
    check_plan(runs)
    left = [run for run in runs if run.finished() is None]
    # A run whose weights are gone is done again for the sake of its students.
    again = [run for run in dict.fromkeys(run.teacher for run in left) if run and run not in left]
    left = [run for run in runs if run in left or (run in again and not run.has_weights())]
    if args.print_commands:
        print('\n'.join(shlex.join(['timm-vpl', 'train', *run.command()]) for run in left))
        return 0
    with open(output / '.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f'{output}: another study, or a run that it started, is at work here') from None
        if args.dry_run:
            print(dry_run(runs, left))
            return 0
        failed = Runner(left, args.jobs, args.limit_minutes, lock.fileno()).run()
    print(conclusion(runs))
    for line in failed:
        print(f'Failed: {line}', file=sys.stderr)
    return bool(failed)


class Runner:
    """Starts runs in their order, some at a time.

    Args:
        runs: The runs.
        jobs: How many at a time.
        limit_minutes: No run is started that would not end in this time.
        lock: File descriptor that the runs inherit, so that a study is at work while one of them is.
    """

    def __init__(self, runs: Sequence[PlannedRun], jobs: int, limit_minutes: float | None, lock: int):
        self.waiting = list(runs)
        self.total = len(runs)
        self.jobs = jobs
        self.lock = lock
        self.end = None if limit_minutes is None else time.time() + 60 * limit_minutes
        self.estimates: dict[str, float] = {}
        self.active: dict[PlannedRun, tuple[subprocess.Popen, float]] = {}
        self.failed: dict[PlannedRun, str] = {}
        self.left_out: set[PlannedRun] = set()

    def run(self) -> list[str]:
        """Run all; return a line for each run that failed."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self.waiting or self.active:
                self._start()
                time.sleep(0.2)
                for run, (process, started) in list(self.active.items()):
                    if process.poll() is not None:
                        del self.active[run]
                        self._ended(run, process.returncode, time.time() - started)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return list(self.failed.values())

    def _start(self) -> None:
        for run in list(self.waiting):
            if run.teacher in self.active or run.teacher in self.waiting or len(self.active) >= self.jobs:
                continue
            self.waiting.remove(run)
            if run.teacher in self.failed:
                self.failed[run] = f'{run.folder.name}: its teacher {run.teacher.folder.name} failed'
            elif run.teacher in self.left_out or self._too_late(run):
                self.left_out.add(run)
                print(f'{run.folder.name}: not started, it would not end in time', flush=True)
            elif run not in self.failed:
                with open(run.log, 'ab') as log:
                    process = subprocess.Popen(
                        [sys.executable, '-m', 'timm_vpl', 'train', *run.command()],
                        stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[self.lock])
                self.active[run] = process, time.time()

    def _too_late(self, run: PlannedRun) -> bool:
        """Return whether a run would not end in time; where its trial fails, the run has failed."""
        if self.end is None:
            return False
        try:
            return time.time() + MARGIN * self._expected(run) > self.end
        except RunError as e:
            self.failed[run] = str(e)
            return False

    def _expected(self, run: PlannedRun) -> float:
        if run.row not in self.estimates:
            with tempfile.TemporaryDirectory() as folder:
                self.estimates[run.row] = trial(run, Path(folder))[0]
        return self.estimates[run.row]

    def _ended(self, run: PlannedRun, status: int, seconds: float) -> None:
        done = self.total - len(self.waiting) - len(self.active)
        result = f'{seconds / 60:.1f} min'
        if status or run.finished() is None:
            lines = run.log.read_text(errors='replace').strip().splitlines() or ['']
            self.failed[run] = f'{run.folder.name}: status {status}, {one_line(lines[-1])}'
            result += f', FAILED: {one_line(lines[-1], 200)}'
        else:
            self.estimates[run.row] = max(seconds, self.estimates.get(run.row, 0.))
        print(f'{done}/{self.total} {run.folder.name}: {result}', flush=True)

    def _stop(self, number: int, frame: Any) -> None:
        for process, _ in self.active.values():
            process.terminate()
        for process, _ in self.active.values():
            process.wait()
        raise SystemExit(128 + number)


def trial(run: PlannedRun, folder: Path) -> tuple[float, float]:
    """Train a row for an epoch; return the seconds that a whole run of it would take, and the cores that it keeps busy.

    Args:
        run: A run of the row.
        folder: Where the trial is done.

    Raises:
        RunError: It failed.
    """
    teacher = run.teacher
    if teacher and not teacher.has_weights():
        trial(teacher, folder)
    place = folder / teacher.folder.name if teacher and not teacher.has_weights() else None
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(
        [sys.executable, '-m', 'timm_vpl', 'train', *run.command(folder, place), '--stop-epoch', '1', '--no-export'],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds, after = time.time() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ['']
        raise RunError(f'{run.folder.name}: its trial failed: {one_line(lines[-1])}')
    tried = read_run(folder / run.folder.name)
    epoch = tried.rows[0]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    evaluations = -(-tried.num_epochs // int(tried.options['val_interval']))
    further = (tried.num_epochs - 1) * epoch['seconds'] + (evaluations - 1) * epoch['eval_seconds']
    return seconds + further, cpu / seconds


def dry_run(runs: Sequence[PlannedRun], left: Sequence[PlannedRun]) -> str:
    """Return a table of what the runs that are left would take, measured by an epoch of each row."""
    lines, hours, core_hours = ['row  runs left  minutes a run  core-hours'], 0., 0.
    with tempfile.TemporaryDirectory() as folder:
        for row in dict.fromkeys(run.row for run in left):
            todo = [run for run in left if run.row == row]
            try:
                seconds, cores = trial(todo[0], Path(folder, 'row-' + row))
            except RunError as e:
                lines.append(str(e))
                continue
            each = seconds / 3600 * len(todo)
            hours, core_hours = hours + each, core_hours + each * cores
            lines.append(f'{row}  {len(todo)}  {seconds / 60:.1f}  {each * cores:.2f}')
    return '\n'.join([*lines, f'{len(left)} of {len(runs)} runs left: {hours:.2f} hours one after the other, '
                              f'{core_hours:.2f} core-hours'])


def conclusion(runs: Sequence[PlannedRun]) -> str:
    """Return the report of the finished runs and, for each model, a sentence that says what to run."""
    finished = [run for run in runs if run.finished() is not None]
    if not finished:
        return 'No run is finished.'
    names = {str(run.folder): run.row for run in finished}
    groups = make_groups([run.finished() for run in finished], names)
    branches = [(group, index, model) for group in groups for index, model in enumerate(group.runs[0].models)]
    commands = {
        run.row: shlex.join(['timm-vpl', 'train', *run.options[:-2], *(
            ['--data-dir', run.data_dir] if run.data_dir else [])])
        for run in finished}
    lines = [report(list(names), names=names), '', '## Verdict', '']
    for model in dict.fromkeys(model for *_, model in branches):
        lines.append(_verdict(model, [(g, i) for g, i, m in branches if m == model], groups, commands))
    return '\n'.join(lines)


def _verdict(model: str, rows: list[tuple], groups: list, commands: dict[str, str]) -> str:
    """Return which row is best for a model, by how much, at what cost, and what to run.

    The interval holds for the best of all rows that were compared (Bonferroni).
    """
    found = []
    for group, index in rows:
        baselines = find_baselines(group, index, groups)
        kind = 'flops' if 'flops' in baselines and baselines['flops'].pairs else 'epochs'
        baseline = baselines.get(kind)
        if baseline and len(baseline.pairs) > 1:
            found.append((baseline.difference.mean, group, baseline, {'flops': 'FLOPs', 'epochs': 'epochs'}[kind]))
    if not found:
        return f'- {model}: the seeds do not tell: no row has two seeds in common with the model alone.'
    _, group, baseline, kind = max(found, key=lambda item: item[0])
    gain = paired_difference(
        [run.figure(side, run.num_epochs - 1) - alone.figure(alone.sides[0], alone.num_epochs - 1)
         for side, run, alone in baseline.pairs], 1 - 0.05 / len(found))
    alone, flops = baseline.pairs[0][2], [group.total('flops'), baseline.pairs[0][2].total('flops')]
    cost = f' at {flops[0] / flops[1]:.2f} times its FLOPs' if all(flops) else ''
    text = (f'{group.name} is {gain} points above {model} alone at the same {kind} ({baseline.name}, '
            f'{alone.num_epochs} epochs){cost}; the interval is that of the best of {len(found)} rows')
    if gain.low > 0:
        return f'- {model}: {text}. Run: {commands[group.name]}'
    return f'- {model}: the seeds do not tell: at best {text}. Cheapest: {commands[baseline.name]}'
