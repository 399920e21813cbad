"""The device of a process, how it joins the others, and what they exchange."""
import ipaddress
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from timm.utils.distributed import init_distributed_device_so

from ..core.processes import Processes, launched
from ..errors import RunError, UsageError, first_line
from . import peers


def by_first(processes: Processes, function: Callable[[], Any]) -> Any:
    """Run a function in the first process, and return its result in all."""
    return from_all(processes, function() if processes.rank == 0 else None)[0]


def from_all(processes: Processes, value: Any) -> list:
    """Return the values of all processes, in each process."""
    values = [value] * processes.world_size
    if processes.distributed:
        torch.distributed.all_gather_object(values, value)
    return values


def is_lost(error: BaseException) -> bool:
    """Return whether an error is about the connection to other processes."""
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ('gloo', 'Gloo', 'Connection', 'TCPStore'))


def init_device(name: str | None, workers: int = 0, deterministic: bool = False) -> Processes:
    """Join the other processes, on the given device, else CUDA, MPS or the CPU; set CPU threads.

    Args:
        name: Device, as --device names it.
        workers: Processes that load data besides this one.
        deterministic: Use deterministic algorithms.
    """
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    try:
        if launched().world_size > 1:
            check_name()
        found = init_distributed_device_so(name)
        if others := peers.current():
            others.joined = True
        processes = Processes(
            torch.device(found['device']), found['global_rank'], found['world_size'], found['local_rank'])
    except (AssertionError, RuntimeError, ValueError) as e:
        if is_lost(e):
            raise RunError(f'the processes cannot connect to each other: {first_line(e, 300)}') from e
        raise UsageError(f'--device {name}: {first_line(e)}') from e
    if processes.device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        # torch would take every core, and its threads and the loader's workers would wait for each other.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) - workers))
    elif processes.device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = not deterministic
    return processes


def check_name() -> None:
    """Raise UsageError where gloo would give other machines the loopback address of this one.

    It gives them the address of this machine's name, which is 127.0.1.1 on many (/etc/hosts of Debian and Ubuntu).
    """
    machines = os.environ.get('GROUP_WORLD_SIZE', os.environ.get('SLURM_NNODES', '1'))
    if machines == '1' or 'GLOO_SOCKET_IFNAME' in os.environ:
        return
    name = socket.gethostname()
    try:
        address = ipaddress.ip_address(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        address = ipaddress.ip_address('127.0.0.1')  # which gloo takes then
    if address.is_loopback:
        interfaces = [each for _, each in socket.if_nameindex() if each != 'lo']
        raise UsageError(f'the name of this machine, {name}, is {address} (/etc/hosts), where others cannot reach it; '
                         f'set GLOO_SOCKET_IFNAME to the network that they share, one of {", ".join(interfaces)}')
