"""Comparing runs: everything that a run leaves, but for times and places."""
import csv
from pathlib import Path

import torch

from timm_vpl.engine.checkpoint import read_checkpoint

TIMES = ('seconds', 'eval_seconds', 'images_per_second')


def summary(folder: Path) -> list[dict]:
    """Return the rows of a run's summary.csv without its times."""
    with open(folder / 'summary.csv', newline='') as f:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(f)]


def differences(folder: Path, other: Path) -> list[str]:
    """Return in what two finished runs differ: weights, EMA, optimizer, bookkeeping, summary, files; to the bit."""
    found = []
    names = [
        sorted(path.name for path in f.glob('*') if not path.name.startswith('recovery-')) for f in (folder, other)]
    if names[0] != names[1]:
        found.append(f'files: {names[0]} and {names[1]}')
    if summary(folder) != summary(other):
        found.append(f'summary.csv: {summary(folder)} and {summary(other)}')
    for name in sorted(path.name for path in folder.glob('*.pth.tar') if not path.name.startswith('recovery-')):
        if not (other / name).exists():
            continue
        one, two = (read_checkpoint(str(f / name)) for f in (folder, other))
        for key in ('epoch', 'state_dict', 'state_dict_ema', 'optimizer', 'metrics', 'metric', 'saver', 'ranks'):
            _compare(f'{name}: {key}', one.get(key), two.get(key), found)
    return found


def _compare(where, one, two, found):
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if not torch.equal(one, two):
            found.append(f'{where}: by {(one.double() - two.double()).abs().max():.2g}')
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            _compare(f'{where}.{key}', one[key], two[key], found)
    elif isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        for i, pair in enumerate(zip(one, two, strict=True)):
            _compare(f'{where}[{i}]', *pair, found)
    elif one != two:
        found.append(f'{where}: {one!r} and {two!r}')
