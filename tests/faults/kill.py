#!/usr/bin/env python3
"""Draws runs and what befalls them, lets them go on, and compares their end with that of a run left alone.

    python tests/faults/kill.py --faults 120             # half an hour on a quiet core
    python tests/faults/kill.py --seed 0 --only 7        # scenario 7 again

A scenario is a configuration (method, processes, workers, accumulation); every fault of it is drawn, with its time,
from the seed and the scenario's number. Kills, wrong clocks and images that stand still change nothing at the end. A
second start in the folder of a run that lives, and a class with another name, are refused, and change nothing either.

The processes of a run are forked from this one, so that torch and timm are imported once; apart from that they are
those of `torchrun train_vpl.py`, which itself is started where it is to be killed.
"""
import argparse
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # before torch; its threads and forks do not go together
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from runs import differences  # noqa: E402

COMMON = [
    '--img-size', '32', '-b', '8', '--epochs', '3', '--warmup-epochs', '1', '--lr', '0.001',
    '--model-ema-decay', '0.9', '--mixup', '0.2', '--cutmix', '1.0', '--aa', 'rand-m5-n1', '--reprob', '0.25',
    '--drop-path', '0.1', '--val-interval', '2', '--device', 'cpu', '--checkpoint-hist', '2', '--no-export',
    '--log-interval', '1', '--save-epochs', '1', '--resume', 'auto', '--hang-timeout', '60', '--workers', '0',
]
METHODS = {
    'vpl': ['--model-a', 'test_resnet', '--model-b', 'test_vit', '--x', '40', '--y', '30'],
    'dml': ['--model-a', 'test_resnet', '--model-b', 'test_vit'],
    'cosub': ['--model-b', 'test_vit'],
}
INTERVAL = 2  # updates between two recovery checkpoints
SLOW = float(os.environ.get('TIMM_VPL_SLOW', 1))  # how many times longer a busy machine may take
LIMIT = 240 * SLOW  # seconds for an attempt


@dataclass
class Scenario:
    """A method on a number of processes."""
    method: str
    processes: int
    folder: Path
    options: list[str] = field(default_factory=list)
    become: Callable[[int, list[str]], list[str]] = lambda rank, argv: argv  # in each process; returns its options
    log_each: bool = False  # a log for each process
    lost: list[int] = field(default_factory=list)  # batches done again after each kill

    def argv(self, name):
        return [
            str(self.folder / 'data'), *COMMON, '--method', self.method, *METHODS[self.method],
            '--recovery-interval', str(INTERVAL), '--output', str(self.folder), '--experiment', name, *self.options]

    def start(self, name, log: str = '') -> list[int]:
        """Fork the processes of a run and return their ids; what they print goes to NAME.log, or LOG.log."""
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        pids = []
        for rank in range(self.processes):
            pid = os.fork()
            if pid == 0:
                path = self.folder / f'{log or name}{rank if self.log_each else ""}.log'
                _become_rank(rank, self.processes, port, path, self.argv(name), self.become)
            _statuses.pop(pid, None)
            pids.append(pid)
        return pids


def write_images(folder: Path) -> None:
    """Write a data set of small images, 96 to train on and 24 to validate on."""
    from PIL import Image

    from timm_vpl.data.sources import DigitsReader
    for split, count in (('train', 96), ('validation', 24)):
        reader = DigitsReader(split)
        for i in [i for i in range(len(reader)) if reader.targets[i] < 4][:count]:
            file, label = reader[i]
            path = folder / split / str(label) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(file).resize((32, 32)).save(path)


def _become_rank(rank, world, port, log, argv, become):
    status = 70
    try:
        os.setpgid(0, 0)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        if world > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        from timm_vpl.cli import train
        try:
            status = train(become(rank, argv))
        except SystemExit as e:
            status = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


_statuses: dict[int, int] = {}  # of processes that have ended


def wait(pids, until=None) -> list[int] | None:
    """Return the exit statuses (-N: by signal N) of all processes; None as soon as `until()` says so before."""
    deadline = time.monotonic() + LIMIT
    while running := set(pids) - set(_statuses):
        for pid in running:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                _statuses[pid] = os.waitstatus_to_exitcode(status)
        if until is not None and set(pids) - set(_statuses) and until():
            return None
        if time.monotonic() > deadline:
            kill(pids)
            raise SystemExit(f'hung for {LIMIT} s')
        time.sleep(0.001)
    return [_statuses[pid] for pid in pids]


def kill(pids) -> None:
    """Kill processes with their loaders' workers, at once."""
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _progress(log) -> tuple[int, int] | None:
    """Return the last place (epoch, batches done) that a log names."""
    found = re.findall(r'Train: (\d+) \[ *(\d+)/', log.read_text()) if log.exists() else None
    return (int(found[-1][0]), int(found[-1][1]) + 1) if found else None


class Still:
    """Training images of which none can be read to its end.

    Args:
        scenario: Whose images they are.
    """

    def __init__(self, scenario: Scenario):
        self.paths = sorted((scenario.folder / 'data' / 'train').rglob('*.png'))

    def stand(self) -> bool:
        """Put a pipe without a writer in the place of each image."""
        for path in self.paths:
            path.rename(path.with_suffix('.kept'))
            os.mkfifo(path)
        return True

    def flow(self) -> None:
        """Put the images back."""
        for path in self.paths:
            path.with_suffix('.kept').replace(path)


# Faults: each is done to the processes of a run that lives, and returns the exit statuses that it may have then.


def kill_all(scenario, name, pids, rng):
    """Kill the tree of a run."""
    kill(pids)
    return {-signal.SIGKILL, 0, 1}


def kill_one(scenario, name, pids, rng):
    """Kill one process and its workers."""
    kill([rng.choice(pids)])
    return {-signal.SIGKILL, 0, 1}


def kill_worker(scenario, name, pids, rng):
    """Kill one worker of a loader; where there is none, a process."""
    workers = [int(each) for pid in pids for each in _children(pid)]
    if not workers:
        return kill_one(scenario, name, pids, rng)
    os.kill(rng.choice(workers), signal.SIGKILL)
    return {0, 1}


def move_clock(scenario, name, pids, rng):
    """Kill a run and let the clock of its machine run hours off, back or forward, when it goes on."""
    seconds, now = rng.choice([-1, 1]) * rng.uniform(1, 1000) * 3600, time.time

    def become(rank, argv):
        time.time = lambda: now() + seconds
        return argv

    scenario.become = become
    return kill_all(scenario, name, pids, rng)


def start_again(scenario, name, pids, rng):
    """Start a run again while it lives; that start is refused, unless the first one ends meanwhile."""
    owner, log = scenario.folder / name / 'owner', scenario.folder / 'second.log'

    def owned():
        return owner.exists() and (found := owner.read_text().split()) and int(found[1]) in pids

    if wait(pids, owned) is None:
        statuses = wait(scenario.start(name, 'second'))
        refused = re.search(r'error: --output .*: process \d+ on \S+ is training there; end it', log.read_text())
        ended = not set(pids) - set(_statuses) or wait(pids, lambda: True) is not None
        if not (set(statuses) == {2} and refused or set(statuses) == {0} and ended):
            fail(scenario, f'a second start was not refused: {statuses}, see {log}', pids)
        log.unlink()
    return {0}


def stand_still(scenario, name, pids, rng):
    """Let the images stand still, and stop the run by a signal that one process gets."""
    still = Still(scenario)
    still.stand()
    time.sleep(rng.uniform(0, 2))
    begun = time.monotonic()
    os.kill(rng.choice(pids), signal.SIGTERM)
    if wait(pids, lambda: time.monotonic() > begun + 25 * SLOW) is None:
        fail(scenario, f'not stopped within {25 * SLOW:.0f} s', pids)
    still.flow()
    # The last three before it trains: 2 if it counts the images while they are replaced, and finds fewer.
    return {0, 128 + signal.SIGTERM, -signal.SIGTERM, 1, 2}


def rename_class(scenario, name, pids, rng):
    """Kill a run and give a class another name: it is refused until the class has its own again."""
    statuses = kill_all(scenario, name, pids, rng)
    wait(pids)
    if not any((scenario.folder / name).glob('*.pth.tar')):
        return statuses
    folders = [scenario.folder / 'data' / split for split in ('train', 'validation')]
    for folder in folders:
        (folder / '1').rename(folder / 'one')
    found, log = wait(scenario.start(name, 'renamed')), scenario.folder / 'renamed.log'
    if set(found) != {2} or 'the weights were trained on the old classes' not in log.read_text():
        fail(scenario, f'a class with another name was not refused: {found}, see {log}')
    for folder in folders:
        (folder / 'one').rename(folder / '1')
    log.unlink()
    return statuses


FAULTS = {
    kill_all: 4, kill_one: 4, kill_worker: 2, move_clock: 2, start_again: 2, stand_still: 3, rename_class: 1}


def kill_torchrun(scenario: Scenario, name: str, seconds: float, rng: random.Random) -> None:
    """Start a run by torchrun and kill torchrun alone: its processes end by themselves."""
    log = scenario.folder / f'{name}.log'
    begin = log.stat().st_size if log.exists() else 0
    with open(log, 'a') as stream:
        agent = subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(scenario.processes),
             str(ROOT / 'train_vpl.py'), *scenario.argv(name)],
            stdout=stream, stderr=stream, env={**os.environ, 'PYTHONPATH': str(ROOT)}, start_new_session=True)
    deadline = time.monotonic() + LIMIT
    while agent.poll() is None and time.monotonic() < deadline and 'Train: ' not in log.read_text()[begin:]:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5) * seconds)
    processes = _children(agent.pid)
    agent.kill()
    agent.wait()
    while any(_lives(pid) for pid in processes):
        if time.monotonic() > deadline:
            fail(scenario, 'processes live without torchrun')
        time.sleep(0.01)


def fail(scenario: Scenario, what: str, pids=()) -> None:
    """End this script, whose folder stays."""
    kill(pids)
    raise SystemExit(f'{scenario.folder}: {what}')


def _children(pid) -> list[str]:
    try:
        return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:
        return []


def _lives(pid) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def attempt(scenario: Scenario, name: str, seconds: float, rng: random.Random, done: Counter) -> bool:
    """Start or continue a run and do something to it at a random instant; return whether it came to its end."""
    run, log = scenario.folder / name, scenario.folder / f'{name}.log'
    if scenario.processes > 1 and rng.random() < 0.05:
        kill_torchrun(scenario, name, seconds, rng)
        done['kill_torchrun'] += 1
        return False
    begin = log.stat().st_size if log.exists() else 0
    before = _progress(log)
    fault = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
    when = time.monotonic() + rng.uniform(0.1, 1) * seconds
    place = rng.choice(['any', 'any', 'writing', 'validation'])

    def due():
        now = time.monotonic()
        if now < when or place == 'any' or now > when + seconds / 2:
            return now >= when
        if place == 'writing':
            return any(run.glob('*.tmp'))
        return re.search(r'\(100%\)[^\n]*\n$', log.read_text()[begin:]) is not None

    pids = scenario.start(name)
    statuses, allowed = wait(pids, due), {0}
    scenario.become = Scenario.become  # the clock is right again
    if statuses is None:
        allowed = fault(scenario, name, pids, rng)
        statuses = wait(pids)
        done[fault.__name__] += 1
    if set(statuses) - allowed:
        fail(scenario, f'{fault.__name__}: statuses {statuses}, expected {allowed}, see {log}')
    begun = re.search(r'continues with epoch (\d+), batch (\d+) of (\d+)', log.read_text()[begin:])
    if before and begun:
        epoch, batch, batches = map(int, begun.groups())
        scenario.lost.append((before[0] - epoch) * batches + before[1] - batch)
    return set(statuses) == {0}


def prepare(method: str, processes: int, folder: Path) -> Scenario:
    """Return a scenario whose folder has its data."""
    pid = os.fork()
    if pid == 0:
        write_images(folder / 'data')
        os._exit(0)
    os.waitpid(pid, 0)
    return Scenario(method, processes, folder)


def run_scenario(index: int, faults: int, folder: Path, seed: int) -> tuple[str, int]:
    """Do at least so many faults to runs of a scenario; every one must end as the run that was left alone.

    Returns:
        A line of what was done, and the number of faults.
    """
    rng, begin = random.Random(f'{seed} {index}'), time.monotonic()
    combinations = [(method, processes) for processes in (1, 2, 3) for method in METHODS]
    method, processes = combinations[index] if index < len(combinations) else rng.choice(combinations)
    workers, accumulation = rng.choice([0, 1, 2]), 1 if method == 'dml' else rng.choice([1, 1, 2])
    scenario = prepare(method, processes, folder)
    scenario.options = ['--workers', str(workers), '--grad-accum-steps', str(accumulation)]
    if wait(scenario.start('alone')) != [0] * processes:
        fail(scenario, 'the run that is left alone failed, see alone.log')
    seconds, done = time.monotonic() - begin, Counter()
    for name in map('run{}'.format, itertools.count()):
        if sum(done.values()) >= faults:
            break
        while not attempt(scenario, name, seconds, rng, done):
            pass
        check_equal(folder / 'alone', folder / name)
        shutil.rmtree(folder / name)
    if max(scenario.lost, default=0) > INTERVAL * accumulation:
        fail(scenario, f'{max(scenario.lost)} batches done again, the interval is {INTERVAL * accumulation}')
    what = ', '.join(f'{name} {count}' for name, count in sorted(done.items()))
    line = (f'{index}: {method}, {processes} process(es), {workers} worker(s), accumulation {accumulation}: {what}; '
            f'all ends identical, at most {max(scenario.lost, default=0)} batches done again, '
            f'{time.monotonic() - begin:.0f} s')
    return line, sum(done.values())


def check_equal(folder: Path, other: Path, what: str = '') -> None:
    """End this process if two runs differ in what this pattern matches."""
    pid = os.fork()  # this process must not start threads
    if pid == 0:
        found = ['the comparison failed']
        try:
            found = [line for line in differences(folder, other) if re.match(what, line)]
        finally:
            if found:
                print('\n'.join(found[:20]), file=sys.stderr, flush=True)
            os._exit(bool(found))
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f'{other} is not {folder}, see above')


def main(argv=None) -> None:
    """Run the scenarios of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--faults', type=int, default=120)
    parser.add_argument('--each', type=int, default=6, help='faults of a scenario')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, help='number of the one scenario')
    args = parser.parse_args(argv)
    import timm_vpl.engine.train  # noqa: F401  for all processes at once
    total = 0
    for index in itertools.count() if args.only is None else [args.only]:
        folder = tempfile.mkdtemp(prefix='timm-vpl-faults-')  # stays after a failure
        try:
            line, done = run_scenario(index, args.each, Path(folder) / 'runs', args.seed)
        except SystemExit as e:
            raise SystemExit(f'{e} (--seed {args.seed} --each {args.each} --only {index})') from None
        shutil.rmtree(folder)
        total += done
        print(line, flush=True)
        if total >= args.faults:
            break
    print(f'{total} faults, seed {args.seed}')


if __name__ == '__main__':
    main()
