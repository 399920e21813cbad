"""Predictions: by value against timm's own transform, in order, of what cannot be read, as CSV and on the screen."""
import csv
import io
import logging
import shutil

import pytest
import timm
import torch
from PIL import Image
from runs import status_of
from test_validate import load_exported, save_model
from timm.data import ImageNetInfo, create_transform

from timm_vpl.cli import main
from timm_vpl.engine import trained
from timm_vpl.engine.trained import load_branches

QUICK = ['--device', 'cpu', '--workers', '0']


def predict(capsys, *argv, status=0):
    """Run the command and return what it prints."""
    capsys.readouterr()
    assert status_of(main, ['predict', *argv, *QUICK]) == status
    out, err = capsys.readouterr()
    assert 'Traceback' not in err
    return err if status == 2 else out


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline='')))


def plain_probabilities(branch, path):
    """Return what a model gives an image, by timm alone."""
    images = create_transform(**branch.data_config)(Image.open(path).convert('RGB')).unsqueeze(0)
    with torch.no_grad():
        return branch.model(images).softmax(dim=-1)[0]


@pytest.fixture(scope='module')
def folder(digits_folder, tmp_path_factory):
    """A folder of images whose natural order is not that of their characters, and of files that are none."""
    root = tmp_path_factory.mktemp('images')
    paths = sorted((digits_folder / 'validation').rglob('*.png'))
    for name, path in zip(('a/2.png', 'a/10.png', 'b/1.PNG', '3.png'), paths[::4], strict=False):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, root / name)
    for name in ('a/notes.txt', '.hidden.png', 'b/._1.png'):
        (root / name).write_text('no image')
    return root


ORDER = ('3.png', 'a/2.png', 'a/10.png', 'b/1.PNG')


@pytest.fixture(scope='module')
def unlike(run_dir, tmp_path_factory):
    """A checkpoint whose branches have their images prepared in different ways."""
    checkpoint = torch.load(run_dir / 'last.pth.tar', weights_only=True)
    cfg = checkpoint['branches']['a']['pretrained_cfg']
    cfg.update(input_size=[3, 48, 48], crop_pct=0.5, mean=[0.1, 0.2, 0.3], interpolation='bicubic')
    path = tmp_path_factory.mktemp('unlike') / 'unlike.pth.tar'
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize('alike', [True, False])
def test_values_of_both_branches_and_their_average(capsys, run_dir, unlike, folder, alike):
    model = run_dir / 'last.pth.tar' if alike else unlike
    a, b = load_branches(str(model))
    assert a.ema and b.ema and (a.data_config == b.data_config) == alike
    rows = rows_of(predict(capsys, model, folder, '-b', 3))
    assert list(rows[0]) == ['file', 'label_a', 'prob_a', 'label_b', 'prob_b', 'label_ens', 'prob_ens']
    assert [row['file'] for row in rows] == [str(folder / name) for name in ORDER]
    for row in rows:
        each = {'a': plain_probabilities(a, row['file']), 'b': plain_probabilities(b, row['file'])}
        each['ens'] = (each['a'] + each['b']) / 2
        for name, probabilities in each.items():
            assert row[f'label_{name}'] == f'class{int(probabilities.argmax())}'
            assert float(row[f'prob_{name}']) == pytest.approx(float(probabilities.max()), abs=2e-6)


def test_the_classes_of_each_image_on_screen(capsys, run_dir, folder):
    files = [folder / 'b' / '1.PNG', folder / '3.png']
    lines = predict(capsys, run_dir, *files).splitlines()
    assert lines[:2] == ['a: test_resnet (a, EMA)', 'b: test_vit (b, EMA)']
    [*_, b] = load_branches(str(run_dir))
    for place, file in ((3, files[0]), (10, files[1])):  # in the order given; 4 classes are fewer than 5
        assert lines[place - 1:place + 2] == ['', str(file), lines[4]]
        probabilities = plain_probabilities(b, file)
        shown = [line.split()[2:4] for line in lines[place + 2:place + 6]]
        assert shown == [[f'class{i}', f'{probabilities[i]:.3f}'] for i in probabilities.argsort(descending=True)]
    assert len(predict(capsys, run_dir, *files, '--topk', 2).splitlines()) == 2 + 2 * 5


def test_files_of_results(capsys, run_dir, folder, tmp_path):
    for name in ('out.csv', 'out.json'):
        assert predict(capsys, run_dir, folder / '3.png', folder, '--results-file', tmp_path / name) == ''
    rows = rows_of((tmp_path / 'out.csv').read_text())
    assert rows == rows_of(predict(capsys, run_dir, folder / '3.png', folder)) and len(rows) == 5
    assert (tmp_path / 'out.json').read_text().count('"label_ens"') == 5
    ranked = rows_of(predict(capsys, run_dir, folder, '--topk', 3))
    assert [row['rank'] for row in ranked] == ['1', '2', '3'] * 4
    assert [row['label_b'] for row in ranked[::3]] == [row['label_b'] for row in rows[1:]]


def test_images_that_can_not_be_read(capsys, run_dir, folder, tmp_path):
    """More of them in a row than end a training run; each gets a line, and the others their values."""
    data = shutil.copytree(folder, tmp_path / 'data')
    wanted = [line.replace(str(folder), str(data)) for line in predict(capsys, run_dir, folder).splitlines()]
    for i in range(12):
        (data / 'a' / f'3-{i}.png').write_bytes(b'\x89PNG cut off')
    (data / 'a' / 'link.png').symlink_to('nowhere')
    assert status_of(main, ['predict', run_dir, data, tmp_path / 'none.png', '-b', '4', *QUICK]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == wanted
    named = [line.partition(': cannot be read (')[0] for line in err.splitlines() if 'cannot be read' in line]
    assert named == [*(str(data / 'a' / f'3-{i}.png') for i in range(12)), str(data / 'a' / 'link.png'),
                     str(tmp_path / 'none.png')]
    assert err.count('not an image that Pillow can read') == 12 and err.count('No such file') == 2


def test_images_are_decoded_once_and_files_of_models_read_once(capsys, run_dir, folder, monkeypatch):
    decoded, read = [], []
    open_image, read_checkpoint = Image.open, trained.read_checkpoint
    monkeypatch.setattr(Image, 'open', lambda file: decoded.append(file) or open_image(file))
    monkeypatch.setattr(trained, 'read_checkpoint', lambda path: read.append(path) or read_checkpoint(path))
    predict(capsys, run_dir / 'last.pth.tar', folder)
    assert len(decoded) == 4 and len(read) == 1


def test_one_model(capsys, run_dir, folder, tmp_path):
    export = run_dir / 'export' / 'vpl-test_resnet'
    [row] = rows_of(predict(capsys, export, folder / 'a', '--topk', 1))[:1]
    assert list(row) == ['file', 'label', 'prob']
    assert row['label'] in predict(capsys, f'local-dir:{export}', row['file'], '--topk', 1).splitlines()[-1]

    save_model(tmp_path / 'imagenet')  # does not name its classes
    model = load_exported(tmp_path / 'imagenet')
    transform = create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        index = int(model(transform(Image.open(folder / '3.png').convert('RGB')).unsqueeze(0)).argmax())
    predict(capsys, tmp_path / 'imagenet', folder / '3.png', '--results-file', tmp_path / 'out.csv')
    assert rows_of((tmp_path / 'out.csv').read_text())[0]['label'] == ImageNetInfo().label_descriptions()[index]


def test_names_of_others(capsys, run_dir, folder, tmp_path):
    save_model(tmp_path / 'model', num_classes=2, class_names=['\x1b[31mred', 'a\nb'])
    odd = tmp_path / '\x1b]0;x\x07\n=1.png'
    shutil.copy(folder / '3.png', odd)
    bad = tmp_path / b'\xff.png'.decode('utf-8', 'surrogateescape')
    shutil.copy(folder / '3.png', bad)
    for argv in ([odd, bad], [tmp_path]):
        shown = predict(capsys, tmp_path / 'model', *argv, '--topk', 2)
        assert all(line.isprintable() for line in shown.splitlines()) and r'\x1b[31mred' in shown
    predict(capsys, tmp_path / 'model', odd, bad, '--results-file', tmp_path / 'out.csv')
    rows = rows_of((tmp_path / 'out.csv').read_bytes().decode())
    assert [row['file'] for row in rows] == [str(odd), str(tmp_path / r'\udcff.png')]
    assert {row['label'] for row in rows} <= {'\x1b[31mred', 'a\nb'}


@pytest.mark.parametrize('options, message', [
    (['FOLDER/a/notes'], 'IMAGE FOLDER/a/notes: contains no images'),
    (['FOLDER', '--results-file', 'x.txt'], '--results-file x.txt: expected a file name that ends in .csv or .json'),
    (['FOLDER', '--topk', '0'], "--topk: '0' is not a whole number >= 1"),
    (['FOLDER', '--input-img-mode', 'L'], 'images of mode L have 1'),
    ([], 'the following arguments are required: IMAGE'),
])
def test_refusals(capsys, run_dir, folder, options, message):
    (folder / 'a' / 'notes').mkdir(exist_ok=True)
    argv = [option.replace('FOLDER', str(folder)) for option in options]
    assert message.replace('FOLDER', str(folder)) in predict(capsys, run_dir, *argv, status=2)


def test_several_processes_are_refused(capsys, run_dir, folder, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert 'start it without torchrun' in predict(capsys, run_dir, folder, status=2)


def test_outputs_that_are_no_numbers(capsys, run_dir, folder, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    checkpoint = torch.load(run_dir / 'last.pth.tar', weights_only=True)
    checkpoint['state_dict_ema']['model_a.bn1.running_mean'].fill_(torch.nan)
    torch.save(checkpoint, tmp_path / 'nan.pth.tar')
    assert status_of(main, ['predict', tmp_path / 'nan.pth.tar', folder, *QUICK]) == 1
    assert 'the outputs of branch a are NaN' in capsys.readouterr().err
