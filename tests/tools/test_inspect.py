"""Two models on the same images: every figure against plain loops, the contact sheet, files, names of others."""
import base64
import csv
import io
import re
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from runs import status_of
from test_validate import load_exported, save_model
from timm.data import ImageDataset, create_transform, resolve_model_data_config

from timm_vpl.cli import main
from timm_vpl.data.sources import SOURCES, DigitsReader, Source
from timm_vpl.engine.trained import load_branches
from timm_vpl.tools.inspect import GAP, LINE, TILE, calibration_error, confusions, thumbnail

QUICK = ['--device', 'cpu', '--workers', '0']


def inspect(capsys, *argv, status=0):
    """Run the command and return the lines that it prints, or the one with which it ends."""
    capsys.readouterr()
    assert status_of(main, ['inspect', *QUICK, *argv]) == status
    out, err = capsys.readouterr()
    assert 'Traceback' not in err
    return out.splitlines() if status == 0 else next(line for line in err.splitlines() if ': error: ' in line)


def rows_of(path):
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its text, images and their captions."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.images, self.captions = Counter(), '', [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        assert not {name for name, _ in attrs} - {
            'lang', 'charset', 'http-equiv', 'content', 'name', 'class', 'alt', 'src'}, attrs
        if tag == 'img':
            data = dict(attrs)['src'].removeprefix('data:image/png;base64,')
            self.images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True)))))
        if tag == 'figcaption':
            self.captions.append([])

    def handle_data(self, data):
        self.text += data
        if self.captions and data.strip():
            self.captions[-1].append(data)


def tiles_of(path, count, lines=4):
    """Return the images of a contact sheet, in order."""
    sheet = np.asarray(Image.open(path).convert('RGB'))
    height = TILE + (1 + lines) * LINE
    return [
        sheet[LINE + GAP + row * (height + GAP):, GAP + column * (TILE + GAP):][:TILE, :TILE]
        for row, column in (divmod(i, min(6, count)) for i in range(count))]


# Figures


@pytest.mark.parametrize('bins', [15, 4])
def test_calibration_error_against_a_plain_loop(bins):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(200, generator=generator, dtype=torch.float64)
    confidence[:bins] = torch.arange(1, bins + 1, dtype=torch.float64) / bins  # the upper edges belong to their bins
    right = torch.rand(200, generator=generator) < confidence ** 2
    total = 0.
    for m in range(1, bins + 1):
        inside = [i for i in range(200) if (m - 1) / bins < confidence[i].item() <= m / bins]
        if inside:
            accuracy = sum(right[i].item() for i in inside) / len(inside)
            total += len(inside) / 200 * abs(accuracy - sum(confidence[i].item() for i in inside) / len(inside))
    assert calibration_error(confidence, right, bins) == pytest.approx(100 * total, rel=1e-12) and total > 0.05
    assert calibration_error(torch.ones(4), torch.tensor([True, True, True, False])) == 25.


def test_confusions_against_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    target, said = torch.randint(4, (2, 300), generator=generator)
    found = confusions(target, said)
    counted = Counter((t, s) for t, s in zip(target.tolist(), said.tolist(), strict=True) if t != s)
    assert {(t, s): count for t, s, count in found} == counted
    assert [count for *_, count in found] == sorted(counted.values(), reverse=True)


@pytest.fixture(scope='module')
def plain(run_dir, digits_folder):
    """Files, labels and, by name, the probabilities of a run's last epoch, by a loop that knows only timm."""
    dataset = ImageDataset(str(digits_folder / 'validation'))
    found = {}
    for branch in load_branches(str(run_dir / 'last.pth.tar')):
        transform = create_transform(**branch.data_config)
        with torch.no_grad():
            found[branch.side] = torch.stack([
                branch.model(transform(image.convert('RGB')).unsqueeze(0))[0].softmax(dim=-1) for image, _ in dataset])
    found['ens'] = (found['a'] + found['b']) / 2
    return dataset.filenames(), torch.tensor([label for _, label in dataset]), found


def test_figures_of_a_run(capsys, run_dir, digits_folder, plain, tmp_path):
    _, target, probabilities = plain
    argv = [run_dir / 'last.pth.tar', digits_folder, '-b', '7', '--results-file', tmp_path / 'classes.csv']
    lines = inspect(capsys, *argv)
    right = {name: each.argmax(dim=1) == target for name, each in probabilities.items()}
    with open(run_dir / 'summary.csv', newline='') as file:
        summary = list(csv.DictReader(file))[-1]
    shown = {line.split()[0]: line.split()[1:] for line in lines[6:9]}
    for name in ('a', 'b', 'ens'):
        ece = calibration_error(probabilities[name].max(dim=1).values, right[name])
        assert shown[name] == [
            *(f'{float(summary[f"eval_ema_{metric}_{name}"]):.2f}' for metric in ('top1', 'top5')),
            f'{float(summary[f"eval_ema_loss_{name}"]):.3f}', f'{ece:.2f}'], name

    a, b, n = right['a'], right['b'], len(target)
    agree = (probabilities['a'].argmax(dim=1) == probabilities['b'].argmax(dim=1)).sum()
    shares = (100 * int(each.sum()) / n for each in (agree, a & b, a & ~b, b & ~a, ~a & ~b))
    assert lines[9] == (
        'The models agree on {:.2f} % of the images; both right {:.2f} %, only a {:.2f} %, only b {:.2f} %, neither '
        '{:.2f} %.'.format(*(float(share) for share in shares)))
    better = 'a' if a.sum() >= b.sum() else 'b'
    gain = float(summary['eval_ema_top1_ens']) - float(summary[f'eval_ema_top1_{better}'])
    assert lines[10] == (
        f'Their averaged probabilities (ens): {gain:+.2f} points of top-1 against {better}, the better one.')

    classes = rows_of(tmp_path / 'classes.csv')
    assert [row['class'] for row in classes] == [f'class{i}' for i in range(4)]
    for i, row in enumerate(classes):
        top1 = {name: 100 * each[target == i].double().mean().item() for name, each in right.items()}
        assert int(row['images']) == (target == i).sum()
        assert {name: float(row[f'top1_{name}']) for name in top1} == pytest.approx(top1)
        assert float(row['difference']) == pytest.approx(top1['b'] - top1['a'])
    differences = [abs(float(line.split()[-1])) for line in lines[14:18]]
    assert differences == sorted(differences, reverse=True) and lines[12] == 'Classes, the largest differences first'
    start = lines.index('Confusions of b') + 2
    said = probabilities['b'].argmax(dim=1)
    wanted = [
        [f'class{t}', f'class{s}', str(count), f'{100 * count / int((target == t).sum()):.1f}']
        for t, s, count in confusions(target, said)[:10]]
    assert [line.split() for line in lines[start:]] == wanted and wanted


@pytest.fixture(scope='module')
def two_models(tmp_path_factory):
    """Exports of two untrained models, whose classes have another order and whose images another size."""
    root = tmp_path_factory.mktemp('models')
    names = [f'class{i}' for i in range(4)]
    save_model(root / 'one', num_classes=4, class_names=names)
    save_model(root / 'two', 'test_resnet', num_classes=4, class_names=names[::-1])
    config = (root / 'two' / 'config.json').read_text()
    assert '[3,32,32]' in re.sub(r'\s', '', config)
    (root / 'two' / 'config.json').write_text(re.sub(r'3,\s*32,\s*32', '3, 40, 40', config))
    return root


def test_models_of_another_order_and_another_size(capsys, two_models, digits_folder, tmp_path):
    dataset = ImageDataset(str(digits_folder / 'validation'))
    probabilities, configs = [], []
    for name in ('one', 'two'):
        model = load_exported(two_models / name)
        configs.append(resolve_model_data_config(model))
        transform = create_transform(**configs[-1])
        with torch.no_grad():
            logits = torch.stack([model(transform(image.convert('RGB')).unsqueeze(0))[0] for image, _ in dataset])
        probabilities.append((logits if name == 'one' else logits.flip(1)).softmax(dim=-1))
    assert [config['input_size'][1] for config in configs] == [32, 40]
    argv = [two_models / 'one', f'local-dir:{two_models / "two"}', digits_folder, '-b', '5', '--contact-sheet',
            tmp_path / 'sheet.png']
    lines = inspect(capsys, *argv)
    target = torch.tensor([label for _, label in dataset])
    for place, each in ((6, probabilities[0]), (7, probabilities[1]), (8, sum(probabilities) / 2)):
        assert lines[place].split()[1] == f'{100 * (each.argmax(dim=1) == target).double().mean():.2f}'
    assert Image.open(tmp_path / 'sheet.png').width == 6 * (TILE + GAP) + GAP


# Contact sheet and page


def test_contact_sheet_and_page(capsys, run_dir, digits_folder, plain, tmp_path):
    files, target, probabilities = plain
    a, b = probabilities['a'], probabilities['b']
    sure = torch.minimum(a.max(dim=1).values, b.max(dim=1).values)
    apart = (a.argmax(dim=1) != b.argmax(dim=1)).nonzero().flatten().tolist()
    assert len(apart) > 3
    order = sorted(apart, key=lambda i: -sure[i].item())
    branch = load_branches(str(run_dir / 'last.pth.tar'), 'a')[0]
    transform = create_transform(**branch.data_config, use_prefetcher=True)
    for number in (3, 50):
        argv = ['--num-images', number, '--contact-sheet', tmp_path / 'x.png', '--html', tmp_path / 'x.html']
        lines = inspect(capsys, run_dir / 'last.pth.tar', digits_folder, *argv, '-b', 4)
        page, wanted = Page(tmp_path / 'x.html'), order[:number]
        assert page.captions == [[
            f'true: class{target[i]}', f'a: class{a[i].argmax()} {a[i].max():.2f}',
            f'b: class{b[i].argmax()} {b[i].max():.2f}', files[i]] for i in wanted]
        tiles = tiles_of(tmp_path / 'x.png', len(wanted))
        for i, tile, image in zip(wanted, tiles, page.images, strict=True):
            with Image.open(digits_folder / 'validation' / files[i]) as opened:
                pixels = np.asarray(transform(opened.convert('RGB')))
            assert np.array_equal(image, np.asarray(thumbnail(Image.fromarray(pixels.transpose(1, 2, 0)))))
            assert np.array_equal(image, tile)
        for line in lines:  # all on the screen is on the page
            assert all(word in page.text for word in line.split())
    assert 'script' not in page.tags and 'http' not in page.text


def test_models_that_agree(capsys, run_dir, digits_folder, tmp_path, caplog):
    export = run_dir / 'export' / 'vpl-test_vit'
    argv = [export, export, '--data-dir', digits_folder, '--contact-sheet', tmp_path / 'x.png']
    lines = inspect(capsys, *argv, '--html', tmp_path / 'x.html')
    assert lines[9].startswith('The models agree on 100.00 % of the images; ') and '+0.00 points' in lines[10]
    assert not (tmp_path / 'x.png').exists() and 'the models agree on all images' in caplog.text
    assert Page(tmp_path / 'x.html').images == []


MARKUP = ['<img src=x onerror=alert(1)>', '"><b>&lt;', '\x1b[31mred', 'a\nb | c']


def test_names_of_others(capsys, digits_folder, tmp_path):
    data = tmp_path / '<script>x'
    for old, new in zip(sorted((digits_folder / 'validation').iterdir()), MARKUP, strict=True):
        (data / new).mkdir(parents=True)
        for path in old.iterdir():
            shutil.copy(path, data / new / f"'<i>{path.name}")
    for name, seed in (('one', 'test_vit'), ('two', 'test_resnet')):
        save_model(tmp_path / name, seed, num_classes=4, class_names=MARKUP)
    names = ('--results-file', 'x.csv', '--contact-sheet', 'x.png', '--html', 'x.html')
    argv = [str(tmp_path / name) if name.startswith('x.') else name for name in names]
    lines = inspect(capsys, tmp_path / 'one', tmp_path / 'two', data, *argv)
    assert all(line.isprintable() for line in lines)
    assert sorted(row['class'] for row in rows_of(tmp_path / 'x.csv')) == sorted(MARKUP)
    page = Page(tmp_path / 'x.html')
    assert set(page.tags) == {
        'html', 'head', 'meta', 'style', 'title', 'body', 'h1', 'h2', 'p', 'table', 'thead', 'tr', 'th', 'td', 'div',
        'figure', 'img', 'figcaption', 'br'}
    assert page.tags['img'] == len(page.captions) > 0 and '<img src=x onerror=alert(1)>' in page.text
    assert all("'<i>" in caption[-1] and len(caption) == 4 for caption in page.captions)


# Data


def test_images_that_can_not_be_read(capsys, run_dir, digits_folder, plain, tmp_path, caplog):
    """One is counted as that which stands in for it, as by validate, and is not shown."""
    files, _, probabilities = plain
    said = [probabilities[side].argmax(dim=1) for side in 'ab']
    apart = (said[0] != said[1]).nonzero().flatten().tolist()
    index = next(i for i in range(len(files) - 1) if i + 1 in apart)  # the next one stands in for it
    data = shutil.copytree(digits_folder / 'validation', tmp_path / 'data')
    (data / files[index]).write_bytes(b'no image')
    lines = inspect(capsys, run_dir / 'last.pth.tar', data, '--html', tmp_path / 'x.html', '--num-images', 99)
    assert lines[0] == f'{data}: 17 images' and '1 images could not be read; others replaced them' in caplog.text
    shown = {caption[-1] for caption in Page(tmp_path / 'x.html').captions}
    assert shown == {files[i] for i in apart if i != index}


class Nameless(DigitsReader):
    """The digits without file names, in turn too."""
    num_samples = 360

    def set_loader_cfg(self, num_workers):
        assert num_workers < 2

    def _filename(self, index, basename=False, absolute=False):
        return None

    def __iter__(self):
        for i in range(len(self)):
            file, label = self[i]
            yield Image.open(file).convert('RGB'), label


@pytest.mark.parametrize('is_stream', [False, True])
def test_data_without_file_names(capsys, tmp_path, monkeypatch, is_stream):
    for name in ('test_vit', 'test_resnet'):
        save_model(tmp_path / name, name, num_classes=10)
    argv = [tmp_path / 'test_vit', tmp_path / 'test_resnet', '--dataset', 'digits', '--num-images', 7, '--html']
    inspect(capsys, *argv, tmp_path / 'named.html')
    source = Source(lambda request: Nameless(request.split), is_stream=is_stream)
    monkeypatch.setitem(SOURCES, 'digits', source)
    inspect(capsys, *argv, tmp_path / 'x.html')
    named, page = Page(tmp_path / 'named.html'), Page(tmp_path / 'x.html')
    wanted = [[*caption[:3], f'index {re.search("[0-9]+(?=.pgm)", caption[3])[0]}'] for caption in named.captions]
    assert page.captions == wanted and len(wanted) == 7
    assert all(np.array_equal(*each) for each in zip(named.images, page.images, strict=True))


@pytest.mark.parametrize('models, options, message, status', [
    (['RUN'], ['--data-dir', 'DATA', '--html', 'x.txt'], '--html x.txt: expected a file name that ends in .html', 2),
    (['RUN'], ['--data-dir', 'DATA', '--contact-sheet', 'x.jpg'], 'expected a file name that ends in .png', 2),
    (['RUN'], ['--data-dir', 'DATA', '--contact-sheet', 'no/x.png'], '--contact-sheet no/x.png: no such folder', 2),
    (['RUN'], [], 'no data: give a folder or .tar of images', 2),
    (['RUN', 'none/data'], [], 'data folder none/data does not exist', 2),
    (['one', 'DATA'], [], 'one: contains one model; name a second one', 2),
    (['RUN', 'one', 'DATA'], [], 'contain 3 models; name a pair, or two', 2),
    (['one', 'five', 'DATA'], [], 'five: has 5 classes, ', 2),
    (['one', 'other', 'DATA'], [], "other: does not have the class 'class3' of ", 2),
    (['one', 'grey', 'DATA'], [], 'grey: has 1 channels, ', 2),
    (['one', 'nan', 'DATA'], [], 'test_vit: the loss is not finite, so the models cannot be compared', 1),
])
def test_refusals(capsys, run_dir, digits_folder, two_models, tmp_path, monkeypatch, models, options, message, status):
    monkeypatch.chdir(tmp_path)
    if 'one' in models:
        shutil.copytree(two_models / 'one', 'one')
    names = [f'class{i}' for i in range(4)]
    made = {'five': (5, [*names, 'class4'], 3), 'other': (4, [*names[:3], 'x'], 3), 'grey': (4, names, 1)}
    for name, (number, classes, channels) in made.items():
        if name in models:
            save_model(tmp_path / name, num_classes=number, class_names=classes, in_chans=channels)
    if 'nan' in models:
        save_model(tmp_path / 'nan', num_classes=4, class_names=names)
        [path] = (tmp_path / 'nan').glob('*.bin')
        torch.save({**torch.load(path, weights_only=True), 'head.bias': torch.full((4,), torch.nan)}, path)
    places = {'RUN': str(run_dir), 'DATA': str(digits_folder)}
    line = inspect(capsys, *(places.get(word, word) for word in (*models, *options)), status=status)
    assert message in line
