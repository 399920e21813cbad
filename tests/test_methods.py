"""Each method against an implementation of its formulas, against timm's own tasks, and in whole runs."""
import copy
import json
import logging
import os
import socket
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import reference
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from processes import run_script
from runs import TIMES
from test_train import NOISE, PAIR, SMALL, assert_equal_weights, last, rows, run, torchrun
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_model_data_config
from timm.layers import DropPath
from timm.models import save_for_hf
from timm.optim import Lamb, create_optimizer_v2, list_optimizers
from timm.task import LogitDistillationTask, TokenDistillationTask
from torch.utils.data import DataLoader

from timm_vpl import PairTask, PairWrapper
from timm_vpl.cli import train
from timm_vpl.core.inputs import InputTransform
from timm_vpl.core.losses import cross_entropy, kl_divergence
from timm_vpl.core.methods import METHODS
from timm_vpl.core.teacher import Teacher
from timm_vpl.engine.build import create_criterion, create_teacher
from timm_vpl.engine.device import init_device
from timm_vpl.engine.train import create_run, epoch_terms, train_one_epoch, update
from timm_vpl.options.options import parse_args

NUM_CLASSES = 4
CPU = torch.device('cpu')
DEIT = 'deit_tiny_distilled_patch16_224'
SMALL_DEIT = ['depth=2', 'embed_dim=48', 'num_heads=3']
STUDENT = ['--model-b', DEIT, '--model-kwargs-b', *SMALL_DEIT]

# The formulas. A case is a method with some options; its terms are those of one optimizer phase, each with its weight.

TAU, RHO, W_C, W_K, ALPHA, T = 0.4, 1.7, 0.6, 1.3, 0.3, 2.5
CONTRASTIVE = ['--tau', str(TAU), '--contrastive-weight', str(W_C)]
KL = ['--rho', str(RHO), '--kl-weight', str(W_K)]
BOTH = ['--model-a', 'test_resnet', '--model-b', 'test_vit']


class Case(NamedTuple):
    options: list
    terms: Any  # terms(outputs, ce, phase) -> {name: (value, weight)}
    learners: dict  # what each term moves: branches, affine layer
    frozen: str = ''  # side of the teacher
    token: str = ''  # side of the student with a distillation token


def contrastive(o, learner, similarity='cosine'):
    """Eq. 3 to 5, the partner detached; the affine layer P learns always."""
    h = {side: o.h[side] if learner in (side, 'both') else o.h[side].detach() for side in 'ab'}
    h[o.affine_side] = o.affine(h[o.affine_side])
    return reference.contrastive(h['a'], h['b'], TAU, similarity)


def follow(o, learner, rho=RHO):
    """KL(sg p_partner || p_learner)."""
    leader = o.z['b' if learner == 'a' else 'a']
    return reference.kl(leader.detach(), o.z[learner], rho)


def vpl_terms(contrastive_to='b', kl_to='a', similarity='cosine'):
    def terms(o, ce, phase):
        return {
            'ce_a_loss': (ce(o.z['a']), 1),
            'ce_b_loss': (ce(o.z['b']), 1),
            'contrastive_loss': (contrastive(o, contrastive_to, similarity), W_C),
            'kl_loss': (reference.kl(o.z['b'], o.z['a'], RHO) if kl_to == 'both' else follow(o, kl_to), W_K),
        }
    return terms


def solo_terms(side):
    return lambda o, ce, phase: {f'ce_{side}_loss': (ce(o.z[side]), 1)}


def dml_terms(o, ce, phase):
    side = 'ab'[phase]
    return {f'ce_{side}_loss': (ce(o.z[side]), 1), f'kl_{side}_loss': (follow(o, side), W_K)}


def dml_joint_terms(o, ce, phase):
    return {
        'ce_a_loss': (ce(o.z['a']), 1),
        'ce_b_loss': (ce(o.z['b']), 1),
        'kl_a_loss': (reference.kl(o.z['b'], o.z['a'], RHO), W_K / 2),
        'kl_b_loss': (reference.kl(o.z['a'], o.z['b'], RHO), W_K / 2),
    }


def distill_terms(side, which):
    def terms(o, ce, phase):
        found = {f'ce_{side}_loss': (ce(o.z[side]), 1)}
        if which in ('contrastive', 'both'):
            found['contrastive_loss'] = (contrastive(o, side), W_C)
        if which in ('kl', 'both'):
            found['kl_loss'] = (follow(o, side), W_K)
        return found
    return terms


def deit_terms(student, kind, online=False):
    teacher = 'a' if student == 'b' else 'b'

    def terms(o, ce, phase):
        if kind == 'hard':
            token = reference.token_hard(o.token, o.z[teacher])
        else:
            token = reference.token_soft(o.token, o.z[teacher], T)
        found = {f'ce_{teacher}_loss': (ce(o.z[teacher]), 1)} if online else {}
        return {
            **found,
            f'ce_{student}_loss': (ce(o.z[student]), 1 - ALPHA),
            f'distill_{student}_loss': (token, ALPHA),
        }
    return terms


def cosub_terms(sum_classes=False):
    def terms(o, ce, phase):
        z_0, z_1 = o.z['a'], o.z['b']
        return {
            'ce_a_loss': (ce(z_0), 1 / 4),
            'ce_b_loss': (ce(z_1), 1 / 4),
            'cosub_a_loss': (reference.submodel(z_0, z_1, sum_classes), 1 / 4),
            'cosub_b_loss': (reference.submodel(z_1, z_0, sum_classes), 1 / 4),
        }
    return terms


def vpl_case(contrastive_to='b', kl_to='a', affine_side='b', similarity='cosine'):
    return Case(
        [*BOTH, *CONTRASTIVE, *KL, '--contrastive-to', contrastive_to, '--kl-to', kl_to, '--affine-side', affine_side,
         '--similarity', similarity],
        vpl_terms(contrastive_to, kl_to, similarity),
        {
            'ce_a_loss': {'a'},
            'ce_b_loss': {'b'},
            'contrastive_loss': {'affine', *(contrastive_to if contrastive_to != 'both' else 'ab')},
            'kl_loss': set(kl_to if kl_to != 'both' else 'ab'),
        },
    )


def distill_case(student, which):
    teacher = 'a' if student == 'b' else 'b'
    learners = {f'ce_{student}_loss': {student}}
    if which in ('contrastive', 'both'):
        learners['contrastive_loss'] = {student, 'affine'}
    if which in ('kl', 'both'):
        learners['kl_loss'] = {student}
    default = {'a': 'kl', 'b': 'contrastive'}[student]
    chosen = [] if which == default else ['--distill-terms', which]
    options = [*chosen, *(CONTRASTIVE if which != 'kl' else []), *(KL if which != 'contrastive' else [])]
    return Case(
        ['--method', 'distill', f'--model-{student}', 'test_vit', '--teacher', 'test_resnet', *options],
        distill_terms(student, which), learners, frozen=teacher)


def deit_case(student, kind, online=False):
    teacher = 'a' if student == 'b' else 'b'
    options = ['--method', 'deit', f'--model-{student}', DEIT, '--distillation-alpha', str(ALPHA)]
    options += [f'--model-{teacher}' if online else '--teacher', 'test_resnet', '--distillation-type', kind]
    options += ['--distillation-tau', str(T)] if kind == 'soft' else []
    learners = {f'ce_{student}_loss': {student}, f'distill_{student}_loss': {student}}
    if online:
        learners[f'ce_{teacher}_loss'] = {teacher}
    return Case(
        options, deit_terms(student, kind, online), learners, frozen='' if online else teacher, token=student)


def cosub_case(*options):
    return Case(
        ['--method', 'cosub', '--model-a', 'test_vit', '--drop-path', '0.5', *options],
        cosub_terms('--bce-sum' in options),
        dict.fromkeys(('ce_a_loss', 'ce_b_loss', 'cosub_a_loss', 'cosub_b_loss'), {'a'}))


DML = ['--method', 'dml', *BOTH, *KL]
DML_LEARNERS = {'ce_a_loss': {'a'}, 'kl_a_loss': {'a'}, 'ce_b_loss': {'b'}, 'kl_b_loss': {'b'}}
CASES = {
    'vpl': vpl_case(),
    'vpl, affine layer on a': vpl_case(affine_side='a'),
    'vpl, Bi': vpl_case('both', 'both'),
    'vpl, swapped': vpl_case('a', 'b'),
    'vpl, dot': vpl_case(similarity='dot'),
    'solo a': Case(['--method', 'solo', *BOTH[:2]], solo_terms('a'), {'ce_a_loss': {'a'}}),
    'solo b': Case(['--method', 'solo', *BOTH[2:]], solo_terms('b'), {'ce_b_loss': {'b'}}),
    'dml': Case(DML, dml_terms, DML_LEARNERS),
    'dml, joint': Case(
        [*DML, '--dml-joint'], dml_joint_terms, {**DML_LEARNERS, 'kl_a_loss': {'a', 'b'}, 'kl_b_loss': {'a', 'b'}}),
    **{f'distill {side}, {which}': distill_case(side, which)
       for side in 'ab' for which in ('kl', 'contrastive', 'both')},
    **{f'deit {side}, {kind}{", online" * online}': deit_case(side, kind, online)
       for side in 'ab' for kind in ('hard', 'soft') for online in (False, True)},
    'cosub': cosub_case(),
    'cosub, sum': cosub_case('--bce-sum'),
}
TARGETS = {'hard': ['--smoothing', '0'], 'smooth': ['--smoothing', '0.1'], 'soft': ['--mixup', '0.2']}


class TinyModel(nn.Module):
    """A float64 model with a norm layer, stochastic depth and, if asked for, a distillation token."""

    def __init__(self, width, norm, drop_path=0., token=False, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.num_classes = NUM_CLASSES
        self.stem = nn.Conv2d(3, width, 3, stride=2, bias=False)
        self.norm = norm(width)
        self.block = nn.Linear(width, width)
        self.drop_path = DropPath(drop_path)
        self.head = nn.Linear(width, NUM_CLASSES)
        if token:
            self.token = nn.Parameter(torch.randn(width))
            self.head_dist = nn.Linear(width, NUM_CLASSES)
        self.double()
        with torch.no_grad():  # so that evaluation mode is not training mode
            for buffer in self.buffers():
                buffer += 0.3 if buffer.is_floating_point() else 0

    def get_classifier(self):
        return (self.head, self.head_dist) if hasattr(self, 'token') else self.head

    def features(self, x):
        x = torch.tanh(self.norm(self.stem(x))).mean((2, 3))
        return x + self.drop_path(torch.tanh(self.block(x)))

    def token_logits(self, h):
        return self.head_dist(torch.tanh(h + self.token))

    def forward(self, x):
        h = self.features(x)
        return (self.head(h), self.token_logits(h)) if hasattr(self, 'token') else self.head(h)


WIDTHS = {'a': 5, 'b': 7}
NORMS = {'a': nn.BatchNorm2d, 'b': lambda width: nn.GroupNorm(1, width)}


def make_task(case, *options):
    """The method's task on tiny models: pair and criterion as the options say, and the teacher's model."""
    args = parse_args(['--dataset', 'digits', *case.options, *options])
    args.num_classes, args.student = NUM_CLASSES, case.token
    method = METHODS[args.method]
    models = {}
    for i, side in enumerate('ab'):
        if side in args.sides:
            drop_path = 0.5 if method.uniform_drop_path else 0.
            models[side] = TinyModel(WIDTHS[side], NORMS[side], drop_path, token=side == case.token, seed=i)
    teacher = None
    if case.frozen:
        config = {'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'input_size': (3, 9, 9)}
        model = TinyModel(WIDTHS[case.frozen], nn.BatchNorm2d, seed=5)
        teacher = Teacher(model, case.frozen, config, config)
    torch.manual_seed(2)
    pair = PairWrapper(
        models.get('a'),
        models.get('b'),
        affine_side=args.affine_side,
        partner_dim=teacher and teacher.embed_dim,
        affine=method.projects(args),
    ).double()
    criterion = create_criterion(args, 3, CPU)
    criterion.set_epoch(1)  # all terms are on
    task = PairTask(pair, criterion, teacher=teacher, verbose=False)
    task.train()
    return task


def make_batch(targets):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 3, 9, 9, dtype=torch.float64, generator=generator)
    if targets == 'soft':
        return x, torch.rand(6, NUM_CLASSES, dtype=torch.float64, generator=generator).softmax(-1)
    return x, torch.randint(NUM_CLASSES, (6,), generator=generator)


def label_loss(case, targets, y):
    """The loss of the labels as a function of logits."""
    smoothing = 0.1 if targets == 'smooth' else 0.

    def ce(z):
        if 'cosub' in case.options:
            return reference.binary_ce(z, y, smoothing) * (z.shape[1] if '--bce-sum' in case.options else 1)
        return reference.smoothed_ce(z, y, smoothing) if smoothing else reference.ce(z, y)
    return ce


def plain_outputs(case, pair, teacher, x):
    """What the formulas need, with each network run by hand."""
    o = SimpleNamespace(z={}, h={}, affine=pair.affine or nn.Identity(), affine_side=pair.affine_side)
    for side in pair.sides:
        model = pair.branch(side)
        if 'cosub' in case.options:
            z = model.head(model.features(torch.cat([x, x])))
            o.z = {'a': z[:len(x)], 'b': z[len(x):]}
            continue
        o.h[side] = model.features(x)
        o.z[side] = model.head(o.h[side])
        if side == case.token:
            o.token = model.token_logits(o.h[side])
    if case.frozen:
        model = teacher.branch.model
        assert not model.norm.training
        with torch.no_grad():
            o.h[case.frozen] = model.features(x)
            o.z[case.frozen] = model.head(o.h[case.frozen])
    return o


def assert_close(got, want, rtol=1e-10, atol=1e-10, msg=None):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=msg)


@pytest.mark.parametrize('targets', TARGETS)
@pytest.mark.parametrize('name', CASES)
def test_terms_and_gradients(name, targets):
    case = CASES[name]
    task = make_task(case, *TARGETS[targets])
    pair, plain = task.trainable_module, copy.deepcopy(task.trainable_module)
    x, y = make_batch(targets)
    ce = label_loss(case, targets, y)
    torch.manual_seed(4)
    o = plain_outputs(case, plain, task.teacher, x)
    assert task.phases == (('a', 'b') if name == 'dml' else ('ab',))
    for phase in range(len(task.phases)):
        if phase == 0:
            torch.manual_seed(4)
        else:  # the partner says what it says after its update
            with torch.no_grad():
                o.z['a'] = copy.deepcopy(plain.model_a)(x)
        result = task(x, y, phase=phase)
        want = case.terms(o, ce, phase)
        total = sum(weight * value for value, weight in want.values())
        assert set(result) == {*want, 'loss', 'output'}
        for term, (value, _) in want.items():
            assert result[term].dtype == torch.float64
            assert_close(result[term], value, msg=lambda m, term=term: f'{term}: {m}')
        assert_close(result['loss'], total)

        pair.zero_grad()
        plain.zero_grad()
        result['loss'].backward()
        total.backward()
        for (key, parameter), wanted in zip(pair.named_parameters(), plain.parameters(), strict=True):
            if wanted.grad is None:
                assert parameter.grad is None or not parameter.grad.any(), key
            else:
                assert_close(parameter.grad, wanted.grad, msg=lambda m, key=key: f'{key}: {m}')
        with torch.no_grad():
            for module in (pair, plain):
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.5 * parameter.grad
    for (key, buffer), wanted in zip(pair.named_buffers(), plain.buffers(), strict=True):
        assert_close(buffer, wanted, msg=lambda m, key=key: f'{key}: {m}')


@pytest.mark.parametrize('name', [name for name in CASES if not name.startswith('vpl')])
def test_terms_are_on_from_the_first_to_the_last_epoch(name):
    criterion = make_task(CASES[name]).criterion
    for epoch in (0, 1, 2, 3):
        criterion.set_epoch(epoch)
        assert [term.name for term in criterion.active_terms()] == [term.name for term in criterion.all_terms]
    assert {term.name for term in criterion.all_terms} == set(CASES[name].learners)


@pytest.mark.parametrize('name', CASES)
def test_who_learns(name):
    case = CASES[name]
    task = make_task(case)
    pair = task.trainable_module
    groups = {'a': pair.model_a, 'b': pair.model_b, 'affine': pair.affine, 'teacher': task.teacher}
    parameters = {
        (group, key): parameter
        for group, module in groups.items() if module is not None for key, parameter in module.named_parameters()}
    assert not any(parameter.requires_grad for (group, _), parameter in parameters.items() if group == 'teacher')
    trainable = {key: parameter for key, parameter in parameters.items() if parameter.requires_grad}
    seen = {}
    for phase in range(len(task.phases)):
        result = task(*make_batch('hard'), phase=phase)
        for term, value in result.items():
            if term.endswith('_loss'):
                grads = torch.autograd.grad(value, trainable.values(), allow_unused=True, retain_graph=True)
                seen[term] = {
                    group for (group, _), grad in zip(trainable, grads, strict=True) if grad is not None and grad.any()}
    assert seen == case.learners
    # In the total every parameter of a model that trains has a gradient, but for an affine layer that no term uses.
    moved = set().union(*case.learners.values())
    pair.zero_grad()
    for phase, learners in enumerate(task.phases):
        task(*make_batch('hard'), phase=phase)['loss'].backward()
        for (group, key), parameter in parameters.items():
            has_grad = parameter.grad is not None and bool(parameter.grad.any())
            may_learn = group in moved and (group == 'affine' or group in learners)
            assert has_grad == may_learn, (phase, group, key)
        pair.zero_grad()


# The frozen teacher

def save_teacher(folder, name='test_efficientnet', size=48, class_names=None, **kwargs):
    """Write a model with random weights, other statistics and another size than the student's, and return it."""
    torch.manual_seed(7)
    model = timm.create_model(name, **{'num_classes': NUM_CLASSES, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    data_config = {
        **resolve_model_data_config(model),
        'input_size': (kwargs.get('in_chans', 3), size, size),
        'mean': (0.4, 0.5, 0.6)[:kwargs.get('in_chans', 3)],
        'std': (0.5,) * kwargs.get('in_chans', 3),
    }
    save_for_hf(
        model, str(folder), data_config=data_config, model_config={'label_names': class_names} if class_names else None)
    return model


def start_run(data, output, *options):
    """The parts of a run as the command builds them."""
    args = parse_args([str(data), *SMALL, '--output', str(output), '--experiment', 'run', *options])
    run = create_run(args, init_device(args))
    run.task.set_epoch(0)
    return run


@pytest.mark.parametrize('options', [
    ['--method', 'distill', '--model-b', 'test_vit', '--distill-terms', 'both'],
    ['--method', 'deit', *STUDENT],
], ids=lambda options: options[1])
def test_teacher_stays_as_it_is(digits_folder, tmp_path, options):
    model = save_teacher(tmp_path / 'teacher')
    run = start_run(digits_folder, tmp_path, *options, '--teacher', str(tmp_path / 'teacher'), '--weight-decay', '0.5')
    task, teacher, pair = run.task, run.task.teacher, run.pair
    for train_mode in (task.train, pair.train, teacher.train):
        train_mode()
        assert task.training and not any(module.training for module in teacher.modules())
    grad_enabled = []
    teacher.branch.model.register_forward_hook(lambda *args: grad_enabled.append(torch.is_grad_enabled()))
    train_one_epoch(run)
    assert grad_enabled == [False] * len(run.loader_train)  # once a batch
    assert not any(module.training for module in teacher.modules())
    for key, tensor in teacher.branch.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert any(key.endswith('num_batches_tracked') for key, _ in teacher.named_buffers())

    student = {'model_b', *(['affine'] if pair.affine is not None else [])}
    assert (pair.affine is not None) == ('distill' in options)  # 96 to 256 features
    for ema in (False, True):
        state = task.get_checkpoint_state(ema=ema)['state_dict_ema' if ema else 'state_dict']
        assert {key.partition('.')[0] for key in state} == student
    optimized = {id(parameter) for group in run.optimizer.param_groups for parameter in group['params']}
    assert optimized == {id(parameter) for parameter in pair.parameters()}
    assert len(run.optimizer.state) == len(optimized)
    clipped = {id(parameter) for parameter in task.get_clip_parameters()}
    assert clipped == optimized


def test_input_transform_normalises():
    source = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD, 'input_size': (3, 16, 16)}
    target = {'mean': (0.4, 0.5, 0.6), 'std': (0.5, 0.3, 0.2), 'input_size': (3, 16, 16)}
    pixels = torch.rand(2, 3, 16, 16)

    def normalised(config):
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
        return (pixels - mean) / std

    transform = InputTransform(source, target)
    assert_close(transform(normalised(source)), normalised(target), rtol=0, atol=1e-6)
    input = normalised(source)
    assert InputTransform(source, {**source, 'mean': list(IMAGENET_DEFAULT_MEAN)})(input) is input
    # bfloat16 images stay bfloat16
    assert transform(input.bfloat16()).dtype == torch.bfloat16
    assert not dict(transform.state_dict())


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('size', [(24, 24), (48, 48), (48, 24)])
def test_input_transform_resizes(size, interpolation):
    source = {'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'input_size': (3, 32, 32)}
    target = {'mean': (0.,) * 3, 'std': (1.,) * 3, 'input_size': (3, *size), 'interpolation': interpolation}

    def pattern(height, width):
        rows, columns = (torch.arange(count).add(0.5) / count * 2 * torch.pi for count in (height, width))
        return (0.5 + 0.4 * torch.sin(rows)[:, None] * torch.cos(columns)).expand(1, 3, -1, -1)

    # Against the same pattern, drawn at that size.
    got = InputTransform(source, target)((pattern(32, 32) - 0.5) / 0.5)
    assert got.shape == (1, 3, *size)
    assert_close(got, pattern(*size), rtol=0, atol=0.02)
    # Against Pillow, which rounds to whole grey levels after each of two passes.
    image = Image.fromarray((pattern(32, 32)[0] * 255).round().byte().permute(1, 2, 0).numpy())
    resized = image.resize(size[::-1], getattr(Image.Resampling, interpolation.upper()))
    image, resized = (create_transform(size_of.size[::-1], crop_pct=1., mean=(0.,) * 3, std=(1.,) * 3)(size_of)
                      for size_of in (image, resized))
    assert_close(InputTransform(source, target)((image[None] - 0.5) / 0.5), resized[None], rtol=0, atol=1.5 / 255)


def test_teacher_sees_its_own_images(digits_folder, tmp_path):
    # The student's images, prepared for the teacher, against images that timm prepares for the teacher.
    model = save_teacher(tmp_path / 'teacher', size=32)
    run = start_run(
        digits_folder, tmp_path, '--method', 'distill', '--model-b', 'test_vit', '--teacher', str(tmp_path / 'teacher'),
        '--no-aug', '--crop-pct', '1')
    dataset = copy.copy(run.loader_eval.dataset)
    dataset.transform = create_transform((3, 32, 32), crop_pct=1., mean=(0.4, 0.5, 0.6), std=(0.5,) * 3)
    with torch.no_grad():
        want = torch.cat([model(input) for input, _ in DataLoader(dataset, batch_size=8)])
        got = torch.cat([run.task.teacher(input)['logits_a'] for input, _ in run.loader_eval])
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert run.task.teacher.prepare.renormalize and run.task.teacher.prepare.size is None


@pytest.fixture(scope='module')
def teacher_run(digits_folder, tmp_path_factory):
    """The folder of a short run of one model, exported."""
    options = ['--method', 'solo', '--epochs', '2', '--lr', '0.003', '--crop-pct', '1', '--export']
    return run(digits_folder, tmp_path_factory.mktemp('teacher'), *options, models=PAIR[:2])


def averaged_weights(path):
    return torch.load(path, weights_only=True)['state_dict_ema']


def test_sources_of_a_teacher(digits_folder, teacher_run, tmp_path):
    pair_run = run(digits_folder, tmp_path, '--method', 'dml', '--epochs', '1')

    def teacher(source, *options, student='b'):
        args = parse_args([
            str(digits_folder), '--method', 'distill', f'--model-{student}', 'test_vit', '--teacher', str(source),
            *options])
        args.num_classes = NUM_CLASSES
        config = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD, 'input_size': (3, 32, 32)}
        found = create_teacher(args, config, [f'class{i}' for i in range(NUM_CLASSES)])
        assert found.side == {'a': 'b', 'b': 'a'}[student]
        return found.branch.model.state_dict()

    def prefixed(state, side):
        return {f'model_{side}.{key}': value for key, value in state.items()}

    best = averaged_weights(teacher_run / 'best_a.pth.tar')
    for source in (teacher_run, teacher_run / 'best_a.pth.tar', teacher_run / 'export' / 'solo-test_resnet'):
        assert_equal_weights(prefixed(teacher(source), 'a'), best)
    # Of a pair, the branch in whose place the teacher stands, or the one that is named.
    for student, side, options in (
            ('b', 'a', []), ('a', 'b', []),
            ('b', 'b', ['--teacher-branch', 'b']), ('a', 'a', ['--teacher-branch', 'a'])):
        state = teacher(pair_run, *options, student=student)
        assert_equal_weights(prefixed(state, side), averaged_weights(pair_run / f'best_{side}.pth.tar'))


# Against timm's tasks

def distilled_student(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(
        DEIT, num_classes=NUM_CLASSES, img_size=32, depth=2, embed_dim=48, num_heads=3).double()


def frozen_models(mean, std):
    """A teacher's model with BatchNorm, for us and for timm, and its data configuration."""
    torch.manual_seed(1)
    model = timm.create_model('test_resnet', num_classes=NUM_CLASSES).double().eval()
    model.pretrained_cfg = {**model.pretrained_cfg, 'mean': mean, 'std': std}
    return model, copy.deepcopy(model), {'mean': mean, 'std': std, 'input_size': (3, 32, 32)}


def assert_same_training(task, timm_task, names, steps=4, **close):
    """Both tasks give equal losses and gradients, and go on from them."""
    students = task.trainable_module.model_b, timm_task.trainable_module
    optimizers = [torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9) for student in students]
    task.set_epoch(0)
    generator = torch.Generator().manual_seed(5)
    task.train()
    timm_task.train()
    for _ in range(steps):
        x = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=generator)
        y = torch.randint(NUM_CLASSES, (6,), generator=generator)
        got, want = task(x, y), timm_task(x, y)
        for name, (timm_name, factor) in names.items():
            assert_close(got[name], want[timm_name] * factor, **close)
        assert torch.equal(got['output'].logits_b, want['output'])
        for optimizer, result in zip(optimizers, (got, want), strict=True):
            optimizer.zero_grad()
            result['loss'].backward()
        for parameter, wanted in zip(students[0].parameters(), students[1].parameters(), strict=True):
            assert_close(parameter.grad, wanted.grad, **close)
        with torch.no_grad():  # both go on from the same weights
            for parameter, wanted in zip(students[0].parameters(), students[1].parameters(), strict=True):
                wanted.grad.copy_(parameter.grad)
        for optimizer in optimizers:
            optimizer.step()


STATISTICS = {'same statistics': (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), 'others': ((0.5,) * 3, (0.4, 0.5, 0.6))}


@pytest.mark.parametrize('statistics', STATISTICS)
@pytest.mark.parametrize('kind', ['hard', 'soft'])
def test_deit_is_timms_token_distillation(kind, statistics):
    options = ['--distillation-tau', '2.5', '--distillation-alpha', '0.3'] if kind == 'soft' else []
    args = parse_args(['--dataset', 'digits', '--method', 'deit', *STUDENT, '--teacher', 'test_resnet',
                       '--distillation-type', kind, '--smoothing', '0', *options])
    student, teacher, timm_teacher, config = distilled_student(), *frozen_models(*STATISTICS[statistics])
    student.pretrained_cfg = {**student.pretrained_cfg, 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    timm_task = TokenDistillationTask(
        copy.deepcopy(student), timm_teacher, nn.CrossEntropyLoss(), distill_type=kind,
        task_loss_weight=0.7 if kind == 'soft' else 0.5, temperature=2.5, dtype=torch.float64, verbose=False)
    args.student = 'b'
    student.set_distilled_training(True)
    student_config = {**config, 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    task = PairTask(
        PairWrapper(None, student), create_criterion(args, 1, CPU),
        teacher=Teacher(teacher, 'a', config, student_config), verbose=False)
    # The factors of the normalisation are float32 here.
    close = {} if statistics == 'same statistics' else {'rtol': 1e-5, 'atol': 1e-6}
    names = {'loss': ('loss', 1), 'ce_b_loss': ('task_loss', 1), 'distill_b_loss': ('distill_loss', 1)}
    assert_same_training(task, timm_task, names, **close)


@pytest.mark.parametrize('statistics', STATISTICS)
@pytest.mark.parametrize('temperature', [1., 2.5])
def test_distill_with_kl_is_timms_logit_distillation(temperature, statistics):
    # timm's term has a factor T^2, ours has not (eq. 6).
    args = parse_args([
        '--dataset', 'digits', '--method', 'distill', *STUDENT, '--teacher', 'test_resnet', '--distill-terms', 'kl',
        '--smoothing', '0', '--rho', str(temperature), '--kl-weight', str(0.8 * temperature ** 2)])
    student, teacher, timm_teacher, config = distilled_student(), *frozen_models(*STATISTICS[statistics])
    student.pretrained_cfg = {**student.pretrained_cfg, 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    timm_task = LogitDistillationTask(
        copy.deepcopy(student), timm_teacher, nn.CrossEntropyLoss(), distill_loss_weight=0.8, temperature=temperature,
        dtype=torch.float64, verbose=False)
    student_config = {**config, 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    task = PairTask(
        PairWrapper(None, student), create_criterion(args, 1, CPU),
        teacher=Teacher(teacher, 'a', config, student_config), verbose=False)
    close = {} if statistics == 'same statistics' else {'rtol': 1e-5, 'atol': 1e-6}
    names = {'loss': ('loss', 1), 'ce_b_loss': ('task_loss', 1), 'kl_loss': ('kd_loss', temperature ** -2)}
    assert_same_training(task, timm_task, names, **close)


# cosub

@pytest.mark.parametrize(('model', 'branches'), [
    (['test_vit'], 12),
    (['test_convnext'], 9),
    (['regnetx_002', '--model-kwargs-a', 'depth=6', 'w0=8', 'wa=8.', 'wm=1.7', 'group_size=4'], 6),
    ([DEIT, '--model-kwargs-a', *SMALL_DEIT], 4),
], ids=['test_vit', 'test_convnext', 'regnetx_002', 'deit'])
def test_cosub_is_its_formula_on_one_forward(digits_folder, tmp_path, model, branches):
    run = start_run(
        digits_folder, tmp_path, '--method', 'cosub', '--model-a', *model, '--drop-path', '0.3', '--smoothing', '0.1')
    task, pair = run.task, run.pair.double()
    rates = [module.drop_prob for module in pair.modules() if isinstance(module, DropPath)]
    assert rates == [0.3] * branches
    with torch.no_grad():  # RegNet's branches begin as zeros
        for parameter in pair.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    task.train()
    seen = []
    pair.model_a.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output)))
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 3, 1, 1, 2])
    result = task(x, y)
    [(input, logits)] = seen
    assert torch.equal(input, torch.cat([x, x]))
    z_0, z_1 = logits[:5], logits[5:]
    assert not torch.equal(z_0, z_1)
    want = {
        'ce_a_loss': reference.binary_ce(z_0, y, 0.1),
        'ce_b_loss': reference.binary_ce(z_1, y, 0.1),
        'cosub_a_loss': reference.submodel(z_0, z_1),
        'cosub_b_loss': reference.submodel(z_1, z_0),
    }
    for name, value in want.items():
        assert_close(result[name], value)
    assert_close(result['loss'], sum(want.values()) / 4)
    parameters = list(pair.parameters())
    grads, wanted_grads = (
        torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        for total in (result['loss'], sum(want.values()) / 4))
    for grad, wanted in zip(grads, wanted_grads, strict=True):
        assert (grad is None) == (wanted is None)
        if grad is not None:
            assert_close(grad, wanted)


# dml

class Batches:
    """A loader of the same few images, which differ by class, in fixed order."""

    def __init__(self, num_batches):
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(NUM_CLASSES, 3, 16, 16, generator=generator)
        self.batches = []
        for _ in range(num_batches):
            y = torch.randint(NUM_CLASSES, (8,), generator=generator)
            self.batches.append((patterns[y] + 0.5 * torch.randn(8, 3, 16, 16, generator=generator), y))

    def __len__(self):
        return len(self.batches)

    skipped = 0

    def epoch(self, epoch, first_batch):
        for i, (x, y) in enumerate(self.batches):
            yield i, x, y, None


def plain_kl(logits, reference):
    return F.kl_div(logits.log_softmax(-1), reference.softmax(-1), reduction='batchmean')


def plain_dml(model_a, model_b, optimizer_a, optimizer_b, batches, ce=F.cross_entropy, kl=plain_kl):
    """Deep mutual learning as two networks with an optimizer each; returns each batch's losses."""
    losses = []
    for x, y in batches:
        logits_a, logits_b = model_a(x), model_b(x)
        loss_a = ce(logits_a, y) + kl(logits_a, logits_b.detach())
        optimizer_a.zero_grad()
        loss_a.backward()
        optimizer_a.step()
        with torch.no_grad():
            logits_a = copy.deepcopy(model_a)(x)  # of a copy, which takes the update of the statistics with it
        loss_b = ce(logits_b, y) + kl(logits_b, logits_a)
        optimizer_b.zero_grad()
        loss_b.backward()
        optimizer_b.step()
        losses.append((loss_a.item(), loss_b.item()))
    return losses


def plain_groups(model, weight_decay):
    """timm's rule: no weight decay on vectors."""
    parameters = list(model.parameters())
    return [
        {'params': [parameter for parameter in parameters if parameter.ndim <= 1], 'weight_decay': 0.},
        {'params': [parameter for parameter in parameters if parameter.ndim > 1], 'weight_decay': weight_decay},
    ]


OPTIMIZERS = {
    'momentum': lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
    'sgd': lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    'adamw': lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
    'lamb': lambda groups, lr: Lamb(groups, lr=lr),  # its step count is its groups', its clipping that of all groups
}


def start_dml(data, output, *options, num_batches=20):
    run = start_run(
        data, output, '--method', 'dml', '--model-a', 'test_resnet', '--model-b', 'test_efficientnet',
        '--smoothing', '0', '--sched', 'none', '--weight-decay-a', '0.05', '--weight-decay-b', '0.1', *options)
    run.loader_train = Batches(num_batches)
    return run


def assert_close_states(state, wanted, tolerance):
    for key, value in wanted.items():
        if value.is_floating_point():
            assert_close(state[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f'{key}: {m}')
        else:
            assert torch.equal(state[key], value), key


@pytest.mark.parametrize(('opt', 'lr_a', 'lr_b'), [
    ('momentum', 0.01, 0.005), ('lamb', 5e-3, 2e-3), pytest.param('sgd', 0.01, 0.005, marks=pytest.mark.slow),
    pytest.param('adamw', 1e-3, 3e-4, marks=pytest.mark.slow)])
def test_dml_is_two_networks_with_an_optimizer_each(digits_folder, tmp_path, opt, lr_a, lr_b):
    # In float64, since BatchNorm and momentum make 1e-2 of a rounding of float32 within 20 steps.
    run = start_dml(digits_folder, tmp_path, '--opt', opt, '--lr-a', str(lr_a), '--lr-b', str(lr_b))
    run.pair.double()
    run.loader_train.batches = [(x.double(), y) for x, y in run.loader_train.batches]
    model_a, model_b = copy.deepcopy(run.pair.model_a).train(), copy.deepcopy(run.pair.model_b).train()
    calls = {'a': [], 'b': []}
    for side in 'ab':
        run.pair.branch(side).register_forward_hook(
            lambda module, args, output, side=side: calls[side].append((torch.is_grad_enabled(), module.training)))
    optimizers = [
        OPTIMIZERS[opt](plain_groups(model, decay), lr)
        for model, decay, lr in ((model_a, 0.05, lr_a), (model_b, 0.1, lr_b))]
    train_one_epoch(run)
    losses = plain_dml(model_a, model_b, *optimizers, run.loader_train.batches)

    # a with and, after its update, without gradient; b once.
    assert calls['a'] == [(True, True), (False, True)] * 20 and calls['b'] == [(True, True)] * 20
    assert METHODS['dml'].passes({}) == 3
    assert losses[-1][0] < 0.8 * losses[0][0] and losses[-1][1] < 0.8 * losses[0][1]
    for model, wanted in ((run.pair.model_a, model_a), (run.pair.model_b, model_b)):
        state = model.state_dict()
        counts = [int(value) for key, value in state.items() if key.endswith('num_batches_tracked')]
        assert len(counts) > 5 and set(counts) == {20}
        assert_close_states(state, wanted.state_dict(), 1e-8)
    means = [sum(values) / 20 for values in zip(*losses, strict=True)]
    terms = {name.removeprefix('train_'): value for name, value in epoch_terms(run).items()}
    assert terms['ce_a_loss'] + terms['kl_a_loss'] == pytest.approx(means[0], rel=1e-8)
    assert terms['ce_b_loss'] + terms['kl_b_loss'] == pytest.approx(means[1], rel=1e-8)
    assert terms['loss'] == pytest.approx(sum(means), rel=1e-8)
    assert run.task.num_updates == 20  # batches, not optimizer steps


@pytest.mark.slow
def test_phases_share_an_optimizer_as_if_each_had_its_own():
    # Of all kinds: with counts and moments by parameter, by group, or by themselves.
    names = list_optimizers(exclude_filters=['fused*', 'bnb*', 'kron*', 'adahessian'])
    inputs = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))

    def models():
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)) for width in (8, 5)]

    def create(name, **models):
        groups = [
            {'params': list(model.parameters()), 'name': f'{side}.0', 'lr': 0.01, 'weight_decay': 0.01}
            for side, model in models.items()]
        return create_optimizer_v2(groups, opt=name, lr=0.01)

    def step(model_a, model_b, update_a, update_b):
        for x in inputs:
            z_a, z_b = model_a(x), model_b(x)
            (z_a - z_b.detach()).pow(2).mean().backward()
            update_a()
            (z_b - model_a(x).detach()).pow(2).mean().backward()
            update_b()

    def own_update(optimizer):
        def update():
            optimizer.step()
            optimizer.zero_grad()
        return update

    assert len(names) > 30
    for name in names:
        model_a, model_b = models()
        run = SimpleNamespace(
            optimizer=create(name, a=model_a, b=model_b),
            scaler=torch.amp.GradScaler('cpu', enabled=False),
            task=SimpleNamespace(clip_gradients=lambda *args: None),
            args=SimpleNamespace(clip_mode='norm'),
        )
        step(model_a, model_b, lambda run=run: update(run, 'a', {}), lambda run=run: update(run, 'b', {}))
        assert [group['name'] for group in run.optimizer.param_groups] == ['a.0', 'b.0']
        plain_a, plain_b = models()
        step(plain_a, plain_b, own_update(create(name, a=plain_a)), own_update(create(name, b=plain_b)))
        for model, wanted in ((model_a, plain_a), (model_b, plain_b)):
            for parameter, value in zip(model.parameters(), wanted.parameters(), strict=True):
                assert_close(parameter, value, rtol=0, atol=1e-6, msg=lambda m, name=name: f'{name}: {m}')


def test_dml_in_float32_to_the_bit(digits_folder, tmp_path):
    run = start_dml(
        digits_folder, tmp_path, '--opt', 'momentum', '--lr-a', '0.02', '--lr-b', '0.01', '--opt-kwargs', 'fused=False')
    model_a, model_b = copy.deepcopy(run.pair.model_a).train(), copy.deepcopy(run.pair.model_b).train()
    optimizers = [
        OPTIMIZERS['momentum'](plain_groups(model, decay), lr)
        for model, decay, lr in ((model_a, 0.05, 0.02), (model_b, 0.1, 0.01))]
    train_one_epoch(run)
    plain_dml(model_a, model_b, *optimizers, run.loader_train.batches, cross_entropy, kl_divergence)
    for model, wanted in ((run.pair.model_a, model_a), (run.pair.model_b, model_b)):
        assert_equal_weights(wanted.state_dict(), model.state_dict())


def test_dml_with_a_gradient_scaler(digits_folder, tmp_path):
    options = ['--opt', 'momentum', '--lr', '0.01', '--clip-grad', '1.0']
    plain = start_dml(digits_folder, tmp_path, *options, num_batches=5)
    scaled = start_dml(digits_folder, tmp_path, *options, num_batches=5)
    scaled.scaler = torch.amp.GradScaler('cpu', init_scale=2., growth_interval=1)
    train_one_epoch(plain)
    train_one_epoch(scaled)
    assert scaled.scaler.get_scale() == 2 ** 11  # it grew after each of two phases a batch
    assert_close_states(scaled.pair.state_dict(), plain.pair.state_dict(), 1e-7)
    # An overflow in one phase costs that phase's step alone.
    run = start_dml(digits_folder, tmp_path, *options, num_batches=1)
    run.scaler = torch.amp.GradScaler('cpu', init_scale=2.)
    parameter = next(run.pair.model_a.parameters())
    parameter.register_hook(lambda grad: grad * float('inf'))
    before = copy.deepcopy(run.pair.state_dict())
    train_one_epoch(run)
    assert run.scaler.get_scale() == 1.
    for key, parameter in run.pair.named_parameters():
        assert torch.equal(parameter, before[key]) == (not key.startswith('model_b')), key


def test_dml_leaves_other_statistics_alone():
    # The refresh of a forward of a model in evaluation mode, or without running statistics.
    case = CASES['dml']
    task = make_task(case)
    norm = task.trainable_module.model_a.norm
    x, y = make_batch('hard')
    task(x, y, phase=0)
    norm.eval()
    before = copy.deepcopy(norm.state_dict())
    task(x, y, phase=1)
    assert norm.track_running_stats and not norm.training
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    with pytest.raises(RuntimeError, match='2 optimizer phases'):
        task(x, y)


# Whole runs

METHOD_RUNS = {
    'vpl': PAIR,
    'solo': ['--method', 'solo', *PAIR[2:]],
    'dml': ['--method', 'dml', *PAIR, '--clip-grad', '1.0'],
    'dml, joint': ['--method', 'dml', '--dml-joint', *PAIR],
    'distill': ['--method', 'distill', *PAIR[2:], '--teacher', 'TEACHER', '--distill-terms', 'both'],
    'distill, a': ['--method', 'distill', *PAIR[:2], '--teacher', 'TEACHER'],
    'deit': ['--method', 'deit', *STUDENT, '--teacher', 'TEACHER'],
    'deit, soft': ['--method', 'deit', *STUDENT, '--teacher', 'TEACHER', '--distillation-type', 'soft'],
    'deit, online': ['--method', 'deit', *PAIR[:2], *STUDENT],
    'cosub': ['--method', 'cosub', *PAIR[2:], '--opt', 'lamb'],
    'cosub, skip': ['--method', 'cosub', *PAIR[2:], '--drop-path-skip'],
}
TRAINED_SIDES = {'solo': 'b', 'distill': 'b', 'distill, a': 'a', 'deit': 'b', 'deit, soft': 'b', 'cosub': 'b',
                 'cosub, skip': 'b'}


def method_options(name, teacher):
    return [str(teacher) if option == 'TEACHER' else option for option in METHOD_RUNS[name]]


def untimed(table):
    return [
        {key: value for key, value in row.items() if key not in TIMES} for row in table]


def assert_trained(name, folder, epochs=2):
    """The run has its terms, metrics, EMA, and its export."""
    sides = TRAINED_SIDES.get(name, 'ab')
    table = rows(folder)
    assert len(table) == epochs and all(float(row['train_loss']) > 0 for row in table)
    for side in sides:
        assert 0 <= float(table[-1][f'eval_ema_top1_{side}']) <= 100
    checkpoint = last(folder)
    state, averaged = checkpoint['state_dict'], checkpoint['state_dict_ema']
    assert {key.partition('.')[0] for key in state} - {'affine'} == {f'model_{side}' for side in sides}
    assert list(state) == list(averaged)
    assert any(not torch.equal(averaged[key], state[key]) for key in state)
    assert all(torch.isfinite(value).all() for value in [*state.values(), *averaged.values()])
    assert len(list((folder / 'export').iterdir())) == len(sides)


@pytest.mark.parametrize('name', [
    *(pytest.param(name, marks=pytest.mark.slow) for name in METHOD_RUNS
      if name not in ('dml', 'distill', 'deit', 'cosub')),
    'dml', 'distill', 'deit', 'cosub'])
def test_resumed_run_is_the_uninterrupted_one(digits_folder, teacher_run, tmp_path, caplog, name):
    caplog.set_level(logging.INFO)
    options = [*NOISE, '--mixup', '0.2', '--mixup-off-epoch', '1', '--export', *method_options(name, teacher_run)]
    whole = run(digits_folder, tmp_path, *options, name='whole', models=[])
    assert_trained(name, whole)
    has_teacher = 'TEACHER' in METHOD_RUNS[name]
    assert caplog.text.count('Teacher: top1') == has_teacher
    part = run(digits_folder, tmp_path, *options, '--stop-epoch', '1', name='part', models=[])
    assert len(rows(part)) == 1
    run(digits_folder, tmp_path, *options, '--resume', str(part / 'last.pth.tar'), name='part', models=[])
    assert caplog.text.count('Teacher: top1') == 2 * has_teacher  # not again where a run goes on
    for key in ('state_dict', 'state_dict_ema'):
        assert list(last(whole)[key]) == list(last(part)[key])
        assert_equal_weights(last(whole)[key], last(part)[key])
    assert untimed(rows(whole)) == untimed(rows(part))
    assert last(whole)['saver']['best_branches'] == last(part)['saver']['best_branches']
    check_export(name, whole)


def check_export(name, folder):
    """The exports are timm's plain models with the averaged weights of the best epoch."""
    for side in TRAINED_SIDES.get(name, 'ab'):
        best = torch.load(folder / f'best_{side}.pth.tar', weights_only=True)
        architecture = best['branches'][side]['architecture']
        method = METHOD_RUNS[name][1] if METHOD_RUNS[name][0] == '--method' else 'vpl'
        model = timm.create_model(f'local-dir:{folder}/export/{method}-{architecture}', pretrained=True).eval()
        assert_equal_weights(
            {f'model_{side}.{key}': value for key, value in model.state_dict().items()}, best['state_dict_ema'])
        kwargs = {'num_classes': NUM_CLASSES}
        if 'vit' in architecture or architecture == DEIT:
            kwargs['img_size'] = 32
        if architecture == DEIT:
            kwargs.update(depth=2, embed_dim=48, num_heads=3)
        plain = timm.create_model(architecture, **kwargs).eval()
        assert type(model) is type(plain)
        assert [repr(module) for module in model.modules()] == [repr(module) for module in plain.modules()]
        plain.load_state_dict(model.state_dict())
        x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
            if architecture == DEIT:  # the mean of its two heads
                features = model.forward_features(x)
                heads = model.head(features[:, 0]), model.head_dist(features[:, 1])
                assert_close(model(x), (heads[0] + heads[1]) / 2, rtol=1e-5, atol=1e-6)
                assert not torch.allclose(*heads)


def test_teacher_is_validated_as_in_its_own_run(digits_folder, teacher_run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(digits_folder, tmp_path, '--epochs', '1', *method_options('distill', teacher_run), '--img-size', '48',
        '--model-kwargs-b', 'img_size=48', models=[])
    best = last(teacher_run)['saver']['best_branches']['a'][0]
    assert f'Teacher: top1 {best:.3f} ' in caplog.text


# Several processes. Without BatchNorm, whose statistics are those of a process, with SGD and without augmentation.

QUIET = ['--opt', 'sgd', '--lr', '0.02', '--aa', '', '--reprob', '0', '--drop-path', '0', '--seed', '3']
NO_BATCH_NORM = {
    'vpl': ['--model-a', 'test_convnext', '--model-b', 'test_vit'],
    'solo': ['--method', 'solo', '--model-b', 'test_vit'],
    'dml': ['--method', 'dml', '--model-a', 'test_convnext', '--model-b', 'test_vit'],
    'dml, joint': ['--method', 'dml', '--dml-joint', '--model-a', 'test_convnext', '--model-b', 'test_vit'],
    'distill': METHOD_RUNS['distill'],
    'distill, a': ['--method', 'distill', '--model-a', 'test_convnext', '--teacher', 'TEACHER'],
    'deit': METHOD_RUNS['deit'],
    'deit, soft': METHOD_RUNS['deit, soft'],
    'deit, online': ['--method', 'deit', '--model-a', 'test_convnext', *STUDENT],
}


def quiet_argv(name, data, teacher, output, experiment, batch_size):
    options = [str(teacher) if option == 'TEACHER' else option for option in NO_BATCH_NORM[name]]
    return [str(data), *options, *SMALL, *QUIET, '-b', str(batch_size), '--output', str(output), '--experiment',
            f'{name.replace(", ", "-")}-{experiment}']


def assert_same_runs(name, output):
    """Two processes of half the batch each trained what one process did."""
    one, two = (output / f'{name.replace(", ", "-")}-{experiment}' for experiment in ('one', 'two'))
    for row, wanted in zip(untimed(rows(two)), untimed(rows(one)), strict=True):
        assert (row.pop('processes'), wanted.pop('processes')) == ('2', '1')
        for key, value in wanted.items():
            if value == '':
                assert row[key] == '', key
            elif key.startswith(('train', 'lr', 'eval_loss', 'eval_ema_loss')):
                assert float(row[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), key
    for key in ('state_dict', 'state_dict_ema'):
        assert_close_states(last(two)[key], last(one)[key], 1e-4)


def run_as_a_process(rank, port, argv, folder):
    """Train as one of two processes that torchrun has started."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port))
    status = 1
    try:
        status = train(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def run_jobs(folder):
    """Run each command line of FOLDER/jobs.json in two processes; forked, so that torch and timm are imported once."""
    for argv in json.loads((folder / 'jobs.json').read_text()):
        pids, port = [], free_port()
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                run_as_a_process(rank, port, argv, folder)
            pids.append(pid)
        print(argv, [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)


def test_two_processes_train_as_one(digits_folder, teacher_run, tmp_path):
    names = ('dml', 'distill')
    jobs = [quiet_argv(name, digits_folder, teacher_run, tmp_path, 'two', 4) for name in names]
    (tmp_path / 'jobs.json').write_text(json.dumps(jobs))
    log = run_script(__file__, tmp_path)
    assert log.count('[0, 0]') == 2, log
    for name in names:
        assert train(quiet_argv(name, digits_folder, teacher_run, tmp_path, 'one', 8)) == 0
        assert_same_runs(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name', NO_BATCH_NORM)
def test_torchrun_trains_as_one_process(digits_folder, teacher_run, tmp_path, name):
    torchrun(2, *quiet_argv(name, digits_folder, teacher_run, tmp_path, 'two', 4))
    assert train(quiet_argv(name, digits_folder, teacher_run, tmp_path, 'one', 8)) == 0
    assert_same_runs(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name', METHOD_RUNS)
def test_torchrun_with_everything(digits_folder, teacher_run, tmp_path, name):
    options = [*SMALL, *NOISE, '-b', '4', '--mixup', '0.2', '--export', '--output', tmp_path, '--experiment', 'run']
    torchrun(2, digits_folder, *options, *method_options(name, teacher_run))
    assert_trained(name, tmp_path / 'run')
    assert {row['processes'] for row in rows(tmp_path / 'run')} == {'2'}
    check_export(name, tmp_path / 'run')


# Usage errors

def error_line(capsys, data, output, *options):
    """Return the one line with which a wrong command ends."""
    capsys.readouterr()
    try:
        status = train([str(data), *SMALL, '--output', str(output), *map(str, options)])
    except SystemExit as e:
        status = e.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('train_vpl.py: error: ')]
    assert status == 2 and len(lines) == 1
    return lines[0].removeprefix('train_vpl.py: error: ')


@pytest.mark.parametrize(('options', 'parts'), [
    (['--method', 'solo', *PAIR], ['--method solo', 'one model', '--model-a test_resnet --model-b test_vit']),
    (['--method', 'dml', *PAIR[:2]], ['--method dml', 'two models', 'missing: --model-b']),
    (['--method', 'distill', *PAIR, '--teacher', 'test_vit'], ['--method distill', 'one model', '--model-b test_vit']),
    (['--method', 'cosub', *PAIR, '--drop-path', '0.1'], ['--method cosub', 'one model']),
    (['--method', 'deit', '--model-b', 'test_vit', '--teacher', 'test_resnet'],
     ['--method deit', '--model-b test_vit', 'no distillation token', 'deit_', 'pit_']),
    (['--method', 'deit', *PAIR], ['--method deit', '--model-a test_resnet --model-b test_vit', 'deit_']),
    (['--method', 'distill', *PAIR[2:]], ['--method distill', 'needs --teacher']),
    (['--method', 'deit', *STUDENT], ['--method deit', 'needs --teacher', 'or a second model']),
    ([*PAIR, '--teacher', 'test_vit'], ['--teacher test_vit', '--method vpl has two models']),
    (['--method', 'dml', *PAIR, '--teacher', 'test_vit'], ['--teacher test_vit', '--method dml has two models']),
    (['--method', 'deit', *PAIR[:2], *STUDENT, '--teacher', 'test_vit'],
     ['--teacher test_vit', '--method deit has two models']),
    (['--method', 'cosub', *PAIR[2:]], ['--drop-path 0', '--method cosub', 'above 0']),
    (['--method', 'cosub', *PAIR[2:], '--drop-path', '0'], ['--drop-path 0', '--method cosub']),
    (['--method', 'cosub', *PAIR[2:], '--drop-path', '1'], ['--drop-path 1', 'below 1']),
    (['--method', 'solo', *PAIR[2:], '--teacher', 'test_vit'], ['--teacher test_vit', '--method solo has no teacher']),
    (['--method', 'cosub', '--model-a', 'vgg11', '--drop-path', '0.1'], ['--model-a vgg11', 'families that work']),
    (['--method', 'cosub', '--model-a', 'mobilevit_xxs', '--drop-path', '0.1'],
     ['--model-a mobilevit_xxs', '--method cosub', 'families that work']),
    (['--method', 'dml', *PAIR, '--grad-accum-steps', '2'], ['--grad-accum-steps 2', '--method dml', '--dml-joint']),
    (['--method', 'dml', *PAIR, '--opt', 'lookahead_adamw'], ['--opt lookahead_adamw', '--method dml']),
    (['--method', 'distill', *PAIR[2:], '--teacher', 'no/such/run'], ['--teacher no/such/run', 'no such file']),
    (['--method', 'distill', *PAIR[2:], '--teacher', 'test_resnett'],
     ['--teacher test_resnett', 'no model of this name', 'test_resnet']),
    (['--method', 'distill', *PAIR[2:], '--teacher', 'local-dir:nowhere'], ['--teacher local-dir:nowhere']),
    (['--method', 'dml', *PAIR, '--kl-weight', '-1'], ['--kl-weight', '-1']),
    (['--method', 'deit', *STUDENT, '--teacher', 'test_resnet', '--distillation-alpha', '1.5'],
     ['--distillation-alpha', '1.5']),
], ids=lambda value: ' '.join(value[:2] + value[-2:]) if value[0].startswith('--') else '')
def test_usage_errors(capsys, digits_folder, tmp_path, options, parts):
    line = error_line(capsys, digits_folder, tmp_path, *options)
    assert all(part in line for part in parts), line


def test_models_named_for_deit_have_a_token(capsys, digits_folder, tmp_path):
    line = error_line(capsys, digits_folder, tmp_path, '--method', 'deit', *PAIR)
    names = [name for name in line.replace(',', ' ').split() if timm.is_model(name)]
    names = [name for name in names if not name.startswith('test_')]
    assert len(names) > 1
    for name in names:
        with torch.device('meta'):
            assert hasattr(timm.create_model(name), 'set_distilled_training'), name


def test_teachers_that_do_not_fit(capsys, digits_folder, teacher_run, tmp_path):
    distill = ['--method', 'distill', *PAIR[2:], '--teacher']
    three, others, one_channel = (tmp_path / name for name in ('three', 'others', 'one_channel'))
    save_teacher(three, num_classes=3)
    line = error_line(capsys, digits_folder, tmp_path, *distill, three)
    assert f'--teacher {three}: test_efficientnet knows 3 classes, the data has 4' in line
    save_teacher(others, class_names=['class0', 'class1', 'tabby', 'class3'])
    line = error_line(capsys, digits_folder, tmp_path, *distill, others)
    assert f'--teacher {others}: ' in line and "class 2 is 'tabby' to it and 'class2' in the data" in line
    save_teacher(one_channel, in_chans=1)
    assert f'--teacher {one_channel}: ' in error_line(capsys, digits_folder, tmp_path, *distill, one_channel)
    line = error_line(capsys, digits_folder, tmp_path, *distill, teacher_run, '--teacher-branch', 'b')
    assert f'{teacher_run}: has no branch b' in line
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert str(empty) in error_line(capsys, digits_folder, tmp_path, *distill, empty)


if __name__ == '__main__':
    run_jobs(Path(sys.argv[1]))
