"""Runs on a CUDA device: values against the CPU's, going on to the bit, memory that runs out, host reads.

`TIMM_VPL_DEVICE=cpu pytest -m cuda -n 0` tries the tests themselves without one.
"""
import itertools
import os
import subprocess
import sys
from contextlib import closing

import pytest
import timm
import torch
from runs import NOISE, PAIR, ROOT, SMALL, differences, rows, run, status_of
from test_resume import SHORT, stopped

from timm_vpl.cli import train
from timm_vpl.engine import loop, step
from timm_vpl.engine.device import init_device
from timm_vpl.engine.run import create_run
from timm_vpl.engine.train import begin
from timm_vpl.options.train import parse_args

DEVICE = os.environ.get('TIMM_VPL_DEVICE', 'cuda')
ON_CUDA = DEVICE.startswith('cuda')
cuda = [pytest.mark.cuda, pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason='no CUDA device')]
on_device = pytest.mark.parametrize('device', [pytest.param(DEVICE, marks=cuda)])
only_cuda = pytest.mark.skipif(not ON_CUDA, reason='of CUDA alone')

METHODS = {
    'vpl': [*PAIR, '--mixup', '0.2'],
    'dml': [*PAIR, '--method', 'dml', '--clip-grad', '1'],
    'terms': [*PAIR, '--method', 'pair', '--term', 'tokens,learner=b,weight=3', '--term', 'kl,learner=b,temperature=4',
              '--term', 'dkd,learner=a,leader=teacher', '--teacher', 'TEACHER', '--img-size-b', '48'],
    'distill': ['--method', 'distill', '--model-b', 'test_vit', '--teacher', 'TEACHER', '--grad-accum-steps', '2'],
}
PRECISIONS = {  # and how far a loss may be from the CPU's in float32
    'fp32': ([], 0.005), 'bf16': (['--amp', '--amp-dtype', 'bfloat16'], 0.03), 'fp16': (['--amp'], 0.01)}
COMPILE = {
    'eager': [], 'compiled': ['--torchcompile'],
    'tuned': ['--torchcompile', '--torchcompile-mode', 'max-autotune-no-cudagraphs']}
LAYOUTS = {'contiguous': [], 'channels last': ['--channels-last']}
CONFIGS = [
    (method, precision, [*COMPILE][(i + j) % 3], [*LAYOUTS][(i + min(j, 1)) % 2])
    for i, method in enumerate(METHODS) for j, precision in enumerate(PRECISIONS)]
CONFIGS.sort(key=lambda config: [*COMPILE].index(config[2]))  # what takes longest comes last


def test_the_configurations_have_each_pair_of_settings():
    settings = (METHODS, PRECISIONS, COMPILE, LAYOUTS)
    for (i, some), (j, others) in itertools.combinations(enumerate(settings), 2):
        assert {(config[i], config[j]) for config in CONFIGS} == set(itertools.product(some, others))
    assert len(CONFIGS) == 12


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=4)
    timm.models.save_for_hf(model, folder, model_config={'label_names': [f'class{i}' for i in range(4)]})
    return str(folder)


def losses(folder, output, teacher, method, *options):
    """The mean losses of two epochs in which the device draws nothing."""
    argv = [word.replace('TEACHER', teacher) for word in METHODS[method]]
    table = rows(run(folder, output, *argv, '--lr', '0.0002', *options, models=[]))
    return [float(row[name]) for row in table for name in row if name.startswith(('train_', 'eval_loss')) and row[name]]


@pytest.fixture(scope='module')
def of_the_cpu(digits_folder, tmp_path_factory, teacher):
    found = {}

    def get(method):
        if method not in found:
            found[method] = losses(digits_folder, tmp_path_factory.mktemp(method), teacher, method)
        return found[method]

    return get


@on_device
@pytest.mark.parametrize('method, precision, compiled, layout', CONFIGS, ids=list(map(' '.join, CONFIGS)))
def test_values(digits_folder, tmp_path, teacher, of_the_cpu, device, method, precision, compiled, layout):
    options, tolerance = PRECISIONS[precision]
    found = losses(digits_folder, tmp_path, teacher, method, '--device', device, *options, *COMPILE[compiled],
                   *LAYOUTS[layout])
    expected = of_the_cpu(method)
    assert len(found) == len(expected) > 4
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance)


@on_device
@pytest.mark.parametrize('options', [['--amp', '--mixup', '0.2'], ['--method', 'dml', '--on-nonfinite', 'skip']],
                         ids=['fp16', 'dml'])
def test_a_run_goes_on_to_the_bit(digits_folder, tmp_path, device, options):
    options = [*SHORT, '--device', device, '--deterministic', '--workers', '2', *options]
    whole = run(digits_folder, tmp_path / 'whole', *options)
    stopped(r'Train: 1 \[ *[12]/', run, digits_folder, tmp_path / 'part', *options)
    assert not differences(whole, run(digits_folder, tmp_path / 'part', *options, '--resume', 'auto'))


@only_cuda
@on_device
def test_memory_that_runs_out(digits_folder, tmp_path, capsys, device):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2e-4)
    try:
        argv = [digits_folder, *PAIR, *SMALL, '--device', device, '--output', tmp_path, '-b', '32', '--img-size', '224']
        assert status_of(train, argv) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'out of memory' in line and 'use a smaller --batch-size, --grad-checkpointing or --amp' in line


@on_device
@pytest.mark.parametrize('options', [
    PAIR, [*PAIR, '--amp', '--clip-grad', '1'], [*PAIR, '--method', 'dml', '--amp', '--amp-dtype', 'bfloat16'],
    [*PAIR, '--on-nonfinite', 'skip', '--grad-accum-steps', '2'], ['--method', 'cosub', '--model-a', 'test_vit'],
    [*PAIR, '--method', 'pair', '--term', 'tokens,learner=b', '--term', 'contrastive,learner=b']], ids=' '.join)
def test_no_host_read_between_log_lines(digits_folder, tmp_path, device, options):
    options = parse_args([*map(str, [digits_folder, *SMALL, *NOISE]), '--device', device, '--output', str(tmp_path),
                          *options])
    training = create_run(options, init_device(device))
    begin(training, None)
    training.task.set_epoch(1)
    loader = training.loader_train

    class Guarded:
        skipped, watched, images = 0, 0, loader.images

        def __len__(self):
            return len(loader)

        def epoch(self, epoch, first_batch=0):
            with closing(loader.epoch(epoch, first_batch)) as batches:
                for batch in batches:
                    if ON_CUDA and batch[0] > 1:
                        torch.cuda.set_sync_debug_mode('error')
                    self.watched += batch[0] > 1
                    yield batch
                    if ON_CUDA:  # the loader may wait for its own copies
                        torch.cuda.set_sync_debug_mode('default')

    training.loader_train = Guarded()
    training.progress = step.Progress(1)
    try:
        loop.train_one_epoch(training)
    finally:
        if ON_CUDA:
            torch.cuda.set_sync_debug_mode('default')
    assert training.loader_train.watched == 3


KILLED = """
import os, signal, sys, threading, time
from timm_vpl.cli import train
from timm_vpl.engine import loop
look = loop.look
def watched(*args):
    look(*args)
    if os.environ['RANK'] == '1':
        os.kill(os.getpid(), signal.SIGKILL)
loop.look = watched
sys.exit(train(sys.argv[1:]))
"""


@only_cuda
@on_device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two devices')
def test_a_rank_that_is_killed(digits_folder, tmp_path, device):
    script = tmp_path / 'killed.py'
    script.write_text(KILLED)
    argv = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script),
            str(digits_folder), *PAIR, *SMALL, '--device', device, '--output', str(tmp_path)]
    result = subprocess.run(
        argv, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and 'Signal 9 (SIGKILL)' in result.stderr
