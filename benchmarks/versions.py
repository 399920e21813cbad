#!/usr/bin/env python3
"""Time of a training step of two checkouts of this project, in turn: what a change costs.

    git worktree add ../before COMMIT
    python benchmarks/versions.py ../before --method vpl --series 3 --repeats 8

Each series starts a process for each checkout, which times blocks of steps of its own loop on one batch. The blocks
alternate (A B, B A, ...); the ratio of a pair is this checkout's time over the other's. Printed are, for a step of
each, the operations, the reads of a value by the host and the collectives (torch's profiler, process 0), then all
series, and the 95 % t interval of the mean of the logarithms over the pairs of all series.
"""
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import common
from common import arguments, create_parser, parse

from timm_vpl.tools.comparison import paired_difference

WORKER = '''
import json, sys, time
sys.path.insert(0, sys.argv[1] + '/benchmarks')
import common
options = common.parse(common.create_parser(''), json.loads(sys.argv[2]))
run = common.create_fixed(json.loads(sys.argv[3]), options.steps)
train = common.block(run)
for _ in range(2):
    train()
first = run.args.rank == 0
with common.torch.profiler.profile(activities=[common.torch.profiler.ProfilerActivity.CPU]) as profiler:
    train()
names = [event.name for event in profiler.events()]
counts = [
    sum(name.startswith(begin) for name in names) / options.steps
    for begin in ('aten::', 'aten::_local_scalar_dense', 'c10d::')]
print('ready', *counts, flush=True) if first else None
for line in sys.stdin if first else iter(int, 1):
    if run.args.distributed:
        common.torch.distributed.barrier()
    started = time.perf_counter()
    train()
    print(time.perf_counter() - started, flush=True) if first else None
'''


def start(checkout: Path, options, own: list[str], argv: list[str]) -> tuple[subprocess.Popen, list[str]]:
    """Start the process (or processes) of a checkout, wait until it is warm, and return it and its counts a step."""
    launcher = [sys.executable]
    if options.processes > 1:
        launcher += ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(options.processes)]
    script = Path(common.scratch()) / 'worker.py'
    script.write_text(WORKER)
    process = subprocess.Popen(
        [*launcher, str(script), str(checkout), json.dumps(own), json.dumps(argv)], cwd=checkout, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    while (words := process.stdout.readline().split())[:1] != ['ready']:
        if process.poll() is not None:
            sys.exit(f'versions.py: error: {checkout}: its process ended')
    return process, words[1:]


def seconds(process: subprocess.Popen) -> float:
    """Let a process train a block and return its time."""
    process.stdin.write('\n')
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument('other', type=Path, help='checkout to compare with')
    parser.add_argument('--method', default='vpl')
    parser.add_argument('--series', type=int, default=3)
    parser.add_argument('--processes', type=int, default=1)
    options = parse(parser)
    argv = arguments(options, options.method)
    own = ['--device', options.device, '--steps', str(options.steps)]
    checkouts = (Path(__file__).resolve().parents[1], options.other.resolve())
    logarithms = []
    for series in range(options.series):
        processes, counts = zip(*(start(checkout, options, own, argv) for checkout in checkouts), strict=True)
        if series == 0:
            for name, numbers in zip(('this checkout', 'the other'), counts, strict=True):
                print(f'{name}, a step: {numbers[0]} operations, {numbers[1]} host reads, {numbers[2]} collectives')
        ratios = []
        for pair in range(options.repeats):
            order = (0, 1) if pair % 2 else (1, 0)
            taken = dict((i, seconds(processes[i])) for i in order)
            ratios.append(taken[0] / taken[1])
        for process in processes:
            process.kill()
        logarithms += map(math.log, ratios)
        print(f'series {series + 1}: median {statistics.median(ratios):.4f}: {" ".join(f"{x:.3f}" for x in ratios)}',
              flush=True)
    pooled = paired_difference(logarithms)
    print(f'{options.method}, {options.processes} process(es), {len(logarithms)} pairs: '
          f'{math.exp(pooled.mean):.4f} [{math.exp(pooled.low):.4f}, {math.exp(pooled.high):.4f}]')


if __name__ == '__main__':
    main()
