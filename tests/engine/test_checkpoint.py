"""The saver: ranked as by timm's, whole whatever interrupts it, and what is read back of files that were damaged."""
import os
import random
from pathlib import Path

import pytest
import torch
from runs import content
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

import timm_vpl.files
from timm_vpl.engine.checkpoint import Ranks, Saver, newest_checkpoint, read_checkpoint, recovery_files
from timm_vpl.errors import RunError

METRICS = [3., None, 5., 1., 5.]  # of epochs; None: not validated
BRANCHES = {'a': {'architecture': 'x'}, 'b': {'architecture': 'y'}}


def create_task():
    return ClassificationTask(torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(), verbose=False)


@pytest.mark.parametrize('decreasing', [False, True])
@pytest.mark.parametrize('seed', range(4))
def test_ranks_are_those_of_timms_saver(tmp_path, decreasing, seed):
    rng = random.Random(seed)
    task = create_task()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    saver = CheckpointSaver(
        task.trainable_module, optimizer, task=task, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path),
        decreasing=decreasing, max_history=3)
    ranks = Ranks()
    for epoch in range(12):
        metric = rng.choice([None, 1., 2., 3., 4.])
        saver.save_checkpoint(epoch, metric)
        ranks = ranks.add(epoch, {} if metric is None else {'model_best': metric}, 3, decreasing)
        theirs, ours = saver.state_dict(), ranks.state_dict()
        assert [ours[key] for key in ('checkpoint_files', 'best_metric', 'best_epoch')] == [
            theirs[key] for key in ('checkpoint_files', 'best_metric', 'best_epoch')]
        assert Ranks.from_state(ours, 'ab') == ranks


class Killed(BaseException):
    """The end of a process at an instant that a test chose."""


def go_on(folder):
    """Save the epochs that a folder does not have yet, with a recovery checkpoint in each."""
    os.makedirs(folder, exist_ok=True)
    task = create_task()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    newest = newest_checkpoint(folder)
    saver = Saver(str(folder), task, optimizer, {}, BRANCHES, max_history=2, milestones=(2,))
    start = 0
    if newest is not None:
        checkpoint = read_checkpoint(newest)
        start = checkpoint['epoch'] + 1
        saver.resume(checkpoint['saver'], newest, checkpoint['epoch'])
    for epoch in range(start, len(METRICS)):
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.fill_(epoch)
        assert saver.save_recovery(epoch, 3, {})
        metrics = {'model_best': METRICS[epoch], 'best_a': METRICS[epoch], 'best_b': METRICS[-1 - epoch]}
        saver.save(epoch, {}, metrics)
        assert not saver.failed


def state(folder):
    """Return what each file holds, but for the bookkeeping in those within an epoch: it may miss what was deleted."""
    found = {}
    for path in folder.iterdir():
        checkpoint = read_checkpoint(str(path))
        found[path.name] = (checkpoint['epoch'], float(checkpoint['state_dict']['bias'][0])) + (
            () if path.name.startswith('recovery') else (checkpoint['saver'],))
    return found


def test_killed_while_saving(tmp_path, monkeypatch):
    # Of the file operations of all saves, each in turn is the last that the process did not do.
    go_on(tmp_path / 'whole')
    whole = state(tmp_path / 'whole')
    assert set(whole) == {f'{name}.pth.tar' for name in (
        'last', 'checkpoint-2', 'checkpoint-4', 'model_best', 'best_a', 'best_b', 'milestone-2', 'recovery-3-2',
        'recovery-4-2')}
    assert whole['model_best.pth.tar'][:2] == (2, 2.) and whole['best_b.pth.tar'][:2] == (0, 0.)
    assert len({path.stat().st_ino for path in (tmp_path / 'whole').iterdir()}) == 6  # the other names are links
    monkeypatch.setattr(os, 'fsync', lambda file: None)  # slow, and no file operation of its own
    functions = {name: getattr(os, name) for name in ('replace', 'link', 'unlink')}
    instant, killed = 0, True
    while killed:
        count, killed = [0], False

        def interrupted(*args, function, count=count, instant=instant, **kwargs):
            count[0] += 1
            if count[0] > instant:  # and none after it
                raise Killed
            return function(*args, **kwargs)

        folder = tmp_path / str(instant)
        with monkeypatch.context() as patch:
            for name, function in functions.items():
                patch.setattr(os, name, lambda *args, f=function, i=interrupted, **kwargs: i(
                    *args, function=f, **kwargs))
            try:
                go_on(folder)
            except Killed:
                killed = True
        go_on(folder)
        assert state(folder) == whole, instant
        instant += 1
    assert instant > 40


def test_newest_checkpoint_that_can_be_read(tmp_path, caplog):
    go_on(tmp_path)
    assert newest_checkpoint(tmp_path) == str(tmp_path / 'last.pth.tar')
    for name in ('last', 'recovery-4-2'):
        path = tmp_path / f'{name}.pth.tar'
        half = path.read_bytes()
        path.unlink()
        path.write_bytes(half[:len(half) // 2])
    assert newest_checkpoint(tmp_path) == str(tmp_path / 'recovery-3-2.pth.tar')
    assert 'last.pth.tar' in caplog.text and 'truncated, or not a checkpoint' in caplog.text
    for path in tmp_path.glob('recovery-*'):
        path.unlink()
    assert newest_checkpoint(tmp_path) == str(tmp_path / 'checkpoint-4.pth.tar')
    for path in tmp_path.glob('*.tar'):
        path.unlink()
        path.write_bytes(b'half')
    before = content(tmp_path)
    with pytest.raises(RunError, match='none of the checkpoints in .* can be read'):
        newest_checkpoint(tmp_path)
    assert content(tmp_path) == before and newest_checkpoint(tmp_path / 'nothing') is None


def test_timms_saver_takes_the_bookkeeping(tmp_path):
    go_on(tmp_path)
    task = create_task()
    saver = CheckpointSaver(
        task.trainable_module, torch.optim.SGD(task.parameters(), lr=0.1), task=task, checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path), max_history=2)
    assert saver.load_state_dict_from_checkpoint(str(tmp_path / 'last.pth.tar'))
    assert [(os.path.basename(path), metric) for path, metric in saver.checkpoint_files] == [
        ('checkpoint-2.pth.tar', 5.), ('checkpoint-4.pth.tar', 5.)]
    assert (saver.best_metric, saver.best_epoch) == (5., 2)


def test_files_are_whole_or_as_they_were(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(OSError, match='full'), timm_vpl.files.replacing(str(path)) as f:
        f.write('new')
        raise OSError('full')
    assert path.read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['file']


def test_a_copy_of_a_recovery_checkpoint_is_the_users_own(tmp_path):
    for name in ('recovery-0-3', 'recovery-0-3-keep', 'recovery-1-2 copy', 'recovery-10-4'):
        (tmp_path / f'{name}.pth.tar').touch()
    assert [Path(path).name for path in recovery_files(str(tmp_path))] == [
        'recovery-0-3.pth.tar', 'recovery-10-4.pth.tar']
