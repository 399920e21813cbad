"""The options of a training run: from the command line and its recipe to checked sections.

`parse_args` parses the command line, then the recipe that it names, lets the command line win, resolves the options of
each branch, and checks. Nothing heavy is imported, so that `--help` and errors are fast.
"""
import contextlib
import copy
import functools
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any, get_type_hints

from ..core.methods import METHODS
from ..core.names import SIDES
from ..core.processes import launched
from ..errors import UsageError
from ..text import one_line
from . import sections
from .checks import check
from .parser import Entry, OptionParser, entries_of, flag_of, show
from .recipes import check_foreign, load_recipe, option_tokens, recipe_path
from .refused import check_not_refused

_logger = logging.getLogger('timm_vpl')


@dataclass(frozen=True)
class Options:
    """All options of a run, by section.

    Attributes:
        method: Name of the method.
        own: Options of the method: an instance of its `options`.
        branches: Options of each branch, by side.
        data: Where the images are; the further sections likewise.
        command: The command line: (program, options that were given).
    """
    method: str
    own: Any
    branches: dict[str, sections.Branch]
    data: sections.Data
    input: sections.Input
    loader: sections.Loader
    device: sections.Device
    optimizer: sections.Optimizer
    schedule: sections.Schedule
    augmentation: sections.Augmentation
    batch_norm: sections.BatchNorm
    ema: sections.EMA
    run: sections.Run
    command: tuple[str, dict[str, Any]] = ('', {})

    @property
    def sides(self) -> tuple[str, ...]:
        """The branches."""
        return tuple(self.branches)

    def flat(self) -> dict[str, Any]:
        """Return all options by dest."""
        values = {'method': self.method, **asdict(self.own)}
        for side, branch in self.branches.items():
            values.update((f'{name}_{side}', value) for name, value in vars(branch).items())
        for name in _PLAIN:
            values.update(vars(getattr(self, name)))
        return values


# The sections that are not per branch, by name.
_PLAIN: dict[str, Any] = {name: kind for name, kind in get_type_hints(Options).items() if is_dataclass(kind)}


def make_options(values: Mapping[str, Any], command: tuple[str, dict[str, Any]] = ('', {})) -> Options:
    """Return the options in effect: the given value, else for a branch that of both branches, else the default.

    Args:
        values: What is given.
        command: The command line, as in `Options`.
    """
    def make(section):
        return section(**{field.name: values[field.name] for field in fields(section) if field.name in values})

    branches: dict[str, dict[str, Any]] = {side: {} for side in SIDES}
    for dest, entry in build_parser().entries.items():
        if entry.side in SIDES:
            name, side = dest[:-2], entry.side
            branches[side][name] = copy.copy(values.get(f'{name}_{side}', values.get(name, entry.default)))
    method = make(sections.MethodChoice).method
    return Options(
        method=method,
        own=make(METHODS[method].options),
        branches={side: sections.Branch(**own) for side, own in branches.items() if own['model']},
        **{name: make(section) for name, section in _PLAIN.items()},
        command=command,
    )


def build_parser(prog: str = 'train_vpl.py') -> OptionParser:
    """Return the parser of all options, those of the methods among them."""
    return _build_parser(prog, *METHODS)


@functools.cache
def _build_parser(prog: str, *methods: str) -> OptionParser:
    data, *others = _PLAIN.values()
    own = dict.fromkeys(METHODS[name].options for name in methods)
    return OptionParser(
        [sections.MethodChoice, *own, data, sections.Branch, *others],
        prog=prog,
        usage='%(prog)s [DIR] [-c FILE] --model-a MODEL --model-b MODEL [options]',
        description='Train a CNN (branch a) and a vision transformer (branch b) together: Vision Pair Learning.',
    )


METHOD_OPTIONS = sorted({field.name for method in METHODS.values() for field in fields(method.options)})


@contextlib.contextmanager
def exit_on_usage_error(prog: str) -> Iterator[None]:
    """End the command after a usage error: one line on stderr, exit status 2."""
    try:
        yield
    except UsageError as error:
        print(f'{prog}: error: {one_line(error)}', file=sys.stderr)
        raise SystemExit(error.exit_status) from None


def parse_args(argv: Sequence[str] | None = None, prog: str = 'train_vpl.py') -> Options:
    """Return the options of a run, checked (`read_args`).

    Raises:
        SystemExit: With status 2 after one line (`exit_on_usage_error`) where the input is wrong; with 0 after
            `--help`.
    """
    with exit_on_usage_error(prog):
        return take_args(argv, prog)


def take_args(argv: Sequence[str] | None, prog: str) -> Options:
    """Return the options of a run, checked (`read_args`); warn of those without effect.

    Raises:
        UsageError: The input is wrong.
    """
    options, given = read_args(sys.argv[1:] if argv is None else argv, prog)
    if launched().local_rank == 0:
        warn_without_effect(options, given)
    return options


def read_args(argv: Sequence[str], prog: str = 'train_vpl.py') -> tuple[Options, dict[str, Any]]:
    """Return the options of a run, and what the command line and its recipe gave.

    Raises:
        UsageError: The input is wrong.
    """
    parser = build_parser(prog)
    argv = list(argv)
    for token in argv[:argv.index('--')] if '--' in argv else argv:
        check_not_refused(token.partition('=')[0])
    command_line = name_data_dir(parser.parse(argv))
    given_here = dict(command_line)
    config = command_line.get('config')
    recipe = name_data_dir(load_recipe(parser, recipe_path(config), command_line)) if config else {}
    for dest in command_line:
        for side in SIDES:  # the form for both wins over a branch's own value in the recipe, too
            recipe.pop(f'{dest}_{side}', None)
    folder = command_line.get('resume', recipe.get('resume', ''))
    if os.path.isdir(folder):
        _continue_in(folder, command_line)
    if config:
        check_foreign(recipe_path(config), {
            dest: value for dest, value in recipe.items() if dest not in command_line})
    given = {**recipe, **command_line}
    options = make_options(given, (prog, given_here))
    check(options, given)
    return options, given


def _continue_in(folder: str, command_line: dict[str, Any]) -> None:
    """Let a run continue in its folder, even if the recipe gives other names."""
    for dest, place in zip(('output', 'experiment'), os.path.split(os.path.realpath(folder)), strict=True):
        named = command_line.get(dest, place)
        if (os.path.realpath(named) if dest == 'output' else named) != place:
            raise UsageError(f'--resume {folder}: the run continues in that folder, but {flag_of(dest)} is {named}')
        command_line[dest] = place


def resume_command(options: Options, folder: str) -> str:
    """Return the command that resumes a run in its folder: the given options, without those for the start."""
    prog, given = options.command
    entries = build_parser().entries
    tokens = [
        token for dest, value in given.items()
        if dest not in ('resume', 'no_resume_opt', 'start_epoch', 'output', 'experiment')
        for token in option_tokens(entries[dest], _as_text(value))]
    python = ['python'] if prog.endswith('.py') else []
    return shlex.join([*python, *prog.split(), *tokens, '--resume', folder])


def train_command(values: Mapping[str, Any]) -> str:
    """Return the command that trains by these options, as in args.yaml, without those at their defaults."""
    tokens = []
    for dest, value in values.items():
        entry = build_parser().entries.get(dest)
        if entry and value is not None:
            default = values.get(dest[:-2], entry.default) if entry.side in SIDES else entry.default
            tokens += option_tokens(entry, _as_text(value)) if show(value) != show(default) else []
    return shlex.join(['timm-vpl', 'train', *tokens])


def _as_text(value: Any) -> Any:
    """Return a value as in a recipe."""
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return value if isinstance(value, (bool, dict)) else '' if value is None else str(value)


def name_data_dir(given: dict[str, Any]) -> dict[str, Any]:
    """Move the positional argument DIR to `data_dir`."""
    data = given.pop('data', None)
    if data is None:
        return given
    if given.get('data_dir', data) != data:
        raise UsageError(f"DIR {data} and --data-dir {given['data_dir']} differ; give only one of them")
    return {**given, 'data_dir': data}


def plain(value: Any) -> Any:
    """Return a value as recipes and checkpoints hold it: several numbers as a list."""
    return list(value) if isinstance(value, tuple) else value


def recipe_values(options: Options) -> dict[str, Any]:
    """Return the options of a run as a flat dict that, dumped as YAML, is a recipe of the same run (`args.yaml`)."""
    entries = build_parser().entries
    return {
        dest: plain(value) for dest, value in options.flat().items()
        if entries[dest].row.recipe and value is not None}


def changed_options(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the options that changed between two starts of a run: lines of refused and of warned changes.

    Args:
        then: `recipe_values` of the first start.
        now: `recipe_values` of this one.
    """
    lines: tuple[list[str], list[str]] = [], []
    sides = [side for side in SIDES if now.get(f'model_{side}')]
    for dest, entry in build_parser().entries.items():
        if not entry.row.recipe or entry.resume == 'free' or entry.side not in (None, *sides):
            continue
        # What is left out had its default; 0, '' and off are values.
        before, after = (plain(values.get(dest, entry.default)) for values in (then, now))
        if before == after or (dest == 'num_classes' and None in (before, after)):  # taken from the data
            continue
        spell = show if show(before) != show(after) else repr
        lines[entry.resume == 'warned'].append(f'{entry.flag} {spell(before)} before, now {spell(after)}')
    return lines


def idle_options(options: Options) -> dict[str, list[str]]:
    """Return the options that have no effect because of the others, by the reason."""
    view = SimpleNamespace(**{
        **options.flat(), 'sides': options.sides, 'branch': options.branches.__getitem__,
        'augmentation': options.augmentation})
    idle: dict[str, list[str]] = {}
    own = entries_of(type(options.own))  # methods may name an option alike
    for dest, entry in {**build_parser().entries, **own}.items():
        reason = _why_idle(options, view, entry)
        if reason:
            idle.setdefault(reason, []).append(dest)
    return idle


def _why_idle(options: Options, view: Any, entry: Entry) -> str | None:
    places = [view]
    if entry.side is None and not hasattr(view, entry.dest):
        return f'--method {options.method} does not use it'
    if entry.side is not None:
        places = [branch for side, branch in options.branches.items() if entry.side in (side, 'both')]
    if not places:
        return f'there is no --model-{entry.side}'
    return next((reason.reason for reason in entry.row.idle if all(map(reason.applies, places))), None)


def warn_without_effect(options: Options, given: Mapping[str, Any]) -> None:
    """Log a line for each reason why options that were given, with another value than the default, have no effect."""
    entries = build_parser().entries
    for reason, dests in idle_options(options).items():
        named = [
            dest for dest, value in given.items()
            if dest in dests and value not in (entries[dest].default, entries[dest].row.timm)]
        if named:
            _logger.warning(f"{', '.join(map(flag_of, named))}: no effect, {reason}")
