"""The machinery of options: a parser that knows what was given, types of values, recipe files (YAML) as options.

Nothing heavy is imported here, so that `--help` and a mistake in the command line answer at once.
"""
import argparse
import ast
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import UsageError

_SAME = object()  # the default is timm's

# A recipe is a page of options: what is far larger is none, and could keep the reader busy for long.
MAX_RECIPE_BYTES = 100_000
MAX_RECIPE_VALUES = 10_000  # with aliases written out
MAX_RECIPE_DEPTH = 20


# Types of option values


def number(kind: type, wanted: str, valid: Callable = lambda value: True) -> Callable[[str], Any]:
    """Return the argparse type of a finite number for which `valid` holds; errors name what is `wanted`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        # NaN fails the comparison, an integer of any size passes it.
        if not (-math.inf < value < math.inf and valid(value)):
            raise argparse.ArgumentTypeError(f'{text!r} is not {wanted}')
        return value
    parse.metavar = 'N' if kind is int else 'X'
    return parse


ANY_NUMBER = number(float, 'a finite number')
POSITIVE = number(float, 'a number > 0', lambda value: value > 0)
NON_NEGATIVE = number(float, 'a number >= 0', lambda value: value >= 0)
PROBABILITY = number(float, 'a number from 0 to 1', lambda value: 0 <= value <= 1)
BELOW_ONE = number(float, 'a number >= 0 and < 1', lambda value: 0 <= value < 1)
INSIDE_0_1 = number(float, 'a number > 0 and < 1', lambda value: 0 < value < 1)
REPEATS = number(float, '0 or a number >= 1', lambda value: value == 0 or value >= 1)
COUNT = number(int, 'a whole number >= 1', lambda value: value >= 1)
WHOLE = number(int, 'a whole number >= 0', lambda value: value >= 0)


def name_or_none(text: str) -> str | None:
    """Return the name of a model, None for an empty one."""
    return text or None


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


# The parser


def show(value: Any) -> str:
    if value is None or value == '' or value == [] or value == {}:
        return 'none'
    if isinstance(value, bool):
        return 'on' if value else 'off'
    if isinstance(value, (list, tuple)):
        return ' '.join(map(show, value))
    return f'{value:g}' if isinstance(value, float) else str(value)


class OptionParser(argparse.ArgumentParser):
    """A parser that knows more of each option: our default and timm's, and whether a branch can have its own.

    It never fills in defaults itself: what it returns is what the user gave, so that a recipe and the command line can
    be laid over each other.

    Attributes:
        presets: Default by dest.
        changed: `(flag, our default, timm's, why)` of every option whose default differs from timm's.
        branch_options: Dests of the options that each branch can override.
        nulls: What `null` in a recipe means, by dest, where it does not mean 'not given'.
        how: Dests of the options that say how or where a run is done, not what is trained: runs that differ in
            nothing else are of one row of a report.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, exit_on_error=False, **kwargs)
        self.presets: dict[str, Any] = {}
        self.changed: list[tuple] = []
        self.branch_options: list[str] = []
        self.nulls: dict[str, str] = {}
        self.how: set[str] = set()
        self._section = self

    def error(self, message):
        raise UsageError(message)

    def section(self, title: str) -> None:
        """Begin the group that the options added from here on belong to."""
        self._section = self.add_argument_group(title)

    def option(
            self, flags, default, help, *, shown=None, timm=_SAME, why='', note='', null=None, how=False, **kwargs,
    ) -> argparse.Action:
        """Add an option.

        Args:
            flags: All its spellings, separated by spaces.
            default: Its default. A bool makes an on/off flag with a `--no-` form, unless it begins with `--no-` itself.
            help: What it does; the defaults are added.
            shown: How the default reads in the help, if not as its value.
            timm: timm's default, where ours differs.
            why: Why it differs.
            note: Added to the end of the help.
            null: What `null` in a recipe means, if not 'not given'.
            how: Whether it says how or where a run is done, not what is trained.
        """
        names = flags.split()
        if isinstance(default, bool):
            kwargs['action'] = 'store_true' if names[0].startswith('--no-') else argparse.BooleanOptionalAction
        elif hasattr(kwargs.get('type'), 'metavar'):
            kwargs.setdefault('metavar', kwargs['type'].metavar)
        action = self._section.add_argument(*names, default=argparse.SUPPRESS, **kwargs)
        self.presets[action.dest] = default
        if null is not None:
            self.nulls[action.dest] = null
        if how:
            self.how.add(action.dest)
        defaults = f'default: {shown or show(default)}'
        if timm is not _SAME:
            self.changed.append((names[-1], shown or show(default), show(timm), why))
            defaults += f'; timm: {show(timm)}'
        # Set here because BooleanOptionalAction adds its own idea of the default in some Python versions.
        action.help = help if help is argparse.SUPPRESS else f'{help} ({defaults}){note}'.replace('%', '%%')
        return action

    def branch_option(self, flag, default, help, *, default_b=_SAME, **kwargs) -> None:
        """Add an option that sets both branches, and its forms `-a` and `-b` that set one.

        `default` is that of both branches, or of branch a where `default_b` is given.
        """
        if default_b is _SAME:
            default_b = default
        else:
            kwargs['shown'] = f'{show(default)} for a, {show(default_b)} for b'
        action = self.option(flag, default, help, note=f' (also {flag}-a, {flag}-b)', **kwargs)
        self.branch_options.append(action.dest)
        self.presets[action.dest] = None
        for name in ('shown', 'timm', 'why'):
            kwargs.pop(name, None)
        self.option(f'{flag}-a', default, argparse.SUPPRESS, **kwargs)
        self.option(f'{flag}-b', default_b, argparse.SUPPRESS, **kwargs)

    def actions(self) -> dict[str, argparse.Action]:
        """Return the action of every option by dest, `--help` aside."""
        return {action.dest: action for action in self._actions if action.dest in self.presets}

    def parse(self, tokens: Sequence[str], where: str = '') -> dict[str, Any]:
        """Return the values that `tokens` give, by dest. Errors begin with `where`, or else with the flag."""
        try:
            given, unknown = self.parse_known_args(tokens)
        except argparse.ArgumentError as error:
            message = re.sub('^ignored explicit argument (.*)$', r'takes no value, not \1', error.message)
            raise UsageError(f'{where or error.argument_name}: {message}') from None
        for token in unknown:
            if token.startswith('-') and token != '-':
                flag = token.partition('=')[0]
                near = did_you_mean(flag, self._option_string_actions)
                raise UsageError(f'unknown option {flag}{near} (see --help)')
        if unknown:
            raise UsageError(f'unexpected argument {unknown[0]!r} (see --help)')
        return vars(given)


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


# Recipe files


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a file of options with the values that YAML gives them, for what is not given to the parser.

    Raises:
        UsageError: It would not do as a recipe.
    """
    import yaml
    read_recipe(path)  # its size and its tags
    try:
        return yaml.safe_load(path.read_bytes())
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError):
        raise UsageError(f'{path}: a value is not of the kind that its tag says') from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Return what a recipe file holds: text as written, bools, None, and lists and dicts of these.

    Only the nodes that PyYAML's safe loader composes are read, and no object is made of them: what a value means is
    left to the parser, as on the command line.
    """
    import yaml
    try:
        if not path.is_file():
            raise UsageError(f'{path} is not a file')
        with path.open('rb') as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
        if len(data) > MAX_RECIPE_BYTES:
            raise UsageError(f'{path} is too large for a recipe, it has more than {MAX_RECIPE_BYTES} bytes')
        root = yaml.compose(data.decode('utf-8'), Loader=yaml.SafeLoader)
        if root is None:
            raise UsageError(f'{path} is empty')
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f'{path} is not a mapping of options to values (epochs: 100)')
        return _node_value(root, path, itertools.count())
    except OSError as error:
        raise UsageError(f'{path} can not be read: {error.strerror}') from None
    except UnicodeDecodeError:
        raise UsageError(f'{path} is not a text file in UTF-8') from None
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        line = f', line {mark.line + 1}' if mark else ''
        raise UsageError(f"{path}{line} is not YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise UsageError(f'{path} is nested too deeply') from None
    except (OverflowError, ValueError) as error:  # of PyYAML, for a character or a version that can't be
        raise UsageError(f'{path} is not YAML: {error}') from None


_NODES = {'seq': 'sequence', 'map': 'mapping'}


def _node_value(node, path: Path, counter: Iterator[int], depth: int = 0) -> Any:
    where = f'{path}, line {node.start_mark.line + 1}'
    if depth > MAX_RECIPE_DEPTH:
        raise UsageError(f'{path} is nested too deeply')
    if next(counter) > MAX_RECIPE_VALUES:
        raise UsageError(f'{path} is too large for a recipe, it has more than {MAX_RECIPE_VALUES} values')
    kind = node.tag.replace('tag:yaml.org,2002:', '')
    known = kind in ('null', 'bool', 'int', 'float', 'str', 'timestamp', 'value', 'merge', 'seq', 'map')
    if not known or node.id != _NODES.get(kind, 'scalar'):
        raise UsageError(f'{where}: the tag {node.tag} is not allowed{" here" if known else ""}')
    if kind == 'seq':
        return [_node_value(item, path, counter, depth + 1) for item in node.value]
    if kind == 'map':
        values = {}
        for key_node, value_node in node.value:
            key = _node_value(key_node, path, counter, depth + 1)
            if not isinstance(key, str):
                raise UsageError(f'{where}: {key!r} is not the name of an option')
            if key in values:
                raise UsageError(f'{path}, line {key_node.start_mark.line + 1}: {key} is given twice')
            values[key] = _node_value(value_node, path, counter, depth + 1)
        return values
    if any(c == '\0' or '\ud800' <= c <= '\udfff' for c in node.value):
        raise UsageError(f'{where}: {node.value!r} is not text')
    if kind == 'null':
        return None
    return node.value.lower() in ('true', 'yes', 'on') if kind == 'bool' else node.value


def _spell(value: Any) -> str:
    """Return the Python expression of a value of `model_kwargs` in a recipe."""
    if isinstance(value, list):
        return f"[{', '.join(map(_spell, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_spell(item)}' for key, item in value.items())}}}"
    return repr(literal(value) if isinstance(value, str) else value)


def option_tokens(action: argparse.Action, value: Any) -> list[str]:
    """Return the command line that says what a recipe says of one option."""
    flag = next((name for name in action.option_strings if name.startswith('--')), None)
    if action.nargs == 0 or (action.nargs == '?' and flag and isinstance(value, bool)):
        if not isinstance(value, bool):
            raise UsageError(f'{value!r} is not true or false')
        if isinstance(action, argparse.BooleanOptionalAction):
            return [flag if value else f'--no-{flag[2:]}']
        return [flag] if value else []
    if isinstance(action, KeyValues) and isinstance(value, dict):
        return [flag, *(f'{key}={_spell(item)}' for key, item in value.items())]
    many = action.nargs not in (None, '?')
    values = value if isinstance(value, list) and many else [value]
    for item in values:
        # Text that looks like an option would be taken for one.
        if not isinstance(item, str) or (many and re.match(r'-[^\d.]', item)):
            wanted = 'a list of values' if many else 'one value'
            raise UsageError(f'{_spell(item)} is not {wanted} (text that YAML takes for something else needs quotes)')
    if isinstance(action.nargs, int) and len(values) != action.nargs:
        raise UsageError(f'{_spell(values)} is not a list of {action.nargs} values')
    if many:
        return [flag, *values] if values else []
    return [f'{flag}={values[0]}'] if flag else ['--', values[0]]
