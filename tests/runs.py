"""Runs on small real images, in this process or under torchrun, all that they leave, and the line of a wrong one."""
import csv
import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from processes import run_processes

from timm_vpl.cli import train
from timm_vpl.core.processes import Processes
from timm_vpl.engine.checkpoint import read_checkpoint
from timm_vpl.engine.run import create_run
from timm_vpl.options.train import parse_args

ROOT = Path(__file__).resolve().parent.parent

TIMES = ('seconds', 'eval_seconds', 'images_per_second')
PAIR = ['--model-a', 'test_resnet', '--model-b', 'test_vit']
SMALL = [
    '--img-size', '32', '-b', '8', '--epochs', '2', '--warmup-epochs', '0', '--lr', '0.001', '--workers', '0',
    '--device', 'cpu', '--checkpoint-hist', '2', '--model-ema-decay', '0.5', '--no-export',
    '--interpolation', 'bicubic', '--no-curves',
]
NOISE = ['--drop', '0.2', '--drop-path', '0.2', '--aa', 'rand-m5-n1', '--reprob', '0.5', '--seed', '7',
         '--model-kwargs-b', 'depth=2']  # a third quicker


def run(data, output, *options, name='run', models=PAIR):
    """Train in this process and return the run's folder."""
    argv = [str(data), *models, *SMALL, '--output', str(output), '--experiment', name, *options]
    assert train(argv) == 0
    return Path(output) / name


def start_run(data, output, *options):
    """Return the parts of a run as the command builds them, in its first epoch."""
    argv = [data, *SMALL, '--output', output, '--experiment', 'run', *options]
    run = create_run(parse_args(list(map(str, argv))), Processes(torch.device('cpu')))
    run.task.set_epoch(0)
    return run


def status_of(command, argv):
    """Return the exit status of a command in this process."""
    try:
        return command([str(arg) for arg in argv])
    except SystemExit as end:  # options that are read wrong
        return end.code


def last(folder):
    return read_checkpoint(str(folder / 'last.pth.tar'))


def rows(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))


def assert_equal_weights(state, other, prefix=''):
    keys = [key for key in state if key.startswith(prefix)]
    assert keys and all(torch.equal(state[key], other[key]) for key in keys)


def torchrun(processes, *argv):
    """Run the training script under torchrun."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    result = subprocess.run(
        [*command, str(ROOT / 'train_vpl.py'), *map(str, argv)],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
        capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]


def train_in(processes, *argv):
    """Train in processes of one group, as torchrun starts them, from a server that has imported torch."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    statuses = run_processes((_train, rank, processes, port, argv) for rank in range(processes))
    assert set(statuses) == {0}, statuses


def _train(rank, processes, port, argv):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    raise SystemExit(train(list(map(str, argv))))


def summary(folder: Path) -> list[dict]:
    """Return the rows of a run's summary.csv without its times."""
    with open(folder / 'summary.csv', newline='') as f:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(f)]


def differences(folder: Path, other: Path) -> list[str]:
    """Return in what two finished runs differ: weights, EMA, optimizer, bookkeeping, summary, files; to the bit."""
    found = []
    names = [
        sorted(path.name for path in f.glob('*') if not path.name.startswith(('recovery-', 'traceback-')))
        for f in (folder, other)]
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


def error_line(capsys, *argv, command=train, statuses=(2,)) -> str:
    """Return the one line with which a wrong command line of a command ends, without the command's name."""
    capsys.readouterr()
    status = status_of(command, argv)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if ': error: ' in line]
    assert status in statuses and len(lines) == 1 and err.endswith(f'{lines[0]}\n') and 'Traceback' not in err, (
        status, out, err)
    return lines[0].partition(': error: ')[2]


def content(folder: Path) -> dict:
    """Return all that would show that a file of a folder was touched, made or removed."""
    return {path: path.is_file() and (path.lstat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in folder.rglob('*')}
