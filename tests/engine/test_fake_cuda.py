"""Training steps, validation and EMA on a CUDA device that is not there: devices, host reads, precision, generators."""
import traceback
from contextlib import nullcontext
from functools import partial

import pytest
import timm
import torch
from fake_cuda import CUDA, HostRead, fake_cuda, walk
from runs import NOISE, PAIR
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from timm_vpl import PairTask, PairWrapper, VPLLoss
from timm_vpl.core.processes import Processes
from timm_vpl.core.seeding import BranchStreams, derive_seed
from timm_vpl.engine import evaluate, loop, step
from timm_vpl.engine.run import create_run
from timm_vpl.engine.train import begin
from timm_vpl.errors import UsageError
from timm_vpl.options.train import parse_args

if not hasattr(fake_tensor, 'FakeTensorDeviceMismatchError'):
    pytest.skip('this torch has no error of its own for a tensor of another device', allow_module_level=True)

pytestmark = pytest.mark.filterwarnings('ignore')  # torch's, of what a fake tensor lacks
EPOCH, BATCHES = 1, 2
PRECISIONS = {'bfloat16': torch.bfloat16, 'float16': torch.float16}
BF16, FP16 = (['--amp', '--amp-dtype', name] for name in PRECISIONS)
SOLO = ['--method', 'solo', '--model-a', 'test_resnet']
OTHER_IMAGES = ['--img-size-b', '48', '--mean-b', '0.4', '0.4', '0.4']
TERMS = [word for term in (
    'kl,learner=b,temperature=4,confidence=true', 'kl,learner=a,leader=average,when=leader-ahead',
    'tokens,learner=b,weight=3', 'embed,learner=a,distance=cosine', 'ofa,learner=b,features=stage2+stage4',
    'contrastive,learner=b', 'dist,learner=b', 'dkd,learner=b') for word in ('--term', term)]
TEACHER = ['--teacher', 'TEACHER']
CASES = {
    'vpl': [*PAIR, *BF16, '--clip-grad', '1', '--mixup', '0.2'],
    'dml-joint': [*PAIR, '--method', 'dml', '--dml-joint', *FP16, '--clip-grad', '1'],
    'accumulation': [*PAIR, *FP16, '--grad-accum-steps', '2', '--channels-last'],
    'skip': [*PAIR, *BF16, '--on-nonfinite', 'skip', '--clip-grad', '0.1', '--clip-mode', 'agc'],
    'dml': [*PAIR, '--method', 'dml', *BF16, '--aug-repeats', '2'],
    'solo': [*SOLO, '--opt', 'sgd', '--clip-grad', '1', '--clip-mode', 'value', '--bce-loss'],
    'terms': [*PAIR, '--method', 'pair', *TERMS, '--gate-split', 'validation', *BF16, '--log-grad-terms', '1'],
    'terms of a teacher': [
        *PAIR, '--method', 'pair', '--term', 'kl,learner=b,leader=teacher,when=leader-ahead', '--term',
        'tokens,learner=a,leader=teacher', '--gate-split', 'validation', *TEACHER, *OTHER_IMAGES, *FP16],
    'distill': ['--method', 'distill', '--model-b', 'test_vit', *TEACHER, *FP16],
    'deit': ['--method', 'deit', '--model-b', 'deit_tiny_distilled_patch16_224', '--model-kwargs-b', 'embed_dim=48',
             'depth=2', 'num_heads=3', *TEACHER, *BF16],
    'cosub': ['--method', 'cosub', '--model-a', 'test_vit', *BF16, '--grad-accum-steps', '2'],
    'other images': [*PAIR, *OTHER_IMAGES, *BF16, '--class-weights', 'balanced'],
    'checkpointing': [*PAIR, *BF16, '--grad-checkpointing', '--freeze-depth-a', '1'],
}
IN_SHORT = ('vpl', 'dml-joint', 'solo')


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    model = timm.create_model('test_resnet', num_classes=4)
    timm.models.save_for_hf(model, folder, model_config={'label_names': [f'class{i}' for i in range(4)]})
    return folder


@pytest.fixture
def train(monkeypatch, digits_folder, teacher):
    """Train an epoch of two batches and validate on the fake device; check what was done there."""
    # What the host reads at a log line, and at the end of a validation.
    monkeypatch.setattr(step.Update, 'read', lambda self, progress: {})
    monkeypatch.setattr(evaluate.Mean, 'compute', lambda self, distributed: {'mean': 0.})
    monkeypatch.setattr(evaluate.Tally, 'compute', lambda self, distributed: {
        'images': 0, 'loss': 0., 'top1': 0., 'top5': 0.})

    def run_epoch(*argv, plant=lambda run: None):
        options = parse_args([str(word).replace('TEACHER', str(teacher)) for word in [
            digits_folder, '--img-size', 32, '-b', 16, '-vb', 16, '-j', 0, '--epochs', 3, '--x', 40, '--y', 30,
            '--device', 'cuda', '--interpolation', 'bicubic', *NOISE, *argv]])
        with fake_cuda() as device:
            run = create_run(options, Processes(CUDA))
            for group in run.optimizer.param_groups:
                group['params'] = [device.moved.get(each, each) for each in group['params']]
            run.saver = object()  # so that updates are measured
            begin(run, None)
            run.progress = step.Progress(EPOCH)
            run.task.set_epoch(EPOCH)
            plant(run)
            del device.done[:], device.seeds[:]
            loop.train_one_epoch(run)
            done, seeds = list(device.done), list(device.seeds)
            metrics = loop.validate(run)
            if run.loader_gate is not None:
                evaluate.gate_accuracies(run.task, run.loader_gate, CUDA, run.autocast, False)
        assert run.progress.batch == BATCHES and set(metrics) == set(run.columns)
        held = [*run.pair.state_dict().values(), *run.task.trainable_module_ema.state_dict().values(),
                *run.task.criterion.state_dict().values()]
        held += [value for state in run.optimizer.state.values() for name, value in state.items() if name != 'step']
        assert {tensor.device for tensor in held if isinstance(tensor, torch.Tensor)} == {CUDA}
        expected = PRECISIONS[options.device.amp_dtype] if options.device.amp else torch.float32
        assert {('convolution', expected), ('convolution_backward', expected), ('_foreach_lerp_', None)} <= set(done)
        drawn = [*(('forward', side) for side in run.pair.sides), ('erase',)]
        assert {derive_seed(7, *what, EPOCH, batch, 0) for what in drawn for batch in range(BATCHES)} <= set(seeds)
        trained = [each for group in run.optimizer.param_groups for each in group['params']]
        assert len(run.optimizer.state) == len(trained)  # each has had a gradient

    return run_epoch


@pytest.mark.parametrize('case', [
    case if case in IN_SHORT else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_steps_and_validation(train, case):
    train(*CASES[case])


def tensor_of_the_cpu(run):
    forward = run.task.forward

    def planted(*args, **kwargs):
        result = forward(*args, **kwargs)
        return {**result, 'loss': result['loss'] + torch.ones(1)}
    run.task.forward = planted


def planted_after_forward(look):
    def plant(run):
        collect = run.update._collect
        run.update._collect = lambda result: (collect(result), look(result['loss'].detach()))
    return plant


def wrong_autocast(run):
    run.update.autocast = partial(torch.autocast, 'cpu', dtype=torch.bfloat16)


def average_on_the_cpu(run):
    for module in run.task.trainable_module_ema.module.modules():
        for slots in (module._parameters, module._buffers):
            slots.update({
                name: torch.zeros(each.shape, dtype=each.dtype) for name, each in slots.items() if each is not None})


def generator_of_the_cpu(run):
    run.task.streams = BranchStreams(7, 0, torch.device('cpu'))


FAULTS = {
    'tensor of the CPU': (tensor_of_the_cpu, fake_tensor.FakeTensorDeviceMismatchError, 'torch.ones(1)'),
    'item': (planted_after_forward(lambda loss: loss.item()), DataDependentOutputException, 'loss.item()'),
    'copy': (planted_after_forward(lambda loss: loss.cpu()), HostRead, 'loss.cpu()'),
    'autocast': (wrong_autocast, AssertionError, '<= set(done)'),
    'average': (average_on_the_cpu, HostRead, 'average.copy_(value)'),
    'generator': (generator_of_the_cpu, AssertionError, '<= set(seeds)'),
    'draw': (planted_after_forward(lambda loss: torch.rand_like(loss, generator=torch.Generator())), RuntimeError,
             'torch.rand_like('),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_found_with_their_line(train, fault):
    plant, error, line = FAULTS[fault]
    with pytest.raises(error) as found:
        train(*SOLO, *BF16, plant=plant)
    assert any(line in frame.line for frame in traceback.extract_tb(found.value.__traceback__))


GRAPHS = 'its CUDA graphs overwrite outputs of one network with those of another, and accumulated gradients'


@pytest.mark.parametrize('options, refused', [
    ([*PAIR, '--torchcompile-mode', 'reduce-overhead'], '--torchcompile-mode reduce-overhead: '),
    ([*PAIR, '--torchcompile', 'cudagraphs'], '--torchcompile cudagraphs: '),
    ([*SOLO, '--torchcompile-mode', 'max-autotune', '--grad-accum-steps', '2'], '--torchcompile-mode max-autotune: '),
    ([*SOLO, '--torchcompile-mode', 'max-autotune'], ''),
    ([*PAIR, '--torchcompile-mode', 'max-autotune-no-cudagraphs'], ''),
])
def test_cuda_graphs_of_several_networks_are_refused(digits_folder, options, refused):
    asked = parse_args([
        str(digits_folder), '--img-size', '32', '-b', '16', '--device', 'cuda', '--torchcompile', *options])
    with fake_cuda(), pytest.raises(UsageError, match=refused + GRAPHS) if refused else nullcontext():
        assert create_run(asked, Processes(CUDA)).device == CUDA


@pytest.mark.slow
@pytest.mark.parametrize('options', [['--on-nonfinite', 'skip', '--opt', 'sgd'], ['--model-ema-force-cpu']])
def test_waits_that_are_documented(train, options):
    with pytest.raises((DataDependentOutputException, HostRead)):
        train(*SOLO, *BF16, *options)


def test_the_graph_is_walked_as_by_torch():
    """On real tensors, to the rounding of sums in another order."""
    torch.manual_seed(0)
    models = [timm.create_model(name, num_classes=4, img_size=32) if 'vit' in name else
              timm.create_model(name, num_classes=4) for name in ('test_resnet', 'test_vit')]
    task = PairTask(PairWrapper(*models), VPLLoss(1, x=0, y=0), verbose=False).train()
    loss = task(torch.randn(4, 3, 32, 32), torch.arange(4))['loss']
    walked = walk(loss)
    loss.backward()
    parameters = [each for each in task.parameters() if each.grad is not None]
    assert {id(each) for each in walked} == {id(each) for each in parameters}
    for each in parameters:
        torch.testing.assert_close(walked[each], each.grad)
