"""Signals, lost and hanging processes, against real runs; `python tests/faults/signals.py CASE FOLDER`.

Each case is a function that raises if a run does not end as it should.
"""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kill import check_equal, kill, prepare, wait  # noqa: E402


def until(log: Path, pattern: str):
    """Return a function that says whether a log has this pattern."""
    return lambda: log.exists() and re.search(pattern, log.read_text()) is not None


def check(condition, scenario, name):
    """End this process with the end of a run's log, unless the condition holds."""
    if not condition:
        raise SystemExit(f'{sys.argv[1]} failed, see above:\n' + (scenario.folder / f'{name}.log').read_text()[-3000:])


def alone(folder, method='vpl', processes=1, options=()):
    """Return a scenario whose run `alone` has come to its end."""
    scenario = prepare(method, processes, folder)
    scenario.options = list(options)
    if wait(scenario.start('alone')) != [0] * processes:
        raise SystemExit((folder / 'alone.log').read_text()[-3000:])
    return scenario


def stop(scenario, name, number, pattern, victims=slice(None), status=None) -> str:
    """Start a run, send a signal when its log has the pattern, check its end, return its log."""
    log = scenario.folder / f'{name}.log'
    pids = scenario.start(name)
    check(wait(pids, until(log, pattern)) is None, scenario, name)
    begin = time.monotonic()
    for pid in pids[victims]:
        os.kill(pid, number)
    statuses = wait(pids)
    check(statuses == [128 + number if status is None else status] * len(pids), scenario, name)
    check(time.monotonic() - begin < 20, scenario, name)
    return log.read_text()


def stopped(folder):
    """Each signal, in an epoch and in validation; the run goes on exactly from where it was saved."""
    scenario = alone(folder, options=['--epochs', '2'])
    for name, number, pattern, place in (
            ('term', signal.SIGTERM, r'Train: 1 \[ *4/', r'epoch 1, batch [567] of 12'),
            ('int', signal.SIGINT, r'Train: 0 \[ *2/', r'epoch 0, batch [345] of 12'),
            ('usr1', signal.SIGUSR1, r'Train: 1 \[ *11/', r'epoch 1, batch 12 of 12'),
    ):
        text = stop(scenario, name, number, pattern)
        check(re.search(f'stopped by {number.name} after {place}', text), scenario, name)
        check('Traceback' not in text, scenario, name)
        check(wait(scenario.start(name)) == [0], scenario, name)
        check_equal(folder / 'alone', folder / name)


def stopped_together(folder):
    """One of two processes gets the signal: both end at the same update, and go on exactly."""
    scenario = alone(folder, 'dml', 2, ['--epochs', '2'])
    text = stop(scenario, 'one', signal.SIGTERM, r'Train: 1 \[ *2/', slice(1, 2))
    check('stopped by SIGTERM after epoch' in text and 'Traceback' not in text, scenario, 'one')
    check(wait(scenario.start('one')) == [0, 0], scenario, 'one')
    check_equal(folder / 'alone', folder / 'one')


def second_signal(folder):
    """A second signal ends a process that waits for another, which stands still."""
    scenario = prepare('vpl', 2, folder)
    pids = scenario.start('slow')
    check(wait(pids, until(folder / 'slow.log', r'Train: 0 \[ *2/')) is None, scenario, 'slow')
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(1)
    os.kill(pids[0], signal.SIGTERM)
    time.sleep(1.5)
    begin = time.monotonic()
    os.kill(pids[0], signal.SIGTERM)
    check(wait(pids[:1]) == [128 + signal.SIGTERM] and time.monotonic() - begin < 1, scenario, 'slow')
    kill(pids[1:])
    wait(pids[1:])


def lost(folder):
    """One of two processes is killed: the other says so in one line and ends."""
    scenario = prepare('vpl', 2, folder)
    log = folder / 'lost.log'
    pids = scenario.start('lost')
    check(wait(pids, until(log, r'Train: 0 \[ *2/')) is None, scenario, 'lost')
    kill(pids[1:])
    check(wait(pids) == [1, -signal.SIGKILL], scenario, 'lost')
    text = log.read_text()
    check('error: process 0: another process ended or can not be reached' in text, scenario, 'lost')
    check('Traceback' not in text, scenario, 'lost')


def hanging(folder):
    """One of two processes stands still: the other prints all its stacks and ends."""
    scenario = prepare('vpl', 2, folder)
    scenario.options = ['--hang-timeout', '5']
    log = folder / 'hanging.log'
    pids = scenario.start('hanging')
    check(wait(pids, until(log, r'Train: 0 \[ *2/')) is None, scenario, 'hanging')
    os.kill(pids[1], signal.SIGSTOP)
    check(os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 1, scenario, 'hanging')
    kill(pids[1:])
    wait(pids[1:])
    text = log.read_text()
    check('Timeout (0:00:05)!' in text and 'train_one_epoch' in text, scenario, 'hanging')


def restarted(folder):
    """Under torchrun --max-restarts a run whose worker is killed goes on by itself, exactly."""
    scenario = alone(folder, 'vpl', 2)
    argv = [option for option in scenario.argv('run') if option not in ('--resume', 'auto')]
    script = Path(__file__).resolve().parents[2] / 'train_vpl.py'
    log = folder / 'run.log'
    with open(log, 'w') as stream:
        torchrun = subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
             '--max-restarts', '1', str(script), *argv],
            stdout=stream, stderr=stream,
            env={**os.environ, 'PYTHONPATH': str(script.parent), 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})
    try:
        deadline = time.monotonic() + 120
        while not until(log, r'Train: 1 \[ *3/')():
            check(time.monotonic() < deadline and torchrun.poll() is None, scenario, 'run')
            time.sleep(0.01)
        children = Path(f'/proc/{torchrun.pid}/task/{torchrun.pid}/children').read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        check(torchrun.wait(120) == 0, scenario, 'run')
    finally:
        torchrun.kill()
    check(re.search(r'goes on with epoch 1, batch [1-9]', log.read_text()), scenario, 'run')
    check_equal(folder / 'alone', folder / 'run')


if __name__ == '__main__':
    if sys.argv[1] != 'restarted':
        import timm_vpl.engine.train  # noqa: F401  for all processes at once
    globals()[sys.argv[1]](Path(sys.argv[2]))
