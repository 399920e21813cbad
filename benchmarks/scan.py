#!/usr/bin/env python3
"""Time of creating both splits from a folder of many images, against timm's create_dataset for both.

The files are empty: nothing is read but folders. They are made once where --folder names a place that keeps them. Both
cases run in turn on a warm cache, each in a process of its own, so that neither pays for the other's memory.
"""
import argparse
import gc
import os
import time
from pathlib import Path

import common

from timm_vpl.data.data import create_split

VALIDATION_SHARE = 25  # ImageNet: 1,281,167 training images, 50,000 to validate


def make_files(root: Path, num_images: int, num_classes: int) -> None:
    """Make the empty files of both splits, named as ImageNet's, where they are not there yet."""
    for split, count in (('train', num_images), ('validation', num_images // VALIDATION_SHARE)):
        for c in range(num_classes):
            (root / split / f'n{c:08d}').mkdir(parents=True, exist_ok=True)
        for i in range(count):
            path = root / split / f'n{i % num_classes:08d}' / f'n{i % num_classes:08d}_{i}.JPEG'
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def timm_splits(root: str) -> int:
    """Return the number of images that timm finds."""
    return sum(len(common.timm.data.create_dataset('', root, split=split)) for split in ('train', 'validation'))


def package_splits(root: str) -> int:
    """Return the number of images that the package finds."""
    args = common.parse_args(['--model-a', 'test_resnet', '--model-b', 'test_vit', root])
    return sum(len(create_split(args, split, split == 'train')) for split in ('train', 'validation'))


def in_process(find, root: str) -> tuple[float, int]:
    """Return the seconds that a function takes in a fork of this process, and what it returns."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        gc.collect()
        started = time.perf_counter()
        count = find(root)
        os.write(write, f'{time.perf_counter() - started} {count}'.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read) as f:
        seconds, count = f.read().split()
    return float(seconds), int(count)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=200_000, help='training images')
    parser.add_argument('--classes', type=int, default=1000)
    parser.add_argument('--folder', help='where the files are made and kept; a folder that has train/ is taken as it '
                        'is', metavar='DIR')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=1)
    parser.add_argument('--json', help='file for the figures', metavar='FILE')
    options = parser.parse_args(argv)
    report = common.Report('scan', options)

    root = Path(options.folder or common.scratch())
    if not (root / 'train').is_dir():
        make_files(root, options.images, options.classes)
    cases = {'timm': timm_splits, 'timm_vpl': package_splits}
    seconds, counts = {name: [] for name in cases}, set()
    for i in range(options.warmup + options.repeats):
        for name, find in cases.items():
            taken, count = in_process(find, str(root))
            counts.add(count)
            if i >= options.warmup:
                seconds[name].append(taken)
    if len(counts) > 1:
        raise RuntimeError(f'the two do not find the same number of images: {sorted(counts)}')
    question = f'both splits, {counts.pop()} images'
    report.times(question, seconds)
    report.ratios(question, {'timm_vpl / timm': (seconds['timm_vpl'], seconds['timm'])})
    report.save()


if __name__ == '__main__':
    main()
