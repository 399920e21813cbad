#!/usr/bin/env python3
"""What it costs a step to look for bad numbers, to let the processes decide together, and to watch them.

The same run trains blocks of steps with and without these, in turn. `torchrun --nproc-per-node 2 benchmarks/guards.py`
measures it for several processes, whose votes travel with each update.
"""
import contextlib
import os

from common import STAGE_2, Report, arguments, block, create_fixed, create_parser, interleave, parse

from timm_vpl.engine.control import GO_ON, Control
from timm_vpl.engine.finite import FiniteCheck


@contextlib.contextmanager
def without_guards():
    """Take the checks and votes out of the loop."""
    taken = {
        (FiniteCheck, 'gradients'): lambda self, groups: {},
        (FiniteCheck, 'step'): lambda self, optimizer, found: optimizer.step(),
        (FiniteCheck, 'record'): lambda self, where, losses, found: None,
        (FiniteCheck, 'kept'): lambda self, losses, batches: losses,
        (Control, 'decide'): lambda self, wish=GO_ON: GO_ON,
    }
    kept = {key: getattr(*key) for key in taken}
    for key, function in taken.items():
        setattr(*key, function)
    try:
        yield
    finally:
        for key, function in kept.items():
            setattr(*key, function)


def main(argv=None) -> None:
    """Measure and report."""
    options = parse(create_parser(__doc__), argv, cpu={'steps': 10, 'repeats': 41}, cuda={'steps': 20, 'repeats': 41})
    run = create_fixed(arguments(options, 'vpl', 'ab', '--hang-timeout', 1800), options.steps)
    train = block(run, STAGE_2)

    def bare():
        with without_guards():
            train()

    seconds, _ = interleave({'with': train, 'without': bare}, options.repeats, options.warmup, options.device)
    if int(os.environ.get('RANK', 0)):
        return
    report = Report('guards', options)
    name = f'guards, {run.args.world_size} process(es)'
    report.times(name, seconds, options.steps, options.batch_size * run.args.world_size)
    report.ratios(name, {'with / without': (seconds['with'], seconds['without'])})
    report.save()


if __name__ == '__main__':
    main()
