"""The device of a process, and what the processes of a command agree on."""
import contextlib
import os

import torch
from timm.utils import init_distributed_device

from .errors import RunError, UsageError


@contextlib.contextmanager
def agreement(args):
    """Let an error of one process end all of them, with one line; no collective may run inside."""
    error = None
    try:
        yield
    except (RunError, UsageError) as e:
        error = e
    errors = [error]
    if args.distributed:
        errors = [None] * args.world_size
        torch.distributed.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        if args.rank:
            raise SystemExit(first.exit_status)
        raise first


def init_device(args) -> torch.device:
    """Choose the device (CUDA, then MPS, then CPU, unless named), join the other processes, set CPU threads."""
    if args.device is None:
        args.device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = init_distributed_device(args)
    except (AssertionError, RuntimeError, ValueError) as e:
        raise UsageError(f'--device {args.device}: {str(e).splitlines()[0]}') from e
    if device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        # torch would take every core, and its threads and the loader's workers would wait for each other.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)) - args.workers))
    elif device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return device
