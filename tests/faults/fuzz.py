#!/usr/bin/env python3
"""Recipes, data folders and checkpoints, mutated from real ones: each is taken, or refused with one line.

    python tests/faults/fuzz.py                       # 1,000 recipes, 300 folders, 500 checkpoints
    python tests/faults/fuzz.py --only checkpoint/17  # one case again

Cases run in few processes under an audit hook. A case fails by a traceback, a process or a connection that it starts, a
write outside its folder, a class of exit status other than 0, 1 and 2, or by taking more than LIMIT seconds. A case is
a function of the seed and its number alone.
"""
import argparse
import contextlib
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNEXPECTED = 'unexpected: '
LIMIT = 120  # seconds of a case, on a busy machine
COUNTS = {'recipe': 1000, 'folder': 300, 'checkpoint': 500}
PAIR = ['--model-a', 'test_resnet', '--model-b', 'test_vit']
SMALL = [
    '--img-size', '32', '-b', '8', '--epochs', '2', '--warmup-epochs', '0', '--lr', '0.001', '--workers', '0',
    '--device', 'cpu', '--checkpoint-hist', '1', '--no-export', '--aa', '']
TEXTS = [
    '', ' ', '-', '..', '../../out', '/tmp/out', '~', '\0', '\x1b[31m', '\r\n', '\u202e', '\ud800', 'nan', '1e999',
    '9' * 400, "'; touch ran; '", '$(touch ran)', '`touch ran`', '|touch ran', 'pipe:touch ran', 'hf-hub:a/b', '%s',
    '{0}', '<img src=x>', '[a](http://b)', '![a](b)', '| a | b |', '# a', '---', '!!python/object/apply:os.system [ls]',
    'ÄÖ', '字', 'a' * 300]
STARTS = (
    'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.spawn', 'os.startfile', 'os.system', 'pty.spawn',
    'socket.connect', 'subprocess.Popen')
WRITES = ('os.link', 'os.mkdir', 'os.remove', 'os.rename', 'os.rmdir', 'os.symlink', 'os.truncate', 'shutil.rmtree')


# Mutations


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return damaged bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at + rng.choice([1, 4, 400])] = rng.randbytes(rng.choice([0, 1, 4, 400]))
        elif kind == 2:
            data[at:at] = data[:rng.randrange(200)]
        elif kind == 3:
            data[at:at] = rng.choice(TEXTS).encode('utf-8', 'surrogatepass')
        else:
            data[at:at + 8] = struct.pack('<d', rng.choice([0., math.nan, math.inf, -1e300]))
    return bytes(data)


def odd_value(rng: random.Random, value):
    """Return another value in the place of one."""
    return rng.choice([
        None, True, False, 0, -1, 10 ** 30, 1e308, math.nan, -math.inf, [], {}, [value], {'a': value}, str(value)[:999],
        rng.choice(TEXTS), [rng.choice(TEXTS)] * 3])


def mutate_tree(rng: random.Random, tree):
    """Return a mapping in which one entry, at some depth, is changed, removed or named otherwise."""
    tree = dict(tree)
    keys = sorted(tree, key=str)
    key = rng.choice(keys)
    if isinstance(tree[key], dict) and tree[key] and rng.random() < 0.7:
        tree[key] = mutate_tree(rng, tree[key])
    elif rng.random() < 0.25:
        del tree[key]
    elif rng.random() < 0.2:
        tree[rng.choice(TEXTS)] = tree.pop(key)
    else:
        tree[key] = odd_value(rng, tree[key])
    return tree


# Cases: each returns what to do, in the current folder


def recipe(rng: random.Random, real: Path):
    """A recipe of the package, damaged as text or as YAML, under a command line that makes it small."""
    import yaml

    from timm_vpl.engine.device import init_device
    from timm_vpl.engine.train import create_run
    from timm_vpl.options.options import parse_args
    source = rng.choice(sorted((ROOT / 'hparams').glob('*.yaml')))
    if rng.random() < 0.4:
        data = mutate_bytes(rng, source.read_bytes())
    else:
        tree = yaml.safe_load(source.read_text())
        for _ in range(rng.choice([1, 1, 2, 5])):
            tree = mutate_tree(rng, tree) if tree else tree
        data = yaml.safe_dump(tree, allow_unicode=True).encode('utf-8', 'surrogatepass')
    Path('recipe.yaml').write_bytes(data)
    words = ['-c', 'recipe.yaml', *(['--dataset', 'digits'] if rng.random() < 0.8 else []),
             *(PAIR if rng.random() < 0.8 else []), *(SMALL if rng.random() < 0.8 else [])]

    def build():
        args = parse_args([*words, '--workers', '0', '--device', 'cpu'], 'fuzz')
        names = [name for name in (args.model_a, args.model_b) if name]
        if set(names) <= {'test_resnet', 'test_vit'} and args.dataset == 'digits' and args.batch_size < 2000:
            create_run(args, init_device(args))
    return build


def folder(rng: random.Random, real: Path):
    """A folder of images, damaged, trained on for two epochs or validated on."""
    from timm_vpl.cli import main
    shutil.copytree(real / 'data', 'data')
    files = sorted(path for path in Path('data').rglob('*') if path.is_file())
    folders = sorted(path for path in Path('data').rglob('*') if path.is_dir())
    options = []
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        file, place, text = rng.choice(files), rng.choice(folders), rng.choice(TEXTS)
        name = text.replace('/', '_').replace('\0', '').replace('\ud800', '')[:200] or 'x'
        with contextlib.suppress(OSError, shutil.Error):
            match rng.randrange(12):
                case 0:
                    file.write_bytes(mutate_bytes(rng, file.read_bytes()))
                case 1:
                    file.unlink()
                case 2:
                    place.rename(place.with_name(name))
                case 3:
                    shutil.rmtree(place)
                case 4:
                    place.joinpath(name).mkdir()
                case 5:
                    place.joinpath('loop').symlink_to(rng.choice(['..', '.', 'loop', '/nowhere', '../..']))
                case 6:
                    file.rename(file.with_name(name + rng.choice(['.png', '.gif', '.jpg', ''])))
                case 7:
                    other = rng.choice(['more', '.ipynb_checkpoints', 'class1'])
                    shutil.copytree(place, f'{place}-copy', symlinks=True)
                    Path(f'{place}-copy').rename(place / other)
                case 8:
                    Path('data', 'map.txt').write_bytes(mutate_bytes(rng, b'class0\nclass1\nclass2\nclass3\n'))
                    options = ['--class-map', 'map.txt']
                case 9:
                    Path('data', '_info.json').write_text(json.dumps(odd_value(rng, {'splits': {'train': text}})))
                    options = ['--dataset', 'wds/x', *(['--train-split', f'{name}-{{0..1}}.tar|9'] * rng.randrange(2))]
                case 10:
                    os.mkfifo(place / 'pipe.png')
                case 11:
                    for split in ('train', 'validation'):
                        (Path('data', split) / 'class1').rename(Path('data', split) / name)
    if rng.random() < 0.2:
        shutil.copytree(real / 'run', 'trained')
        return lambda: main(['validate', 'trained', 'data', '--workers', '0', '--device', 'cpu', *options])
    return lambda: main(['train', 'data', *PAIR, *SMALL, *options, '--experiment', 'run'])


def checkpoint(rng: random.Random, real: Path):
    """A checkpoint, damaged as bytes or entry by entry, resumed, exported, validated or taken as a teacher."""
    import torch

    from timm_vpl.cli import main
    shutil.copytree(real / 'part', 'run')
    path = Path('run/last.pth.tar')
    if rng.random() < 0.3:
        data = mutate_bytes(rng, path.read_bytes())
        path.unlink()
        path.write_bytes(data)
    else:
        tree = torch.load(path, weights_only=True)
        for _ in range(rng.choice([1, 1, 2, 5])):
            tree = mutate_tree(rng, tree)
        path.unlink()
        torch.save(tree, path)
    for name in ('best_a', 'best_b', 'model_best', 'checkpoint-0'):
        shutil.copy(path, f'run/{name}.pth.tar')
    if rng.random() < 0.2:
        for name in ('args.yaml', 'data.yaml', 'environment.yaml', 'summary.csv'):
            Path('run', name).write_bytes(mutate_bytes(rng, Path('run', name).read_bytes()))
    data, cpu = str(real / 'data'), ['--workers', '0', '--device', 'cpu']
    train = ['train', data, *PAIR, *SMALL, '--output', '.']
    words = rng.choice([
        [*train, '--experiment', 'run', '--resume', 'auto'],
        [*train, '--experiment', 'other', '--resume', str(path)],
        [*train, '--experiment', 'other', '--resume', str(path), '--start-epoch', '1'],
        ['train', data, '--model-b', 'test_vit', *SMALL, '--method', 'distill', '--teacher', 'run'],
        [*train, '--experiment', 'other', '--initial-checkpoint-a', str(path)],
        ['validate', 'run', data, *cpu], ['validate', str(path), data, *cpu],
        ['export', 'run'], ['export', str(path), '--out', 'exported'], ['report', 'run'],
    ])
    return lambda: main(words)


KINDS = {'recipe': recipe, 'folder': folder, 'checkpoint': checkpoint}


# Running them


class Watch:
    """An audit hook that notes what a case must not do while it runs."""

    def __init__(self):
        self.inside: Path | None = None
        self.found: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.inside is None:
            return
        if event in STARTS and list(args[1][3:4] if event == 'subprocess.Popen' else ()) != ['describe']:  # of git
            self.found.append(f'{event} {args!r}'[:300])
        elif event in WRITES:
            for path in args:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self.check(event, path)
        elif event == 'open' and isinstance(args[0], (str, bytes, os.PathLike)):
            mode, flags = args[1], args[2] or 0
            if (mode and set(mode) & set('wax+')) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.check(event, args[0])

    def check(self, event, path):
        inside, self.inside = self.inside, None  # what follows is no case's doing
        place = os.path.realpath(os.fsdecode(path))
        if not place.startswith((f'{inside}{os.sep}', '/dev/', '/proc/')) and place != str(inside):
            self.found.append(f'{event} {place}')
        self.inside = inside


def run_case(watch: Watch, kind: str, number: int, seed: int, real: Path, inside: Path) -> str:
    """Run a case in an empty folder and return what is wrong with how it ended, '' for nothing."""
    from timm_vpl.cli import _finish
    inside.mkdir()
    os.chdir(inside)
    tempfile.tempdir = str(inside)
    shown, wrong, status = io.StringIO(), '', 0
    try:
        work = KINDS[kind](random.Random(f'{seed}/{kind}/{number}'), real)
        watch.found, watch.inside = [], inside
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = _finish('fuzz', lambda: sys.exit(work() or 0))
            except SystemExit as e:
                status = e.code
    except BaseException as e:
        import traceback
        wrong = f'{type(e).__name__}: {e}\n{traceback.format_exc()}'
    finally:
        watch.inside = None
    if not wrong and (status not in (0, 1, 2) or 'Traceback' in shown.getvalue()):
        wrong = f'status {status}: {shown.getvalue()[-2000:]}'
    wrong = '\n'.join(filter(None, [wrong, *watch.found]))
    if not wrong and list(inside.rglob('ran')):
        wrong = 'a command was executed'
    if not wrong and '(traceback: ' in shown.getvalue():  # one line, but of no check
        wrong = f'{UNEXPECTED}{shown.getvalue().strip()[-300:]}'
    os.chdir(real)
    shutil.rmtree(inside, ignore_errors=True)
    return wrong


def worker(cases, results, seed: int, real: Path, place: Path) -> None:
    """Run cases until there are none, reporting the beginning and the end of each."""
    import torch
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter('ignore')
    for name in ('timm_vpl.cli', 'timm_vpl.engine.train', 'timm_vpl.tools.validation', 'timm_vpl.tools.export',
                 'timm_vpl.tools.report'):
        __import__(name)
    watch = Watch()
    while (case := cases.get()) is not None:
        results.put((os.getpid(), case, None))
        results.put((os.getpid(), case, run_case(watch, *case, seed, real, place / f'{case[0]}-{case[1]}')))


def make_real(real: Path) -> None:
    """Make the folder, the run and the checkpoint that cases are mutated from."""
    from PIL import Image

    from timm_vpl.cli import main
    from timm_vpl.data.data import DigitsReader
    for split, count in (('train', 40), ('validation', 17)):
        reader = DigitsReader(split)
        for i in [i for i in range(len(reader)) if reader.labels[i] < 4][:count]:
            path = real / 'data' / split / f'class{reader.labels[i]}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(reader[i][0]).resize((32, 32)).save(path)
    train = ['train', str(real / 'data'), *PAIR, *SMALL, '--output', str(real)]
    assert main([*train, '--experiment', 'run']) == 0
    assert main([*train, '--experiment', 'part', '--stop-epoch', '1']) == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=2)
    parser.add_argument('--only', help='one case, KIND/NUMBER', metavar='CASE')
    for kind, count in COUNTS.items():
        parser.add_argument(f'--{kind}s', type=int, default=count)
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONDONTWRITEBYTECODE='1')
    if args.only:
        kind, _, number = args.only.partition('/')
        todo = [(kind, int(number))]
    else:
        todo = [(kind, number) for kind in COUNTS for number in range(getattr(args, f'{kind}s'))]
    context, started, failed, unexpected = get_context('spawn'), time.time(), [], []
    with tempfile.TemporaryDirectory() as folder:
        real, place = (Path(os.path.realpath(folder), name) for name in ('real', 'cases'))
        real.mkdir()
        place.mkdir()
        logging.disable(logging.CRITICAL)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            make_real(real)
        cases, results = context.Queue(), context.Queue()
        for case in itertools.chain(todo, [None] * args.jobs * 50):
            cases.put(case)
        workers = {}

        def start():
            process = context.Process(target=worker, args=(cases, results, args.seed, real, place), daemon=True)
            process.start()
            workers[process.pid] = [process, None, time.time() + LIMIT]

        for _ in range(min(args.jobs, len(todo))):
            start()
        done = 0
        while done < len(todo):
            with contextlib.suppress(queue.Empty):
                pid, case, wrong = results.get(timeout=1)
                if wrong is None:
                    workers[pid][1:] = case, time.time() + LIMIT
                    continue
                done += 1
                workers[pid][1:] = None, time.time() + LIMIT
                if wrong.startswith(UNEXPECTED):
                    unexpected.append(f'{case[0]}/{case[1]}: {wrong.removeprefix(UNEXPECTED)}')
                elif wrong:
                    failed.append(case)
                    print(f'FAILED {case[0]}/{case[1]}: {wrong[:500]} ... {wrong[-2500:]}', flush=True)
                if done % 100 == 0:
                    print(f'{done} of {len(todo)}, {time.time() - started:.0f} s', flush=True)
            for pid, (process, case, end) in list(workers.items()):
                if case and (time.time() > end or not process.is_alive()):
                    what = 'hangs' if process.is_alive() else f'ends its process, status {process.exitcode}'
                    print(f'FAILED {case[0]}/{case[1]}: {what}', flush=True)
                    process.kill()
                    del workers[pid]
                    failed.append(case)
                    done += 1
                    start()
        for process, *_ in workers.values():
            process.kill()
    print('\n'.join(['Ended in one line by the last resort:', *unexpected] if unexpected else []))
    print(f'{len(todo)} cases, seed {args.seed}: {len(failed)} failed, {time.time() - started:.0f} s')
    return bool(failed)


if __name__ == '__main__':
    sys.exit(main())
