#!/usr/bin/env python3
"""Time from the command to the first training step, and of --help, as a user waits for it.

Each case is a process of its own, started in turn: the bare interpreter, the import of torch and timm (which every
training needs), `train_vpl.py --help`, and `train_vpl.py --dataset digits` until its first line 'Train:' appears,
after which it is stopped.
"""
import argparse
import os
import subprocess
import sys
import time

import common
from common import ROOT

SCRIPT = str(ROOT / 'train_vpl.py')
IMPORT = 'import torch, torchvision, timm; print("imported")'


def run_to_end(command) -> float:
    """Return the seconds that a command takes."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
    return time.perf_counter() - started


def run_to_line(command, marker: str) -> float:
    """Return the seconds until a command writes a line with the marker, and stop the command."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if marker in line:
                taken = time.perf_counter() - started
                process.kill()
                return taken
    raise RuntimeError(f'{" ".join(command)} ended without a line {marker!r}:\n{"".join(lines[-20:])}')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--model-a', default='test_resnet')
    parser.add_argument('--model-b', default='test_vit')
    parser.add_argument('--img-size', type=int, default=32)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=1)
    parser.add_argument('--json', help='file for the figures', metavar='FILE')
    options = parser.parse_args(argv)
    report = common.Report('startup', options)

    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    output = common.scratch()
    train = [
        sys.executable, SCRIPT, '--dataset', 'digits', '--model-a', options.model_a, '--model-b', options.model_b,
        '--img-size', options.img_size, '--batch-size', options.batch_size, '--workers', options.workers,
        '--device', options.device, '--output', output]
    train = [str(item) for item in train]
    cases = {
        'interpreter': lambda: run_to_end([sys.executable, '-c', '']),
        'import torch, timm': lambda: run_to_line([sys.executable, '-uc', IMPORT], 'imported'),
        '--help': lambda: run_to_end([sys.executable, SCRIPT, '--help']),
        'first step': lambda: run_to_line(train, 'Train: '),
    }
    seconds = {name: [] for name in cases}
    for i in range(options.warmup + options.repeats):
        for name, case in cases.items():
            taken = case()
            if i >= options.warmup:
                seconds[name].append(taken)
    report.times('startup', seconds)
    report.ratios('startup', {
        '--help / interpreter': (seconds['--help'], seconds['interpreter']),
        'first step / import torch, timm': (seconds['first step'], seconds['import torch, timm']),
    })
    report.save()


if __name__ == '__main__':
    main()
