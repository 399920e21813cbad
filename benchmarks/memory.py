#!/usr/bin/env python3
"""Peak memory of the pair against its branches alone, and gradient checkpointing of each branch.

Each case is a process of its own that builds a run and trains two blocks of steps with the package's loop (stage 2,
AdamW, EMA) on one batch.

On CUDA the peak is torch.cuda.max_memory_allocated over the second block: weights, averages, optimizer state,
gradients and activations. On the CPU it is the peak of the bytes that torch's allocator holds, as torch's profiler
records them over building the run and its steps: exact and repeatable, without the workspaces that kernels get from
elsewhere. A process's peak of resident memory also depends on what malloc gives back to the system, so it is not used.
"""
import json
import os
import subprocess
import sys
import time

import common
import torch
from common import arguments, block, create_fixed, create_parser, parse

CASES = {
    'solo a': ('solo', 'a'),
    'solo b': ('solo', 'b'),
    'pair': ('vpl', 'ab'),
    'pair, a checkpointed': ('vpl', 'ab', '--grad-checkpointing-a'),
    'pair, b checkpointed': ('vpl', 'ab', '--grad-checkpointing-b'),
    'pair, both checkpointed': ('vpl', 'ab', '--grad-checkpointing'),
}


def measure(options, case: str) -> dict:
    """Return peak and resident bytes of a case, and the seconds of a step, in this process."""
    method, sides, *extra = CASES[case]
    argv = arguments(options, method, sides, *extra)
    if torch.device(options.device).type == 'cuda':
        run = create_fixed(argv, options.steps)
        block(run)()
        common.synchronize(run.device)
        resident = torch.cuda.memory_allocated(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
        seconds = _seconds(run, options)
        return {'peak': torch.cuda.max_memory_allocated(run.device), 'resident': resident, 'seconds': seconds}

    # Recorded from the first parameter on: a block of unknown origin would be missed when it is freed.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = create_fixed(argv, 1)
        block(run)()
        block(run)()
    held = peak = 0
    for event in sorted(_memory_events(profiler), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    run.loader_train.steps = options.steps
    return {'peak': peak, 'resident': held, 'seconds': _seconds(run, options)}


def _seconds(run, options):
    started = time.perf_counter()
    block(run)()
    common.synchronize(run.device)
    return (time.perf_counter() - started) / options.steps


def _memory_events(profiler):
    return [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']


def main(argv=None):
    parser = create_parser(__doc__)
    parser.add_argument('--case', choices=list(CASES), help='measure this one in this process and print JSON')
    options = parse(parser, argv)
    if options.case:
        print(json.dumps(measure(options, options.case)))
        return
    report = common.Report('memory', options)
    os.environ['KINETO_LOG_LEVEL'] = '99'  # the profiler of a process without a GPU says so at length
    results = {}
    for case in CASES:
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), '--case', case]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results[case] = json.loads(output.splitlines()[-1])
    peaks = {case: result['peak'] for case, result in results.items()}
    both = peaks['solo a'] + peaks['solo b']
    report.table('memory', ['case', 'peak MiB', 'between steps MiB', '/ pair', '/ (solo a + solo b)', 'ms a step'], [
        [case, f'{result["peak"] / 2**20:.1f}', f'{result["resident"] / 2**20:.1f}',
         f'{result["peak"] / peaks["pair"]:.3f}', f'{result["peak"] / both:.3f}', f'{result["seconds"] * 1e3:.1f}']
        for case, result in results.items()])
    report.data['questions']['memory']['cases'] = results
    report.save()


if __name__ == '__main__':
    main()
