"""Kills real training runs at random instants, lets them go on, and compares their end with that of a run left alone.

`python tests/faults/kill.py --kills 100` goes through the methods and numbers of processes in turn and prints a line
for each scenario. The processes of a run are forked from this one, so that torch and timm are imported once; apart
from that they are those of `torchrun train_vpl.py`.
"""
import argparse
import itertools
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # before torch; its threads and forks do not go together
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from runs import differences  # noqa: E402

COMMON = [
    '--img-size', '32', '-b', '8', '--epochs', '3', '--warmup-epochs', '1', '--lr', '0.001',
    '--model-ema-decay', '0.9', '--mixup', '0.2', '--cutmix', '1.0', '--aa', 'rand-m5-n1', '--reprob', '0.25',
    '--drop-path', '0.1', '--val-interval', '2', '--device', 'cpu', '--checkpoint-hist', '2', '--no-export',
    '--log-interval', '1', '--save-epochs', '1', '--resume', 'auto', '--hang-timeout', '60',
]
METHODS = {
    'vpl': ['--model-a', 'test_resnet', '--model-b', 'test_vit', '--x', '40', '--y', '30'],
    'dml': ['--model-a', 'test_resnet', '--model-b', 'test_vit'],
    'cosub': ['--model-b', 'test_vit'],
}
INTERVAL = 2  # updates between two recovery checkpoints
LIMIT = 180  # seconds for an attempt


@dataclass
class Scenario:
    """A method on a number of processes."""
    method: str
    processes: int
    folder: Path
    options: list[str] = field(default_factory=list)
    kills: int = 0
    lost: list[int] = field(default_factory=list)  # batches done again after each kill
    places: dict[str, int] = field(default_factory=dict)  # of the kills

    def argv(self, name):
        workers = 1 if self.processes == 1 else 0
        return [
            str(self.folder / 'data'), *COMMON, '--method', self.method, *METHODS[self.method],
            '--workers', str(workers), '--recovery-interval', str(INTERVAL), '--output', str(self.folder),
            '--experiment', name, *self.options]

    def start(self, name) -> list[int]:
        """Fork the processes of a run and return their ids; what they print goes to NAME.log."""
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        pids = []
        for rank in range(self.processes):
            pid = os.fork()
            if pid == 0:
                _become_rank(rank, self.processes, port, self.folder / f'{name}.log', self.argv(name))
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


def _become_rank(rank, world, port, log, argv):
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
            status = train(argv)
        except SystemExit as e:
            status = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


_statuses: dict[int, int] = {}  # of processes that have ended and were not asked for


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
    return [_statuses.pop(pid) for pid in pids]


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


def attempt(scenario: Scenario, name: str, seconds: float, rng: random.Random) -> bool:
    """Start or continue a run and kill it at a random instant; return whether it came to its end before that."""
    run, log = scenario.folder / name, scenario.folder / f'{name}.log'
    begin = log.stat().st_size if log.exists() else 0
    before = _progress(log)
    when = time.monotonic() + rng.uniform(0.1, 1) * seconds
    place = rng.choice(['any', 'any', 'writing', 'validation'])

    def due():
        now = time.monotonic()
        if now < when or place == 'any' or now > when + seconds / 2:
            return now >= when
        if place == 'writing':
            return (run / 'tmp.pth.tar').exists()
        return re.search(r'\(100%\)[^\n]*\n$', log.read_text()[begin:]) is not None

    pids = scenario.start(name)
    statuses = wait(pids, due)
    allowed = {0}
    if statuses is None:
        kill(pids if rng.random() < 0.5 else [rng.choice(pids)])
        statuses, allowed = wait(pids), {-signal.SIGKILL, 1, 0}
        scenario.kills += 1
        scenario.places[place] = scenario.places.get(place, 0) + 1
    if set(statuses) - allowed:
        raise SystemExit(f'{scenario.folder}: statuses {statuses}, expected {allowed}, see {log}')
    begun = re.search(r'goes on with epoch (\d+), batch (\d+) of|(fresh start)', log.read_text()[begin:])
    if before and begun:
        epoch, batch = map(int, begun.groups('0')[:2])
        batches = int(re.search(r'(\d+) updates an epoch', log.read_text())[1])
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


def run_scenario(method: str, processes: int, kills: int, folder: Path, rng: random.Random) -> Scenario:
    """Kill runs of a scenario at least so often; every one must end as the run that was left alone."""
    scenario = prepare(method, processes, folder)
    begin = time.monotonic()
    if wait(scenario.start('alone')) != [0] * processes:
        raise SystemExit(f'the run that is left alone failed, see {folder}/alone.log')
    seconds = time.monotonic() - begin
    for name in map('killed{}'.format, itertools.count()):
        if scenario.kills >= kills:
            break
        while not attempt(scenario, name, seconds, rng):
            pass
        check_equal(folder / 'alone', folder / name)
        shutil.rmtree(folder / name)
    if max(scenario.lost, default=0) > INTERVAL:
        raise SystemExit(f'{folder}: {max(scenario.lost)} batches done again, the interval is {INTERVAL}')
    return scenario


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


def main(argv=None) -> int:
    """Run the scenarios of the command line and return the number of kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=list(METHODS))
    parser.add_argument('--processes', nargs='+', type=int, default=[1, 2, 3])
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    import timm_vpl.engine.train  # noqa: F401  for all processes at once
    scenarios = [(method, processes) for processes in args.processes for method in args.methods]
    each = -(-args.kills // len(scenarios))
    total = 0
    for method, processes in scenarios:
        folder = tempfile.mkdtemp(prefix='timm-vpl-faults-')  # stays after a failure
        begin = time.monotonic()
        done = run_scenario(method, processes, each, Path(folder) / 'runs', random.Random(f'{args.seed} {method}'))
        shutil.rmtree(folder)
        total += done.kills
        print(
            f'{method}, {processes} process(es): {done.kills} kills {done.places}, all ends identical, at most '
            f'{max(done.lost, default=0)} batches done again, {time.monotonic() - begin:.0f} s', flush=True)
    print(f'{total} kills')
    return total


if __name__ == '__main__':
    main()
