#!/usr/bin/env python3
"""What it costs a step to look for bad numbers, to let the processes decide together, and to watch them.

The same run trains blocks of steps with and without these, in turn. `torchrun --nproc-per-node 2 benchmarks/guards.py`
measures it for several processes, whose votes travel with each update.
"""
import contextlib
import os

from common import STAGE_2, Report, arguments, block, create_fixed, create_parser, interleave, parse

from timm_vpl.engine.control import GO_ON, Control
from timm_vpl.engine.optim import only
from timm_vpl.engine.step import Update


def plain_step(self, learners):
    """Step without a look at the gradients."""
    with only(self.optimizer, learners):
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextlib.contextmanager
def without_guards():
    """Take the checks and votes out of the loop."""
    taken = {
        (Update, 'step'): plain_step,
        (Update, '_account'): lambda self, progress, size: None,
        (Control, 'decide'): lambda self, request=GO_ON: GO_ON,
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
    name = f'guards, {run.processes.world_size} process(es)'
    report.times(name, seconds, options.steps, options.batch_size * run.processes.world_size)
    report.ratios(name, {'with / without': (seconds['with'], seconds['without'])})
    report.save()


if __name__ == '__main__':
    main()
