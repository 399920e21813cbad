#!/usr/bin/env python3
"""What looking at a run costs: updates with bars, measures and TensorBoard against updates at which nobody looks.

    python benchmarks/observers.py --series 3 --repeats 8

Each series builds two runs of the same command in this process: one tells its observers what `train_vpl.py
--log-tensorboard` tells them on a terminal (stderr is a pseudo-terminal), the other measures and tells nothing. Epochs
of --steps updates on one batch are timed side by side: each run trains on while the other waits, five updates in turn,
so that a machine that is now fast, now slow counts alike for both. The first, each 50th and the last update of an epoch
are logged. Printed are the operations and the host's reads of a value for an update of each, all ratios (with observers
over without), the 95 % t interval of the mean of their logarithms over all series, and the seconds of curves.png,
drawn for the first time and again.
"""
import math
import os
import pty
import statistics
import sys
import threading
import time
import traceback

import common
import torch
from common import FixedLoader, arguments, block, create, create_fixed, create_parser, fix_batch, parse

from timm_vpl.bars import set_output
from timm_vpl.engine.owner import Owner
from timm_vpl.engine.train import open_folder
from timm_vpl.tools.comparison import paired_difference
from timm_vpl.tools.plots import draw_run
from timm_vpl.tools.trackers import observers_of


def show_terminal() -> None:
    """Make stderr a terminal whose output is thrown away."""
    master, slave = pty.openpty()
    os.dup2(slave, sys.stderr.fileno())
    sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.stdout)
    threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(master, 65536), b'')], daemon=True).start()


def create_observed(argv: list[str], steps: int):
    """Return a run whose observers are those of a run on a terminal."""
    run = create([*argv, '--log-tensorboard', '--no-export'])
    set_output(quiet=False, no_progress=False)
    run.observers = observers_of(run.options)
    open_folder(run, None, Owner())
    fix_batch(run, steps)
    return run


def counts(train, steps: int) -> list[float]:
    """Return operations and host reads of an update."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train()
    names = [event.name for event in profiler.events()]
    return [sum(name.startswith(begin) for name in names) / steps for begin in ('aten::', 'aten::_local_scalar_dense')]


def seconds(train) -> float:
    started = time.perf_counter()
    train()
    return time.perf_counter() - started


class Turns(FixedLoader):
    """A run's batches, of which five are handed out at a turn.

    Args:
        fixed: The run's batches.
    """

    def __init__(self, fixed: FixedLoader):
        super().__init__(fixed.input, fixed.target, fixed.steps)
        self.mine, self.others, self.seconds = threading.Semaphore(0), threading.Semaphore(0), 0.

    def epoch(self, epoch, first_batch=0):
        for batch in super().epoch(epoch, first_batch):
            if batch[0] % 5 == 0 and batch[0]:
                self.hand_over()
                self.take()
            yield batch

    def take(self):
        self.mine.acquire()
        self._started = time.perf_counter()

    def hand_over(self):
        self.seconds += time.perf_counter() - self._started
        self.others.release()


def in_turns(runs, first: int) -> list[float]:
    """Train an epoch of two runs, the other standing still meanwhile, and return the seconds that each took."""
    def go(run):
        run.loader_train.take()
        block(run)()
        run.loader_train.hand_over()

    turns = [Turns(run.loader_train) for run in runs]
    turns[0].others, turns[1].others = turns[1].mine, turns[0].mine
    for run, turn in zip(runs, turns, strict=True):
        run.loader_train = turn
    threads = [threading.Thread(target=go, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    turns[first].mine.release()
    for thread in threads:
        thread.join()
    return [turn.seconds for turn in turns]


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument('--method', default='vpl')
    parser.add_argument('--series', type=int, default=3)
    options = parse(parser, cpu={'steps': 100, 'repeats': 8, 'img_size': 32, 'batch_size': 64})
    show_terminal()
    argv = arguments(options, options.method)
    logarithms = []
    for series in range(options.series):
        observed = create_observed(argv, options.steps)
        runs = [observed, create_fixed(argv, options.steps)]
        for name, run in zip(('with observers', 'without'), runs, strict=True):
            train = block(run)
            train()
            if series == 0:
                operations, reads = counts(train, options.steps)
                print(f'{name}, an update: {operations:.1f} operations, {reads:.2f} host reads', flush=True)
        ratios = []
        for pair in range(options.repeats):
            taken, other = in_turns(runs, pair % 2)
            ratios.append(taken / other)
        observed.notify('close')
        logarithms += map(math.log, ratios)
        print(f'series {series + 1}: median {statistics.median(ratios):.4f}: {" ".join(f"{x:.3f}" for x in ratios)}',
              flush=True)
    pooled = paired_difference(logarithms)
    print(f'{options.method}, {len(logarithms)} pairs: '
          f'{math.exp(pooled.mean):.4f} [{math.exp(pooled.low):.4f}, {math.exp(pooled.high):.4f}]')
    rows = [{'epoch': epoch, 'stage': 1 + epoch // 100, 'num_epochs': 300, **{
        name: 1.5 for name in ('train_ce_a_loss', 'train_ce_b_loss', 'eval_top1_a', 'eval_top1_b', 'eval_ema_top1_a',
                               'eval_ema_top1_b', 'lr_a', 'lr_b')}} for epoch in range(300)]
    drawn = [seconds(lambda: draw_run(common.scratch(), rows, observed.options.flat())) for _ in range(4)]
    print('curves.png of 300 epochs: first {:.2f} s, then {:.2f} to {:.2f} s'.format(drawn[0], *sorted(drawn[1:])[::2]))


if __name__ == '__main__':
    main()
