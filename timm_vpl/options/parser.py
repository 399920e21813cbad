"""From rows to a command line: a parser that returns only what is given, so that a recipe can fill in the rest."""
import argparse
import ast
import dataclasses
import re
import types
import typing
import warnings
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..core.names import SIDES
from ..core.option import ABSENT, SAME, Row, values_of
from ..errors import UsageError


def literal(text: str) -> Any:
    """Return the Python value that `text` spells, or `text` itself if it spells none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of the compiler, on text that is not meant as Python
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


class KeyValues(argparse.Action):
    """Collect `key=value` pairs in a dict, as `timm.utils.ParseKwargs` does (which is slow to import).

    Several pairs may also come as one quoted argument: `--model-kwargs 'a=1 b=x'`.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for text in values:
            spelled = text.partition('=')[2]
            is_one_value = literal(spelled) is not spelled
            for pair in [text] if is_one_value else re.split(r'(?<!\s)\s+(?=[^\W\d]\w*=)', text.strip()):
                key, equals, value = pair.partition('=')
                if not equals or not key.isidentifier():
                    raise argparse.ArgumentError(self, f'{pair!r} is not of the form key=value')
                pairs[key] = literal(value)
        setattr(namespace, self.dest, pairs)


@dataclass(frozen=True)
class Entry:
    """An option as the command line has it: that of a section, or of one branch, or the form that sets both.

    Attributes:
        dest: Its name in a recipe.
        row: What is known of it.
        default: Its default; of a form that sets both, that of branch a.
        type: Annotation of its field.
        side: The branch that it is of; 'both' of a form that sets both.
    """
    dest: str
    row: Row
    default: Any
    type: Any
    side: str | None = None

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return flag_of(self.dest)

    @property
    def values(self) -> tuple[Any, Any]:
        """Type and number of its values, as argparse has them."""
        return values_of(self.type)

    @property
    def resume(self) -> str:
        """Whether a resumed run may have another value: 'fixed', 'free' or 'warned'."""
        return self.row.resume or ('free' if self.row.how else 'warned')

    @property
    def in_card(self) -> bool:
        """Whether a public card may show it."""
        return not self.row.how if self.row.card is None else self.row.card

    @property
    def shown(self) -> str:
        """How its default reads."""
        if self.side == 'both' and self.row.default_b is not SAME:
            return f'{show(self.default)} for a, {show(self.row.default_b)} for b'
        return self.row.shown or show(self.default)


def flag_of(dest: str) -> str:
    """Return the spelling of an option on the command line."""
    return '--' + dest.replace('_', '-')


def as_given(message: str, given: Container[str]) -> str:
    """Return a message that names an option of a branch as it was given: `--mean` where `--mean-a` was not.

    Args:
        message: The message.
        given: What was given, by dest.
    """
    def flag(found):
        name, side = found.groups()
        dest = name.replace('-', '_')
        return f'--{name}' if dest in given and f'{dest}_{side}' not in given else found[0]
    return re.sub(r'--([a-z-]+)-([ab])\b', flag, message)


def show(value: Any) -> str:
    """Return a value as a message names it."""
    if value is None or value in ('', [], (), {}):
        return 'none'
    if isinstance(value, bool):
        return 'on' if value else 'off'
    if isinstance(value, (list, tuple)):
        return ' '.join(map(show, value))
    return f'{value:g}' if isinstance(value, float) else str(value)


def entries_of(section: Any) -> dict[str, Entry]:
    """Return the options of a section by dest; of one of each branch the form that sets both, then those of each."""
    entries = {}
    hints = typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        name, row = field.name, field.metadata['row']
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        dests: dict[str | None, tuple[str, Any]] = {None: (name, default)}
        if getattr(section, 'PER_BRANCH', False):
            default_b = default if row.default_b is SAME else row.default_b
            dests = {'both': (name, default), 'a': (f'{name}_a', default), 'b': (f'{name}_b', default_b)}
        for side, (dest, value) in dests.items():
            if side != 'both' or not row.own_only:
                entries[dest] = Entry(dest, row, value, hints[name], side)
    return entries


class OptionParser(argparse.ArgumentParser):
    """A parser of the options of some sections. It fills in no defaults: what it returns is what was given.

    Args:
        sections: The classes of the sections; one with PER_BRANCH has its options for each branch.
        **kwargs: Further arguments of ArgumentParser.

    Attributes:
        entries: The options by dest.
    """

    def __init__(self, sections: Sequence[type], **kwargs):
        super().__init__(allow_abbrev=False, exit_on_error=False, **kwargs)
        self.entries: dict[str, Entry] = {}
        groups: dict[str, Any] = {}
        for section in sections:
            title = (section.__doc__ or '').strip().rstrip('.')
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            for entry in entries_of(section).values():
                if entry.dest not in self.entries:  # methods share some
                    self.entries[entry.dest] = entry
                    self._add(groups[title], entry)

    def _add(self, group, entry: Entry) -> None:
        row = entry.row
        kwargs: dict[str, Any] = {'default': argparse.SUPPRESS}
        kind, nargs = entry.values
        if kind is bool:
            kwargs['action'] = 'store_true' if entry.dest.startswith('no_') else argparse.BooleanOptionalAction
        else:
            kwargs.update(type=kind, choices=row.choices, metavar=row.metavar or getattr(kind, 'metavar', None))
            if nargs is not None:
                action = KeyValues if nargs == '*' else 'extend' if row.repeats else 'store'
                kwargs.update(nargs=nargs, action=action)
            if row.const is not None:
                kwargs.update(nargs='?', const=row.const)
        names = [entry.dest]
        if not row.positional:
            names = [*row.flags, entry.flag] if entry.side in (None, 'both') else [entry.flag]
            kwargs['dest'] = entry.dest
        elif isinstance(entry.type, types.UnionType):
            kwargs['nargs'] = '?'
        action = group.add_argument(*names, **kwargs)
        # Set here because BooleanOptionalAction adds its own idea of the default in some Python versions.
        action.help = self._help(entry)

    @staticmethod
    def _help(entry: Entry) -> str:
        row = entry.row
        if not row.help or (entry.side in SIDES and not row.own_only):
            return argparse.SUPPRESS
        if row.positional:
            return row.help
        timm = '' if row.timm in (SAME, ABSENT) else f'; timm: {show(row.timm)}'
        return f'{row.help} (default: {entry.shown}{timm})'.replace('%', '%%')

    def error(self, message):
        raise UsageError(message)

    def parse(self, tokens: Sequence[str], where: str = '') -> dict[str, Any]:
        """Return the values that `tokens` give, by dest. Errors begin with `where`, or else with the flag."""
        try:
            given, unknown = self.parse_known_args(tokens)
        except argparse.ArgumentError as error:
            message = re.sub('^ignored explicit argument (.*)$', r'takes no value, but got \1', error.message)
            raise UsageError(f'{where or error.argument_name}: {message}') from None
        for token in unknown:
            if token.startswith('-') and token != '-':
                flag = token.partition('=')[0]
                near = did_you_mean(flag, self._option_string_actions)
                raise UsageError(f'unknown option {flag}{near} (see --help)')
        if unknown:
            raise UsageError(f'unexpected argument {unknown[0]!r} (see --help)')
        return {dest: tuple(value) if isinstance(value, list) else value for dest, value in vars(given).items()}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ', did you mean X or Y?' of the nearest names, or nothing if none is near."""
    def plain(text):
        return text.lstrip('-').replace('_', '-')

    by_plain = {plain(other): other for other in sorted(names)}
    found = [plain(name)] if plain(name) in by_plain else get_close_matches(plain(name), by_plain)
    near = [by_plain[text] for text in found]
    if not near:
        return ''
    return ', did you mean ' + ' or '.join([', '.join(near[:-1]), near[-1]] if near[1:] else near) + '?'
