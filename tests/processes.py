"""Real gloo processes for tests: each calls a function of a test file, all of one server that has imported torch."""
import datetime
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

TOTAL_SECONDS = 600  # on a busy machine; what hangs is told earlier, by gloo
GLOO_SECONDS = 120
# Not forked from the process of the tests, whose autograd may have started threads.
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['pytest', 'timm', 'timm_vpl.cli', 'timm_vpl.engine.train'])


def run_ranks(folder: Path, world: int, scenario: Callable) -> list:
    """Return what `scenario(rank, world)` returns in each of `world` processes of one group.

    Raises:
        AssertionError: A process failed, hung or died; what it said is in the output of the test.
    """
    statuses = run_processes((_run_rank, folder, rank, world, scenario) for rank in range(world))
    files = [folder / f'{rank}.pt' for rank in range(world)]
    assert all(file.exists() for file in files), f'{scenario.__name__} on {world} processes: statuses {statuses}'
    return [torch.load(file) for file in files]


def run_processes(calls: Iterable[tuple]) -> list[int | None]:
    """Run each (function, *arguments) in a process of its own and return their statuses; what hangs is killed."""
    processes = [CONTEXT.Process(target=function, args=args) for function, *args in calls]
    deadline = time.monotonic() + TOTAL_SECONDS
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0., deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _run_rank(folder, rank, world, scenario):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=GLOO_SECONDS))
    torch.save(scenario(rank, world), folder / f'{rank}.part')
    os.replace(folder / f'{rank}.part', folder / f'{rank}.pt')
    # Gloo now and then aborts at teardown, and a process that leaves early breaks the others' last call.
    deadline = time.monotonic() + GLOO_SECONDS
    while not all((folder / f'{other}.pt').exists() for other in range(world)) and time.monotonic() < deadline:
        time.sleep(0.01)
    os._exit(0)
