"""The device of a process, and what the processes of a command agree on."""
import contextlib
import os

import torch
from timm.utils import init_distributed_device

from ..errors import RunError, UsageError, first_line


@contextlib.contextmanager
def agreement(args):
    """Let an error of one process end all of them, with one line; no collective may run inside."""
    error = None
    try:
        yield
    except (RunError, UsageError) as e:
        error = e
    first = next((e for e in from_all(args, error) if e is not None), None)
    if first is not None:
        if args.rank:
            raise SystemExit(first.exit_status)
        raise first


def from_first(args, value):
    """Return the first process's value in all of them."""
    values = [value]
    if args.distributed:
        torch.distributed.broadcast_object_list(values, 0)
    return values[0]


def from_all(args, value) -> list:
    """Return the values of all processes, in each of them."""
    values = [value]
    if args.distributed:
        values = [None] * args.world_size
        torch.distributed.all_gather_object(values, value)
    return values


def is_lost(error: BaseException) -> bool:
    """Return whether an error is one of the connection to other processes."""
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ('gloo', 'Gloo', 'Connection', 'TCPStore'))


def init_device(args) -> torch.device:
    """Choose the device (CUDA, then MPS, then CPU, unless named), join the other processes, set CPU threads."""
    if args.device is None:
        args.device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    deterministic = getattr(args, 'deterministic', False)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    try:
        device = init_distributed_device(args)
    except (AssertionError, RuntimeError, ValueError) as e:
        if is_lost(e):
            raise RunError(f'the processes do not find each other: {first_line(e, 300)}') from e
        raise UsageError(f'--device {args.device}: {first_line(e)}') from e
    if device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        # torch would take every core, and its threads and the loader's workers would wait for each other.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) - args.workers))
    elif device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = not deterministic
    return device
