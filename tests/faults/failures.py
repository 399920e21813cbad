"""Failures of one process among several, against real runs; `python tests/faults/failures.py CASE PROCESSES FOLDER`.

Each case makes one process fail. All of them have to end within seconds, and each machine's log has to show the cause,
once. `destroy_process_group` stands still for a minute, as NCCL's does while others are in a collective. Two machines
(PROCESSES is `nodes`) are network namespaces.
"""
import ctypes
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kill import SLOW, kill, prepare, wait  # noqa: E402

SECONDS = 10 * SLOW  # from the failure to its line on each machine


class Case(NamedTuple):
    """A failure: its line, how the process that fails is made to, and what others say of it."""
    line: str
    status: int = 1
    options: tuple[str, ...] = ()  # of all processes
    own: tuple[str, ...] = ()  # of the process that fails
    data: str = ''  # its images
    before: Callable = lambda scenario: None
    at: str = ''  # when the log has this, `then` makes it fail
    then: Callable = lambda scenario, pid: None
    rank: int = -1  # the last one; 0 where only the first one can


def spoil(scenario, split: str) -> None:
    """Give the process that fails images of its own, of which none can be read."""
    shutil.copytree(scenario.folder / 'data', scenario.folder / 'spoilt')
    for path in (scenario.folder / 'spoilt' / split).rglob('*.png'):
        path.write_bytes(b'no image')


def starve(scenario, pid: int) -> None:
    """Let a process have no more memory than it has."""
    size = int(Path(f'/proc/{pid}/statm').read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))


def kill_worker(scenario, pid: int) -> None:
    """Kill a loader's worker."""
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


def fewer(scenario) -> None:
    """Give the process that fails one image less."""
    shutil.copytree(scenario.folder / 'data', scenario.folder / 'fewer')
    next((scenario.folder / 'fewer' / 'train' / '0').iterdir()).unlink()


CASES = {
    'usage': Case(r"--lr: 'x' is not a number", 2, own=('--lr', 'x')),
    'usage-of-first': Case(r"--lr: 'x' is not a number", 2, own=('--lr', 'x'), rank=0),
    'usage-of-all': Case(r"--lr: 'x' is not a number", 2, options=('--lr', 'x')),
    'missing': Case(r'data folder \S+/nowhere does not exist', 2, data='nowhere'),
    'other-data': Case(r'data: processes 0 and \d do not see the same', 2, data='fewer',
                       before=fewer),
    'memory': Case(r'(DefaultCPUAllocator|MemoryError|memory).*a smaller --batch-size', at=r'Train: 0 \[ *2/',
                   then=starve),
    'worker': Case(r'DataLoader worker .*killed by signal: Killed.*fewer --workers', options=('--workers', '2'),
                   at=r'Train: 0 \[ *2/', then=kill_worker),
    'data': Case(r'data: Failed to load 10 consecutive samples', data='spoilt',
                 before=lambda scenario: spoil(scenario, 'train')),
    'validation': Case(r'data: Failed to load 10 consecutive samples', data='spoilt',
                       before=lambda scenario: spoil(scenario, 'validation')),
    'code': Case(r'ZeroDivisionError: division by zero \(epoch 0, batch 3'),
    'export': Case(r'ZeroDivisionError: division by zero \(epoch 1, batch 0', options=('--export', '--epochs', '1'),
                   rank=0),
    'lost': Case(r'another process ended or cannot be reached', at=r'Train: 0 \[ *2/',
                 then=lambda scenario, pid: kill([pid])),
}


def become_machine(rank: int) -> None:
    """Move this process into a network namespace of its own, as the only process of its machine."""
    with open(f'/run/netns/node{rank}') as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), 'setns')
    os.environ.update(
        LOCAL_RANK='0', LOCAL_WORLD_SIZE='1', GROUP_WORLD_SIZE='2', MASTER_ADDR='10.99.0.1', GLOO_SOCKET_IFNAME='cable')


def run(name: str, processes: str, folder: Path) -> None:
    """Let one process of a run fail."""
    import torch

    from timm_vpl import PairTask
    from timm_vpl.tools import export
    case, nodes = CASES[name], processes == 'nodes'
    world = 2 if nodes else int(processes)
    scenario = prepare('vpl', world, folder)
    scenario.options = ['--epochs', '2', *case.options]
    case.before(scenario)
    failing = case.rank % world

    def become(rank, argv):
        torch.distributed.destroy_process_group = lambda *args: time.sleep(60)
        if nodes:
            become_machine(rank)
        if rank != failing:
            return argv
        if name == 'code':
            forward, calls = PairTask.forward, iter(range(3, -1, -1))
            PairTask.forward = lambda *args, **kwargs: 1 / next(calls) and forward(*args, **kwargs)
        elif name == 'export':
            export.export_branch = lambda *args: 1 / 0
        return [str(folder / case.data) if case.data else argv[0], *argv[1:], *case.own]

    scenario.become, scenario.log_each = become, nodes
    pids = scenario.start('run')
    ranks = [rank for rank in range(world) if (name, rank) != ('lost', failing)]  # a killed process prints nothing
    logs = [folder / f'run{rank}.log' for rank in ranks] if nodes else [folder / 'run.log']

    def text(log):
        return log.read_text() if log.exists() else ''

    def check(condition, what):
        if not condition:
            kill(pids)
            raise SystemExit(f'{name}: {what}\n' + '\n'.join(text(log)[-3000:] for log in logs))

    if case.at:
        check(wait(pids, lambda: re.search(case.at, text(logs[0]))) is None, f'ended before {case.at}')
        case.then(scenario, pids[failing])
    begun = time.monotonic()
    shown: dict = {}

    def look():
        for log in logs:
            if log not in shown and re.search(case.line, text(log)):
                shown[log] = time.monotonic()
    statuses = wait(pids, look)
    look()
    ended = time.monotonic()
    check(len(shown) == len(logs), 'not every machine shows the cause')
    for log in logs:
        lines = re.findall(r'^train_vpl\.py: error: .*', text(log), re.MULTILINE)
        check(len(lines) == 1 and re.search(case.line, lines[0]), f'lines: {lines}')
        check(re.search(r'\(process \d on \S+\)$', lines[0]), 'it does not say where')
    first = min(shown.values())
    killed = {failing: -signal.SIGKILL} if name == 'lost' else {}
    check(statuses == [killed.get(rank, case.status) for rank in range(world)], f'statuses {statuses}')
    if case.at:
        check(first - begun < SECONDS, f'shown after {first - begun:.1f} s')
    check(max(shown.values()) - first < SECONDS and ended - first < 2 * SECONDS, f'ended {ended - first:.1f} s later')
    print(f'{name}, {processes}: shown on all machines within {max(shown.values()) - first:.1f} s, ended '
          f'{ended - first:.1f} s after the first line')


if __name__ == '__main__':
    name, processes, folder = sys.argv[1:]
    if processes == 'nodes':
        from disk import isolate
        from nodes import connect
        isolate()
        connect()
    import timm_vpl.engine.train  # noqa: F401  for all processes at once
    run(name, processes, Path(folder))
