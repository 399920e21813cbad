"""Errors that nothing expected: one line that says what, where and what to try; the traceback in a file."""
import re
from pathlib import Path

import pytest
from runs import NOISE, PAIR, SMALL

from timm_vpl import PairTask
from timm_vpl.cli import train
from timm_vpl.engine.boundary import as_line
from timm_vpl.engine.train import train as train_run
from timm_vpl.errors import RunError, UsageError
from timm_vpl.options.train import parse_args


def raised(error, cause=None):
    """Return an error with a traceback."""
    try:
        raise error from cause
    except type(error) as e:
        return e


@pytest.mark.parametrize('error, line', [
    (RuntimeError('CUDA out of memory. Tried\nmore'),
     r'RuntimeError: CUDA out of memory. Tried \(epoch 1; use a smaller --batch-size, .*; traceback: .*\)'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '),
     r'RuntimeError: DataLoader worker \(pid 7\) is killed.*\(epoch 1; probably out of memory: .*\)'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. '), '.*enlarge /dev/shm.*'),
    (RuntimeError('unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)'),
     r'RuntimeError: unable to open .*\(epoch 1; raise ulimit -n, .*'),
    (RuntimeError('x does not have a deterministic implementation'), '.*leave out --deterministic.*'),
    (OSError(28, 'No space left on device'), '.*make room on the disk.*'),
    (KeyError('x'), r"KeyError: 'x' \(epoch 1; traceback: .*\)"),
    (OSError('Caught OSError in worker 0.\nTraceback (most recent call last):\n  x\nOSError: no file'),
     r'OSError: no file \(epoch 1; traceback: .*\)'),
    (RuntimeError(), r'RuntimeError: RuntimeError \(epoch 1; traceback: .*\)'),
], ids=lambda value: str(value)[:20])
def test_one_line(tmp_path, error, line):
    found = as_line(raised(error), 'epoch 1', folder=str(tmp_path))
    assert isinstance(found, RunError) and re.fullmatch(line, str(found))
    (file,) = tmp_path.iterdir()
    assert f'traceback: {file}' in str(found) and 'Traceback' in file.read_text()


def test_what_killed_a_worker_is_the_cause(tmp_path):
    cause = RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')
    error = raised(RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly'), cause)
    assert 'probably out of memory' in str(as_line(error, folder=str(tmp_path)))


def test_what_was_expected_stays_as_it_is(tmp_path, capsys):
    for error in (RunError('x'), UsageError('y')):
        assert as_line(error, 'epoch 1', folder=str(tmp_path), show=True) is error
        assert type(error).__name__ in capsys.readouterr().err
    of_a_worker = RunError('Caught RunError in worker.\nTraceback:\ntimm_vpl.errors.RunError: data: a label')
    assert str(as_line(of_a_worker)) == 'data: a label' and not list(tmp_path.iterdir())


def test_an_error_within_a_run(digits_folder, tmp_path, monkeypatch, capsys):
    forward, calls = PairTask.forward, [0]

    def failing(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 8:
            raise RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory')
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PairTask, 'forward', failing)
    argv = [str(digits_folder), *PAIR, *SMALL, *NOISE, '--output', str(tmp_path), '--experiment', 'run']
    assert train(argv) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    (file,) = (tmp_path / 'run').glob('traceback-*.txt')
    assert line.startswith('train_vpl.py: error: RuntimeError: [enforce fail]')
    assert 'epoch 1, batch 2; use a smaller --batch-size' in line
    assert str(file) in line and 'in failing' in file.read_text()


def test_observers_hear_of_a_run(digits_folder, tmp_path):
    class Observer:
        heard: list = []

        def start(self, run):
            self.heard.append(('start', Path(run.output_dir).name))

        def log(self, run, losses):
            self.heard.append(('log', run.progress.epoch, set(losses) >= {'loss', 'ce_a_loss'}))

        def validated(self, run, row):
            self.heard.append(('validated', row['epoch']))

        def end(self, run):
            self.heard.append(('end', (Path(run.output_dir) / 'summary.csv').exists()))

        def finished(self, folder):
            return len(self.heard) > 99

    argv = [str(digits_folder), *PAIR, *SMALL, '--output', str(tmp_path), '--experiment', 'run']
    train_run(parse_args(argv), [Observer(), object()])
    epoch = [('log', 0, True)] * 2 + [('validated', 0)]
    assert Observer.heard == [
        ('start', 'run'), *epoch, *[('log', 1, True)] * 2, ('validated', 1), ('end', True)]
    for count, heard in ((2, Observer.heard + [('start', 'run'), ('end', True)]), (0, [None] * 100)):
        Observer.heard = list(Observer.heard) if count else heard
        train_run(parse_args([*argv, '--resume', 'auto']), [Observer()])
        assert Observer.heard == heard
