"""Validation: the counts of the evaluator, labels by name and number, the command's results."""
import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import status_of
from timm.data import ImageDataset, ImageNetInfo, create_loader, resolve_model_data_config
from timm.models import save_for_hf
from torch.utils.data import DataLoader, TensorDataset

from timm_vpl.cli import main
from timm_vpl.core.processes import Processes
from timm_vpl.engine.evaluate import RealLabelsEvaluator, evaluate
from timm_vpl.engine.trained import TrainedModel
from timm_vpl.options.commands import parse_command
from timm_vpl.tools.runs import COLUMNS
from timm_vpl.tools.validate import _create_pass, load_all, real_label_sets

CPU = torch.device('cpu')
QUICK = ['--device', 'cpu', '--workers', '0']


def validate(capsys, *argv, status=0):
    """Run the command and return the table that it prints, or the one line with which it ends."""
    assert status_of(main, ['validate', *QUICK, *argv]) == status
    out, err = capsys.readouterr()
    if status == 0:
        return [line.split() for line in out.splitlines()]
    errors = [line for line in err.splitlines() if line.startswith('timm-vpl validate: error: ')]
    assert len(errors) == 1 and err.strip().endswith(errors[0]) and 'Traceback' not in err, err
    return errors[0]


def results(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f)) if path.suffix == '.csv' else json.load(f)


def save_model(folder, name='test_vit', num_classes=1000, class_names=None, **kwargs):
    """Write a model with random weights as a user of timm would, and return it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes, **kwargs).eval()
    channels = kwargs.get('in_chans', 3)
    data_config = {**resolve_model_data_config(model), 'input_size': (channels, 32, 32)}
    if channels == 1:
        data_config.update(mean=(0.5,), std=(0.5,))
    save_for_hf(
        model, str(folder), data_config=data_config, model_config={'label_names': class_names} if class_names else None)
    return model


# Counts


def test_reference_figures_of_six_models(data_root):
    with np.load(data_root / 'imagenet_val_top5_6models.npz') as archive:
        labels = torch.from_numpy(archive['labels'].astype(np.int64))
        names = [name for name in archive.files if name != 'labels']
        predictions = torch.stack([torch.from_numpy(archive[name].astype(np.int64)) for name in names], dim=1)

    def forward(predictions):  # [N, models, 5]
        logits = torch.zeros(*predictions.shape[:2], 1000).scatter(2, predictions, torch.arange(5., 0, -1).expand(
            predictions.shape))
        return dict(zip(names, logits.unbind(dim=1), strict=True))

    class Names:
        def filenames(self):
            return [f'val/ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, 50001)]

    trained = TrainedModel(timm.create_model('test_vit', num_classes=1000), 'test_vit', 'test_vit', {})
    real_labels = real_label_sets(SimpleNamespace(reader=Names()), '', trained)
    loader = DataLoader(TensorDataset(predictions, labels), batch_size=512)
    figures = evaluate(forward, names, loader, CPU, real_labels=real_labels)
    reference = {
        'resnet18': (69.758, 89.076, 77.285, 92.754),
        'resnet50': (76.130, 92.862, 82.958, 95.469),
        'resnet152': (78.312, 94.046, 84.815, 96.232),
        'vgg16': (71.592, 90.382, 79.040, 93.644),
        'densenet121': (74.434, 91.972, 81.487, 94.833),
        'pnasnet5large': (82.736, 95.992, 87.446, 97.408),
    }
    columns = ('top1', 'top5', 'real_top1', 'real_top5')
    assert {name: tuple(round(figures[name][c], 3) for c in columns) for name in names} == reference
    assert {(figures[name]['images'], figures[name]['real_images']) for name in names} == {(50000, 46837)}


@pytest.mark.parametrize('num_classes', [3, 12])
def test_sets_of_labels_against_a_plain_loop(num_classes):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, num_classes, generator=generator)
    sets = [torch.randperm(num_classes, generator=generator)[:i % 4].tolist() for i in range(40)]
    evaluator = RealLabelsEvaluator()
    padded = torch.tensor([labels + [-1] * (3 - len(labels)) for labels in sets])
    evaluator.update(logits[:30], padded[:30])
    evaluator.update(logits[30:], padded[30:37])  # the rest pads a process's share
    counts = [0, 0, 0]
    for row, labels in zip(logits[:37], sets, strict=False):
        order = sorted(range(num_classes), key=lambda c: -row[c])
        counts[0] += bool(labels)
        counts[1] += order[0] in labels
        counts[2] += any(c in labels for c in order[:5])
    assert evaluator.counts.tolist() == counts


# Which label is meant


@pytest.fixture(scope='module')
def imagenet_v2(tmp_path_factory):
    """Folders 0 to 999 of one image, whose colour is the label."""
    root = tmp_path_factory.mktemp('v2')
    for label in range(1000):
        (root / str(label)).mkdir()
        Image.new('RGB', (4, 4), (label // 32 * 8 + 4, label % 32 * 8 + 4, 0)).save(root / str(label) / 'x.png')
    return root


def read_colour(images, config):
    """Return logits that give the label of an image's colour."""
    pixels = images[:, :, 0, 0] * torch.tensor(config['std']) + torch.tensor(config['mean'])
    parts = ((pixels * 255 - 4) / 8).round().long()
    return torch.nn.functional.one_hot(parts[:, 0] * 32 + parts[:, 1], 1000).float()


@pytest.mark.parametrize('dataset, shuffled', [('', False), ('torch/folder', True)])
def test_imagenet_v2(imagenet_v2, dataset, shuffled):
    wnids = ImageNetInfo().label_names()
    names = [wnids[(i * 7) % 1000] for i in range(1000)] if shuffled else None  # the model's own order
    model = timm.create_model('test_vit', num_classes=1000, img_size=32)
    trained = TrainedModel(model, 'test_vit', 'test_vit', {
        **resolve_model_data_config(model), 'input_size': (3, 8, 8), 'crop_pct': 1.}, names)
    asked = parse_command('validate', ['test_vit', str(imagenet_v2), '--dataset', dataset, '--imagenet-v2', *QUICK])
    each = _create_pass(asked, [trained], Processes(CPU))

    def forward(images):
        logits = read_colour(images, trained.data_config)
        return {0: logits[:, [wnids.index(name) for name in names]] if shuffled else logits}

    assert evaluate(forward, [0], each.loader, CPU)[0] == pytest.approx(
        {'images': 1000, 'top1': 100., 'top5': 100., 'loss': 5.91}, abs=0.01)


def plain_predictions(model, folder, class_to_idx=None):
    """Return label and prediction of each image, by a loop that knows nothing of this package."""
    loader = create_loader(
        ImageDataset(str(folder), class_map=class_to_idx), batch_size=5, use_prefetcher=False, num_workers=0,
        device=CPU, is_training=False, **resolve_model_data_config(model))
    with torch.no_grad():
        return [pair for images, labels in loader for pair in zip(
            labels.tolist(), model(images).argmax(dim=1).tolist(), strict=True)]


def percentage(pairs):
    return 100 * sum(label == prediction for label, prediction in pairs) / len(pairs)


def load_exported(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def test_classes_by_name(capsys, digits_folder, tmp_path):
    # In another order, and more of them than the data has.
    names = ['other', 'class0', 'class3', 'class2', 'class1', 'more']
    model = save_model(tmp_path / 'model', num_classes=6, class_names=names)
    plain, folder = load_exported(tmp_path / 'model'), digits_folder / 'validation'
    wanted = percentage(plain_predictions(plain, folder, {name: i for i, name in enumerate(names)}))
    assert wanted != percentage(plain_predictions(plain, folder))  # guards the comparison
    path = tmp_path / 'results.json'
    validate(capsys, tmp_path / 'model', digits_folder, '--results-file', path)
    assert results(path)[0]['top1'] == wanted and model.num_classes == 6

    (tmp_path / 'map.txt').write_text('\n'.join(names))
    shutil.rmtree(tmp_path / 'model')
    save_model(tmp_path / 'model', num_classes=6)  # without names
    error = validate(capsys, tmp_path / 'model', digits_folder, status=2)
    assert 'does not name its 6 classes' in error and 'has 4; --class-map' in error
    validate(capsys, tmp_path / 'model', digits_folder, '--class-map', tmp_path / 'map.txt', '--results-file', path)
    assert results(path)[0]['top1'] == wanted
    (tmp_path / 'map.txt').write_text('\n'.join(['x', 'y', 'z', 'class1', 'class3', 'class0', 'class2']))
    assert 'has the label 6, not one of the 6 classes' in validate(
        capsys, tmp_path / 'model', digits_folder, '--class-map', tmp_path / 'map.txt', status=1)

    shutil.rmtree(tmp_path / 'model')
    save_model(tmp_path / 'model', num_classes=4, class_names=['class0', 'class1', 'class2', 'klass3'])
    assert '1 of the 4 classes' in validate(capsys, tmp_path / 'model', digits_folder, status=2)


# ImageNet's validation images by their file names


@pytest.fixture(scope='module')
def imagenet_part(digits_folder, tmp_path_factory):
    """A folder of a model, 17 images named as ImageNet's and ReaL labels; (images, top-1, top-5) right; as for ReaL."""
    root = tmp_path_factory.mktemp('imagenet')
    save_model(root / 'model', img_size=32)
    model = load_exported(root / 'model')
    transform = timm.data.create_transform(**resolve_model_data_config(model))
    wnids = ImageNetInfo().label_names()
    labels = [[] for _ in range(50000)]
    original, real = np.zeros(3, int), np.zeros(3, int)
    for i, source in enumerate(sorted((digits_folder / 'validation').rglob('*.png'))):
        number = 1 + 37 * i
        image = Image.open(source).convert('RGB')
        path = root / f'ILSVRC2012_val_{number:08d}.JPEG'
        image.save(path, quality=95)
        with torch.no_grad():
            order = model(transform(Image.open(path).convert('RGB')).unsqueeze(0))[0].argsort(descending=True).tolist()
        label = (order[0], order[3], order[500])[i % 3]
        original += [1, i % 3 == 0, i % 3 < 2]
        labels[number - 1] = ([order[700], order[0]], [order[4]], [], [order[600], order[601]], [order[0]])[i % 5]
        real += [i % 5 != 2, i % 5 in (0, 4), i % 5 in (0, 1, 4)]
        (root / 'val' / wnids[label]).mkdir(parents=True, exist_ok=True)
        path.rename(root / 'val' / wnids[label] / path.name)
    (root / 'real.json').write_text(json.dumps(labels))
    return root, tuple(original.tolist()), tuple(real.tolist())


def counted(rows):
    """Return (images, top-1, top-5) of the rows of one model, by set."""
    return {
        row['set']: (row['images'], *(round(row[top] * row['images'] / 100) for top in ('top1', 'top5')))
        for row in rows}


def validate_as(environ, argv, printed):
    """Run the command as one of several processes, and end with its status."""
    os.environ.update(environ)
    with open(printed, 'w') as file, contextlib.redirect_stdout(file):
        status = main(['validate', *QUICK, *map(str, argv)])
    os._exit(status)


def test_real_labels_of_a_part_on_one_process_as_on_two(capsys, imagenet_part, tmp_path):
    root, original, real = imagenet_part
    options = [root / 'model', root / 'val', '--real-labels', root / 'real.json', '-b', '3']
    table = validate(capsys, *options, '--results-file', tmp_path / 'one.json')
    assert len(table) == 3 and table[2][4] == 'real'
    one = results(tmp_path / 'one.json')
    assert counted(one) == {'validation': original, 'real': real} and one[1]['loss'] is None

    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context('fork')
    processes = [
        context.Process(target=validate_as, args=(
            {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
             'MASTER_PORT': str(port)},
            [*options, '--results-file', tmp_path / 'two.json'], tmp_path / f'{rank}.txt')) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [len((tmp_path / f'{rank}.txt').read_text().splitlines()) for rank in (0, 1)] == [3, 0]
    two = results(tmp_path / 'two.json')
    for row, other in zip(one, two, strict=True):
        assert row.pop('images_per_second') > 0 and other.pop('images_per_second') > 0
        if row['set'] == 'validation':
            assert row.pop('loss') == pytest.approx(other.pop('loss'), rel=1e-6)
        assert row == other


def test_labels_of_timm_for_a_part(capsys, imagenet_part, tmp_path):
    root = imagenet_part[0]
    path = tmp_path / 'results.csv'
    validate(capsys, root / 'model', root / 'val', '--real-labels', '--results-file', path)
    # One has no label.
    assert {row['set']: row['images'] for row in results(path)} == {'validation': '17', 'real': '16'}


def test_model_of_some_of_imagenets_classes(imagenet_part):
    root = imagenet_part[0]
    dataset = ImageDataset(str(root / 'val'))
    names = list(dataset.reader.class_to_idx)
    trained = TrainedModel(timm.create_model('test_vit', num_classes=len(names)), 'x', 'test_vit', {})
    sets = real_label_sets(dataset, str(root / 'real.json'), trained, names).tolist()
    labels = json.loads((root / 'real.json').read_text())
    wnids = ImageNetInfo().label_names()
    for i, name in enumerate(dataset.filenames(basename=True)):
        wanted = [wnids[label] for label in labels[int(name[15:23]) - 1]]
        assert [names[index] if index >= 0 else index for index in sets[i] if index != -1] == [
            name if name in names else -2 for name in wanted]


def test_real_labels_of_other_images(capsys, imagenet_part, digits_folder, tmp_path):
    root = imagenet_part[0]
    shutil.copytree(root / 'val', tmp_path / 'val')
    shutil.copy(next((root / 'val').rglob('*.JPEG')), next((tmp_path / 'val').iterdir()) / 'more.JPEG')
    error = validate(capsys, root / 'model', tmp_path / 'val', '--real-labels', status=2)
    assert "1 of 18 images are not in ImageNet's validation set, more.JPEG" in error
    (tmp_path / 'few.json').write_text('[[1], [2]]')
    error = validate(capsys, root / 'model', root / 'val', '--real-labels', tmp_path / 'few.json', status=2)
    assert 'not a JSON list of the labels of 50000 images' in error


# Runs, exported folders, what is written


@pytest.mark.parametrize('larger', [
    pytest.param(False, id='export'), pytest.param(True, id='larger in testing', marks=pytest.mark.slow)])
def test_figures_are_those_of_timms_script(larger, capsys, timm_scripts, digits_folder, run_dir, tmp_path):
    """Its script on the same images, to all digits that it prints."""
    source = tmp_path / 'model'
    shutil.copytree(run_dir / 'export' / 'vpl-test_resnet', source)
    if larger:
        config = json.loads((source / 'config.json').read_text())
        config['pretrained_cfg'].update(test_input_size=[3, 48, 48], test_crop_pct=1.0)
        (source / 'config.json').write_text(json.dumps(config))
    argv = [timm_scripts / 'validate.py', '--data-dir', digits_folder / 'validation', '--model', f'local-dir:{source}',
            '--pretrained', '-j', '0', '-b', '8', '--device', 'cpu', '--results-file', tmp_path / 'timm.csv']
    subprocess.run([sys.executable, *map(str, argv)], check=True, capture_output=True)
    [timms] = results(tmp_path / 'timm.csv')
    validate(capsys, source, digits_folder, '-b', 8, '--results-file', tmp_path / 'ours.csv')
    [ours] = results(tmp_path / 'ours.csv')
    for name in ('top1', 'top5'):
        assert round(float(ours[name]), 4) == float(timms[name])
    for name in ('img_size', 'crop_pct', 'interpolation'):
        assert ours[name] == timms[name]
    assert ours['img_size'] == ('48' if larger else '32')


def test_figures_of_a_run_are_those_of_its_summary(capsys, digits_folder, run_dir):
    table = validate(capsys, run_dir, digits_folder, '-b', 8)
    assert [line[:3] for line in table[1:]] == [
        ['test_resnet', 'a', 'raw'], ['test_resnet', 'a', 'ema'], ['test_vit', 'b', 'raw'], ['test_vit', 'b', 'ema']]
    with open(run_dir / 'summary.csv', newline='') as f:
        summary = {row['epoch']: row for row in csv.DictReader(f)}
    rows = results(run_dir / 'validation.csv')
    assert list(rows[0]) == list(COLUMNS) and len(rows) == 4
    validate(capsys, run_dir / 'last.pth.tar', digits_folder, '-b', 8)
    rows = results(run_dir / 'validation.csv')
    assert [row['model'] for row in rows] == [
        f'{name}.pth.tar' for name in ('best_a', 'best_a', 'best_b', 'best_b', *['last'] * 4)]
    for row in rows:
        prefix = 'eval_ema_' if row['weights'] == 'ema' else 'eval_'
        for metric in ('top1', 'top5', 'loss'):
            trained = float(summary[row['epoch']][f'{prefix}{metric}_{row["branch"]}'])
            assert float(row[metric]) == pytest.approx(trained, rel=1e-6), (row, metric)
        assert (row['set'], row['images'], row['img_size'], row['crop_pct']) == ('validation', '17', '32', '0.9')
        assert row['data'] == str(digits_folder / 'validation')

    path = run_dir / 'validation.csv'
    path.write_text(path.read_text().replace(',17,', ',99,'))
    validate(capsys, run_dir / 'best_a.pth.tar', digits_folder, '-b', 8)  # replaces 2 of the rows
    rows = results(path)
    assert sorted(row['images'] for row in rows) == ['17'] * 4 + ['99'] * 6
    assert [row for row in run_dir.iterdir() if row.suffix == '.tmp'] == []
    path.write_text('a,b\n1,2\n')
    assert 'not a results file' in validate(capsys, run_dir, digits_folder, status=1)
    assert path.read_text() == 'a,b\n1,2\n'
    path.unlink()


def test_logits_that_are_no_numbers_give_no_figures(capsys, digits_folder, run_dir, tmp_path):
    checkpoint = torch.load(run_dir / 'best_a.pth.tar', weights_only=True)
    checkpoint['state_dict']['model_a.bn1.running_mean'].fill_(torch.nan)
    torch.save(checkpoint, tmp_path / 'nan.pth.tar')
    options = ['--results-file', tmp_path / 'results.json', '--per-class', tmp_path / 'classes.csv']
    table = validate(capsys, tmp_path / 'nan.pth.tar', digits_folder, *options)
    assert [line[1:3] + line[6:9] for line in table[1:3]] == [['a', 'raw', '-', '-', '-'], ['a', 'ema', *table[2][6:9]]]
    shown = [None not in (row['loss'], row['top1'], row['top5']) for row in results(tmp_path / 'results.json')]
    assert shown == [False, True, True, True]
    assert {row['weights'] for row in results(tmp_path / 'classes.csv') if row['branch'] == 'a'} == {'ema'}


def test_accuracy_of_each_class(capsys, digits_folder, run_dir, tmp_path):
    file = tmp_path / 'classes.csv'
    folder = run_dir / 'export' / 'vpl-test_resnet'
    table = validate(capsys, f'local-dir:{folder}', digits_folder, '--per-class', file)
    pairs = plain_predictions(load_exported(folder), digits_folder / 'validation')
    expected = {}
    for index in range(4):
        right = [p == y for y, p in pairs if y == index]
        expected[f'class{index}'] = (str(len(right)), pytest.approx(100 * sum(right) / len(right)))
    assert {row['class']: (row['images'], float(row['top1'])) for row in results(file)} == expected
    mean = sum(float(row['top1']) for row in results(file)) / 4
    assert ' '.join(table[2]).startswith(f'local-dir:{folder}: mean top-1 of 4 classes {mean:.3f}, lowest: ')


def test_classes_of_a_part_of_imagenet_have_their_own_names(capsys, imagenet_part, tmp_path):
    """The model does not name its classes, and the data has some of them."""
    root = imagenet_part[0]
    path = tmp_path / 'classes.csv'
    validate(capsys, root / 'model', root / 'val', '--per-class', path, '--results-file', tmp_path / 'x.csv')
    images = {folder.name: str(len(list(folder.iterdir()))) for folder in (root / 'val').iterdir()}
    assert {row['class']: row['images'] for row in results(path)} == images


def test_branches_of_one_preparation_share_a_pass(capsys, digits_folder, run_dir, tmp_path, monkeypatch):
    decoded = []
    open_image = Image.open
    monkeypatch.setattr(Image, 'open', lambda file: decoded.append(file) or open_image(file))
    path = tmp_path / 'results.csv'
    validate(capsys, run_dir, digits_folder, '--results-file', path, '--img-size', '48',
             '--channels-last', '--amp', '--amp-dtype', 'bfloat16')
    assert len(decoded) == 17 and {row['img_size'] for row in results(path)} == {'48'}
    assert len(load_all(str(run_dir))) == len(results(path)) == 4


def test_one_tar_or_folder_of_classes(capsys, digits_folder, run_dir, tmp_path):
    with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
        tar.add(digits_folder / 'validation', arcname='.')
    model = run_dir / 'last.pth.tar'
    figures = []
    for data in (digits_folder, digits_folder / 'validation', tmp_path / 'images.tar'):
        path = tmp_path / 'results.json'
        validate(capsys, model, data, '--results-file', path)
        figures.append([(row['loss'], row['top1'], row['images']) for row in results(path)])
    assert figures[0] == figures[1] == figures[2]
    shutil.copytree(digits_folder / 'train', tmp_path / 'data' / 'train')  # splits, but not the one to validate on
    assert '--val-split validation: no such folder' in validate(capsys, model, tmp_path / 'data', status=2)


@pytest.mark.parametrize('model, options, message', [
    ('RUN', ['--results-file', 'x.txt'], 'expected a file name that ends in .csv or .json'),
    ('RUN', ['--results-file', 'none/x.csv'], 'no such folder'),
    ('RUN', ['--real-labels', 'none.json'], '--real-labels none.json: no such file'),
    ('RUN', ['--real-labels'], "does not name its classes by ImageNet's wnids"),
    ('RUN', ['--mean', '0.5', '0.5'], '--mean: 2 values, but the images of test_resnet have 3 channels'),
    ('RUN', ['--in-chans', '1'], 'test_resnet: cannot take images of size (1, 32, 32)'),
    ('RUN', ['--device', 'nosuch'], '--device nosuch'),
    ('RUN', ['--nosuch'], 'unknown option --nosuch'),
    ('RUN', ['--split', 'test'], '--val-split test: no such folder'),
    ('RUN', ['--data-dir', 'none'], 'does not exist'),
    ('RUN', ['--imagenet-v2'], "has a class 'class0', which is not a number from 0 to 999"),
    ('RUN', ['--imagenet-v2', '--class-map', __file__], 'cannot be combined with --class-map'),
    ('none/model', [], 'no such file or folder'),
    ('test_vitt', [], 'did you mean test_vit'),
    ('.', [], 'no checkpoint in this folder'),
    ('model', [], 'has no classifier'),
    ('bad.pth.tar', [], 'truncated'),
])
def test_refusals(capsys, digits_folder, run_dir, tmp_path, monkeypatch, model, options, message):
    monkeypatch.chdir(tmp_path)
    if model == 'model':
        save_model(tmp_path / model, num_classes=0)
    if model == 'bad.pth.tar':
        (tmp_path / model).write_bytes(b'PK\x03\x04 cut off')
    data = [] if '--data-dir' in options else [digits_folder]
    model = run_dir / 'last.pth.tar' if model == 'RUN' else model
    assert message in validate(capsys, model, *data, *options, status=1 if model == 'bad.pth.tar' else 2)


@pytest.mark.parametrize('kind', ['folder', 'tar', 'torch/folder'])
def test_images_that_lie_in_both_splits(capsys, digits_folder, tmp_path, kind):
    save_model(tmp_path / 'model', num_classes=4)
    data = shutil.copytree(digits_folder, tmp_path / 'data')
    options = [tmp_path / 'model', data, '--results-file', tmp_path / 'x.csv', '--check-data']
    options += ['--dataset', kind] if '/' in kind else []
    images = sorted((data / 'validation').rglob('*.png'))
    for image, name in zip(images[:2], ('class0/twin.png', 'class3/twin.png'), strict=True):
        shutil.copy(image, data / 'train' / name)
    changed = bytearray(images[2].read_bytes())
    changed[-1] ^= 1  # of the same size
    (data / 'train' / 'class0' / 'almost.png').write_bytes(changed)
    wanted = [f'{image.relative_to(data / "validation")} is train/{name}' for image, name in zip(
        images, ('class0/twin.png', 'class3/twin.png'), strict=False)]
    if kind == 'tar':
        for split in ('train', 'validation'):
            with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
                tar.add(data / split, arcname='')
        options[1:2] = [tmp_path, '--val-split', 'validation.tar']
        options.append('train.tar')
        wanted = [line.replace('train/', 'train.tar/') for line in wanted]
    lines = check_lines(capsys, *options)
    assert lines[0].endswith(f'2 of 17 images are also in the split {"train.tar" if kind == "tar" else "train"!r}')
    assert lines[1:] == wanted
    if kind == 'folder':
        assert '--check-data other: no such folder' in validate(capsys, *options, 'other', status=2)


def check_lines(capsys, *argv):
    """Return the lines that follow the table."""
    assert main(['validate', *map(str, argv), *QUICK]) == 0
    return capsys.readouterr().out.splitlines()[2:]


def test_images_that_can_not_be_read(capsys, digits_folder, run_dir, tmp_path):
    shutil.copytree(digits_folder / 'validation', tmp_path / 'data')
    for path in (tmp_path / 'data').rglob('*.png'):
        path.write_bytes(b'not an image')
    assert 'consecutive samples' in validate(capsys, run_dir, tmp_path / 'data', status=1)
