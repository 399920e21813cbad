"""What a run shows while it goes: bars and lines, figures of updates, trackers."""
import fcntl
import logging
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from runs import PAIR, ROOT, SMALL, differences, error_line, rows, run, torchrun
from torch.utils._python_dispatch import TorchDispatchMode

from timm_vpl import PairTask, PairWrapper, VPLLoss
from timm_vpl.core.pair import PairOutput
from timm_vpl.engine import log
from timm_vpl.engine.measures import gradient_norms, likeness, term_norms
from timm_vpl.engine.step import Progress, Update
from timm_vpl.tools import trackers

OPTIONS = ['--epochs', '3', '--x', '30', '--y', '35', '--log-interval', '2']  # a stage an epoch


# On the screen


def on_terminal(*argv):
    """Return what training prints on a terminal of its own."""
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 160, 0, 0))
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
    return text.decode()


def test_a_terminal_gets_bars_and_a_row_an_epoch(digits_folder, tmp_path):
    text = on_terminal(digits_folder, *PAIR, *SMALL, *OPTIONS, '--output', tmp_path)
    assert re.search(r'Epoch 1, stage 2 \|.*\| 5/5, ce_a .*  loss [\d.]+  \d+ images/s, data \d+ %', text)
    assert re.search(r'Run \|.*\| 2/3, left 0:\d\d:\d\d  top-1 a \d', text)
    assert 'Train:' not in text
    plain = re.sub(r'\x1b\[\d*[A-Z]|\r', '\n', text)
    for epoch in range(3):
        [line] = re.findall(rf'^Epoch {epoch} \({epoch + 1}/3\)  .*$', plain, re.MULTILINE)
        assert f'stage {epoch + 1}' in line
        assert re.search(r'top-1 a [\d.]+ \([\d.]+\)  b [\d.]+ \([\d.]+\)  average .* s  left 0:', line)


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
    assert line.startswith('--log-grad-terms 5: its backward passes would run the forward of --grad-checkpointing-a ')


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
    events = accumulator.EventAccumulator(str(folder / 'tensorboard'), size_guidance={'scalars': 0})
    events.Reload()
    curves = {}
    for name in events.Tags()['scalars']:
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert len(dict(points)) == len(points), name
        curves[name] = dict(points)
    return curves


def without_times(curves):
    return {name: points for name, points in curves.items() if 'second' not in name}


def stop_at(pattern, *argv):
    """Train in another process until it prints a line with the pattern, and end it by SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'train_vpl.py'), *map(str, argv)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    for line in process.stderr:
        if re.search(pattern, line):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_tensorboard_has_the_figures_and_goes_on(digits_folder, tmp_path):
    pytest.importorskip('tensorboard')
    options = [*OPTIONS, '--log-interval', '1', '--log-tensorboard', '--recovery-interval', '2']
    whole = run(digits_folder, tmp_path / 'whole', *options)
    curves = scalars(whole)
    for row in rows(whole):
        step = 5 * (int(row['epoch']) + 1)
        for name, value in row.items():
            if value != '':
                assert curves[f'epoch/{name}'][step] == pytest.approx(float(value), rel=1e-5), name
    assert sorted(curves['train/loss']) == list(range(1, 16))
    assert [curves['train/stage'][step] for step in (5, 6, 15)] == [1, 2, 3]
    assert curves['train/weight_kl'][5] == 0 and curves['train/weight_kl'][6] == 1
    # Killed in mid-epoch after figures that the last checkpoint does not know, and gone on.
    argv = [digits_folder, *PAIR, *SMALL, *options, '--output', tmp_path / 'part', '--experiment', 'run']
    stop_at(r'Train: 1 \[ *3/', *argv)
    part = run(digits_folder, tmp_path / 'part', *options, '--resume', 'auto')
    assert without_times(scalars(part)) == without_times(curves)


def test_a_tracker_that_fails_ends_no_run(digits_folder, tmp_path, monkeypatch, caplog):
    def fail(self, numbers, step):
        raise OSError('no space left')

    pytest.importorskip('tensorboard')
    monkeypatch.setattr(trackers.TensorBoard, '_send', fail)
    with caplog.at_level(logging.WARNING):
        folder = run(digits_folder, tmp_path, '--log-tensorboard')
    assert len(rows(folder)) == 2
    [line] = [record.getMessage() for record in caplog.records if 'TensorBoard' in record.getMessage()]
    assert line == 'TensorBoard: no space left; the run goes on without it'


@pytest.mark.parametrize('name, package', [('tensorboard', 'tensorboard'), ('wandb', 'wandb')])
def test_a_missing_package_is_one_line_before_data_are_read(name, package, monkeypatch, capsys, tmp_path):
    folder = SimpleNamespace(loader=None)  # as W&B leaves one in the current folder
    monkeypatch.setattr(trackers, 'find_spec', lambda name: folder if name == 'wandb' else None)
    (tmp_path / 'train').mkdir()
    assert error_line(capsys, tmp_path, *PAIR, f'--log-{name}') == (
        f'--log-{name}: needs the package {package} (pip install {package})')


def test_wandb_offline_is_one_run_after_a_stop(digits_folder, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    folder = run(digits_folder, tmp_path, '--log-wandb', '--stop-epoch', '1')
    known = (folder / 'wandb_id').read_text()
    run(digits_folder, tmp_path, '--log-wandb', '--resume', 'auto')
    kept = [path.name for path in Path(folder, 'wandb').glob('offline-run-*')]
    assert len(kept) == 2 and all(name.endswith(known) for name in kept)
