"""The parser: defaults, branches, recipes, refused options, and the one line that each mistake gets."""
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import yaml

from timm_vpl import ContrastiveLoss, VPLLoss
from timm_vpl.core.names import DEFAULT_TAU
from timm_vpl.core.option import ABSENT, SAME
from timm_vpl.options import recipes, train
from timm_vpl.options.checks import timm_model_names
from timm_vpl.options.page import options_markdown
from timm_vpl.options.parser import show
from timm_vpl.options.recipes import recipe_path
from timm_vpl.options.refused import REFUSED, check_not_refused
from timm_vpl.options.train import build_parser, recipe_values

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


def test_defaults_are_those_of_the_paper():
    args = vars(parse_args(DIGITS))
    wanted = {
        'method': 'vpl', 'x': 20., 'y': 20., 'rho': 1., 'tau': DEFAULT_TAU, 'similarity': 'cosine',
        'contrastive_to': 'b', 'kl_to': 'a', 'affine_side': 'b', 'contrastive_weight': 1., 'kl_weight': 1.,
        'same_class': 'negative', 'gather': True, 'opt': 'adamw', 'sched': 'cosine', 'aa': 'original', 'reprob': 0.25,
        'epochs': 300, 'batch_size': 128, 'model_ema': True, 'model_ema_warmup': True, 'model_ema_decay': 0.9998,
        'lr_a': None, 'lr_b': None, 'lr_base_a': 0.005, 'lr_base_b': 0.002, 'lr_base_size': 1600,
        'weight_decay_a': 0.05, 'weight_decay_b': 0.05, 'sides': ('a', 'b'), 'device': None}
    assert {name: args[name] for name in wanted} == wanted


def test_the_losses_have_the_defaults_of_the_options():
    args = vars(parse_args(DIGITS))
    for loss in (VPLLoss, ContrastiveLoss):
        defaults = {
            name: parameter.default for name, parameter in inspect.signature(loss).parameters.items()
            if parameter.default is not inspect.Parameter.empty}
        shared = {name: args[name] for name in defaults if name in args}
        assert len(shared) >= 4 and shared == {name: defaults[name] for name in shared}


def test_branch_value_wins_over_shared_over_default():
    args = parse_args([
        *DIGITS, '--drop-path', '0.1', '--drop-path-b', '0.3', '--lr-base-a', '.001', '--clip-grad', '1',
        '--channels-last', '--no-channels-last-b', '--no-model-ema'])
    assert (args.drop_path_a, args.drop_path_b) == (0.1, 0.3)
    assert (args.lr_base_a, args.lr_base_b) == (0.001, 0.002)
    assert (args.clip_grad_a, args.clip_grad_b) == (1., 1.)
    assert (args.channels_last_a, args.channels_last_b, args.model_ema) == (True, False, False)


@pytest.mark.parametrize('given', [['a=1', 'b=x', 'c=[1, 2]'], ['a=1 b=x c=[1, 2]']])
def test_key_value_options(given):
    args = parse_args([*DIGITS, '--model-kwargs', *given, '--model-kwargs-b', "d='x e=2'"])
    assert args.model_kwargs_a == {'a': 1, 'b': 'x', 'c': [1, 2]}
    assert args.model_kwargs_b == {'d': 'x e=2'}
    assert args.opt_kwargs == {}


def test_branches_do_not_share_a_dict():
    args = parse_args([*DIGITS, '--model-kwargs', 'a=1'])
    args.model_kwargs_a['a'] = 2
    assert args.model_kwargs_b == {'a': 1}


def test_data_by_position_or_by_name(tmp_path):
    assert parse_args([str(tmp_path), *PAIR]).data_dir == str(tmp_path)
    assert parse_args([*PAIR, '--epochs', '3', str(tmp_path), '--no-aug']).data_dir == str(tmp_path)
    assert parse_args([*PAIR, '--data-dir', str(tmp_path)]).data_dir == str(tmp_path)
    assert parse_args([str(tmp_path), *PAIR, '--data-dir', str(tmp_path)]).data_dir == str(tmp_path)


def test_tar_and_data_sets_without_a_folder(tmp_path):
    tar = tmp_path / 'images.tar'
    tar.touch()
    assert parse_args([str(tar), *PAIR]).data_dir == str(tar)
    for dataset in ('hfds/cifar10', 'HFIDS/a/b', 'tfds/mnist'):
        assert parse_args([*PAIR, '--dataset', dataset]).data_dir is None
    new = str(tmp_path / 'new')
    assert parse_args([*PAIR, '--dataset', 'torch/cifar10', '--dataset-download', '--data-dir', new]).data_dir == new
    assert parse_args([*PAIR, '--dataset', 'wds/x', '--data-dir', 'https://host/x']).data_dir == 'https://host/x'


def test_solo_takes_one_model():
    args = parse_args(['--dataset', 'digits', '--method', 'solo', '--model-b', 'vit_tiny_patch16_224'])
    assert args.sides == ('b',)
    assert parse_args([*DIGITS, '--method', 'solo', '--model-b', '']).sides == ('a',)


@pytest.mark.parametrize('name', [
    'vit_base_patch16_224.augreg_in21k', 'hf-hub:timm/resnet18', 'hf_hub:timm/resnet18', 'tf_efficientnet_b0_ns',
])
def test_model_names_that_timm_takes(name):
    assert parse_args([*DIGITS, '--model-a', name]).model_a == name


def test_local_dir_model_must_exist(tmp_path, capsys):
    assert parse_args([*DIGITS, '--model-a', f'local-dir:{tmp_path}']).sides == ('a', 'b')
    assert error_line(capsys, [*DIGITS, '--model-a', 'local-dir:/no/where']) == (
        '--model-a local-dir:/no/where: no such folder')


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


def test_decimals_that_add_up_to_100_are_taken():
    assert parse_args([*DIGITS, '--x', '70.1', '--y', '29.9']).x == 70.1


def test_other_processes_of_a_machine_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(SystemExit) as caught:
        parse_args(['/no/where', *PAIR])
    assert caught.value.code == 2
    assert capsys.readouterr() == ('', '')


# Recipes


def test_recipe_gives_values_and_the_command_line_wins(recipe):
    path = recipe("""
        model-a: resnet18       # dashes or underscores
        model_b: vit_tiny_patch16_224
        dataset: digits
        y: 10
        lr_base: 1e-3           # text in YAML 1.1, a number to the parser
        amp: true
        model-ema: off
        seed: null
        mean: [0.5, -0.5, 1]
        std: 0.5
        experiment: 007
        model_kwargs: {act_layer: gelu, depths: [1, 2], flag: true}
        torchcompile: true
        local_rank: 1
    """)
    args = parse_args(['--config', path, '--no-amp', '--y', '30'])
    assert (args.model_a, args.model_b, args.y, args.amp, args.model_ema) == (
        'resnet18', 'vit_tiny_patch16_224', 30., False, False)
    assert (args.lr_base_a, args.lr_base_b, args.seed, args.mean_a, args.std_b) == (
        .001, .001, 42, (0.5, -0.5, 1.), (0.5,))
    assert (args.experiment, args.torchcompile) == ('007', 'inductor')
    assert args.model_kwargs_b == {'act_layer': 'gelu', 'depths': [1, 2], 'flag': True}
    assert parse_args(['-c', path]).amp is True


def test_every_crop_of_timm_is_taken():
    timm = pytest.importorskip('timm')
    crops = {timm.get_pretrained_cfg(name).crop_pct for name in timm.list_pretrained()}
    assert max(crops) > 1 and all(parse_args([*DIGITS, '--crop-pct', str(crop)]).crop_pct_a == crop for crop in crops)


def test_no_policy_by_name(recipe):
    assert parse_args([*DIGITS, '--aa', 'none']).aa == parse_args([*DIGITS, '-c', recipe('aa: none')]).aa == ''


def test_null_in_a_recipe_means_not_given_or_no_policy(recipe):
    args = parse_args([*DIGITS, '-c', recipe('aa: null\nreprob: null')])
    assert (args.aa, args.reprob) == ('', 0.25)


def test_shared_option_on_the_command_line_wins_over_a_branch_in_the_recipe(recipe):
    path = recipe('lr_a: 0.1\nlr_b: 0.2\ndrop_b: 0.3')
    args = parse_args([*DIGITS, '-c', path, '--lr', '0.5'])
    assert (args.lr_a, args.lr_b, args.drop_b) == (0.5, 0.5, 0.3)


def test_folder_on_the_command_line_wins_over_the_recipe(recipe, tmp_path):
    path = recipe('data_dir: /no/where')
    assert parse_args([str(tmp_path), *PAIR, '-c', path]).data_dir == str(tmp_path)
    assert parse_args([*PAIR, '-c', recipe(f'data: {tmp_path}')]).data_dir == str(tmp_path)


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


def test_values_of_a_run_are_a_recipe_of_it(recipe):
    args = train.parse_args([
        *DIGITS, '--lr', '1e-3', '--lr-b', '0.5', '--model-kwargs-a', 'a=1', 'b=x y', '--no-aug', '--no-gather',
        '--dist-bn', '', '--wandb-tags', 'one', 'two', '--crop-pct', '0.9', '--aa', '', '--input-size', '3', '32', '32',
    ])
    again = train.parse_args(['-c', recipe(yaml.safe_dump(recipe_values(args)))])
    assert again.flat() == {**args.flat(), 'config': again.run.config}


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
