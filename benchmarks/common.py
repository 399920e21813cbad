"""What the benchmarks share: options, runs of the package on a fixed batch, interleaved timing, tables and JSON."""
import argparse
import contextlib
import functools
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the clone's package, installed or not

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import timm_vpl  # noqa: E402
from timm_vpl.engine.device import init_device  # noqa: E402
from timm_vpl.engine.loop import train_one_epoch  # noqa: E402
from timm_vpl.engine.run import create_run  # noqa: E402
from timm_vpl.engine.step import Progress  # noqa: E402
from timm_vpl.engine.train import begin  # noqa: E402
from timm_vpl.options.train import parse_args  # noqa: E402

# Data named as more classes than it has: the width of the classifiers is what is measured.
logging.getLogger('timm_vpl.data').setLevel(logging.ERROR)

PRECISIONS = {
    'fp32': [],
    'bf16': ['--amp', '--amp-dtype', 'bfloat16'],
    'fp16': ['--amp', '--amp-dtype', 'float16'],
}
# What an option is on a device when it is not given; a script replaces some.
DEFAULTS = {
    'cpu': {
        'model_a': 'test_resnet', 'model_b': 'test_vit', 'img_size': 64, 'batch_size': 64, 'precision': 'fp32',
        'num_classes': 1000, 'steps': 4, 'repeats': 11, 'warmup': 1, 'workers': 1,
    },
    'cuda': {
        'model_a': 'resnet50', 'model_b': 'vit_base_patch16_224', 'img_size': 224, 'batch_size': 256,
        'precision': 'bf16', 'num_classes': 1000, 'steps': 10, 'repeats': 11, 'warmup': 2, 'workers': 8,
    },
}
# Of 10 epochs with the paper's x and y, one in which both pair terms are on.
EPOCHS, STAGE_2 = 10, 5


def create_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks; None stands for the default of the device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--model-a', help='branch a')
    add('--model-b', help='branch b')
    add('--img-size', type=int, help='height and width of the images')
    add('--batch-size', type=int, help='images a step')
    add('--num-classes', type=int, help='width of the classifiers')
    add('--precision', choices=list(PRECISIONS))
    add('--channels-last-a', action='store_true', help='channels-last memory layout of branch a')
    add('--torchcompile', nargs='?', const='inductor', help='compile the branches', metavar='BACKEND')
    add('--steps', type=int, help='steps in a timed block')
    add('--repeats', type=int, help='rounds; in each, every case is timed once')
    add('--warmup', type=int, help='rounds before, which do not count')
    add('--workers', type=int, help='processes that load data')
    add('--json', help='file for the figures', metavar='FILE')
    return parser


def parse(parser: argparse.ArgumentParser, argv=None, cpu=None, cuda=None) -> argparse.Namespace:
    """Return the options, completed by the defaults of the device, of which a script may replace some."""
    options = parser.parse_args(argv)
    kind = options.device.partition(':')[0]
    defaults = {**DEFAULTS.get(kind, DEFAULTS['cpu']), **((cuda if kind == 'cuda' else cpu) or {})}
    for name, value in defaults.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def arguments(options, method: str, sides: str = 'ab', *extra) -> list[str]:
    """Return the command line of a run of the package."""
    argv = [
        '--dataset', 'digits', '--method', method, '--device', options.device, '--epochs', EPOCHS,
        '--batch-size', options.batch_size, '--img-size', options.img_size, '--num-classes', options.num_classes,
        '--workers', 0, *PRECISIONS[options.precision],
    ]
    for side in sides:
        argv += [f'--model-{side}', getattr(options, f'model_{side}')]
    if options.channels_last_a and 'a' in sides:
        argv += ['--channels-last-a']
    if options.torchcompile:
        argv += ['--torchcompile', options.torchcompile]
    return [str(item) for item in [*argv, *extra]]


@functools.cache
def join(device: str | None):
    """Join the other processes: once, for all runs of this one."""
    return init_device(device)


class FixedLoader:
    """The same batch, already on the device, `steps` times an epoch, in the place of a run's loader."""

    skipped = 0  # unreadable images
    images = SimpleNamespace(being_read=str)

    def __init__(self, input, target, steps):
        self.input, self.target, self.steps = input, target, steps

    def __len__(self):
        return self.steps

    def epoch(self, epoch, first_batch=0):
        for batch in range(first_batch, self.steps):
            yield batch, self.input, self.target, None


def create(argv: list[str], epoch: int = STAGE_2, started: bool = True):
    """Return a run of the package, built from a command line as `train_vpl.py` does it, and its stage chosen.

    Args:
        argv: The command line.
        epoch: Epoch that decides the stage.
        started: Wrap its parts for several processes, as before a training.
    """
    options = parse_args(['--output', scratch(), *argv])
    run = create_run(options, join(options.device.device))
    if started:
        begin(run, None)
    run.task.set_epoch(epoch)
    return run


def create_fixed(argv: list[str], steps: int, epoch: int = STAGE_2, started: bool = True):
    """Return a run whose epoch is `steps` steps on one batch that lies on the device; it logs nothing."""
    run = create(argv, epoch, started)
    fix_batch(run, steps)
    run.saver = None
    return run


def fix_batch(run, steps: int) -> None:
    """Make an epoch of a run `steps` steps on one batch that lies on the device."""
    batch_size, size = run.options.loader.batch_size, next(iter(run.options.branches.values())).img_size
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(batch_size, 3, size, size, generator=generator)
    target = torch.randint(run.pair.num_classes, (batch_size,), generator=generator)
    run.loader_train = FixedLoader(input.to(run.device), target.to(run.device), steps)


def block(run, epoch: int = STAGE_2):
    """Return a function that trains one epoch of a run with the package's own loop."""
    def train():
        run.progress = Progress(epoch)
        train_one_epoch(run)
    return train


_scratch = contextlib.ExitStack()


def scratch() -> str:
    """Return a new temporary folder, removed at the end of the process."""
    return _scratch.enter_context(tempfile.TemporaryDirectory(prefix='timm-vpl-benchmark-'))


def synchronize(device) -> None:
    """Wait for the device."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def interleave(cases: dict, repeats: int, warmup: int, device='cpu') -> tuple[dict, dict]:
    """Time every case once a round: A, B, A, B, ...

    Returns:
        Seconds of each round by case; and, on CUDA, the largest peak of allocated bytes above what lay there before
        the block, by case (empty elsewhere).
    """
    seconds, peaks = {name: [] for name in cases}, {}
    cuda = torch.device(device).type == 'cuda'
    for i in range(warmup + repeats):
        for name, case in cases.items():
            synchronize(device)
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            started = time.perf_counter()
            case()
            synchronize(device)
            taken = time.perf_counter() - started
            if i >= warmup:
                seconds[name].append(taken)
                if cuda:
                    peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated(device) - before)
    return seconds, peaks


def quartiles(values) -> tuple[float, float, float]:
    """Return median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method='inclusive')
    return median, low, high


def add(*series) -> list[float]:
    """Return the sums of several series, round by round."""
    return [sum(values) for values in zip(*series, strict=True)]


def environment(device='cpu') -> dict:
    """Describe the software, the processor and the device."""
    found = {
        'torch': torch.__version__, 'timm': timm.__version__, 'timm_vpl': timm_vpl.__version__,
        'python': platform.python_version(), 'system': platform.platform(),
        'cpu': platform.processor() or platform.machine(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'load': _load(),
    }
    with contextlib.suppress(OSError, StopIteration), open('/proc/cpuinfo') as f:
        found['cpu'] = next(line for line in f if line.startswith('model name')).partition(':')[2].strip()
    device = torch.device(device)
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        found.update(
            gpu=properties.name, gpu_memory_gib=round(properties.total_memory / 2**30, 1), cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version())
    return found


def _load():
    return [round(value, 2) for value in os.getloadavg()]


def print_table(header, rows) -> None:
    """Print a Markdown table, its columns aligned."""
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for i, row in enumerate(rows):
        print('| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + ' |')
        if i == 0:
            print('|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    print(flush=True)


class Report:
    """Collects figures, prints them as tables and writes them to --json.

    Args:
        name: Name of the benchmark.
        options: Its options, which are part of the file.
    """

    def __init__(self, name: str, options):
        self.path = options.json
        self.data = {
            'benchmark': name,
            'environment': environment(getattr(options, 'device', 'cpu')),
            'options': {key: value for key, value in vars(options).items() if key != 'json'},
            'questions': {},
        }
        print(f'# {name}: ' + ', '.join(f'{key} {value}' for key, value in self.data['environment'].items()))
        print('# ' + ', '.join(f'{key} {value}' for key, value in self.data['options'].items() if value is not None))
        print(flush=True)

    def times(self, question: str, seconds: dict, units: int = 1, images: int = 0, peaks: dict | None = None) -> None:
        """Print and keep the time of a unit (a step, an epoch) of each case.

        Args:
            question: Name under which they are kept.
            seconds: Seconds of each round, by case.
            units: Units in a timed block.
            images: Images in a unit, 0 for no rate.
            peaks: Bytes by case.
        """
        header = ['case', 'median ms', 'quartiles']
        header += ['images/s'] if images else []
        header += ['peak MiB above the start'] if peaks else []
        rows = []
        for name, values in seconds.items():
            median, low, high = (value / units for value in quartiles(values))
            row = [name, f'{median * 1e3:.2f}', f'{low * 1e3:.2f} to {high * 1e3:.2f}']
            row += [f'{images / median:.1f}'] if images else []
            row += [f'{peaks[name] / 2**20:.1f}' if name in peaks else ''] if peaks else []
            rows.append(row)
        print(f'## {question}')
        print_table(header, rows)
        entry = self.data['questions'].setdefault(question, {})
        entry['seconds'] = {name: [value / units for value in values] for name, values in seconds.items()}
        if peaks:
            entry['peak_bytes'] = peaks

    def ratios(self, question: str, ratios: dict) -> None:
        """Print and keep paired ratios, {name: (numerator series, denominator series)}."""
        rows, kept = [], {}
        for name, (above, below) in ratios.items():
            values = [a / b for a, b in zip(above, below, strict=True)]
            median, low, high = quartiles(values)
            rows.append([name, f'{median:.3f}', f'{low:.3f} to {high:.3f}', len(values)])
            kept[name] = {'median': median, 'quartiles': [low, high], 'values': values}
        print_table(['ratio', 'median', 'quartiles', 'rounds'], rows)
        self.data['questions'].setdefault(question, {})['ratios'] = kept

    def table(self, question: str, header, rows) -> None:
        """Print and keep any table."""
        rows = [list(row) for row in rows]
        print(f'## {question}')
        print_table(header, rows)
        self.data['questions'].setdefault(question, {}).update(header=list(header), rows=rows)

    def save(self) -> None:
        """Write the file, if one is asked for, with the settings that the package chose for the device."""
        self.data['environment'].update(
            threads=torch.get_num_threads(), tf32=torch.backends.cuda.matmul.allow_tf32,
            cudnn_benchmark=torch.backends.cudnn.benchmark, load_at_end=_load())
        if self.path:
            Path(self.path).write_text(json.dumps(self.data, indent=1) + '\n')
            print(f'written: {self.path}')


def create_folder(
        num_images: int, width: int, height: int, distinct: int = 256, num_classes: int = 8, root: str | None = None,
) -> str:
    """Write a folder of JPEGs (train/CLASS/*.jpg, validation/CLASS/*.jpg): smooth colours, edges and noise.

    Beyond `distinct`, files are hard links to earlier ones, which cost a decoder as much. Validation has one image a
    class.
    """
    root = Path(root or scratch())
    rng = np.random.default_rng(0)
    files = []
    for i in range(num_images):
        path = root / 'train' / f'class{i % num_classes}' / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < distinct:
            coarse = Image.fromarray(rng.integers(0, 256, (height // 25, width // 25, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
            fine = rng.normal(0, 10, (height, width, 1))
            Image.fromarray((pixels + fine).clip(0, 255).astype(np.uint8)).save(path, quality=90)
            files.append(path)
        else:
            os.link(files[i % distinct], path)
    for i in range(num_classes):
        path = root / 'validation' / f'class{i}' / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(files[i % len(files)], path)
    size = statistics.mean(path.stat().st_size for path in files)
    print(f'# {num_images} images of {width} x {height}, {len(files)} of them distinct, {size / 1024:.0f} KiB each')
    return str(root)
