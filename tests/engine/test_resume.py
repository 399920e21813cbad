"""A run that is stopped or interrupted, anywhere, ends as the run that was left alone, to the bit."""
import logging
import os
import re
import shlex
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from runs import NOISE, PAIR, SMALL, content, differences, last, rows, run, summary, torchrun
from safetensors.torch import load_file, save_file
from streams import write_tars

from timm_vpl.cli import train
from timm_vpl.engine import loop
from timm_vpl.engine.checkpoint import newest_checkpoint, read_checkpoint, recovery_files
from timm_vpl.engine.control import STOP
from timm_vpl.errors import Stopped
from timm_vpl.files import temporary
from timm_vpl.options.train import parse_args

SHORT = [
    *NOISE, '--epochs', '3', '--x', '40', '--y', '30', '--log-interval', '1', '--experiment', 'run', '-vb', '4',
    '--save-epochs', '2', '--checkpoint-hist', '3']


@pytest.fixture(scope='module')
def whole(digits_folder, tmp_path_factory):
    return run(digits_folder, tmp_path_factory.mktemp('whole'), *SHORT, '--recovery-interval', '2')


@pytest.fixture(scope='module')
def begun(digits_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp('begun')
    run(digits_folder, output, *SHORT, '--stop-epoch', '1')
    return output


class SignalAt(logging.Handler):
    """Sends this process SIGTERM at the first log line that has a pattern."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern

    def emit(self, record):
        if self.pattern and re.search(self.pattern, record.getMessage()):
            self.pattern = None
            self.act(signal.SIGTERM)

    @staticmethod
    def act(number):
        os.kill(os.getpid(), number)


def stopped(pattern, function, *args, **kwargs):
    """Train by a function until a log line has the pattern."""
    handler = SignalAt(pattern)
    logging.getLogger('train').addHandler(handler)
    logging.getLogger('train').setLevel(logging.INFO)
    try:
        with pytest.raises(SystemExit, match='143'):
            function(*args, **kwargs)
    finally:
        logging.getLogger('train').removeHandler(handler)


@pytest.mark.parametrize('options', [
    ['--mixup', '0.2', '--cutmix', '1.0', '--workers', '2', '--lr-noise', '0.1', '--val-interval', '2'],
    ['--method', 'dml', '--aug-repeats', '3'],
    ['--grad-accum-steps', '2', '--opt', 'lookahead_adamw', '--sched-on-updates', '--mixup', '0.8', '--amp',
     '--amp-dtype', 'bfloat16', '--on-nonfinite', 'skip', '--no-model-ema'],
    pytest.param(['--torchcompile', 'eager'], marks=pytest.mark.slow),
], ids=['workers', 'dml', 'accumulation', 'compiled'])
def test_stopped_in_mid_epoch(digits_folder, tmp_path, options):
    whole = run(digits_folder, tmp_path / 'whole', *SHORT, *options)
    stopped(r'Train: 1 \[ *[12]/', run, digits_folder, tmp_path / 'part', *SHORT, *options)
    assert read_checkpoint(newest_checkpoint(tmp_path / 'part' / 'run'))['progress']['batch'] in (1, 2, 3, 4)
    part = run(digits_folder, tmp_path / 'part', *SHORT, *options, '--resume', 'auto')
    assert not differences(whole, part)


def test_stopped_in_validation(digits_folder, tmp_path, capsys, whole):
    stopped(r'Train: 1 \[ *4/', run, digits_folder, tmp_path, *SHORT)
    assert 'after epoch 1, batch 5 of 5' in capsys.readouterr().err
    assert not differences(whole, run(digits_folder, tmp_path, *SHORT, '--resume', 'auto'))


def test_a_stream_begins_its_epoch_anew(digits_folder, tmp_path, caplog):
    pytest.importorskip('webdataset', minversion='1.0', reason='the extra wds is not installed')
    for split in ('train', 'validation'):
        paths = sorted((digits_folder / split).rglob('*.png'))
        write_tars(tmp_path / 'x', split, [(path.read_bytes(), int(path.parent.name[5:])) for path in paths], 3)
    options = [*SHORT, '--dataset', 'wds/x', '--num-classes', '4', '--mixup', '0.2']
    whole = run(tmp_path / 'x', tmp_path / 'whole', *options)
    # In validation a run is where the next epoch begins, at which it goes on as the one left alone.
    stopped(r'Train: 1 \[ *4/', run, tmp_path / 'x', tmp_path / 'part', *options)
    assert not differences(whole, run(tmp_path / 'x', tmp_path / 'part', *options, '--resume', 'auto'))
    assert 'starts again' not in caplog.text
    stopped(r'Train: 1 \[ *2/', run, tmp_path / 'x', tmp_path / 'anew', *options)
    assert read_checkpoint(newest_checkpoint(tmp_path / 'anew' / 'run'))['progress']['batch'] in (3, 4)
    found = rows(run(tmp_path / 'x', tmp_path / 'anew', *options, '--resume', 'auto'))
    assert [record.getMessage() for record in caplog.records if 'starts again' in record.getMessage()] == [
        'A stream cannot be resumed in mid-epoch: epoch 1 starts again']
    assert [(row['epoch'], row['images'], row['skipped']) for row in found] == [(str(i), '40', '0') for i in range(3)]


@pytest.mark.parametrize('split, options, place', [
    ('train', [], 'epoch 1, batch [234] of 5'),
    pytest.param('train', ['--grad-accum-steps', '2'], 'epoch 1, batch [024] of 5', marks=pytest.mark.slow),
    pytest.param('validation', [], 'epoch 0, batch 5 of 5', marks=pytest.mark.slow),
], ids=['training', 'accumulation', 'validation'])
@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes with names')
def test_stopped_while_images_stand_still(digits_folder, tmp_path, capsys, monkeypatch, whole, split, options, place):
    data = shutil.copytree(digits_folder, tmp_path / 'data')
    images = sorted((data / split).rglob('*.png'))

    def stand_still(number):
        for image in images:
            image.rename(image.with_suffix('.kept'))
            os.mkfifo(image)  # nobody writes to it
        threading.Timer(1, os.kill, (os.getpid(), number)).start()

    if options:
        whole = run(data, tmp_path / 'whole', *SHORT, *options)
    monkeypatch.setattr(SignalAt, 'act', staticmethod(stand_still))
    pattern = r'Train: 1 \[ *1/' if split == 'train' else r'Train: 0 \[ *4/'
    stopped(pattern, run, data, tmp_path / 'part', *SHORT, *options)
    line = capsys.readouterr().err
    assert re.search(rf'after {place}, while worker 0 reads class\d/\d+\.png \(index \d+\); to resume', line)
    for image in images:
        image.with_suffix('.kept').replace(image)
    part = run(data, tmp_path / 'part', *SHORT, *options, '--resume', 'auto')
    assert not differences(whole, part)


@pytest.mark.parametrize('own_name', [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_command_of_the_stop_line_goes_on(digits_folder, tmp_path, capsys, own_name):
    recipe, output = tmp_path / 'recipe.yaml', tmp_path / 'part of it'
    recipe.write_text('lr: 0.002\nopt: sgd\nexperiment: run\n' if own_name else 'opt: sgd\n')
    if own_name:
        (output / 'run').mkdir(parents=True)  # so that the run's folder gets another name
    options = [*PAIR, *SMALL, *NOISE, '--epochs', '3', '--log-interval', '1', '--scale', '0.5', '1', '--model-kwargs-b',
               'drop_rate=0.1', 'depth=2', '--no-model-ema', '-c', str(recipe)]
    whole = [*options, '--output', str(tmp_path / 'whole'), '--experiment', 'run', str(digits_folder)]
    assert train(whole) == 0
    stopped(r'Train: 1 \[ *[12]/', train, [*options, '--output', str(output), str(digits_folder)])
    command = shlex.split(capsys.readouterr().err.strip().rpartition('; to resume: ')[2])
    (folder,) = [path for path in output.iterdir() if any(path.iterdir())]
    assert command[:2] == ['python', 'train_vpl.py'] and command[-2:] == ['--resume', str(folder)]
    assert train(command[2:]) == 0
    assert not differences(tmp_path / 'whole' / 'run', folder)
    saved = (folder / 'last.pth.tar').stat().st_mtime_ns
    assert train(command[2:]) == 0 and (folder / 'last.pth.tar').stat().st_mtime_ns == saved  # it is finished
    assert len(list(output.iterdir())) == 1 + own_name


@pytest.mark.parametrize('saved, distributed, end', [
    (True, False, 'to resume: timm-vpl train {} --resume {}'),
    (True, True, 'to resume (under torchrun, as before): timm-vpl train {} --resume {}'),
    (False, False, 'NOT saved, older checkpoints are kept, the newest is last.pth.tar; to resume: timm-vpl train {} '
     '--resume {}'),
], ids=['saved', 'torchrun', 'not saved'])
def test_the_stop_line(monkeypatch, tmp_path, saved, distributed, end):
    monkeypatch.setattr(loop, 'save_recovery', lambda run: saved)
    given = ['--dataset=digits', '--model-a=test_resnet', '--model-b=test_vit', '--lr=0.002']
    run = SimpleNamespace(
        options=parse_args([*given, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto',
                            '--no-resume-opt', '--start-epoch', '0'], 'timm-vpl train'),
        output_dir=str(tmp_path / 'run'), saver=SimpleNamespace(newest='last.pth.tar'),
        processes=SimpleNamespace(distributed=distributed), progress=SimpleNamespace(epoch=1, batch=2),
        loader_train=range(5))
    with pytest.raises(Stopped) as stop:
        loop.handle_decision(run, STOP + signal.SIGTERM)
    end = end.format(shlex.join(given), tmp_path / 'run')
    assert str(stop.value) == f'stopped by SIGTERM after epoch 1, batch 2 of 5; {end}'


def test_a_folder_to_resume(digits_folder, tmp_path, capsys):
    pair = ['--dataset', 'digits', *PAIR, '--resume', str(tmp_path)]
    for options, message in (
            (['--experiment', 'x'], f'--resume {tmp_path}: the run continues in that folder, but --experiment is x'),
            (['--output', 'x'], f'--resume {tmp_path}: the run continues in that folder, but --output is x')):
        with pytest.raises(SystemExit):
            parse_args([*pair, *options])
        assert message in capsys.readouterr().err
    assert train([str(digits_folder), *PAIR, *SMALL, '--resume', str(tmp_path)]) == 2
    assert f'--resume {tmp_path}: no checkpoint in this folder' in capsys.readouterr().err
    run_options = parse_args([*pair, '--output', str(tmp_path.parent), '--experiment', tmp_path.name])
    assert (run_options.run.output, run_options.run.experiment) == (str(tmp_path.parent), tmp_path.name)


@pytest.mark.parametrize('name', ['recovery-2-3', pytest.param('recovery-2-4', marks=pytest.mark.slow)])
def test_recovery_checkpoints_and_a_link_to_their_folder(digits_folder, tmp_path, whole, name):
    assert {path.name for path in whole.glob('recovery-*')} == {'recovery-2-3.pth.tar', 'recovery-2-4.pth.tar'}
    part = shutil.copytree(whole, tmp_path / 'part' / 'run')
    (tmp_path / 'link').symlink_to(tmp_path / 'part')
    run(digits_folder, tmp_path / 'part', *SHORT, '--resume', str(tmp_path / 'link' / 'run' / f'{name}.pth.tar'))
    assert not differences(whole, part) and os.listdir(tmp_path / 'part') == ['run']


def test_recovery_minutes(digits_folder, tmp_path):
    folder = run(digits_folder, tmp_path, '--epochs', '1', '--recovery-minutes', '0.00001')
    assert len(list(folder.glob('recovery-*'))) == 2


def test_other_data_is_refused(digits_folder, tmp_path, capsys, caplog):
    data = shutil.copytree(digits_folder, tmp_path / 'data')
    options = [*SHORT, '--resume', 'auto']
    run(data, tmp_path, *options, '--stop-epoch', '1', '--recovery-interval', '2')

    def refused(*more):
        assert train([str(data), *PAIR, *SMALL, '--output', str(tmp_path), '--experiment', 'run', *options, *more]) == 2
        return capsys.readouterr().err

    def rename(old, new):
        for split in ('train', 'validation'):
            (data / split / old).rename(data / split / new)

    rename('class1', 'zebra')
    classes = "data: class 1 was 'class1', now 'class2'; the weights were trained on the old classes\n"
    for more in (['--accept-data-change'], ['--start-epoch', '1']):
        assert f'train {classes}' in refused(*more)
    rename('zebra', 'class1')

    image = next((data / 'train' / 'class1').iterdir())
    moved = image.rename(image.with_name('other.png'))
    assert ('run/last.pth.tar: train data: other images or labels; --accept-data-change continues with them from a '
            'checkpoint at the end of an epoch\n') in refused()
    shutil.copy(moved, image)
    assert 'train data: 40 images before, now 41; --accept-data-change' in refused()
    held_out = next((data / 'validation' / 'class1').iterdir())
    held_out.rename(held_out.with_name('x.png'))
    assert 'train data: 40 images before, now 41; validation data: other images or labels;' in refused()
    # Within an epoch its order would be another one.
    shutil.copytree(tmp_path / 'run', tmp_path / 'within')
    (tmp_path / 'within' / 'last.pth.tar').unlink()
    assert '--accept-data-change continues with them from' in refused(
        '--accept-data-change', '--experiment', 'within')

    before = yaml.safe_load((tmp_path / 'run' / 'data.yaml').read_text())
    run(data, tmp_path, *options, '--accept-data-change', '--stop-epoch', '2')
    assert '--resume: changed: train data: 40 images before, now 41' in caplog.text
    now = yaml.safe_load((tmp_path / 'run' / 'data.yaml').read_text())
    assert now['train']['earlier'] == [before['train']['files']] and now['train']['images'] == 41
    run(data, tmp_path, *options)
    assert yaml.safe_load((tmp_path / 'run' / 'data.yaml').read_text()) == now and len(rows(tmp_path / 'run')) == 3


def test_auto_after_a_death_before_the_first_checkpoint(digits_folder, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'args.yaml').write_text('method: vpl\n')
    half = Path(temporary(folder / 'last.pth.tar'))
    half.write_bytes(b'half')
    assert run(digits_folder, tmp_path, '--resume', 'auto', '--epochs', '1') == folder
    assert (folder / 'last.pth.tar').exists() and not half.exists()
    assert not (tmp_path / 'run-1').exists()


@pytest.mark.parametrize('options, messages', [
    (['--model-b', 'test_vit2', '--method', 'dml', '--epochs', '4', '-b', '4', '--seed', '8', '--weight-decay-a',
      '0.1', '--no-model-ema', '--eval-metric', 'loss_a'],
     ['--model-b test_vit before, now test_vit2', '--method vpl before, now dml', '--epochs 3 before, now 4',
      '1 processes x batch 8 before, now 1 x 4', '--seed 7 before, now 8', '--weight-decay-a 0.05 before, now 0.1',
      '--model-ema on before, now off', '--eval-metric top1 before, now loss_a']),
    (['--cooldown-epochs', '2'], ['3 epochs in all before, now 5']),
], ids=['options', 'epochs'])
def test_another_run_is_refused(digits_folder, begun, capsys, options, messages):
    before = content(begun / 'run')
    argv = [str(digits_folder), *PAIR, *SMALL, *SHORT, '--output', str(begun), '--resume', 'auto', *options]
    assert train(argv) == 2
    line = capsys.readouterr().err
    assert all(message in line for message in messages) and line.count('\n') == 1 and '--start-epoch 1' in line
    assert content(begun / 'run') == before


def test_a_change_of_course_is_allowed(digits_folder, begun, tmp_path, caplog):
    shutil.copytree(begun / 'run', tmp_path / 'run')
    run(digits_folder, tmp_path, *SHORT, '--resume', 'auto', '--lr', '0.002', '--workers', '1', '--stop-epoch', '2')
    lines = [record.getMessage() for record in caplog.records if 'changed' in record.getMessage()]
    assert lines == [f'--resume: changed: --lr-{side} 0.001 before, now 0.002' for side in 'ab']
    assert [row['epoch'] for row in rows(tmp_path / 'run')] == ['0', '1']


def test_restart_by_hand(digits_folder, begun, tmp_path):
    run(digits_folder, tmp_path, *SHORT, '--resume', str(begun / 'run' / 'last.pth.tar'), '--start-epoch', '1',
        '--epochs', '2', '--weight-decay', '0.2')
    assert [row['epoch'] for row in rows(tmp_path / 'run')] == ['0', '1']  # what came before is in the checkpoint
    assert {group['weight_decay'] for group in last(tmp_path / 'run')['optimizer']['param_groups']} == {0., 0.2}


def test_a_name_torchrun_restarts_goes_on(digits_folder, begun, tmp_path, monkeypatch, caplog):
    shutil.copytree(begun / 'run', tmp_path / 'run')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    run(digits_folder, tmp_path, *SHORT, '--stop-epoch', '2')
    assert len(summary(tmp_path / 'run')) == 2
    run(digits_folder, tmp_path, *SHORT, '--stop-epoch', '1', '--experiment', '', '--output', str(tmp_path / 'new'))
    assert 'from the beginning' in caplog.text


def test_a_rewound_run_is_the_newest(digits_folder, tmp_path, whole):
    # From an older checkpoint of the same folder: what the old course left ahead of it is passed by.
    folder = shutil.copytree(whole, tmp_path / 'run')
    for path in folder.glob('*.tar'):
        from_the_future(path)  # of a clock that is right again
    stopped(r'Train: 1 \[ *1/', run, digits_folder, tmp_path, *SHORT, '--recovery-interval', '1', '--lr', '0.002',
            '--resume', str(folder / 'checkpoint-0.pth.tar'))
    newest = read_checkpoint(newest_checkpoint(folder))
    assert newest['epoch'] == 0 and newest['progress']['batch'] in (2, 3) and newest['args']['lr_a'] == 0.002
    for path in folder.glob('recovery-*'):  # each is whole and loads
        read_checkpoint(str(path))
    rewound = run(digits_folder, tmp_path, *SHORT, '--lr', '0.002', '--resume', 'auto')
    assert last(rewound)['epoch'] == 2 and last(rewound)['args']['lr_a'] == 0.002


@pytest.fixture(scope='module')
def finished(digits_folder, tmp_path_factory):
    return run(digits_folder, tmp_path_factory.mktemp('finished'), *SHORT, '--stop-epoch', '2', '--export')


def test_a_finished_run_is_left_alone(digits_folder, finished, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = shutil.copytree(finished, tmp_path / 'run')
    (folder / 'export' / 'vpl-test_vit' / 'README.md').write_text('My own card')
    options = [*SHORT, '--stop-epoch', '2', '--export', '--resume', 'auto']
    before = content(folder)
    run(digits_folder, tmp_path, *options, '--workers', '1')
    assert caplog.messages[-1].endswith(f'the run in {folder} is finished; no file is changed')
    assert content(folder) == before
    run(digits_folder, tmp_path, *SHORT, '--export', '--resume', 'auto')  # to its end
    assert len(rows(folder)) == 3 and (folder / 'export' / 'vpl-test_vit' / 'README.md').read_text() == 'My own card'


@pytest.mark.slow
def test_a_finished_run_is_left_alone_by_two_processes(digits_folder, finished):
    before = content(finished)
    torchrun(2, digits_folder, *PAIR, *SMALL, *SHORT, '--stop-epoch', '2', '--export', '--resume', 'auto', '-b', '4',
             '--output', finished.parent)
    assert content(finished) == before


@pytest.mark.parametrize('lost', [
    'summary.csv', pytest.param('export', marks=pytest.mark.slow), 'export/vpl-test_vit/model.safetensors',
    f'curves.png.{32 * "0"}.tmp'])
def test_what_a_finished_run_lacks_is_made(digits_folder, finished, tmp_path, lost):
    # As after a kill behind the last epoch: the third with the export of an earlier one, the last in a file.
    folder = shutil.copytree(finished, tmp_path / 'run')
    path = folder / lost
    kept = (folder / 'export' / 'vpl-test_resnet').stat().st_mtime_ns
    if path.suffix == '.safetensors':
        weights = load_file(path)
        save_file({key: value + 1 for key, value in weights.items()}, path)
    elif path.suffix == '.tmp':
        path.touch()
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    options = [*SHORT, '--stop-epoch', '2', '--export', '--resume', 'auto']
    run(digits_folder, tmp_path, *options)
    assert summary(folder) == summary(finished) and not list(folder.glob('*.tmp'))
    for name in ('vpl-test_resnet', 'vpl-test_vit'):
        one, two = (load_file(each / 'export' / name / 'model.safetensors') for each in (folder, finished))
        assert all(torch.equal(one[key], two[key]) for key in two)
    assert (kept == (folder / 'export' / 'vpl-test_resnet').stat().st_mtime_ns) is (lost != 'export')
    if lost == 'summary.csv':
        before = content(folder)
        run(digits_folder, tmp_path, *options)
        assert content(folder) == before


def from_the_future(path):
    checkpoint = read_checkpoint(str(path))
    torch.save({**checkpoint, 'time': checkpoint['time'] + 86400}, path)  # under all of its names
    os.utime(path, (checkpoint['time'] + 86400,) * 2)


def test_a_clock_that_runs_behind_and_a_file_half_written(digits_folder, tmp_path, caplog, whole):
    stopped(r'Train: 1 \[ *3/', run, digits_folder, tmp_path, *SHORT, '--recovery-interval', '1')
    folder = tmp_path / 'run'
    from_the_future(folder / 'last.pth.tar')
    newest = newest_checkpoint(folder)
    *_, before, half = recovery_files(str(folder))
    assert newest == half and 'recovery-1-' in newest
    assert caplog.messages[-1] == f'Skipped: last.pth.tar: newer by the clock, but saved before {newest}'
    Path(half).write_bytes(b'half')
    assert newest_checkpoint(folder) == before
    assert not differences(whole, run(digits_folder, tmp_path, *SHORT, '--resume', 'auto'))


def test_another_memory_layout(digits_folder, begun, tmp_path, whole):
    # Fused kernels go by the order in memory.
    shutil.copytree(begun / 'run', tmp_path / 'run')
    other = run(digits_folder, tmp_path, *SHORT, '--resume', 'auto', '--stop-epoch', '2', '--channels-last-a')
    state, changed = read_checkpoint(str(whole / 'checkpoint-1.pth.tar'))['state_dict'], last(other)['state_dict']
    for key in state:
        torch.testing.assert_close(state[key], changed[key], rtol=1e-2, atol=2e-3, msg=key)


def test_torchrun_goes_on_with_a_name(digits_folder, begun, tmp_path, monkeypatch):
    # Also before there is a checkpoint: the folder stays the same.
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    (tmp_path / 'run').mkdir()
    assert run(digits_folder, tmp_path, *SHORT, '--stop-epoch', '1') and not (tmp_path / 'run-1').exists()
    run(digits_folder, tmp_path, *SHORT, '--stop-epoch', '2')
    assert len(summary(tmp_path / 'run')) == 2 and not (tmp_path / 'run-1').exists()
