"""Random command lines and recipes: accepted, or refused with status 2 and one line; never a traceback."""
import contextlib
import io
import logging
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_vpl import cli
from timm_vpl.options.commands import COMMANDS, command_parser, parse_command
from timm_vpl.options.refused import REFUSED
from timm_vpl.options.train import build_parser, exit_on_usage_error, parse_args

PARSERS = {'train': build_parser(), **{name: command_parser(name) for name in COMMANDS}}
FLAGS = {name: sorted(parser._option_string_actions) for name, parser in PARSERS.items()}
DESTS = sorted(PARSERS['train'].entries)
WORDS = {
    'train': ['--dataset', 'digits', '--model-a', 'resnet18', '--model-b', 'vit_tiny_patch16_224'],
    'validate': ['resnet18', '--dataset', 'digits'], 'predict': ['resnet18', 'image.png'],
    'inspect': ['resnet18', 'resnet34', '--dataset', 'digits'], 'export': ['run'], 'report': ['run'],
    'study': ['plan.yaml']}

# Surrogates are what bytes that are not UTF-8 become on a command line.
text = st.text(st.characters(codec=None), max_size=12)
hard_text = st.sampled_from([
    '', ' ', '-', '--', '---', '-1', '-1e3', '-.5', '=', '==', '@', '%', '%s', '%(prog)s', '{}', '{0}', '\0',
    '\x1b[31m', '\r\n', '\u2028', '\udc80', '\ud800', '..', '../x', '/', '~', 'nan', '-inf', 'Infinity', '1e400',
    '1_0', '٣', '0x10',
    '9' * 5000, 'a=1', 'a=', '=1', 'a=[', 'a=' + '(' * 300, "a='\\d'", 'a=1 b', 'a=' + ' ' * 20000 + 'b', 'a b' * 9000,
    'x' * 100000, 'None', 'true', 'null', 'auto', 'digits', 'wds/x', 'HFDS/', 'torch/cifar10', 'pipe:true',
    'https://h/{0..9}', 'hf://a', 'hf-hub:', 'hf-hub:a/b', 'local-dir:', 'local-dir:/', 'resnet18.', '.tar'])
numbers = st.one_of(
    st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from([10**4000, -10**400, 5e-324, 1e308])).map(str)
values = st.one_of(text, hard_text, numbers)


@st.composite
def flags(draw, command):
    """A flag of a command; misspelt, cut short or of another spelling now and then."""
    flag = draw(st.sampled_from([*FLAGS[command], *(name.rstrip('*') for name in REFUSED)]))
    i = draw(st.integers(1, len(flag)))
    others = [flag[:i], flag[:i] + flag[i - 1:], flag.replace('-', '_'), flag.upper(), f'--no-{flag[2:]}', flag[1:]]
    return draw(st.sampled_from([flag] * 6 + others))


@st.composite
def command_lines(draw, command):
    """Words of a command line, most often after some that are valid."""
    words = list(WORDS[command]) if draw(st.integers(0, 3)) else []
    for _ in range(draw(st.integers(0, 4))):
        flag, given = draw(flags(command)), draw(st.lists(values, max_size=3))
        words += draw(st.sampled_from([[flag, *given], [flag, *given[:1]], [f'{flag}={"".join(given)}'], given]))
    return words


scalars = st.one_of(values, st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.binary(max_size=8))
nested = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(text, scalars), inner, max_size=4)),
    max_leaves=8)
names = st.one_of(st.sampled_from(DESTS), st.sampled_from(DESTS).map(lambda name: name.replace('_', '-')), text,
                  st.sampled_from(['model', 'kd_x', 'help', 'config', '<<', 'x' * 2000]))
syntax = st.sampled_from([
    'lr', ': ', ':', '- ', '\n', '\n  ', '[', ']', '{', '}', ',', '&a ', '*a', '!!', '!!python/name:os.system ', '!x ',
    '!!seq ', '!!map ', '!!bool ', '!!str ', '!!set ', '!!binary ', '|', '>', '"', "'", '\\', '\\0', '\\ud800',
    '\\UFFFFFFFF', '%YAML 1.1', '%YAML 9' + '9' * 5000, '---', '...', '#', '?', '@', '`', '<<', '=', '~', 'true', '1',
    '\t', '\r', '\ufeff', '\x85', 'epochs: 3\n', 'mean: [1, 2]\n', 'model_kwargs: {a: 1}\n'])
raw_recipes = st.one_of(
    st.lists(st.one_of(syntax, syntax, text), max_size=20).map(
        lambda parts: ''.join(parts).encode('utf-8', 'surrogatepass')),
    st.binary(max_size=60))


def dump(document):
    """Return YAML of a document, of any tags and styles that PyYAML has for it."""
    return yaml.dump(document, Dumper=yaml.Dumper).encode('utf-8', 'surrogatepass')


recipes = st.one_of(st.dictionaries(names, nested, max_size=4).map(dump), nested.map(dump), raw_recipes)


def ends_well(prog, work):
    """Do what a command does until its options are known, and check how that ends."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli._finish(prog, work)
        except SystemExit as e:
            status = e.code
    shown = err.getvalue()
    if status == 0:
        assert shown == '', shown
        return
    assert status == 2 and out.getvalue() == ''
    assert shown.startswith(f'{prog}: error: ') and shown.endswith('\n') and shown.count('\n') == 1, shown
    assert shown[:-1].isprintable(), ascii(shown)
    assert len(shown) <= 1100 and len(shown) > len(f'{prog}: error: x\n'), shown


def drive(command, words):
    """Give a command its words."""
    prog = f'timm-vpl {command}'

    def work():
        with exit_on_usage_error(prog):
            parse_args(words, prog) if command == 'train' else parse_command(command, words, prog)
    ends_well(prog, work)


def drive_recipe(data, words):
    # In a folder of its own for each example: hypothesis shares the fixtures of a test among them.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'recipe.yaml'
        path.write_bytes(data)
        drive('train', [*WORDS['train'], *words, '-c', str(path)])


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No warnings on screen, and nothing in the current folder that a random word could name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    logger = logging.getLogger('timm_vpl')
    monkeypatch.setattr(logger, 'disabled', True)


def try_out(drive, *strategies, examples):
    settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )(given(*strategies)(drive))()


few_or_many = pytest.mark.parametrize('examples', [60, pytest.param(1000, marks=pytest.mark.slow)])


@few_or_many
@pytest.mark.parametrize('command', ['train', 'validate', 'export', 'report'])
def test_command_lines(command, examples):
    try_out(lambda words: drive(command, words), command_lines(command), examples=examples)


@few_or_many
@pytest.mark.parametrize('below', [st.just([]), command_lines('train')], ids=['alone', 'below a command line'])
def test_recipes(below, examples):
    try_out(drive_recipe, recipes, below, examples=examples)


@pytest.mark.parametrize('command', PARSERS)
def test_each_flag_with_each_hard_value(command):
    """No flag alone, and none with a value that is hard on it, as far as the list of these goes."""
    odd = ['', '-', '-1', 'nan', '\0', '9' * 5000, 'a=1', '\x1b[31m', 'x' * 5000]
    for i, flag in enumerate(FLAGS[command]):
        if flag in ('-h', '--help'):
            continue
        drive(command, [*WORDS[command], flag])
        for value in (odd[i % len(odd)], odd[(i + 4) % len(odd)]):
            drive(command, [*WORDS[command], f'{flag}={value}' if i % 2 else flag, *([] if i % 2 else [value])])
