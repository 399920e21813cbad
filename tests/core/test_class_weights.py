"""Weights of classes: from the counts or a file, in the labels' loss alone, of a run and of one that goes on.

That their loss is a mean over images, so that processes train as one: test_losses.py.
"""
import json

import pytest
import reference
import torch
import yaml
from runs import PAIR, SMALL, error_line, run, start_run

from timm_vpl import PairOutput
from timm_vpl.core.methods import METHODS
from timm_vpl.data.splits import class_weights, create_split
from timm_vpl.engine.optim import create_criterion
from timm_vpl.options.train import parse_args

COUNTS = {'class0': 12, 'class1': 2, 'class2': 4, 'class3': 6}
BALANCED = [24 / (4 * count) for count in COUNTS.values()]


@pytest.fixture
def imbalanced(digits_folder, tmp_path):
    """The digits with fewer training images of some classes."""
    data = tmp_path / 'imbalanced'
    (data / 'train').mkdir(parents=True)
    (data / 'validation').symlink_to(digits_folder / 'validation')
    images = sorted(digits_folder.glob('train/*/*.png'))
    for name, count in COUNTS.items():
        (data / 'train' / name).mkdir()
        own = [path for path in images if path.parent.name == name]
        for i in range(count):
            (data / 'train' / name / f'{i}.png').symlink_to(own[i % len(own)])
    return data


def split_of(data, num_classes=4):
    dataset = create_split(parse_args([str(data), *PAIR]).data, 'train', 3)
    dataset.num_classes = num_classes
    return dataset


def test_balanced(imbalanced, tmp_path):
    weights = class_weights('balanced', split_of(imbalanced))
    assert weights.dtype == torch.float32 and weights.tolist() == pytest.approx(BALANCED)
    assert sum(w * count for w, count in zip(weights.tolist(), COUNTS.values(), strict=True)) == pytest.approx(24)


@pytest.mark.parametrize('name, text', [
    ('w.txt', '2\n0.5\n0\n1e0\n'), ('w.csv', '2, 0.5,0, 1'), ('w.json', json.dumps({'class_weight': [2, 0.5, 0, 1]}))])
def test_files(name, text, imbalanced, tmp_path):
    (tmp_path / name).write_text(text)
    assert class_weights(str(tmp_path / name), split_of(imbalanced)).tolist() == [2, 0.5, 0, 1]


@pytest.mark.parametrize('text, words', [
    (None, 'no such file'), ('1 1 1', '3 weights, but the data has 4 classes'),
    ('1', '1 weights, but the data has 4 classes'),
    ('1 1 1 -1', 'must be finite and non-negative'), ('1 1 1 nan', 'must be finite and non-negative'),
    ('1 1 1 x', "'x'"), ('', 'non-empty'), ('\x80', ''),
])
def test_files_that_hold_no_weights(text, words, imbalanced, tmp_path, capsys):
    path = tmp_path / 'w.txt'
    if text is not None:
        path.write_bytes(text.encode('latin-1'))
    line = error_line(capsys, imbalanced, *PAIR, *SMALL, '--class-weights', path, '--output', tmp_path / 'output')
    assert line.startswith(f'--class-weights {path}: ') and words in line and not (tmp_path / 'output').exists()


def test_classes_that_can_not_be_balanced(imbalanced, tmp_path, capsys):
    argv = [imbalanced, *PAIR, *SMALL, '--class-weights', 'balanced']
    assert error_line(capsys, *argv, '--num-classes', '5') == (
        '--class-weights balanced: class 4 has no training images')
    dataset = split_of(imbalanced)
    del dataset.reader.targets, dataset.reader.samples
    with pytest.raises(Exception, match='does not give the number of images per class; use a file of weights'):
        class_weights('balanced', dataset)


@pytest.mark.parametrize('method, options', [
    ('vpl', []), ('vpl', ['--bce-loss']), ('vpl', ['--mixup', '0.2']), ('dml', []), ('cosub', ['--drop-path', '0.1'])])
def test_only_the_labels_loss_has_weights(method, options, imbalanced):
    models = PAIR if 2 in METHODS[method].models else PAIR[2:]
    asked = parse_args([str(imbalanced), *models, '--method', method, '--epochs', '10', *options])
    generator = torch.Generator().manual_seed(0)
    logits_a, logits_b, embed_a, embed_b = (
        torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    target = torch.tensor([0, 1, 1, 2, 3, 0])
    if '--mixup' in options:
        target = torch.rand(6, 4, generator=generator, dtype=torch.float64).softmax(1)
    found = []
    for weights in (None, torch.tensor(BALANCED)):
        criterion = create_criterion(asked, 10, torch.device('cpu'), num_classes=4, class_weights=weights)
        criterion.set_epoch(5)
        found.append(criterion.terms(PairOutput(logits_a, logits_b, embed_a, embed_b), target))
    plain, weighted = found
    loss = reference.binary_ce if '--bce-loss' in options or method == 'cosub' else reference.ce
    smoothing = 0. if '--mixup' in options else 0.1
    assert len(plain) > 3
    for name in plain.keys() - {'loss'}:
        if name.startswith('ce_'):
            logits = logits_a if name == 'ce_a_loss' else logits_b
            assert weighted[name].item() == pytest.approx(
                loss(logits, target, smoothing, torch.tensor(BALANCED).tolist()).item(), rel=1e-6)
        else:
            assert torch.equal(weighted[name], plain[name])


def test_a_run_with_weights_goes_on_with_those_that_it_began_with(imbalanced, tmp_path, caplog, capsys):
    caplog.set_level('INFO')
    weights = tmp_path / 'weights.txt'
    weights.write_text(' '.join(map(str, BALANCED)))
    folder = run(imbalanced, tmp_path, '--class-weights', str(weights), '--stop-epoch', '1')
    assert f'--class-weights {weights}: 0.5 (class0) to 3 (class1)' in caplog.text
    data = yaml.safe_load((folder / 'data.yaml').read_text())
    assert data['contents']['train']['class_weights'] == pytest.approx(dict(zip(COUNTS, BALANCED, strict=True)))
    assert yaml.safe_load((folder / 'args.yaml').read_text())['class_weights'] == str(weights)
    argv = [imbalanced, *PAIR, *SMALL, '--resume', folder]
    assert f'--class-weights {weights} before, now none' in error_line(capsys, *argv)
    for text, words in (('1 9 1 1', '[0.5, 3.0, 1.5, 1.0] class weights before, now [1.0, 9.0, 1.0, 1.0]'),
                        ('0 0 0 0', 'all weights are 0')):
        weights.write_text(text)
        assert words in error_line(capsys, *argv, '--class-weights', weights)


def test_a_run_has_the_weights_in_both_branches(imbalanced, tmp_path):
    criterion = start_run(imbalanced, tmp_path, *PAIR, '--class-weights', 'balanced').task.criterion.double()
    target, logits, embed = torch.tensor([0, 1, 2, 3]), torch.rand(4, 4).double(), torch.rand(4, 96)
    terms = criterion.terms(PairOutput(logits, logits, embed, embed), target)
    want = reference.ce(logits, target, 0.1, BALANCED)
    assert float(terms['ce_a_loss']) == float(terms['ce_b_loss']) == pytest.approx(float(want))
