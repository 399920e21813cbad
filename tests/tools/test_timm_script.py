"""timm's own train script with a pair in it; skipped where the script is not beside the repository."""
import csv
import logging
import os
import re
import runpy
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from processes import run_processes
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import clean_state_dict

from timm_vpl import PairTask

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / 'examples' / 'timm_script.py'
TRAIN = Path(os.environ.get('TIMM_VPL_DATA', ROOT.parent / 'shared' / 'data')).parent / 'timm' / 'train.py'
pytestmark = pytest.mark.skipif(not TRAIN.is_file(), reason=f"timm's script is not there: {TRAIN}")

MODEL_A, MODEL_B = 'test_byobnet', 'test_vit'  # of other statistics; the script prepares images for the first
OPTIONS = [
    '--model', MODEL_A, '--num-classes', '4', '--img-size', '32', '-b', '10', '--grad-accum-steps', '2',
    '--epochs', '5', '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '0.002', '--weight-decay', '0.05',
    '--layer-decay', '0.75', '--model-ema', '--model-ema-decay', '0.5', '-j', '0', '--device', 'cpu',
]
UPDATES = 2  # an epoch of 40 images


class Lines(logging.Handler):
    """Keeps the lines of a log."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def run(path, *argv):
    """Run a script as the command line does; return its exit status and the lines that it logs."""
    root, handler, before = logging.getLogger(), Lines(), sys.argv
    kept, level = root.handlers[:], root.level
    root.addHandler(handler)
    sys.argv = [str(path), *map(str, argv)]
    try:
        runpy.run_path(str(path), run_name='__main__')
        return 0, handler.lines
    except SystemExit as end:
        return end.code, handler.lines
    finally:
        sys.argv, root.handlers[:] = before, kept  # timm's script adds a handler of its own
        root.setLevel(level)


def run_pair(data, output, name, *options):
    """Train a pair in timm's script, in the folder of this name, and return what it logs."""
    argv = [TRAIN, data, *OPTIONS, '--model-b', MODEL_B, '--output', output, '--experiment', name, *options]
    status, lines = run(EXAMPLE, *argv)
    assert not status
    return lines


def load(path):
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def branch(state, side):
    prefix = f'model_{side}.'
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def different(state, other):
    assert list(state) == list(other)
    return [key for key in state if not torch.equal(state[key], other[key])]


@pytest.fixture(scope='module')
def runs(digits_folder, tmp_path_factory):
    """A run of five epochs, the same resumed after four, and the script alone; with what the first two log."""
    output = tmp_path_factory.mktemp('runs')
    mixing = ['--mixup', '0.2', '--cutmix', '1.0', '--mixup-off-epoch', '3', '--clip-mode', 'value', '--clip-grad', '1']
    going_on = ['--report-branch', 'a', '--resume', output / 'whole' / 'checkpoint-3.pth.tar']
    logs = {
        'whole': run_pair(digits_folder, output, 'whole', *mixing),
        'resumed': run_pair(digits_folder, output, 'resumed', *mixing, *going_on),
    }
    assert not run(TRAIN, digits_folder, *OPTIONS, *mixing, '--output', output, '--experiment', 'alone')[0]
    return output, logs


def test_it_is_the_scripts_training(runs):
    # In the first stage, a fifth of the epochs, branch a learns nothing from b: it is the script's model to the bit.
    output, _ = runs
    for epoch, equal in ((0, True), (1, False)):
        pair, alone = (load(output / name / f'checkpoint-{epoch}.pth.tar') for name in ('whole', 'alone'))
        for key in ('state_dict', 'state_dict_ema'):
            assert (different(branch(pair[key], 'a'), alone[key]) == []) == equal


def test_stages_of_a_run_and_of_one_that_is_resumed(runs):
    output, logs = runs
    stages = {name: re.findall(r'Epoch (\d): stage (\d)', '\n'.join(lines)) for name, lines in logs.items()}
    assert stages == {'whole': [('1', '2'), ('4', '3')], 'resumed': [('4', '3')]}
    assert not (output / 'resumed' / 'checkpoint-3.pth.tar').exists()
    for name in logs:
        assert load(output / name / 'last.pth.tar')['task_state'] == {'num_updates': 5 * UPDATES}
    assert load(output / 'whole' / 'checkpoint-3.pth.tar')['task_state'] == {'num_updates': 4 * UPDATES}


def test_checkpoints_and_args_name_both_models(runs):
    output, _ = runs
    checkpoint = load(output / 'whole' / 'last.pth.tar')
    assert checkpoint['arch'] == checkpoint['args'].model == MODEL_A and checkpoint['args'].model_b == MODEL_B
    assert yaml.safe_load((output / 'whole' / 'args.yaml').read_text())['model_b'] == MODEL_B


def judge(data, state, name, config):
    """What a plain timm model with these weights makes of each image of the validation split: 100 if right, loss."""
    model = timm.create_model(name, num_classes=4, **({'img_size': 32} if name == MODEL_B else {}))
    model.load_state_dict(clean_state_dict(state))
    loader = create_loader(
        create_dataset('', str(data), split='validation'), batch_size=17, use_prefetcher=False, num_workers=0,
        **{key: config[key] for key in ('input_size', 'interpolation', 'crop_pct', 'mean', 'std')})
    [(images, target)] = loader
    with torch.inference_mode():
        logits = model.eval()(images)
    return torch.stack([100. * (logits.argmax(1) == target), F.cross_entropy(logits, target, reduction='none')])


def judge_both(data, state):
    config = resolve_data_config({'img_size': 32}, model=timm.create_model(MODEL_A))
    own = resolve_data_config({}, model=timm.create_model(MODEL_B))
    assert config['mean'] != own['mean']
    return {
        'a': judge(data, branch(state, 'a'), MODEL_A, config),
        'b': judge(data, branch(state, 'b'), MODEL_B, {**config, 'mean': own['mean'], 'std': own['std']}),
    }


def last_line(text):
    said = re.findall(r'^Top-1 \(EMA\): branch a ([\d.]+) %, b ([\d.]+) %$', text, re.MULTILINE)
    return dict(zip('ab', map(float, said[-1]), strict=True))


@pytest.mark.parametrize(('name', 'reported'), [('whole', 'b'), ('resumed', 'a')])
def test_last_line_is_the_accuracy_of_both_plain_models(runs, digits_folder, name, reported):
    output, logs = runs
    both = judge_both(digits_folder, load(output / name / 'last.pth.tar')['state_dict_ema'])
    want = {side: each.mean(1).tolist() for side, each in both.items()}
    assert last_line(logs[name][-1]) == pytest.approx({side: top1 for side, (top1, _) in want.items()}, abs=1e-3)
    with open(output / name / 'summary.csv', newline='') as f:
        row = list(csv.DictReader(f))[-1]
    assert [float(row['eval_top1']), float(row['eval_loss'])] == pytest.approx(want[reported], rel=1e-5)


@pytest.mark.parametrize(('argv', 'said'), [
    ([], 'nothing: expected the path'),
    (['nofile.py'], 'nofile.py: expected the path'),
    ([TRAIN, '--model-b', 'nosuch'], '--model-b nosuch: cannot be built: Unknown model'),
    ([TRAIN, '--model-b', MODEL_B, '--model-kwargs-b', 'num_classes=3'], '--model-b test_vit: the branches classify 4'),
    ([TRAIN, '--model-b', 'test_vit3', '--model-kwargs-b', 'img_size=48'], '--model-b test_vit3: cannot take images'),
    *(([TRAIN, '--model-b', MODEL_B, *option.split()], f'{option.split()[0]}: a pair does not have it') for option in (
        '--kd-model-name x', '--jsd-loss', '--aug-splits 3', '--naflex-loader', '--head-init-bias 0', '--torchscript')),
], ids=str)
def test_what_is_wrong_ends_in_one_line(argv, said, capfd, digits_folder):
    status, _ = run(EXAMPLE, *argv, *(['--data-dir', digits_folder, *OPTIONS] if len(argv) > 1 else []))
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and line.startswith(f'timm_script.py: error: {said}')


def test_it_stays_small():
    code = EXAMPLE.read_text().split('"""', 2)[2].splitlines()
    assert len([line for line in code if line and not line.startswith('#')]) <= 40


# two processes, which deal images by epoch: without augmentation a resumed run sees the same

WORLD = 2


def run_process(rank, folder, ports):
    """Train, and go on from the middle of that run, as one of the processes."""
    os.dup2(os.open(folder / 'log.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    calls, no_sync = [], PairTask.no_sync
    PairTask.no_sync = lambda self: calls.append(self) or no_sync(self)
    for port, name, options in zip(ports, ('whole', 'resumed'), (
            [], ['--resume', folder / 'whole' / 'checkpoint-2.pth.tar']), strict=True):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(port))
        run_pair(folder / 'digits', folder, name, '--no-aug', '-b', '5', '-vb', '9', *options)
    torch.save(len(calls), folder / f'{rank}.pt')


def free_ports(count):
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope='module')
def processes(digits_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    (folder / 'digits').symlink_to(digits_folder)
    ports = free_ports(2)
    assert run_processes((run_process, rank, folder, ports) for rank in range(WORLD)) == [0] * WORLD, (
        folder / 'log.txt').read_text()
    return folder


def test_resumed_run_of_two_processes_equals_the_uninterrupted_one(processes):
    whole, resumed = (load(processes / name / 'last.pth.tar') for name in ('whole', 'resumed'))
    for key in ('state_dict', 'state_dict_ema'):
        assert different(whole[key], resumed[key]) == []
    assert whole['task_state'] == resumed['task_state'] == {'num_updates': 5 * UPDATES}
    assert not (processes / 'resumed' / 'checkpoint-2.pth.tar').exists()
    stages = re.findall(r'^Epoch (\d): stage (\d)', (processes / 'log.txt').read_text(), re.MULTILINE)
    assert stages == [('1', '2'), ('4', '3'), ('3', '2'), ('4', '3')]


def test_two_processes_reduce_gradients_once_an_update(processes):
    # Of two micro-batches to an update, four to an epoch, the first is not reduced: 5 epochs, then 2 resumed ones.
    assert [torch.load(processes / f'{rank}.pt') for rank in range(WORLD)] == [UPDATES * (5 + 2)] * WORLD


def test_last_line_of_two_processes(processes, digits_folder):
    # timm deals the images in turn, and the first again to the process that has one less.
    state = load(processes / 'resumed' / 'last.pth.tar')['state_dict_ema']
    both = {side: right for side, (right, _) in judge_both(digits_folder, state).items()}
    want = {side: torch.cat([right, right[:1]]).mean().item() for side, right in both.items()}
    assert last_line((processes / 'log.txt').read_text()) == pytest.approx(want, abs=1e-3)


@pytest.mark.slow
def test_under_torchrun(digits_folder, tmp_path):
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', EXAMPLE, TRAIN,
         digits_folder, *OPTIONS, '--model-b', MODEL_B, '--output', tmp_path, '--experiment', 'run', '--bce-loss',
         '--amp', '--amp-dtype', 'bfloat16', '--channels-last'],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
        capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 or 'Signal 6 (SIGABRT)' in result.stderr, result.stderr[-3000:]
    assert set(last_line(result.stderr)) == {'a', 'b'}  # said once, by the first process
    assert load(tmp_path / 'run' / 'last.pth.tar')['task_state'] == {'num_updates': 5}
