"""Signals, lost and hanging processes, against real runs; `python tests/faults/signals.py CASE FOLDER`.

Each case is a function that raises if a run does not end as it should.
"""
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kill import SLOW, Scenario, Still, check_equal, kill, prepare, wait  # noqa: E402


class Live:
    """A run of a scenario that was started.

    Args:
        scenario: The scenario.
        name: Name of the run.
    """

    def __init__(self, scenario, name: str = 'run'):
        self.log = scenario.folder / f'{name}.log'
        self.pids = scenario.start(name)

    @property
    def text(self) -> str:
        """What it has logged, with its earlier starts."""
        return self.log.read_text() if self.log.exists() else ''

    def check(self, condition) -> None:
        """End this script with the end of the log, unless the condition holds."""
        if not condition:
            raise SystemExit(f'{sys.argv[1]} failed, see above:\n{self.text[-3000:]}')

    def until(self, pattern: str, also=lambda: True) -> 'Live':
        """Wait until the log has this pattern, and `also()` holds."""
        self.check(wait(self.pids, lambda: re.search(pattern, self.text) and also()) is None)
        return self

    def ends(self, *statuses: int) -> str:
        """Check how its processes end, without a traceback, and return the log."""
        self.check(wait(self.pids) == list(statuses) and 'Traceback' not in self.text)
        return self.text

    def stop(self, number: signal.Signals, victims=slice(None)) -> str:
        """Send processes a signal, check that all end by it, and return the log."""
        begin = time.monotonic()
        for pid in self.pids[victims]:
            os.kill(pid, number)
        text = self.ends(*[128 + number] * len(self.pids))
        self.check(time.monotonic() - begin < 20 * SLOW)
        return text


def alone(folder, method='vpl', processes=1, options=()):
    """Return a scenario whose run `alone` has come to its end."""
    scenario = prepare(method, processes, folder)
    scenario.options = list(options)
    Live(scenario, 'alone').ends(*[0] * processes)
    return scenario


def stopped(folder):
    """Each signal, in an epoch and in validation; the run goes on exactly from where it was saved."""
    scenario = alone(folder, options=['--epochs', '2'])
    for name, number, pattern, place in (
            ('term', signal.SIGTERM, r'Train: 1 \[ *4/', r'epoch 1, batch [567] of 12'),
            ('int', signal.SIGINT, r'Train: 0 \[ *2/', r'epoch 0, batch [345] of 12'),
            ('usr1', signal.SIGUSR1, r'Train: 1 \[ *11/', r'epoch 1, batch 12 of 12'),
    ):
        run = Live(scenario, name).until(pattern)
        run.check(re.search(f'stopped by {number.name} after {place}', run.stop(number)))
        Live(scenario, name).ends(0)
        check_equal(folder / 'alone', folder / name)


def stopped_together(folder):
    """One of two processes gets the signal: both end at the same update, and go on exactly."""
    scenario = alone(folder, 'dml', 2, ['--epochs', '2'])
    run = Live(scenario).until(r'Train: 1 \[ *2/')
    run.check('stopped by SIGTERM after epoch' in run.stop(signal.SIGTERM, slice(1, 2)))
    Live(scenario).ends(0, 0)
    check_equal(folder / 'alone', folder / 'run')


def second_signal(folder):
    """A second signal ends a process that waits for another, which stands still."""
    run = Live(prepare('vpl', 2, folder)).until(r'Train: 0 \[ *2/')
    os.kill(run.pids[1], signal.SIGSTOP)
    time.sleep(1)
    os.kill(run.pids[0], signal.SIGTERM)
    time.sleep(1.5)
    begin = time.monotonic()
    os.kill(run.pids[0], signal.SIGTERM)
    run.check(wait(run.pids[:1]) == [128 + signal.SIGTERM] and time.monotonic() - begin < 1)
    kill(run.pids[1:])
    wait(run.pids[1:])


def hanging(folder):
    """One of two processes stands still: the other prints all its stacks and ends."""
    scenario = prepare('vpl', 2, folder)
    scenario.options = ['--hang-timeout', '5']
    run = Live(scenario).until(r'Train: 0 \[ *2/')
    os.kill(run.pids[1], signal.SIGSTOP)
    run.check(wait(run.pids[:1]) == [1])
    kill(run.pids[1:])
    wait(run.pids[1:])
    run.check('Timeout (0:00:05)!' in run.text and 'train_one_epoch' in run.text)


def stalled(folder):
    """A signal comes while the images stand still: the run is saved where it is, within an update too."""
    for workers, accumulation in (('0', '1'), ('2', '1'), ('0', '3')):
        options = ['--epochs', '2', '--workers', workers, '--grad-accum-steps', accumulation]
        scenario = alone(folder / f'{workers}-{accumulation}', options=options)
        still = Still(scenario)
        run = Live(scenario).until(r'Train: 1 \[ *[23]/', still.stand)
        time.sleep(2)
        text = run.stop(signal.SIGTERM)
        run.check(re.search(
            r'stopped by SIGTERM after epoch 1, batch \d+ of 12, while worker \d reads \d/\d+\.png.*; to resume', text))
        still.flow()
        Live(scenario).ends(0)
        check_equal(scenario.folder / 'alone', scenario.folder / 'run')


def stalled_together(folder):
    """The same with two processes, one of which gets the signal: both are saved at one place."""
    scenario = alone(folder, 'dml', 2, ['--epochs', '2'])
    still = Still(scenario)
    run = Live(scenario).until(r'Train: 1 \[ *2/', still.stand)
    text = run.stop(signal.SIGTERM, slice(1, 2))
    run.check(re.search(r'stopped by SIGTERM after epoch 1, batch \d of 6, while worker 0 reads .*; to resume', text))
    still.flow()
    Live(scenario).ends(0, 0)
    check_equal(folder / 'alone', folder / 'run')


def stalled_apart(folder):
    """The images of one of two processes stand still: both end in time, not saved, and go on from what was saved."""
    scenario = alone(folder, 'vpl', 2, ['--epochs', '2'])
    shutil.copytree(folder / 'data', folder / 'other' / 'data')
    scenario.become = lambda rank, argv: [str(folder / 'other' / 'data'), *argv[1:]] if rank else argv
    still = Still(Scenario('vpl', 2, folder / 'other'))
    run = Live(scenario).until(r'Train: 1 \[ *3/', still.stand)
    text = run.stop(signal.SIGTERM)
    run.check(re.search(
        r'stopped by SIGTERM after epoch 1, batch \d of 6, while worker 0 reads .*; NOT saved, .*; to resume', text))
    still.flow()
    Live(scenario).ends(0, 0)
    check_equal(folder / 'alone', folder / 'run')


if __name__ == '__main__':
    import timm_vpl.engine.train  # noqa: F401  for all processes at once
    globals()[sys.argv[1]](Path(sys.argv[2]))
