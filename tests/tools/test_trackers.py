"""What a run shows while it goes: bars and lines, figures of updates, trackers."""
import fcntl
import itertools
import json
import logging
import multiprocessing
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from runs import PAIR, ROOT, SMALL, differences, error_line, rows, run, torchrun
from torch.utils._python_dispatch import TorchDispatchMode

from timm_vpl import PairTask, PairWrapper, VPLLoss
from timm_vpl.cli import train
from timm_vpl.core.pair import PairOutput
from timm_vpl.engine import checkpoint, log
from timm_vpl.engine.measures import gradient_norms, likeness, term_norms
from timm_vpl.engine.step import Progress, Update
from timm_vpl.tools import trackers

OPTIONS = ['--epochs', '3', '--x', '30', '--y', '35', '--log-interval', '2']  # a stage an epoch
FREQUENT = [*OPTIONS, '--log-interval', '1']


# On the screen


def on_terminal(*argv, columns=160):
    """Return what training prints on a terminal of its own."""
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack('HHHH', 40, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'train_vpl.py'), *map(str, argv)], stderr=end, stdout=end,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    os.close(end)
    text = b''
    while True:
        try:
            text += os.read(main, 65536)
        except OSError:
            break
    assert process.wait() == 0, text
    os.close(main)
    return re.sub(r'\x1b\[\d*[A-Z]|\r', '\n', text.decode())


def test_a_terminal_gets_bars_and_a_row_an_epoch(digits_folder, tmp_path):
    text = on_terminal(digits_folder, *PAIR, *SMALL, *OPTIONS, '--output', tmp_path)
    assert re.search(r'^Epoch 1, stage 2 \|.*\| 5/5, \d+ images/s  data \d+ %$', text, re.MULTILINE)
    assert re.search(r'^Run \|.*\| 2/3, left 0:\d\d:\d\d  top-1 a [\d.]+  top-1 b [\d.]+$', text, re.MULTILINE)
    losses = [r'loss [\d.]+, ce_a [\d.]+', r'ce_b [\d.]+', r'contrastive [\d.]+', r'kl [\d.]+']
    assert re.search(f'^{"  ".join(losses)}$', text, re.MULTILINE)
    assert 'Train:' not in text
    for epoch in range(3):
        [line] = re.findall(rf'^Epoch {epoch} \({epoch + 1}/3\)  .*$', text, re.MULTILINE)
        assert f'stage {epoch + 1}' in line
        assert re.search(r'top-1 a [\d.]+ \([\d.]+\)  b [\d.]+ \([\d.]+\)  average .* s  left 0:', line)


@pytest.mark.slow
def test_a_narrow_terminal_gets_the_most_important_figures(digits_folder, tmp_path):
    text = on_terminal(digits_folder, *PAIR, *SMALL, *OPTIONS, '--output', tmp_path, columns=40)
    assert re.search(r'^Epoch 1, stage 2 \|.*\| 5/5 *$', text, re.MULTILINE)
    assert re.search(r'^Run \|.*\| 2/3, left 0:\d\d:\d\d *$', text, re.MULTILINE)
    assert re.search(r'^loss [\d.]+, ce_a [\d.]+  ce_b [\d.]+ *$', text, re.MULTILINE)
    assert not re.search(r'images/s|top-1 a [\d.]+  top-1|contrastive [\d.]+  kl [\d.]+$', text, re.MULTILINE)


def test_elsewhere_there_are_lines_without_control_characters(digits_folder, tmp_path):
    folder = tmp_path / 'run'
    argv = [digits_folder, *PAIR, *SMALL, *OPTIONS, '--output', tmp_path, '--experiment', 'run']
    err = subprocess.run(
        [sys.executable, str(ROOT / 'train_vpl.py'), *map(str, argv)], capture_output=True, text=True, check=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}).stderr
    assert err.isascii() and all(c.isprintable() or c == '\n' for c in err)
    assert len(re.findall(r'^Train: \d \[ *\d/5 .* Left: 0:00:\d\d$', err, re.MULTILINE)) == 9
    for row in rows(folder):
        [line] = re.findall(rf'^Epoch {row["epoch"]} \(.*$', err, re.MULTILINE)
        for side in 'ab':
            raw, ema = (float(row[f'eval_{kind}top1_{side}']) for kind in ('', 'ema_'))
            assert f' {side} {raw:.2f} ({ema:.2f})' in line
        assert f'loss {float(row["train_loss"]):#.4g}' in line


@pytest.mark.slow
def test_quiet_runs_say_nothing(digits_folder, tmp_path):
    assert on_terminal(digits_folder, *PAIR, *SMALL, '--epochs', '1', '--output', tmp_path, '--quiet') == ''


@pytest.mark.slow
def test_no_progress_has_lines_on_a_terminal_too(digits_folder, tmp_path):
    text = on_terminal(digits_folder, *PAIR, *SMALL, '--epochs', '1', '--output', tmp_path, '--no-progress')
    assert 'Train: 0 [' in text and '|' not in text


def test_the_time_that_is_left():
    row = {'seconds': 10., 'eval_seconds': 4., 'eval_top1': 50.}
    state = SimpleNamespace(
        progress=Progress(epoch=3, batch=5, seconds=6.), loader_train=range(20), end_epoch=10, rows=[row] * 3,
        options=SimpleNamespace(run=SimpleNamespace(val_interval=2)))
    # 6 epochs and 15 of 20 batches at 24 s an epoch, and validations after epochs 4, 6, 8 and 10.
    assert log.seconds_left(state) == pytest.approx(6.75 * 24 + 4 * 4)
    state.progress = Progress(epoch=10)
    assert log.seconds_left(state) == 0
    state.progress = Progress(epoch=3)
    assert log.seconds_left(state) == pytest.approx(7 * 10 + 4 * 4)
    state.rows = []
    assert log.seconds_left(state) is None and log.show_time(None) == '?'
    assert log.show_time(3725.4) == '1:02:05'


# Figures of an update


@pytest.fixture
def batch():
    torch.manual_seed(0)
    models = [timm.create_model(name, num_classes=4, **kwargs) for name, kwargs in (
        ('test_resnet', {}), ('test_vit', {'img_size': 32}))]
    task = PairTask(PairWrapper(*models), VPLLoss(3, x=0, y=0), verbose=False).train()
    return task, torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1])


def test_gradient_norms_are_those_of_autograd(batch):
    task, input, target = batch
    result = task(input, target)
    parameters = {side: list(task.trainable_module.branch(side).parameters()) for side in 'ab'}
    found = term_norms(task, result)
    assert set(found) == {f'grad_{name}_{side}' for name in ('ce_a', 'ce_b', 'contrastive', 'kl') for side in 'ab'}
    for name in ('ce_a', 'ce_b', 'contrastive', 'kl'):
        for side in 'ab':
            gradients = torch.autograd.grad(
                result[f'{name}_loss'], parameters[side], retain_graph=True, allow_unused=True)
            square = sum(float((gradient.double() ** 2).sum()) for gradient in gradients if gradient is not None)
            assert float(found[f'grad_{name}_{side}']) == pytest.approx(square ** 0.5, rel=1e-5, abs=1e-12)
    assert float(found['grad_ce_a_b']) == float(found['grad_kl_b']) == float(found['grad_contrastive_a']) == 0
    result['loss'].backward()
    for side, value in gradient_norms(task, 'ab').items():
        square = sum(float((p.grad.double() ** 2).sum()) for p in parameters[side[-1]] if p.grad is not None)
        assert float(value) == pytest.approx(square ** 0.5, rel=1e-5)


def test_likeness_is_that_of_each_image():
    logits = torch.tensor([[2., 1.], [0., 3.], [1., 0.]]), torch.tensor([[1., 0.], [4., 3.], [5., 0.]])
    embeds = torch.tensor([[3., 4.], [1., 0.], [1., 1.]]), torch.tensor([[4., 3.], [0., 2.], [-1., -1.]])
    found = likeness(PairOutput(*logits, *embeds))
    assert found['agreement'].tolist() == [100, 0, 100]
    assert found['alignment'].tolist() == pytest.approx([24 / 25, 0, -1])
    assert list(likeness(PairOutput(*logits))) == ['agreement'] and not likeness(PairOutput(logits[0], None))


@pytest.mark.parametrize('options', [[], ['--method', 'dml']], ids=' '.join)
def test_measures_change_nothing_that_is_trained(digits_folder, tmp_path, options):
    options = [*OPTIONS, *options, '--stop-epoch', '2']
    plain = run(digits_folder, tmp_path, *options, name='plain')
    measured = run(digits_folder, tmp_path, *options, '--log-grad-terms', '1', '--log-interval', '1', name='measured')
    assert not differences(plain, measured)


def test_terms_are_not_measured_under_checkpointing(digits_folder, capsys):
    line = error_line(capsys, digits_folder, *PAIR, '--log-grad-terms', '5', '--grad-checkpointing-a')
    assert line.startswith('--log-grad-terms 5: its backward passes would repeat the forward pass of --grad-checkp')


@pytest.mark.slow
def test_terms_are_measured_by_two_processes(digits_folder, tmp_path):
    options = [*PAIR, *SMALL, '--epochs', '1', '-b', '4', '--output', tmp_path, '--x', '0', '--y', '0']
    torchrun(2, digits_folder, *options, '--experiment', 'plain')
    torchrun(2, digits_folder, *options, '--experiment', 'measured', '--log-grad-terms', '2')
    assert not differences(tmp_path / 'plain', tmp_path / 'measured')


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 'local_scalar_dense' in str(function)
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_between_log_intervals(batch):
    task, input, target = batch
    optimizer = torch.optim.SGD([
        {'params': group, 'side': side} for side, group in task.clip_groups().items()], lr=0.01)
    update, progress, counts = Update(task, optimizer, 100), Progress(), []
    for measures in (False, True, False):
        update.measures = update.measures_terms = measures
        with HostReads() as reads:
            update(progress, input, target)
        counts.append(reads.count)
    assert counts[0] == counts[1] == counts[2]
    with HostReads() as once:
        figures = update.read(progress)
    assert {'loss', 'agreement', 'alignment', 'grad_norm_a', 'grad_kl_a'} <= figures.keys()
    with HostReads() as plain:
        assert 'agreement' not in update.read(progress)
    assert once.count == plain.count


def test_the_epoch_tells_how_far_the_branches_agree(digits_folder, tmp_path):
    folder = run(digits_folder, tmp_path, *OPTIONS)
    for row in rows(folder):
        for prefix in ('eval', 'eval_ema'):
            assert 0 <= float(row[f'{prefix}_agreement']) <= 100 and -1 <= float(row[f'{prefix}_alignment']) <= 1
            # Neither branch is right where they agree more often than it is.
            right = [float(row[f'{prefix}_top1_{side}']) for side in 'ab']
            assert float(row[f'{prefix}_agreement']) <= 100 - abs(right[0] - right[1]) + 1e-6
    alone = run(digits_folder, tmp_path, *OPTIONS[:2], '--method', 'solo', '--model-b', '', name='solo')
    assert not any('agreement' in name for name in rows(alone)[0])


# Trackers


def scalars(folder):
    """Return the points of each curve of TensorBoard: {name: {step: value}}; no step twice."""
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    curves = {}
    for kind in ('train', 'epoch'):
        events = accumulator.EventAccumulator(str(folder / 'tensorboard' / kind), size_guidance={'scalars': 0})
        events.Reload()
        for name in events.Tags()['scalars']:
            points = [(event.step, event.value) for event in events.Scalars(name)]
            assert name.startswith(f'{kind}/') and len(dict(points)) == len(points), name
            curves[name] = dict(points)
    return curves


def history(folder):
    """Return the points of each curve of W&B, of all starts in their order: {name: {step: value}}; none twice."""
    records = pytest.importorskip('wandb.proto.wandb_internal_pb2')
    pytest.importorskip('wandb').teardown()  # ends the process that writes
    curves = {}
    for path in sorted((folder / 'wandb').glob('offline-run-*/*.wandb')):
        stream, data, place = path.read_bytes(), b'', 7
        while place + 7 <= len(stream):  # blocks of 32768 bytes; each part of a record: checksum, length, kind
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            length, kind = struct.unpack_from('<HB', stream, place + 4)
            data += stream[place + 7:place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or its last part
                record, data = records.Record.FromString(data), b''
                row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
                for name, value in row.items():
                    if '/' in name:
                        curves.setdefault(name, {})[row['update']] = value
    return curves


def without_times(curves):
    return {name: points for name, points in curves.items() if 'second' not in name}


def train_until(owner, name, count, before, argv):
    """Train until a method is called, the count-th time, and end by SIGKILL before or after it."""
    original, calls = getattr(owner, name), itertools.count(1)

    def method(*args, **kwargs):
        is_last = next(calls) == count
        if not (is_last and before):
            original(*args, **kwargs)
        if is_last:
            time.sleep(0.5)  # W&B has a process of its own, which the kill ends too
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, method)
    train([str(arg) for arg in argv])


def killed_and_gone_on(data, output, instant, start, *options):
    """Train in another process, which is killed, go on in this one, and return the run's folder."""
    name, count, before = INSTANTS[instant]
    options = [*FREQUENT, *options, '--recovery-interval', '5']
    process = multiprocessing.get_context(start).Process(target=train_until, args=(
        checkpoint.Saver if name == 'save' else trackers.Tracker, name, count, before,
        [data, *PAIR, *SMALL, *options, '--output', output, '--experiment', 'run']))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return run(data, output, *options, '--resume', 'auto')


INSTANTS = {
    'in an epoch': ('log', 8, False), 'epoch trained': ('save', 2, True), 'epoch saved': ('validated', 2, True),
    'epoch told': ('validated', 2, False)}


@pytest.fixture(scope='module')
def whole(digits_folder, tmp_path_factory):
    """A run that no one stopped, and its curves."""
    pytest.importorskip('tensorboard')
    folder = run(digits_folder, tmp_path_factory.mktemp('whole'), *FREQUENT, '--log-tensorboard')
    return folder, scalars(folder)


def test_tensorboard_has_the_figures(whole):
    folder, curves = whole
    for row in rows(folder):
        step = 5 * (int(row['epoch']) + 1)
        for name, value in row.items():
            if value != '':
                assert curves[f'epoch/{name}'][step] == pytest.approx(float(value), rel=1e-5), name
    assert sorted(curves['train/loss']) == list(range(1, 16))
    assert [curves['train/stage'][step] for step in (5, 6, 15)] == [1, 2, 3]
    assert curves['train/weight_kl'][5] == 0 and curves['train/weight_kl'][6] == 1


SLOW = [pytest.param(instant, marks=[pytest.mark.slow] * (instant not in ('epoch trained', 'epoch saved')))
        for instant in INSTANTS]


@pytest.mark.parametrize('instant', SLOW)
def test_tensorboard_goes_on_after_a_kill(digits_folder, tmp_path, whole, instant):
    part = killed_and_gone_on(digits_folder, tmp_path, instant, 'fork', '--log-tensorboard')
    assert without_times(scalars(part)) == without_times(whole[1])


@pytest.mark.slow
@pytest.mark.parametrize('instant', INSTANTS)
def test_wandb_offline_is_one_run_that_goes_on_after_a_kill(digits_folder, tmp_path, whole, monkeypatch, instant):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL', '0.1')
    part = killed_and_gone_on(digits_folder, tmp_path, instant, 'spawn', '--log-wandb')
    found, wanted = without_times(history(part)), without_times(whole[1])
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert found[name] == pytest.approx(points, rel=1e-5), name
    kept = [path.name for path in Path(part, 'wandb').glob('offline-run-*')]
    assert len(kept) == 2 and all(name.endswith((part / 'wandb_id').read_text()) for name in kept)


def test_a_tracker_that_fails_ends_no_run(digits_folder, tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise OSError('no space left')

    tensorboard = pytest.importorskip('torch.utils.tensorboard', exc_type=ImportError)
    monkeypatch.setattr(tensorboard.SummaryWriter, 'add_scalar', fail)
    with caplog.at_level(logging.WARNING):
        folder = run(digits_folder, tmp_path, '--log-tensorboard')
    assert len(rows(folder)) == 2
    [line] = [record.getMessage() for record in caplog.records if 'TensorBoard' in record.getMessage()]
    assert line == 'TensorBoard: no space left; the run continues without it'


@pytest.mark.parametrize('name, package', [('tensorboard', 'tensorboard'), ('wandb', 'wandb')])
def test_a_missing_package_is_one_line_before_data_are_read(name, package, monkeypatch, capsys, tmp_path):
    folder = SimpleNamespace(loader=None)  # as W&B leaves one in the current folder
    monkeypatch.setattr(trackers, 'find_spec', lambda name: folder if name == 'wandb' else None)
    (tmp_path / 'train').mkdir()
    assert error_line(capsys, tmp_path, *PAIR, f'--log-{name}') == (
        f'--log-{name}: needs the package {package} (pip install {package})')
