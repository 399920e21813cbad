"""Every recipe parses, builds its real models on the meta device, and its method trains with tiny models."""
from pathlib import Path

import pytest
import torch

from timm_vpl import build
from timm_vpl.cli import train
from timm_vpl.options import parse_args

RECIPES = sorted((Path(__file__).resolve().parent.parent / 'hparams').glob('*.yaml'))
TINY = {'a': 'test_resnet', 'b': 'test_vit'}


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe(path, digits_folder, tmp_path):
    header = [line for line in path.read_text().splitlines() if line.startswith('#')]
    assert any('train_vpl.py --config' in line for line in header) and any('Expected' in line for line in header)

    data = [] if 'dataset:' in path.read_text() else ['--data-dir', str(digits_folder)]
    args = parse_args(['--config', str(path), *data])
    args.num_classes, args.world_size, args.rank = 1000, 1, 0
    data_config = build.resolve_data(args)
    with torch.device('meta'):
        models = {side: build.create_branch(args, side, data_config) for side in args.sides}
        pair = build.PairWrapper(models.get('a'), models.get('b'), affine_side=args.affine_side)
        assert pair(torch.zeros(2, *data_config['input_size'])).logits_a.shape == (2, 1000)

    tiny = [f'--model-{side}={TINY[side]}' for side in args.sides]
    options = [
        '--config', str(path), '--data-dir', str(digits_folder), '--dataset', '', '-b', '16', '--img-size', '32',
        '-j', '0', '--epochs', '2', '--warmup-epochs', '0', '--stop-epoch', '1', '--device', 'cpu', '--no-amp',
        '--output', str(tmp_path), '--model-kwargs']
    assert train([*options, *tiny]) == 0


def test_imagenet_recipe_has_the_papers_learning_rates(digits_folder):
    args = parse_args(['--config', 'imagenet_vpl_resnet50_vitb_300ep', '--data-dir', str(digits_folder)])
    args.world_size = 8
    assert build.learning_rates(args) == pytest.approx({'a': 0.005, 'b': 0.002})
    args.batch_size = 50  # a quarter of the batch, AdamW: half the learning rate
    assert build.learning_rates(args) == pytest.approx({'a': 0.0025, 'b': 0.001})
