"""Recipes: YAML files of options, read as what they would be on the command line."""
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..core.names import SIDES
from ..errors import UsageError
from .parser import Entry, OptionParser, did_you_mean, flag_of, literal
from .refused import check_not_refused, is_inert, refusal_of

# A recipe is about a page. A far larger file is not a recipe, and could take long to read.
MAX_RECIPE_BYTES = 100_000
MAX_RECIPE_VALUES = 10_000  # with aliases written out
MAX_RECIPE_DEPTH = 20


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a file of options with YAML's own values, for options that the parser does not read.

    Raises:
        UsageError: The file is not a valid recipe.
    """
    import yaml
    read_recipe(path)  # its size and its tags
    try:
        return yaml.safe_load(path.read_bytes())
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError):
        raise UsageError(f'{path}: a value does not match its YAML tag') from None


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
        raise UsageError(f'{path} cannot be read: {error.strerror}') from None
    except UnicodeDecodeError:
        raise UsageError(f'{path} is not a text file in UTF-8') from None
    except RecursionError:
        raise UsageError(f'{path} is nested too deeply') from None
    # Of PyYAML, the last two for a character or a version that can't be.
    except (yaml.YAMLError, OverflowError, ValueError) as error:
        mark = getattr(error, 'problem_mark', None)
        line = f', line {mark.line + 1}' if mark else ''
        raise UsageError(f"{path}{line} is not YAML: {getattr(error, 'problem', None) or error}") from None


# YAML's own tags, and the kind of node that each may have.
_TAGS = {
    **dict.fromkeys(('null', 'bool', 'int', 'float', 'str', 'timestamp', 'value', 'merge'), 'scalar'),
    'seq': 'sequence', 'map': 'mapping'}


def _node_value(node, path: Path, counter: Iterator[int], depth: int = 0) -> Any:
    def read(inner):
        return _node_value(inner, path, counter, depth + 1)

    where = f'{path}, line {node.start_mark.line + 1}'
    if depth > MAX_RECIPE_DEPTH:
        raise UsageError(f'{path} is nested too deeply')
    if next(counter) > MAX_RECIPE_VALUES:
        raise UsageError(f'{path} is too large for a recipe, it has more than {MAX_RECIPE_VALUES} values')
    kind = node.tag.removeprefix('tag:yaml.org,2002:')
    if node.id != _TAGS.get(kind):
        raise UsageError(f'{where}: the tag {node.tag} is not allowed here')
    if kind == 'seq':
        return [read(item) for item in node.value]
    if kind == 'map':
        return _mapping(node, path, read)
    if any(c == '\0' or '\ud800' <= c <= '\udfff' for c in node.value):
        raise UsageError(f'{where}: {node.value!r} is not text')
    if kind == 'null':
        return None
    return node.value.lower() in ('true', 'yes', 'on') if kind == 'bool' else node.value


def _mapping(node, path: Path, read: Callable[[Any], Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = read(key_node), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UsageError(f'{path}, line {line}: {key!r} is not the name of an option')
        if key in values:
            raise UsageError(f'{path}, line {line}: {key} is given twice')
        values[key] = read(value_node)
    return values


def _spell(value: Any) -> str:
    """Return the Python expression of a value of `model_kwargs` in a recipe."""
    if isinstance(value, list):
        return f"[{', '.join(map(_spell, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_spell(item)}' for key, item in value.items())}}}"
    return repr(literal(value) if isinstance(value, str) else value)


def _joined(name: str, mapping: dict[str, Any]) -> str:
    """Return a mapping as the text of one value: what it has by `name`, then `key=value` of the others, by commas."""
    texts = {
        key: '+'.join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in mapping.items() if value is not None}
    if name not in texts:
        raise UsageError(f'{mapping} has no {name}: expected {{{name}: NAME, option: value, ...}}')
    return ','.join([texts.pop(name), *(f'{key}={text}' for key, text in texts.items())])


def option_tokens(entry: Entry, value: Any) -> list[str]:
    """Return the command line of one option of a recipe."""
    flag, (kind, nargs) = entry.flag, entry.values
    if kind is bool or (entry.row.const is not None and isinstance(value, bool)):
        if not isinstance(value, bool):
            raise UsageError(f'{value!r} is not true or false')
        off = [f'--no-{flag[2:]}'] if kind is bool and not entry.dest.startswith('no_') else []
        return [flag] if value else off
    if nargs == '*' and isinstance(value, dict):
        return [flag, *(f'{key}={_spell(item)}' for key, item in value.items())]
    values = value if isinstance(value, list) and nargs else [value]
    if entry.row.repeats:  # a mapping for each, in YAML
        name = entry.row.flags[0].lstrip('-')
        values = [_joined(name, item) if isinstance(item, dict) else item for item in values]
    for item in values:
        # Text that looks like an option would be taken for one.
        if not isinstance(item, str) or (nargs and re.match(r'-[^\d.]', item)):
            wanted = 'a list of values' if nargs else 'one value'
            raise UsageError(f'{_spell(item)} is not {wanted} (text that YAML takes for something else needs quotes)')
    if entry.row.positional:
        return ['--', *values]
    if not nargs:
        return [f'{flag}={values[0]}']
    return [flag, *values] if values or nargs != '+' else []


def _recipes() -> dict[str, Path]:
    """Return the recipes that the package carries, by name: in the package (wheel) or beside it (clone)."""
    package = Path(__file__).resolve().parents[1]
    folder = package / 'hparams' if (package / 'hparams').is_dir() else package.parent / 'hparams'
    return {path.stem: path for path in sorted(folder.glob('*.yaml'))}


def recipe_path(name: str) -> Path:
    """Return the file that `--config NAME` means: a path, or the name of a recipe that the package carries.

    Raises:
        UsageError: Neither a file nor a recipe.
    """
    if os.path.isfile(name):
        return Path(name)
    recipes = _recipes()
    stem = os.path.basename(name)
    stem = stem[:-len('.yaml')] if stem.endswith('.yaml') else stem
    if os.path.basename(name) == name and stem in recipes:
        return recipes[stem]
    kind = 'a folder' if os.path.isdir(name) else 'neither a file nor the name of a recipe'
    near = [stem] if stem in recipes else get_close_matches(stem, recipes, n=3, cutoff=0.4) or sorted(recipes)[:5]
    raise UsageError(f"--config {name} is {kind}; recipes: {', '.join(near) or 'none'}")


# Options of timm's script for the machine and folders of its run, and for its single model.
_OF_ITS_RUN = (
    'data', 'data_dir', 'device', 'experiment', 'local_rank', 'output', 'resume', 'start_epoch', 'wandb_resume_id')
_OF_ITS_MODEL = (
    'model', 'gp', 'head_init_bias', 'head_init_scale', 'initial_checkpoint', 'model_kwargs', 'pretrained_path')


def _from_timm(path: Path, recipe: dict[str, Any], command_line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe as that of a pair, where it is one of timm's script: its `model` is the branch that is not named.

    Its options for the run are left out, those for its model become that branch's.
    """
    recipe = {key.replace('-', '_') if 'model' in recipe else key: value for key, value in recipe.items()}
    model = recipe.get('model')
    if model is None:
        return recipe
    if not isinstance(model, str) or not model:
        raise UsageError(f'{path}: model: {model!r} is not the name of a model')
    free = [side for side in SIDES if f'model_{side}' not in {**recipe, **command_line}]
    if len(free) > 1:
        raise UsageError(f'{path}: model: {model} is one model of two: --model-b NAME makes it branch a, the partner '
                         f'of NAME, --model-a NAME makes it branch b (--model-b "" with --method solo: it is alone)')
    recipe = {key: value for key, value in recipe.items() if key not in _OF_ITS_RUN}
    own = {key: recipe.pop(key) for key in _OF_ITS_MODEL if key in recipe}
    sides = free or [side for side in SIDES if command_line.get(f'model_{side}') == model]
    return {**recipe, **{f'{key}_{side}': value for side in sides for key, value in own.items()}}


def load_recipe(parser: OptionParser, path: Path, command_line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a recipe file gives, by dest; it may be an `args.yaml` of timm's train script."""
    given: dict[str, Any] = {}
    for key, value in _from_timm(path, read_recipe(path), command_line).items():
        dest = key.replace('-', '_')
        where = f'{path}: {key}'
        entry = parser.entries.get(dest)
        value = entry.row.null if value is None and entry else value
        if value is None or (refusal_of(flag_of(dest)) and is_inert(dest, value)):
            continue
        check_not_refused(flag_of(dest), where)
        if dest == 'config':
            raise UsageError(f'{where}: a recipe cannot name another recipe')
        if entry is None:
            raise UsageError(f'{where} is not an option{did_you_mean(key, parser.entries)}')
        if dest in given:
            raise UsageError(f'{where} is given twice')
        try:
            tokens = option_tokens(entry, value)
        except UsageError as error:
            raise UsageError(f'{where}: {error}') from None
        given.update(parser.parse(tokens, where))
    return given


# Further arguments of a model that set which files and addresses timm reads and writes.
_FILES_OF_A_MODEL = ('cache_dir', 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay')


def check_foreign(path: Path, given: dict[str, Any]) -> None:
    """Raise UsageError where a recipe, which may be untrusted, sets what only the command line may."""
    if given.get('dataset_trust_remote_code'):
        raise UsageError(f'{path}: dataset_trust_remote_code: a recipe cannot allow a data set to run code, only '
                         f'--dataset-trust-remote-code on the command line can')
    output = given.get('output', '')
    if os.path.isabs(output) or '..' in Path(output).parts:
        raise UsageError(f'{path}: output: {output} is not below the current folder; give --output on the command line')
    for dest in ('model_kwargs', *(f'model_kwargs_{side}' for side in SIDES)):
        for key in _FILES_OF_A_MODEL:
            if key in given.get(dest, {}):
                raise UsageError(f'{path}: {dest}: {key} names files, only the command line can give it')
