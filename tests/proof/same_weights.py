"""Trains eight short runs with the code of two commits and compares all weights of their last checkpoints, to the bit.

`python tests/proof/same_weights.py OLD NEW` takes commits or folders of checkouts, prints a line for each run, and ends
with status 1 on a difference. It starts `train_vpl.py` of each checkout and reads timm's checkpoint format; it knows
nothing else of the package.
"""
import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

LIMIT = 300  # seconds for a process
ATTEMPTS = 3  # of two processes: torch's gloo now and then aborts when they end
NUM_CLASSES, NUM_TRAIN, NUM_EVAL = 4, 48, 17

COMMON = [
    '--img-size', '32', '-b', '8', '--epochs', '2', '--warmup-epochs', '1', '--lr', '0.002', '--model-ema-decay', '0.9',
    '--aa', 'rand-m5-n1', '--reprob', '0.25', '--workers', '0', '--device', 'cpu', '--no-export', '--log-interval', '1',
    '--seed', '7']
PAIR = ['--model-a', 'test_resnet', '--model-b', 'test_vit']
NOISE = ['--drop-path', '0.1', '--mixup', '0.2', '--cutmix', '1.0']
STUDENT = ['--model-b', 'deit_tiny_distilled_patch16_224', '--model-kwargs-b', 'embed_dim=48', 'depth=2', 'num_heads=3']
TEACHER = ['--teacher', 'OUTPUT/vpl', '--teacher-branch', 'a']

# Number of processes and options of each run. That a run which is stopped ends alike: tests/engine/test_resume.py.
RUNS = {
    'vpl': (1, [
        *PAIR, *NOISE, '--epochs', '3', '--x', '30', '--y', '40', '--mixup-off-epoch', '2', '--clip-grad', '1']),
    'vpl, 2 processes, accumulation': (2, [
        *PAIR, '-b', '4', '--grad-accum-steps', '2', '--x', '0', '--y', '0', '--same-class', 'positive',
        '--aug-repeats', '2', '--layer-decay', '0.8', '--lr-b', '0.001', '--clip-grad-b', '0.5']),
    'vpl, other options': (1, [
        *PAIR, *NOISE, '--x', '50', '--y', '50', '--grad-accum-steps', '2', '--contrastive-to', 'both', '--kl-to',
        'both', '--affine-side', 'a', '--opt', 'lookahead_adamw', '--sched-on-updates', '--workers', '1',
        '--img-size-b', '48', '--val-interval', '2']),
    'dml, 2 processes': (2, ['--method', 'dml', *PAIR, *NOISE, '-b', '4', '--clip-grad', '0.5']),
    'dml, joint': (1, [
        '--method', 'dml', '--dml-joint', *PAIR, '--rho', '2', '--kl-weight', '0.5', '--clip-grad', '0.1',
        '--clip-mode', 'agc', '--opt', 'sgd', '--weight-decay-a', '0.001']),
    'cosub': (1, [
        '--method', 'cosub', '--model-b', 'test_vit', '--drop-path', '0.2', '--drop-path-skip', '--cutmix', '1.0',
        '--grad-accum-steps', '2', '--freeze-depth-b', '1']),
    'deit': (1, [
        '--method', 'deit', *STUDENT, *TEACHER, '--distillation-type', 'soft', '--mixup', '0.8', '--clip-grad', '1']),
    'distill': (1, [
        '--method', 'distill', '--model-b', 'test_vit', *TEACHER, '--distill-terms', 'both', '--amp', '--amp-dtype',
        'bfloat16', '--no-model-ema', '--bce-loss']),
}


class Failed(Exception):
    """A run did not end as it should."""


# Runs


def write_images(checkout: Path, folder: Path) -> None:
    """Write a few of the package's digits as a folder of images."""
    (file,) = checkout.glob('timm_vpl/**/digits.npz')
    with np.load(file) as archive:
        images, labels = archive['images'], archive['labels']
    chosen = np.flatnonzero(labels < NUM_CLASSES)
    for split, indices in (('train', chosen[:NUM_TRAIN]), ('validation', chosen[NUM_TRAIN:NUM_TRAIN + NUM_EVAL])):
        for i in indices:
            path = folder / split / str(labels[i]) / f'{i:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((images[i] * 15).astype(np.uint8)).resize((32, 32)).save(path)


def train(checkout: Path, data: Path, output: Path, name: str) -> Path:
    """Do one of the runs with the code of a checkout, and return its folder."""
    processes, options = RUNS[name]
    folder = output / re.sub(r'\W+', '-', name)
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'] if processes == 2 else []
    options = [option.replace('OUTPUT', str(output)) for option in options]
    command = [
        sys.executable, *launcher, str(checkout / 'train_vpl.py'), str(data), *COMMON, *options,
        '--output', str(output), '--experiment', folder.name]
    environ = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(checkout)}
    for _ in range(ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        with open(f'{folder}.log', 'w') as log:
            process = subprocess.run(command, stdout=log, stderr=log, env=environ, cwd=output, timeout=LIMIT)
        text = Path(f'{folder}.log').read_text()
        if processes < 2 or 'exitcode: -6' not in text:
            break
    if process.returncode:
        raise Failed(f'ended with status {process.returncode}:\n{text[-3000:]}')
    return folder


# Comparison


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights of a run's last checkpoint with their averages, and the state of its optimizer."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(folder / 'last.pth.tar', map_location='cpu', weights_only=True)
    weights = {
        f'{part}: {key}': tensor for part in ('state_dict', 'state_dict_ema')
        for key, tensor in checkpoint.get(part, {}).items()}
    optimizer = checkpoint['optimizer']
    states = {
        f'optimizer: {index}.{key}': torch.as_tensor(value)
        for index, values in optimizer['state'].items() for key, value in values.items()}
    states.update({
        f'optimizer: {key} of group {number}': torch.tensor(group[key], dtype=torch.float64)
        for number, group in enumerate(optimizer['param_groups']) for key in ('lr', 'weight_decay')})
    return weights, states


def compare(old: Path, new: Path) -> tuple[str, bool]:
    """Return a line on two runs, and whether they are equal."""
    (weights, states), (other_weights, other_states) = read(old), read(new)
    if weights.keys() != other_weights.keys():
        return f'DIFFERENT: only one has {sorted(weights.keys() ^ other_weights.keys())[:3]}', False
    note = f'{len(weights)} weights'
    if [(key, state.shape) for key, state in states.items()] == [
            (key, state.shape) for key, state in other_states.items()]:
        weights, other_weights = {**weights, **states}, {**other_weights, **other_states}
        note += f', {len(states)} tensors of the optimizer'
    else:
        note += "; the optimizer's state has another layout and is not compared"
    differing = [key for key, tensor in weights.items()
                 if tensor.dtype != other_weights[key].dtype or not torch.equal(tensor, other_weights[key])]
    if not differing:
        return f'equal ({note})', True
    one, two = weights[differing[0]], other_weights[differing[0]]
    size = f'by {(one.double() - two.double()).abs().max():.2g}' if one.shape == two.shape else 'in shape'
    return f'DIFFERENT: {differing[0]} {size}, and {len(differing) - 1} others of {len(weights)}', False


# The command


@contextlib.contextmanager
def checkout_of(what: str, folder: Path) -> Iterator[Path]:
    """Give the folder of a checkout, one that is there or a temporary git worktree of a commit."""
    if os.path.isfile(os.path.join(what, 'train_vpl.py')):
        yield Path(what).resolve()
        return
    git = ['git', '-C', str(Path(__file__).resolve().parent), 'worktree']
    subprocess.run([*git, 'add', '--quiet', '--detach', str(folder), what], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, 'remove', '--force', str(folder)], check=True)


def main(argv: list[str] | None = None) -> int:
    """Compare the runs of two commits and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('old', help='commit, or folder of a checkout')
    parser.add_argument('new', help='commit, or folder of a checkout')
    parser.add_argument('--only', nargs='+', choices=list(RUNS), help='these runs (vpl trains the teacher of others)')
    args = parser.parse_args(argv)
    started, work, good = time.monotonic(), Path(tempfile.mkdtemp(prefix='timm-vpl-weights-')), True
    names = [name for name in RUNS if not args.only or name in args.only
             or (name == 'vpl' and {'deit', 'distill'} & set(args.only))]
    with contextlib.ExitStack() as stack:
        checkouts = {
            side: stack.enter_context(checkout_of(what, work / f'{side}-code'))
            for side, what in (('old', args.old), ('new', args.new))}
        write_images(checkouts['old'], work / 'data')
        for side in checkouts:
            (work / side).mkdir()
        for name in names:
            begun = time.monotonic()
            try:
                line, equal = compare(*(
                    train(checkout, work / 'data', work / side, name) for side, checkout in checkouts.items()))
            except (Failed, subprocess.TimeoutExpired) as e:
                line, equal = f'FAILED: {e}', False
            good = good and equal
            print(f'{name}: {line}, {time.monotonic() - begun:.0f} s', flush=True)
    if good:
        shutil.rmtree(work)
    print(f'{"all equal" if good else f"NOT equal; the runs stay in {work}"}, {time.monotonic() - started:.0f} s')
    return not good


if __name__ == '__main__':
    sys.exit(main())
