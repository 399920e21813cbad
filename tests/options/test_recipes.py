"""Every recipe and its header's command parse, its real models are built on the meta device, its method trains."""
import logging
import math
import pickle
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from runs import ROOT, rows
from timm.data import dataset_factory

from timm_vpl.cli import train
from timm_vpl.core.methods import METHODS
from timm_vpl.core.pair import PairWrapper
from timm_vpl.engine.models import create_branch, loader_config, resolve_data
from timm_vpl.engine.optim import learning_rates
from timm_vpl.options.recipes import read_recipe
from timm_vpl.options.train import build_parser, parse_args

RECIPES = sorted((ROOT / 'hparams').glob('*.yaml'))
CLASSES = {'imagenet': 1000, 'cifar10': 10, 'cifar100': 100, 'flowers102': 102, 'cars': 196, 'quickstart': 10,
           'finetune': 10, 'small': 10}
TERMS = {
    'vpl': ('ce_a', 'ce_b', 'contrastive', 'kl'), 'solo': ('ce',), 'dml': ('ce_a', 'kl_a', 'ce_b', 'kl_b'),
    'pair': ('ce_a', 'ce_b', 'kl_b', 'tokens_b', 'kl_a'),
    'distill': ('ce', 'pair'), 'deit': ('ce', 'distill'), 'cosub': ('ce_a', 'ce_b', 'cosub_a', 'cosub_b')}
# Values that a recipe repeats although they are the defaults: the papers give them.
GIVEN = {
    'aa', 'batch_size', 'decay_rate', 'distillation_tau', 'distillation_type', 'epochs', 'lr_base_a', 'lr_base_b',
    'lr_base_size', 'method', 'model_ema', 'model_ema_decay', 'model_ema_warmup', 'momentum', 'opt', 'reprob', 'sched',
    'smoothing', 'warmup_epochs', 'weight_decay_a', 'weight_decay_b', 'x', 'y'}
# Learning rates and images an update that are not the VPL paper's.
OTHERS = {
    '_original_': ({'a': 0.1}, 256), '_deit_hard_vitb': ({'b': 0.001}, 1024), '_deit_soft_vitb': ({'b': 0.001}, 1024),
    '_cosub_vitb': ({'b': 0.003}, 2048), '_finetune384_': ({'b': 5e-6}, 512)}
# One of each way to train; the others take their two steps under `pytest -m slow`.
QUICK = {
    'imagenet_vpl_bi_resnet50_vitb_300ep', 'imagenet_solo_resnet50_original_100ep', 'imagenet_dml_resnet50_vitb_300ep',
    'imagenet_distill_vitb_from_resnet50_300ep', 'imagenet_deit_hard_vitb_300ep', 'imagenet_cosub_vitb_800ep',
    'imagenet_finetune384_vitb', 'quickstart', 'small_data'}
VPL = ROOT / 'hparams' / 'imagenet_vpl_resnet50_vitb_300ep.yaml'
TINY_DISTILLED = 'patch_size=8 embed_dim=48 depth=1 num_heads=3'

each_recipe = pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
quick_recipes = pytest.mark.parametrize('path', [
    pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in RECIPES])


def header(path):
    """Return the lines of a recipe's comment."""
    return [line[2:] for line in path.read_text().splitlines() if line.startswith('#')]


def command(path):
    """Return the words of the command in a recipe's header."""
    lines = iter(header(path))
    text = next(line for line in lines if 'train_vpl.py' in line)
    while text.endswith('\\'):
        text = text[:-1] + next(lines)
    return shlex.split(text)


def arguments(path, data_dir):
    """Return the arguments of the header's command, with stand-ins for the data and for what was trained before."""
    words = command(path)
    argv = words[words.index('train_vpl.py') + 1:]
    for i, word in enumerate(argv[:-1]):
        if word == '--config':
            argv[i + 1] = str(path)
        elif word == '--data-dir':
            argv[i + 1] = str(data_dir)
        elif word == '--teacher':
            assert re.fullmatch(r'output/train/(\w+)', argv[i + 1])
            argv[i + 1] = 'resnet18'
        elif argv[i + 1].startswith('local-dir:'):
            argv[i + 1] = argv[i + 1].rpartition('-')[2]
            argv.append('--no-pretrained')
    return argv if '--no-pretrained' in argv or not path.stem.startswith('finetune') else [*argv, '--no-pretrained']


def options_of(path, data_dir, *more):
    """Return the options of a recipe, as its command gives them on so many processes."""
    options = parse_args([*arguments(path, data_dir), *more])
    return SimpleNamespace(
        **{'model_a': '', 'model_b': '', **options.flat()}, sides=options.sides, options=options,
        world_size=int((re.search(r'--nproc-per-node (\d+)', ' '.join(command(path))) or (0, 1))[1]),
        classes=CLASSES[path.stem.partition('_')[0]])


def is_cnn(args, side):
    return not re.match('(test_)?(vit|deit)', getattr(args, f'model_{side}'))


@each_recipe
def test_header_and_options(path, digits_folder, caplog):
    text = '\n'.join(header(path))
    assert re.search(r'^Expected(:| top-1)', text, re.MULTILINE) or path.stem == 'quickstart' and 'Expected:' in text
    assert all(len(line) <= 120 for line in path.read_text().splitlines())
    words = command(path)
    assert words[words.index('train_vpl.py') + 1:][:2] == ['--config', f'hparams/{path.name}']
    for name in re.findall(r'hparams/(\w+\.yaml)', text):  # other recipes that it names, too
        assert (ROOT / 'hparams' / name).is_file()
    for name in re.findall(r'output/train/(\w+)', text):
        assert (ROOT / 'hparams' / f'{name}.yaml').is_file()

    with caplog.at_level(logging.WARNING):
        args = options_of(path, digits_folder)
    assert not caplog.records  # no option without effect
    given = {name for dest in read_recipe(path) for name in (dest, f'{dest}_a', f'{dest}_b')}
    defaults = {
        dest for dest, entry in build_parser().entries.items()
        if dest in given and entry.side in (None, *args.sides) and getattr(args, dest) == entry.default}
    assert defaults - {'pretrained_a', 'pretrained_b'} <= GIVEN  # the stand-ins undo these two
    kind, _, name = args.dataset.partition('/')
    assert kind in ('', 'digits', 'torch', 'hfds') and (kind != 'torch' or name in dataset_factory._TORCH_BASIC_DS)
    assert '_x' in path.stem or args.method != 'vpl' or (args.x, args.y) == (20, 20)
    if found := re.search(r'_(\d+)ep', path.stem):
        assert args.epochs == int(found[1])
    if 'deit' in path.stem and args.teacher != 'resnet18':
        assert timm.is_model_pretrained(args.teacher)


built = {}


@quick_recipes
def test_real_models_on_the_meta_device(path, digits_folder):
    args = options_of(path, digits_folder)
    names = 'model', 'model_kwargs', 'drop_path', 'img_size'
    key = str([args.classes, METHODS[args.method].uniform_drop_path] + [
        getattr(args, f'{name}_{side}') for side in args.sides for name in names])
    if key not in built:
        configs = resolve_data(args.options)
        with torch.device('meta'):
            models = {side: create_branch(args.options, side, configs[side], args.classes) for side in args.sides}
            pair = PairWrapper(models.get('a'), models.get('b'), affine_side=getattr(args, 'affine_side', 'b')).eval()
            output = pair(torch.zeros(2, *loader_config(configs)['input_size']))
        built[key] = {side: tuple(getattr(output, f'logits_{side}').shape) for side in args.sides}
        assert not METHODS[args.method].distilled(args.options.own) or hasattr(models['b'], 'set_distilled_training')
    assert built[key] == dict.fromkeys(args.sides, (2, args.classes))


@each_recipe
def test_learning_rates(path, digits_folder):
    args = options_of(path, digits_folder)
    lrs = learning_rates(args.options, args.world_size)
    images = args.batch_size * args.world_size
    decays = {getattr(args, f'weight_decay_{side}') for side in args.sides}
    others = [value for part, value in OTHERS.items() if part in path.stem]
    if others:
        assert (lrs, images) == (pytest.approx(others[0][0]), others[0][1])
    elif '_transfer_' in path.stem:
        assert (lrs, decays) == ({'a': 0.0005} if args.model_a else {'b': 0.0001}, {1e-8})
    elif path.stem.startswith('imagenet_'):
        assert lrs == pytest.approx({side: 0.005 if is_cnn(args, side) else 0.002 for side in args.sides})
        assert (images, args.epochs, decays) == (1600, 100 if '_100ep' in path.stem else 300, {0.05})
    else:
        assert (args.world_size, set(lrs)) == (1, set(args.sides))


def test_learning_rates_scale_with_the_batch(digits_folder):
    options = options_of(VPL, digits_folder, '-b', '50')  # a quarter of the batch, AdamW: half the learning rate
    assert learning_rates(options.options, options.world_size) == pytest.approx({'a': 0.0025, 'b': 0.001})


@pytest.mark.parametrize('prefix, others', [
    ('imagenet_', ('original', '_deit_', '_cosub_', '_finetune384_')),
    ('cifar10_', ('_transfer_',)),
])
def test_methods_share_one_recipe(prefix, others):
    own = re.compile(r'epochs|method|x|y|\w+_to|similarity|tau|smoothing|dml_joint|distillation_type|\w+_[ab]')
    common, branches = [], {}
    for path in RECIPES:
        if path.stem.startswith(prefix) and not any(part in path.stem for part in others):
            given = read_recipe(path)
            common.append({dest: value for dest, value in given.items() if not own.fullmatch(dest)})
            for side in [side for side in 'ab' if f'model_{side}' in given]:
                lines = {dest: value for dest, value in given.items() if dest.endswith(f'_{side}')}
                lines[f'model_{side}'] = kind = re.sub('^deit_|_distilled|_(base|small)', '', given[f'model_{side}'])
                branches.setdefault((side, kind), []).append(lines)
    assert len(common) > 10 and all(lines == common[0] for lines in common)
    assert all(lines == group[0] for group in branches.values() for lines in group)


def test_the_literal_recipe_is_the_main_one_with_the_papers_equations():
    literal = read_recipe(VPL.with_name(f'{VPL.stem}_literal.yaml'))
    assert literal == {**read_recipe(VPL), 'similarity': 'dot', 'tau': '64', 'smoothing': '0.0'}


def test_cosub_starts_layer_scale_as_deit_iii(digits_folder):
    args = options_of(ROOT / 'hparams' / 'imagenet_cosub_vitb_800ep.yaml', digits_folder)
    model = timm.create_model(args.model_b, depth=1, **args.model_kwargs_b)
    assert torch.equal(model.blocks[0].ls1.gamma, torch.full((768,), 1e-4))


def test_docs_name_every_recipe():
    text = (ROOT / 'docs' / 'recipes.md').read_text()
    assert set(re.findall(r'^\| `(\w+)` ', text, re.MULTILINE)) == {path.stem for path in RECIPES}
    for path in RECIPES:  # and the figures of the paper that its header gives
        expected = re.search(r'mean of five runs\): (.*?)[;.] ', ' '.join(header(path)))
        row = next(line for line in text.splitlines() if line.startswith(f'| `{path.stem}` '))
        assert expected is None or all(figure in row for figure in re.findall(r'\d\d\.\d\d', expected[1]))


# Two steps with tiny models


def two_steps(path, data_dir, output, *options, source=None):
    """Train a recipe's method, tiny models in the place of its own, for an epoch in which all terms are on.

    Args:
        source: Run whose branches teach, or are the ones to start from.
    """
    args = options_of(path, data_dir)
    argv = [
        '--config', str(path), '--data-dir', str(data_dir), '--dataset', '', '--no-dataset-download',
        '--train-split', 'train', '--val-split', 'validation', '--img-size', '32', '-b', '16', '-j', '0',
        '--epochs', '2', '--start-epoch', '1', '--stop-epoch', '2', '--warmup-epochs', '0', '--device', 'cpu',
        '--no-amp', '--no-pin-mem', '--output', str(output), '--experiment', path.stem, '--no-export', '--model-kwargs']
    if METHODS[args.method].has_teacher(args.options.own, args.sides):
        argv += ['--teacher', str(source)]
    if path.stem.startswith('finetune'):
        argv.insert(0, '--no-pretrained')  # timm's weights of the tiny models are not here
    for side in args.sides:
        tiny = 'test_resnet' if is_cnn(args, side) else 'test_vit'
        if METHODS[args.method].distilled(args.options.own):
            argv += ['--model-kwargs-b', TINY_DISTILLED]
            tiny = 'deit_tiny_distilled_patch16_224'
        elif 'local-dir:' in ' '.join(command(path)):
            tiny = f'local-dir:{source}/export/vpl-{tiny}'
        argv += [f'--model-{side}', tiny]
    assert train([*argv, *options]) == 0
    [row] = rows(output / path.stem)
    losses = [name for name in row if name.startswith('train_') and name.endswith('_loss') and name != 'train_loss']
    assert len(losses) == len(TERMS[args.method])
    assert all(math.isfinite(float(row[name])) for name in [*losses, 'train_loss'])
    return output / path.stem


@pytest.fixture(scope='module')
def pair_run(digits_folder, tmp_path_factory):
    """A run of the main recipe, with its exports."""
    folder = two_steps(VPL, digits_folder, tmp_path_factory.mktemp('pair'), '--export')
    assert {path.name for path in (folder / 'export').iterdir()} == {'vpl-test_resnet', 'vpl-test_vit'}
    return folder


@quick_recipes
def test_two_steps(path, digits_folder, pair_run, tmp_path):
    larger = ['--img-size', '64'] if '_finetune384_' in path.stem else []
    two_steps(path, digits_folder, tmp_path, *larger, source=pair_run)


def test_cifar10_as_torchvision_has_it(tmp_path, monkeypatch):
    """The recipe's own data set, in CIFAR-10's format, with the names of its splits."""
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda path, md5=None: Path(path).exists())
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    images = np.random.default_rng(0)
    for name, count in [*((f'data_batch_{i}', 8) for i in range(1, 6)), ('test_batch', 12)]:
        data = images.integers(256, size=(count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({'data': data, 'labels': [i % 10 for i in range(count)]}))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'class{i}' for i in range(10)]}))
    path = ROOT / 'hparams' / 'cifar10_vpl_convnext_vit.yaml'
    assert read_recipe(path)['dataset'] == 'torch/cifar10'
    two_steps(path, tmp_path, tmp_path / 'output', '--dataset', 'torch/cifar10', '--dataset-download')


def test_flowers_as_a_data_set_of_the_hub(digits_folder, tmp_path, pair_run):
    """The recipe's own splits, among them a sum of two, from a folder that the `datasets` package reads."""
    pytest.importorskip('datasets')
    path = ROOT / 'hparams' / 'flowers102_transfer_vitb.yaml'
    for split, source in (('train', 'train'), ('validation', 'validation'), ('test', 'validation')):
        shutil.copytree(digits_folder / source, tmp_path / 'data' / split)
    given = read_recipe(path)
    assert given['train_split'] == 'train+validation'
    two_steps(
        path, tmp_path / 'cache', tmp_path / 'output', '--dataset', f'hfds/{tmp_path}/data', '--train-split',
        given['train_split'], '--val-split', given['val_split'], source=pair_run)
