#!/usr/bin/env python3
"""Cost of gathered negatives (--gather): step time, bytes and collectives with several processes, and a model of many.

Processes on this machine (gloo on the CPU, NCCL where there are as many GPUs) train with and without --gather in turn,
through the package's own task and loop. Bytes of the gather are counted where it calls torch.distributed; all-reduces,
DistributedDataParallel's included, as torch's profiler sees them; both per step, as the difference of two blocks, so
that what a loop does once an epoch drops out.

The gather moves the embeddings of both branches and N: an all-gather of (N + 1) x 2d float32 a process in the forward,
and an all-reduce of (processes x N) x d float32 for each branch that learns from the contrastive term in the backward.

The table for many processes is not measured. It follows from --bandwidth, --latency, --dim, --model-batch and
--step-ms, for rings of all processes without overlap with computation: an all-gather of c bytes a process takes
(W - 1) (c / bandwidth + latency), an all-reduce of c bytes 2 (W - 1) (c / W / bandwidth + latency).
"""
import itertools
import os
import socket

import common
import torch
import torch.distributed as dist
import torch.multiprocessing
from common import arguments, block, create_fixed, create_parser, interleave, parse
from torch.nn.parallel import DistributedDataParallel

from timm_vpl.engine.train import update


class Counter:
    """Counts calls and bytes of the collectives that Python code calls, whole numbers (decisions) for themselves."""

    def __init__(self):
        self.counts = {}

    def __enter__(self):
        self.saved = dist.all_gather, dist.all_reduce
        dist.all_gather = self._wrap('all_gather', dist.all_gather, of=1)
        dist.all_reduce = self._wrap('all_reduce', dist.all_reduce, of=0)
        return self

    def __exit__(self, *exc):
        dist.all_gather, dist.all_reduce = self.saved

    def _wrap(self, name, function, of):
        def counted(*args, **kwargs):
            key = name if args[of].is_floating_point() else f'{name} of integers'
            calls, size = self.counts.get(key, (0, 0))
            self.counts[key] = calls + 1, size + args[of].numel() * args[of].element_size()
            return function(*args, **kwargs)
        return counted


def collectives(step) -> tuple[dict, int]:
    """Return what Python calls (calls and bytes by name), and the number of all-reduces that the profiler sees."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with Counter() as counter, torch.profiler.profile(activities=activities) as profiler:
        step()
    names = ('gloo:all_reduce', 'nccl:all_reduce', 'c10d::allreduce_')
    counts = {event.key: event.count for event in profiler.key_averages()}
    return counter.counts, max(counts.get(name, 0) for name in names)


def per_step(run) -> tuple[dict, float]:
    """Return the collectives of one step, those of a loop's epoch taken off."""
    found = []
    for steps in (1, 3):
        run.loader_train.steps = steps
        found.append(collectives(block(run)))
    (few, few_reduces), (many, many_reduces) = found
    python = {
        name: tuple((b - a) / 2 for a, b in zip(few.get(name, (0, 0)), value, strict=True))
        for name, value in many.items()}
    return python, (many_reduces - few_reduces) / 2


def plain_step(options):
    """Return a function that does one step with a single DistributedDataParallel around the pair, and no gather."""
    run = create_fixed(arguments(options, 'vpl', 'ab', '--no-gather'), 1, started=False)
    ddp = DistributedDataParallel(run.pair, device_ids=_device_ids(run))

    def step():
        run.task.train()
        for _, input, target, _ in run.loader_train.epoch(0):
            with run.autocast():
                loss = run.task.criterion.terms(ddp(input), target)['loss']
            run.scaler.scale(loss).backward()
            update(run, 'ab', {'a': None, 'b': None})
    return step


def _device_ids(run):
    return [run.args.local_rank] if run.device.type == 'cuda' else None


def work(rank, options, port):
    """Measure in one of the processes; the first one reports."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.processes),
        LOCAL_WORLD_SIZE=str(options.processes), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    os.environ['KINETO_LOG_LEVEL'] = '99'
    try:
        _work(rank, options)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _work(rank, options):
    runs = {}
    for name, flag in (('gather', '--gather'), ('no gather', '--no-gather')):
        runs[name] = create_fixed(arguments(options, 'vpl', 'ab', flag), options.steps)
    run = runs['gather']
    seconds, _ = interleave(
        {name: block(run) for name, run in runs.items()}, options.repeats, options.warmup, run.device)
    counts = {name: per_step(run) for name, run in runs.items()}
    plain = plain_step(options)
    plain()
    plain()  # DistributedDataParallel rebuilds its buckets after the first backward
    _, plain_reduces = collectives(plain)
    if rank:
        return

    report = common.Report('gather', options)
    report.times('step', seconds, options.steps, images=options.batch_size * options.processes)
    report.ratios('step', {'gather / no gather': (seconds['gather'], seconds['no gather'])})
    other = 'b' if run.pair.affine_side == 'a' else 'a'
    dim = run.pair.parts[other].embed_dim
    # With --contrastive-to b, the default, one branch learns from the contrastive term.
    gathered, reduced = gather_bytes(options.processes, options.batch_size, dim, learners=1)
    rows = []
    for name, (python, _) in counts.items():
        formula = {'all_gather': gathered, 'all_reduce': reduced} if name == 'gather' else {}
        for collective in ('all_gather', 'all_reduce'):
            calls, size = python.get(collective, (0, 0))
            rows.append([name, collective, f'{calls:g}', f'{size:.0f}', formula.get(collective, 0)])
    report.table(
        f'bytes a step and process of the gather, N {options.batch_size}, d {dim}, {options.processes} processes',
        ['case', 'collective', 'calls', 'bytes counted', 'bytes by the formula'], rows)
    rows = []
    for name, (python, reduces) in counts.items():
        gather, decisions = (python.get(key, (0, 0))[0] for key in ('all_reduce', 'all_reduce of integers'))
        rows.append([name, f'{reduces:g}', f'{reduces - gather - decisions:g}', f'{gather:g}', f'{decisions:g}'])
    rows.append(['one DistributedDataParallel around the pair, no gather', *[f'{plain_reduces:g}'] * 2, '0', '0'])
    report.table('all-reduces a step', ['case', 'all', 'gradients', 'gather', 'decisions (8 bytes)'], rows)
    model(options, report)
    report.save()


def gather_bytes(world_size: int, rows: int, dim: int, learners: int) -> tuple[int, int]:
    """Return the bytes that a process gives to the all-gather, and those of the tensor that is all-reduced."""
    return (rows + 1) * 2 * dim * 4, world_size * rows * dim * learners * 4


def model(options, report):
    """Report what the gather costs with many processes by the stated assumptions."""
    rate, latency = options.bandwidth * 1e9, options.latency * 1e-6
    rows, dim = options.model_batch, options.dim
    gradients = options.parameters * 1e6 * 4
    table = []
    for world_size in itertools.takewhile(lambda size: size <= 1024, (2 ** i for i in range(11))):
        given, reduced = gather_bytes(world_size, rows, dim, learners=1)
        others = world_size - 1
        moved = others * given + 2 * others / world_size * reduced
        gather_ms = 1e3 * (moved / rate + 3 * others * latency)
        ddp_ms = 1e3 * 2 * others * (gradients / world_size / rate + latency)
        # Four products (N, d) x (d, WN) in the forward; the backward costs as much for each of their two factors that
        # has a gradient, at most twice.
        flops = 3 * 4 * 2 * rows * world_size * rows * dim
        scores = 2 * rows * 2 * world_size * rows * 4
        table.append([
            world_size, world_size * rows, f'{moved / 1e6:.1f}', f'{gather_ms:.2f}', f'{ddp_ms:.2f}',
            f'{100 * gather_ms / options.step_ms:.1f}', f'{flops / 1e9:.1f}', f'{scores / 2**20:.0f}'])
    print(f'# model: {options.bandwidth:g} GB/s a process, {options.latency:g} us a hop, d {dim}, {rows} images a '
          f'process, step {options.step_ms:g} ms, {options.parameters:g} M parameters')
    report.table('model, not measured', [
        'processes', 'images', 'MB moved by the gather', 'gather ms', 'gradients ms', 'gather % of a step',
        'GFLOP of the similarities, at most', 'MiB of scores'], table)


def main(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('--processes', type=int, default=2)
    add('--bandwidth', type=float, default=50., help='of the model: GB/s a process')
    add('--latency', type=float, default=10., help='of the model: microseconds a hop')
    add('--dim', type=int, default=2048, help='of the model: width of the embeddings')
    add('--model-batch', type=int, default=256, help='of the model: images a process')
    add('--step-ms', type=float, default=300., help='of the model: time of a step without the gather')
    add('--parameters', type=float, default=113.7, help='of the model: millions of parameters')
    add('--model-only', action='store_true', help='print the model and measure nothing')
    parser.set_defaults(device='cuda' if torch.cuda.device_count() >= 2 else 'cpu')
    options = parse(parser, argv)
    if options.model_only:
        report = common.Report('gather', options)
        model(options, report)
        report.save()
        return
    if options.device.startswith('cuda') and torch.cuda.device_count() < options.processes:
        parser.error(f'--processes {options.processes}: there are {torch.cuda.device_count()} GPUs')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(options, port), nprocs=options.processes)


if __name__ == '__main__':
    main()
