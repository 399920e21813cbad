"""The parser: its tables against timm, refused options, recipes, help; what it takes and says: command_lines.yaml."""
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs

from timm_vpl import ContrastiveLoss, VPLLoss
from timm_vpl.core.option import ABSENT, SAME
from timm_vpl.options import recipes, train
from timm_vpl.options.checks import timm_model_names
from timm_vpl.options.page import options_markdown
from timm_vpl.options.parser import show
from timm_vpl.options.recipes import recipe_path
from timm_vpl.options.refused import REFUSED, check_not_refused
from timm_vpl.options.train import build_parser

ROOT = Path(__file__).parents[2]
PAIR = ['--model-a', 'resnet18', '--model-b', 'vit_tiny_patch16_224']
DIGITS = ['--dataset', 'digits', *PAIR]


def parse_args(argv, **kwargs):
    """Return all options by name."""
    options = train.parse_args(argv, **kwargs)
    return SimpleNamespace(**options.flat(), sides=options.sides)


def error_line(capsys, argv):
    """Return what a wrong command line prints, without the `train_vpl.py: error: `."""
    return runs.error_line(capsys, *argv, command=parse_args)


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and return its path."""
    def write(text):
        path = tmp_path / 'recipe.yaml'
        path.write_text(text, encoding='utf-8')
        return str(path)
    return write


def test_the_losses_have_the_defaults_of_the_options():
    args = vars(parse_args(DIGITS))
    for loss in (VPLLoss, ContrastiveLoss):
        defaults = {
            name: parameter.default for name, parameter in inspect.signature(loss).parameters.items()
            if parameter.default is not inspect.Parameter.empty}
        shared = {name: args[name] for name in defaults if name in args}
        assert len(shared) >= 4 and shared == {name: defaults[name] for name in shared}


def test_branches_do_not_share_a_dict():
    args = parse_args([*DIGITS, '--model-kwargs', 'a=1'])
    args.model_kwargs_a['a'] = 2
    assert args.model_kwargs_b == {'a': 1}


def test_model_names_are_those_that_timm_registers():
    timm = pytest.importorskip('timm')
    assert timm_model_names() == frozenset(timm.list_models())


@pytest.mark.parametrize('name, recipes_named', [
    ('/no/where.yml', 'first, second'), ('frist', 'first'), ('elsewhere/first.yaml', 'first')])
def test_recipes_that_are_not_there(name, recipes_named, capsys, monkeypatch):
    monkeypatch.setattr(recipes, '_recipes', lambda: {'first': Path('first.yaml'), 'second': Path('second.yaml')})
    assert error_line(capsys, ['-c', name]) == (
        f'--config {name} is neither a file nor the name of a recipe; recipes: {recipes_named}')


@pytest.mark.parametrize('flag', [
    *(name for name in REFUSED if name != '--model'), '--naflex-loader', '--train-size-probs'])
def test_refused_options(flag, capsys, recipe):
    assert error_line(capsys, [*DIGITS, flag, '1']).startswith(f'{flag} is not available: ')
    key = flag[2:].replace('-', '_')
    path = recipe(f'{key}: 1')
    assert error_line(capsys, [*DIGITS, '-c', path]).startswith(f'{path}: {key} is not available: ')
    assert parse_args([*DIGITS, '-c', recipe(f'{key}: null')])


def test_no_option_is_also_refused():
    for flag in build_parser()._option_string_actions:
        check_not_refused(flag)


# Recipes


def test_every_crop_of_timm_is_taken():
    timm = pytest.importorskip('timm')
    crops = {timm.get_pretrained_cfg(name).crop_pct for name in timm.list_pretrained()}
    assert max(crops) > 1 and all(parse_args([*DIGITS, '--crop-pct', str(crop)]).crop_pct_a == crop for crop in crops)


def test_recipe_by_bare_name(monkeypatch, tmp_path):
    for layout in ('clone', 'wheel'):  # hparams beside the package, or in it
        package = tmp_path / layout / 'timm_vpl'
        hparams = package.parent / 'hparams' if layout == 'clone' else package / 'hparams'
        hparams.mkdir(parents=True)
        (package / 'options').mkdir(parents=True, exist_ok=True)
        (hparams / 'quick.yaml').write_text('epochs: 3')
        monkeypatch.setattr(recipes, '__file__', str(package / 'options' / 'recipes.py'))
        assert recipe_path('quick') == recipe_path('quick.yaml') == hparams / 'quick.yaml'
        assert recipe_path(str(hparams / 'quick.yaml')) == hparams / 'quick.yaml'


# Help and docs


def test_help_shows_both_defaults_and_the_branches(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '1000')
    with pytest.raises(SystemExit) as caught:
        parse_args(['--help'], prog='timm-vpl train')
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith('usage: timm-vpl train ')
    assert '(default: adamw; timm: sgd)' in text
    assert '(default: 0.005 for a, 0.002 for b; timm: 0.1)' in text and 'OPTION-a and OPTION-b set one' in text
    assert 'percent of the epochs before the KL term starts (paper: 20) (default: 20)' in text
    assert '(default: 300)' in text and '--local-rank' not in text


def test_every_changed_default_is_in_the_docs():
    assert [
        (entry.flag, entry.shown, show(entry.row.timm)) for entry in build_parser().entries.values()
        if entry.row.timm not in (SAME, ABSENT) and entry.side in (None, 'both')
    ] == [
        ('--lr-base', '0.005 for a, 0.002 for b', '0.1'), ('--weight-decay', '0.05', '2e-05'),
        ('--device', 'cuda, then mps, then cpu', 'cuda'), ('--opt', 'adamw', 'sgd'), ('--lr-base-size', '1600', '256'),
        ('--aa', 'original', 'none'), ('--reprob', '0.25', '0'), ('--model-ema', 'on', 'off'),
        ('--model-ema-warmup', 'on', 'off'),
    ]
    assert (ROOT / 'docs' / 'options.md').read_text(encoding='utf-8') == options_markdown()


def test_a_mistake_imports_nothing_heavy():
    script = """
import sys
from timm_vpl.options.train import parse_args
try:
    parse_args(['--dataset', 'digits', '--model-a', 'resnet5O', '--model-b', 'x'])
finally:
    print(sorted({'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'yaml'}.intersection(sys.modules)))
"""
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '[]\n')
