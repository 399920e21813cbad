"""Real gloo processes for tests: a script of a test file forks them, each leaves its results in a file."""
import datetime
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

TOTAL_SECONDS = 150
GLOO_SECONDS = 30


def run_ranks(folder: Path, world: int, scenario: Callable) -> None:
    """Run `scenario(rank, world)` in `world` forked processes of one group; its results go to `folder/RANK.pt`."""
    pids = []
    # Forked, so that torch and timm are imported once.
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            try:
                _run_rank(folder, rank, world, scenario)
            except BaseException:
                print(f'{scenario.__name__}, rank {rank} of {world}', file=sys.stderr)
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)


def _run_rank(folder, rank, world, scenario):
    torch.distributed.init_process_group(
        'gloo',
        init_method=f'file://{folder}/rendezvous',
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=GLOO_SECONDS),
    )
    torch.save(scenario(rank, world), folder / f'{rank}.part')
    os.replace(folder / f'{rank}.part', folder / f'{rank}.pt')
    # Gloo now and then aborts at teardown, and a process that leaves early breaks the others' last call.
    deadline = time.monotonic() + GLOO_SECONDS
    while not all((folder / f'{other}.pt').exists() for other in range(world)) and time.monotonic() < deadline:
        time.sleep(0.01)


def run_script(script: str, folder: Path) -> str:
    """Run a test file as a script with `folder` as its argument, and return how it ended and what it printed."""
    paths = [*map(str, Path(__file__).resolve().parents[:2]), os.environ.get('PYTHONPATH', '')]
    environ = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    log = folder / 'log.txt'
    with open(log, 'wb') as stream:
        process = subprocess.Popen(
            [sys.executable, script, str(folder)],
            stdout=stream,
            stderr=stream,
            env=environ,
            start_new_session=True,
        )
    try:
        process.wait(TOTAL_SECONDS)
        end = 'ended'
    except subprocess.TimeoutExpired:
        end = f'hung for {TOTAL_SECONDS} s'
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f'{end}:\n{log.read_text()[-5000:]}'


def load_results(folder: Path, world: int) -> list:
    """Return the results of each rank, None of one that left none."""
    files = [folder / f'{rank}.pt' for rank in range(world)]
    return [torch.load(file) if file.exists() else None for file in files]
