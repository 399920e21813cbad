"""Each method against an implementation of its formulas, against timm's own tasks, and in whole runs."""
import copy
import io
import logging
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import reference
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import NOISE, PAIR, SMALL, assert_equal_weights, error_line, last, rows, run, start_run, summary, torchrun
from small import CPU, DEIT, TinyModel, assert_equal_states, make_model, one_branch, seeded
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_model_data_config
from timm.layers import DropPath
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2, list_optimizers
from timm.task import LogitDistillationTask, TokenDistillationTask
from torch.utils.data import DataLoader

from timm_vpl import PairTask, PairWrapper
from timm_vpl.core.methods import METHODS
from timm_vpl.core.names import SIDES, partner_of
from timm_vpl.core.teacher import Teacher
from timm_vpl.engine.log import epoch_terms
from timm_vpl.engine.loop import train_one_epoch
from timm_vpl.engine.optim import create_criterion, only
from timm_vpl.engine.trained import create_teacher
from timm_vpl.options.train import parse_args

NUM_CLASSES = 4
STUDENT = ['--model-b', DEIT, '--model-kwargs-b', 'depth=2', 'embed_dim=48', 'num_heads=3']
IMAGENET = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD, 'input_size': (3, 32, 32)}

# The formulas. A case is a method with some options, and the terms of each optimizer phase.

TAU, RHO, W_C, W_K, ALPHA, T = 0.4, 1.7, 0.6, 1.3, 0.3, 2.5
CONTRASTIVE = ['--tau', str(TAU), '--contrastive-weight', str(W_C)]
KL = ['--rho', str(RHO), '--kl-weight', str(W_K)]


class Case(NamedTuple):
    options: list
    phases: list  # of each {name: (weight, function of Outputs)}
    frozen: str = ''  # side of the teacher
    token: str = ''  # side of the student with a distillation token


def ce(side, weight=1):
    return {f'ce_{side}_loss': (weight, lambda o: o.ce(side))}


def vpl_case(contrastive_to='b', kl_to='a', affine_side='b', similarity='cosine'):
    options = [*PAIR, *CONTRASTIVE, *KL, '--contrastive-to', contrastive_to, '--kl-to', kl_to, '--affine-side',
               affine_side, '--similarity', similarity]
    return Case(options, [{
        **ce('a'), **ce('b'), 'contrastive_loss': (W_C, lambda o: o.contrastive(contrastive_to, similarity)),
        'kl_loss': (W_K, lambda o: o.kl('b', 'a') if kl_to == 'both' else o.follow(kl_to))}])


def distill_case(student, which):
    terms = {'contrastive': (W_C, lambda o: o.contrastive(student)), 'kl': (W_K, lambda o: o.follow(student))}
    given = {'contrastive': CONTRASTIVE, 'kl': KL}
    chosen = [which] if which in terms else list(terms)
    options = ['--method', 'distill', f'--model-{student}', 'test_vit', '--teacher', 'test_resnet']
    options += [] if which == {'a': 'kl', 'b': 'contrastive'}[student] else ['--distill-terms', which]
    return Case([*options, *(word for name in chosen for word in given[name])],
                [{**ce(student), **{f'{name}_loss': terms[name] for name in chosen}}], frozen=partner_of(student))


def deit_case(student, kind, online=False):
    teacher = partner_of(student)
    options = ['--method', 'deit', f'--model-{student}', DEIT, '--distillation-alpha', str(ALPHA),
               f'--model-{teacher}' if online else '--teacher', 'test_resnet', '--distillation-type', kind,
               *(['--distillation-tau', str(T)] if kind == 'soft' else [])]
    token = {'hard': lambda o: reference.token_hard(o.token, o.z[teacher]),
             'soft': lambda o: reference.token_soft(o.token, o.z[teacher], T)}[kind]
    terms = {**(ce(teacher) if online else {}), **ce(student, 1 - ALPHA), f'distill_{student}_loss': (ALPHA, token)}
    return Case(options, [terms], frozen='' if online else teacher, token=student)


def cosub_case(*options):
    def submodel(side):
        return lambda o: reference.submodel(o.z[side], o.z[partner_of(side)], '--bce-sum' in options)
    return Case(['--method', 'cosub', '--model-a', 'test_vit', '--drop-path', '0.5', *options], [{
        **ce('a', 1 / 4), **ce('b', 1 / 4), **{f'cosub_{side}_loss': (1 / 4, submodel(side)) for side in SIDES}}])


DML = ['--method', 'dml', *PAIR, *KL]
CASES = {
    'vpl': vpl_case(),
    'vpl, affine layer on a': vpl_case(affine_side='a'),
    'vpl, Bi': vpl_case('both', 'both'),
    'vpl, swapped': vpl_case('a', 'b'),
    'vpl, dot': vpl_case(similarity='dot'),
    **{f'solo {side}': Case(['--method', 'solo', f'--model-{side}', 'test_vit'], [ce(side)]) for side in SIDES},
    'dml': Case(DML, [
        {**ce(side), f'kl_{side}_loss': (W_K, lambda o, side=side: o.follow(side))} for side in SIDES]),
    'dml, joint': Case([*DML, '--dml-joint'], [{
        **ce('a'), **ce('b'), 'kl_a_loss': (W_K / 2, lambda o: o.kl('b', 'a')),
        'kl_b_loss': (W_K / 2, lambda o: o.kl('a', 'b'))}]),
    **{f'distill {side}, {which}': distill_case(side, which)
       for side in SIDES for which in ('kl', 'contrastive', 'both')},
    **{f'deit {side}, {kind}{", online" * online}': deit_case(side, kind, online)
       for side in SIDES for kind in ('hard', 'soft') for online in (False, True)},
    'cosub': cosub_case(),
    'cosub, sum': cosub_case('--bce-sum'),
}
TARGETS = {'hard': ['--smoothing', '0'], 'smooth': ['--smoothing', '0.1'], 'soft': ['--mixup', '0.2']}


class Network(TinyModel):
    """In float64, with a norm layer, stochastic depth and, if asked for, a distillation token."""

    def __init__(self, width, norm, drop_path=0., token=False, seed=0):
        torch.manual_seed(seed)
        super().__init__(NUM_CLASSES, width)
        self.norm, self.block, self.drop_path = norm(width), nn.Linear(width, width), DropPath(drop_path)
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
    parsed = parse_args(['--dataset', 'digits', *case.options, *options])
    method = METHODS[parsed.method]
    drop_path = 0.5 if method.uniform_drop_path else 0.
    models = [Network(WIDTHS[side], NORMS[side], drop_path, token=side == case.token, seed=i)
              if side in parsed.sides else None for i, side in enumerate(SIDES)]
    teacher = None
    if case.frozen:
        config = {'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'input_size': (3, 16, 16)}
        teacher = Teacher(Network(WIDTHS[case.frozen], nn.BatchNorm2d, seed=5), case.frozen, config, config)
    torch.manual_seed(2)
    pair = PairWrapper(
        *models, affine_side=getattr(parsed.own, 'affine_side', 'b'), partner_dim=teacher and teacher.embed_dim,
        affine=method.projects(parsed.own, parsed.sides)).double()
    criterion = create_criterion(parsed, 3, CPU, case.token)
    criterion.set_epoch(1)  # all terms are on
    return PairTask(pair, criterion, teacher=teacher, verbose=False).train()


def make_batch(targets='hard'):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=generator)
    if targets == 'soft':
        return x, torch.rand(6, NUM_CLASSES, dtype=torch.float64, generator=generator).softmax(-1)
    return x, torch.randint(NUM_CLASSES, (6,), generator=generator)


class Outputs:
    """What the formulas need, with each network run by hand, and what they have in common."""

    def __init__(self, case, pair, teacher, x, y, smoothing):
        self.case, self.y, self.smoothing, self.z, self.h = case, y, smoothing, {}, {}
        self.affine, self.affine_side = pair.affine or nn.Identity(), pair.affine_side
        for side in pair.sides:
            model = pair.branch(side)
            if 'cosub' in case.options:
                self.z['a'], self.z['b'] = model.head(model.features(torch.cat([x, x]))).chunk(2)
                continue
            self.h[side] = model.features(x)
            self.z[side] = model.head(self.h[side])
            if side == case.token:
                self.token = model.token_logits(self.h[side])
        if case.frozen:
            model = teacher.branch.model
            assert not model.norm.training
            with torch.no_grad():
                self.h[case.frozen] = model.features(x)
                self.z[case.frozen] = model.head(self.h[case.frozen])

    def ce(self, side):
        """The loss of the labels."""
        if 'cosub' in self.case.options:
            scale = NUM_CLASSES if '--bce-sum' in self.case.options else 1
            return scale * reference.binary_ce(self.z[side], self.y, self.smoothing)
        return reference.ce(self.z[side], self.y, self.smoothing)

    def contrastive(self, learner, similarity='cosine'):
        """Eq. 3 to 5, the partner detached; the affine layer P learns always."""
        h = {side: self.h[side] if learner in (side, 'both') else self.h[side].detach() for side in SIDES}
        h[self.affine_side] = self.affine(h[self.affine_side])
        return reference.contrastive(h['a'], h['b'], TAU, similarity)

    def kl(self, p, q):
        """KL(p_p || p_q)."""
        return reference.kl(self.z[p], self.z[q], RHO)

    def follow(self, learner):
        """KL(sg p_partner || p_learner)."""
        return reference.kl(self.z[partner_of(learner)].detach(), self.z[learner], RHO)


def assert_close(got, want, rtol=1e-10, atol=1e-10, msg=None):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=msg)


def assert_all_close(got, wanted, tolerance=1e-10):
    """Tensors of the same names are close; None where there is none, or as zeros."""
    for key, want in wanted.items():
        if want is None:
            assert got[key] is None or not got[key].any(), key
        else:
            assert_close(got[key], want, tolerance, tolerance, msg=lambda m, key=key: f'{key}: {m}')


def grads(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize('targets', TARGETS)
@pytest.mark.parametrize('name', CASES)
def test_terms_and_gradients(name, targets):
    case = CASES[name]
    task = make_task(case, *TARGETS[targets])
    pair, plain = task.trainable_module, copy.deepcopy(task.trainable_module)
    x, y = make_batch(targets)
    o = seeded(4, Outputs, case, plain, task.teacher, x, y, 0.1 if targets == 'smooth' else 0.)
    assert task.phases == (('a', 'b') if name == 'dml' else ('ab',))
    for phase, terms in enumerate(case.phases):
        if phase:  # the partner says what it says after its update
            with torch.no_grad():
                o.z['a'] = copy.deepcopy(plain.model_a)(x)
        result = seeded(4, task, x, y, phase=phase)
        want = {name: formula(o) for name, (_, formula) in terms.items()}
        total = sum(weight * want[name] for name, (weight, _) in terms.items())
        assert set(result) == {*want, 'loss', 'output'}
        assert_all_close(result, {**want, 'loss': total})

        pair.zero_grad()
        plain.zero_grad()
        result['loss'].backward()
        total.backward()
        assert_all_close(grads(pair), grads(plain))
        with torch.no_grad():
            for parameter in [*pair.parameters(), *plain.parameters()]:
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
    assert_all_close(dict(pair.named_buffers()), dict(plain.named_buffers()))
    if not name.startswith('vpl'):  # from the first to the last epoch
        for epoch in range(4):
            task.set_epoch(epoch)
            assert task.criterion.active_terms() == list(task.criterion.all_terms)


# The frozen teacher

def save_teacher(folder, name='test_efficientnet', size=48, class_names=None, in_chans=3, num_classes=NUM_CLASSES):
    """Write a model with random weights, other statistics and another size than the student's, and return it."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    data_config = {**resolve_model_data_config(model), 'input_size': (in_chans, size, size),
                   'mean': (0.4, 0.5, 0.6)[:in_chans], 'std': (0.5,) * in_chans}
    model_config = {'label_names': class_names} if class_names else None
    save_for_hf(model, str(folder), data_config=data_config, model_config=model_config)
    return model


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
    assert_equal_states(teacher.branch.model.state_dict(), model.state_dict())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())

    assert (pair.affine is not None) == ('distill' in options)  # 96 to 256 features
    student = {'model_b', *(['affine'] if pair.affine is not None else [])}
    for ema in (False, True):
        state = task.get_checkpoint_state(ema=ema)['state_dict_ema' if ema else 'state_dict']
        assert {key.partition('.')[0] for key in state} == student
    optimized = {parameter for group in run.optimizer.param_groups for parameter in group['params']}
    assert optimized == set(pair.parameters()) == set(run.optimizer.state) == set(task.get_clip_parameters())


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


def test_sources_of_a_teacher(digits_folder, teacher_run, tmp_path):
    pair_run = run(digits_folder, tmp_path, '--method', 'dml', '--epochs', '1')

    def check(source, best, side='a', student='b', options=()):
        parsed = parse_args([
            str(digits_folder), '--method', 'distill', f'--model-{student}', 'test_vit', '--teacher', str(source),
            *options])
        found = create_teacher(parsed, IMAGENET, NUM_CLASSES, [f'class{i}' for i in range(NUM_CLASSES)])
        assert found.side == partner_of(student)
        state = {f'model_{side}.{key}': value for key, value in found.branch.model.state_dict().items()}
        assert_equal_weights(state, torch.load(best, weights_only=True)['state_dict_ema'])

    best = teacher_run / 'best_a.pth.tar'
    for source in (teacher_run, best, teacher_run / 'export' / 'solo-test_resnet'):
        check(source, best)
    # Of a pair, the branch in whose place the teacher stands, or the one that is named.
    for student, side, options in (
            ('b', 'a', []), ('a', 'b', []),
            ('b', 'b', ['--teacher-branch', 'b']), ('a', 'a', ['--teacher-branch', 'a'])):
        check(pair_run, pair_run / f'best_{side}.pth.tar', side, student, options)


# Against timm's tasks: what we call a term, what timm does, and their ratio: timm's KL term has a factor T^2, ours has
# not (eq. 6).

STATISTICS = {'same statistics': IMAGENET, 'others': {**IMAGENET, 'mean': (0.5,) * 3, 'std': (0.4, 0.5, 0.6)}}
TIMMS = {
    'hard': (['deit', '--distillation-type', 'hard'], TokenDistillationTask,
             {'distill_type': 'hard', 'task_loss_weight': 0.5}, ('distill_b_loss', 'distill_loss', 1)),
    'soft': (['deit', '--distillation-type', 'soft', '--distillation-tau', '2.5', '--distillation-alpha', '0.3'],
             TokenDistillationTask, {'distill_type': 'soft', 'task_loss_weight': 0.7, 'temperature': 2.5},
             ('distill_b_loss', 'distill_loss', 1)),
    **{f'logits, T = {T}': (
        ['distill', '--distill-terms', 'kl', '--rho', str(T), '--kl-weight', str(0.8 * T ** 2)], LogitDistillationTask,
        {'distill_loss_weight': 0.8, 'temperature': T}, ('kl_loss', 'kd_loss', T ** -2)) for T in (1., 2.5)},
}


@pytest.mark.parametrize('statistics', STATISTICS)
@pytest.mark.parametrize('kind', TIMMS)
def test_distillation_is_timms(kind, statistics):
    options, timm_task, timm_kwargs, (term, timm_term, ratio) = TIMMS[kind]
    parsed = parse_args([
        '--dataset', 'digits', *STUDENT, '--teacher', 'test_resnet', '--smoothing', '0', '--method', *options])
    student, teacher = make_model(DEIT).double(), make_model('test_resnet').double().eval()
    for model, config in ((student, IMAGENET), (teacher, STATISTICS[statistics])):
        model.pretrained_cfg = {**model.pretrained_cfg, 'mean': config['mean'], 'std': config['std']}
    theirs = timm_task(
        copy.deepcopy(student), copy.deepcopy(teacher), nn.CrossEntropyLoss(), dtype=torch.float64, verbose=False,
        **timm_kwargs)
    if options[0] == 'deit':
        student.set_distilled_training(True)
    ours = PairTask(
        one_branch('b', student), create_criterion(parsed, 1, CPU, 'b'),
        teacher=Teacher(teacher, 'a', STATISTICS[statistics], IMAGENET), verbose=False)
    # The factors of the normalisation are float32 here.
    tolerance = 1e-10 if statistics == 'same statistics' else 1e-5
    ours.set_epoch(0)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):  # the second from other weights
        x = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=generator)
        y = torch.randint(NUM_CLASSES, (6,), generator=generator)
        got, want = ours.train()(x, y), theirs.train()(x, y)
        assert_all_close(got, {
            'loss': want['loss'], 'ce_b_loss': want['task_loss'], term: want[timm_term] * ratio}, tolerance)
        assert torch.equal(got['output'].logits_b, want['output'])
        wanted = theirs.trainable_module
        for model, result in ((student, got), (wanted, want)):
            model.zero_grad()
            result['loss'].backward()
        assert_all_close(grads(student), grads(wanted), tolerance)
        with torch.no_grad():
            for parameter, other in zip(student.parameters(), wanted.parameters(), strict=True):
                parameter -= 0.1 * parameter.grad
                other.copy_(parameter)


# cosub

def test_cosub_gives_every_block_the_rate(digits_folder, tmp_path):
    run = start_run(digits_folder, tmp_path, '--method', 'cosub', '--model-a', 'test_convnext', '--drop-path', '0.3')
    assert [module.drop_prob for module in run.pair.modules() if isinstance(module, DropPath)] == [0.3] * 9
    seen = []
    run.pair.model_a.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    train_one_epoch(run)
    assert len(seen) == 5 and all(torch.equal(*x.chunk(2)) for x in seen)  # a batch of 8, twice, in one forward
    assert set(epoch_terms(run)) >= {'train_ce_a_loss', 'train_ce_b_loss', 'train_cosub_a_loss', 'train_cosub_b_loss'}


# dml

class Batches(list):
    """A loader of given batches, in their order."""
    skipped = 0
    images = SimpleNamespace(being_read=str)

    def epoch(self, epoch, first_batch):
        return ((i, x, y, None) for i, (x, y) in enumerate(self))


def plain_kl(logits, reference):
    return F.kl_div(logits.log_softmax(-1), reference.softmax(-1), reduction='batchmean')


def plain_dml(model_a, model_b, optimizer_a, optimizer_b, batches):
    """Deep mutual learning as two networks with an optimizer each; returns each batch's losses."""
    losses = []
    for x, y in batches:
        logits_a, logits_b = model_a(x), model_b(x)
        loss_a = F.cross_entropy(logits_a, y) + plain_kl(logits_a, logits_b.detach())
        optimizer_a.zero_grad()
        loss_a.backward()
        optimizer_a.step()
        with torch.no_grad():
            logits_a = copy.deepcopy(model_a)(x)  # of a copy, which takes the update of the statistics with it
        loss_b = F.cross_entropy(logits_b, y) + plain_kl(logits_b, logits_a)
        optimizer_b.zero_grad()
        loss_b.backward()
        optimizer_b.step()
        losses.append((loss_a.item(), loss_b.item()))
    return losses


def start_dml(data, output, *options, num_batches=6, dtype=torch.float32):
    run = start_run(
        data, output, '--method', 'dml', '--model-a', 'test_resnet', '--model-b', 'test_efficientnet',
        '--smoothing', '0', '--sched', 'none', '--weight-decay-a', '0.05', '--weight-decay-b', '0.1', '--mean', '0.5',
        '--std', '0.5', *options)
    run.pair.to(dtype)
    generator = torch.Generator().manual_seed(0)
    run.loader_train = Batches(
        (torch.randn(8, 3, 16, 16, generator=generator).to(dtype), torch.randint(4, (8,), generator=generator))
        for _ in range(num_batches))
    return run


@pytest.mark.parametrize(('opt', 'lr_a', 'lr_b'), [
    # Lamb's step count is its groups', its clipping that of all groups. Others: test_phases_share_an_optimizer.
    ('momentum', 0.01, 0.005), ('lamb', 5e-3, 2e-3)])
def test_dml_is_two_networks_with_an_optimizer_each(digits_folder, tmp_path, opt, lr_a, lr_b):
    # In float64, since BatchNorm and momentum make 1e-2 of a rounding of float32 within some steps.
    run = start_dml(
        digits_folder, tmp_path, '--opt', opt, '--lr-a', str(lr_a), '--lr-b', str(lr_b), dtype=torch.float64)
    models = [copy.deepcopy(run.pair.branch(side)).train() for side in SIDES]
    calls = {'a': [], 'b': []}
    for side in SIDES:
        run.pair.branch(side).register_forward_hook(
            lambda module, args, output, side=side: calls[side].append((torch.is_grad_enabled(), module.training)))
    optimizers = [create_optimizer_v2(model, opt, lr=lr, weight_decay=decay)
                  for model, decay, lr in zip(models, (0.05, 0.1), (lr_a, lr_b), strict=True)]
    train_one_epoch(run)
    losses = plain_dml(*models, *optimizers, run.loader_train)

    # a with and, after its update, without gradient; b once.
    assert calls['a'] == [(True, True), (False, True)] * 6 and calls['b'] == [(True, True)] * 6
    assert METHODS['dml'].passes(METHODS['dml'].options(), 'ab') == 3
    terms, means = epoch_terms(run), [sum(values) / 6 for values in zip(*losses, strict=True)]
    for side, model, mean in zip(SIDES, models, means, strict=True):
        state = model.state_dict()
        assert {int(value) for key, value in state.items() if key.endswith('num_batches_tracked')} == {6}
        assert_all_close(run.pair.branch(side).state_dict(), state, 1e-8)
        assert terms[f'train_ce_{side}_loss'] + terms[f'train_kl_{side}_loss'] == pytest.approx(mean, rel=1e-8)
    assert terms['train_loss'] == pytest.approx(sum(means), rel=1e-8)
    assert run.task.num_updates == 6  # batches, not optimizer steps


# kron keeps a generator of its own outside its state; docs/reliability.md says so
@pytest.mark.slow
@pytest.mark.parametrize('name', list_optimizers(exclude_filters=['fused*', 'bnb*', 'kron*', 'adahessian']))
def test_phases_share_an_optimizer_as_if_each_had_its_own_and_it_goes_on_exactly(name):
    # Of all kinds: with counts and moments by parameter, by group, or by themselves.
    def create(models):
        return create_optimizer_v2([
            {'params': list(model.parameters()), 'side': side, 'lr': 0.01, 'weight_decay': 0.01}
            for side, model in models.items()], opt=name, lr=0.01)

    def train(shared, saved=False):
        torch.manual_seed(0)
        models = {side: nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
                  for side, width in (('a', 8), ('b', 5))}
        optimizers = dict.fromkeys(SIDES, create(models)) if shared else {
            side: create({side: model}) for side, model in models.items()}
        for step, x in enumerate(torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))):
            if saved and step == 3:
                file = io.BytesIO()
                torch.save(optimizers['a'].state_dict(), file)
                file.seek(0)
                optimizers = dict.fromkeys(SIDES, create(models))
                optimizers['a'].load_state_dict(torch.load(file, weights_only=True))
            outputs = {side: model(x) for side, model in models.items()}
            for side in SIDES:
                partner = models['a'](x) if side == 'b' else outputs['b']
                (outputs[side] - partner.detach()).pow(2).mean().backward()
                with only(optimizers[side], side):
                    optimizers[side].step()
                    optimizers[side].zero_grad()
        assert not shared or [group['side'] for group in optimizers['a'].param_groups] == ['a', 'b']
        return {side + key: value for side in SIDES for key, value in models[side].named_parameters()}

    together = train(shared=True)
    assert_equal_states(train(shared=True, saved=True), together)
    for key, value in train(shared=False).items():
        assert_close(together[key], value, rtol=0, atol=1e-6)


def test_dml_with_a_gradient_scaler(digits_folder, tmp_path):
    options = ['--opt', 'momentum', '--lr', '0.01', '--clip-grad', '1.0']
    plain, scaled = (start_dml(digits_folder, tmp_path, *options, num_batches=5) for _ in range(2))
    scaled.update.scaler = torch.amp.GradScaler('cpu', init_scale=2., growth_interval=1)
    train_one_epoch(plain)
    train_one_epoch(scaled)
    assert scaled.update.scaler.get_scale() == 2 ** 11  # it grew after each of two phases a batch
    assert_all_close(scaled.pair.state_dict(), plain.pair.state_dict(), 1e-7)
    # An overflow in one phase costs that phase's step alone.
    run = start_dml(digits_folder, tmp_path, *options, num_batches=1)
    run.update.scaler = torch.amp.GradScaler('cpu', init_scale=2.)
    next(run.pair.model_a.parameters()).register_hook(lambda grad: grad * float('inf'))
    before = copy.deepcopy(run.pair.state_dict())
    train_one_epoch(run)
    assert run.update.scaler.get_scale() == 1.
    for key, parameter in run.pair.named_parameters():
        assert torch.equal(parameter, before[key]) == (not key.startswith('model_b')), key


def test_dml_leaves_other_statistics_alone():
    # The refresh of a forward of a model in evaluation mode, or without running statistics.
    task = make_task(CASES['dml'])
    norm = task.trainable_module.model_a.norm
    x, y = make_batch()
    task(x, y, phase=0)
    norm.eval()
    before = copy.deepcopy(norm.state_dict())
    task(x, y, phase=1)
    assert norm.track_running_stats and not norm.training
    assert_equal_states(norm.state_dict(), before)
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


def method_options(name, teacher):
    return [str(teacher) if option == 'TEACHER' else option for option in METHOD_RUNS[name]]


def assert_trained(name, folder):
    """The run has its terms, metrics, EMA, and exports: timm's plain models with the best epoch's averaged weights."""
    sides = [side for side in SIDES if f'--model-{side}' in METHOD_RUNS[name]]
    table = rows(folder)
    assert len(table) == 2 and all(float(row['train_loss']) > 0 for row in table)
    checkpoint = last(folder)
    state, averaged = checkpoint['state_dict'], checkpoint['state_dict_ema']
    assert {key.partition('.')[0] for key in state} - {'affine'} == {f'model_{side}' for side in sides}
    assert list(state) == list(averaged)
    assert any(not torch.equal(averaged[key], state[key]) for key in state)
    assert all(torch.isfinite(value).all() for value in [*state.values(), *averaged.values()])
    assert len(list((folder / 'export').iterdir())) == len(sides)
    for side in sides:
        assert 0 <= float(table[-1][f'eval_ema_top1_{side}']) <= 100
        best = torch.load(folder / f'best_{side}.pth.tar', weights_only=True)
        architecture = best['branches'][side]['architecture']
        method = METHOD_RUNS[name][1] if METHOD_RUNS[name][0] == '--method' else 'vpl'
        model = timm.create_model(f'local-dir:{folder}/export/{method}-{architecture}', pretrained=True).eval()
        assert_equal_weights(
            {f'model_{side}.{key}': value for key, value in model.state_dict().items()}, best['state_dict_ema'])
        if architecture == DEIT:  # the mean of its two heads
            x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            features = model.forward_features(x)
            heads = model.head(features[:, 0]), model.head_dist(features[:, 1])
            assert_close(model(x), (heads[0] + heads[1]) / 2, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(*heads)


@pytest.mark.parametrize('name', [
    name if name == 'deit' else pytest.param(name, marks=pytest.mark.slow) for name in METHOD_RUNS])
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
        assert_equal_states(last(whole)[key], last(part)[key])
    assert summary(whole) == summary(part)
    assert last(whole)['saver']['best_branches'] == last(part)['saver']['best_branches']


def test_teacher_is_validated_as_in_its_own_run(digits_folder, teacher_run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(digits_folder, tmp_path, '--epochs', '1', *method_options('distill', teacher_run), '--img-size', '48',
        '--model-kwargs-b', 'img_size=48', models=[])
    best = last(teacher_run)['saver']['best_branches']['a'][0]
    assert f'Teacher: top1 {best:.3f} ' in caplog.text


# Several processes: that they train as one is in test_task.py.

@pytest.mark.slow
@pytest.mark.parametrize('name', METHOD_RUNS)
def test_torchrun_with_everything(digits_folder, teacher_run, tmp_path, name):
    options = [*SMALL, *NOISE, '-b', '4', '--mixup', '0.2', '--export', '--output', tmp_path, '--experiment', 'run']
    torchrun(2, digits_folder, *options, *method_options(name, teacher_run))
    assert_trained(name, tmp_path / 'run')
    assert {row['processes'] for row in rows(tmp_path / 'run')} == {'2'}


# Usage errors; others: command_lines.yaml

def test_models_named_for_deit_have_a_token(capsys, digits_folder, tmp_path):
    line = error_line(capsys, digits_folder, *SMALL, '--output', tmp_path, '--method', 'deit', *PAIR)
    names = {name for name in line.replace(',', ' ').split() if timm.is_model(name)} - {*PAIR}
    assert len(names) > 1
    for name in names:
        with torch.device('meta'):
            assert hasattr(timm.create_model(name), 'set_distilled_training'), name


@pytest.mark.parametrize(('save', 'options', 'message'), [
    ({'num_classes': 3}, [], 'test_efficientnet has 3 classes, but the data has 4'),
    ({'class_names': ['class0', 'class1', 'tabby', 'class3']}, [], "class 2 is 'tabby' in the model and 'class2'"),
    ({'in_chans': 1}, [], ''),
    (None, ['--teacher-branch', 'b'], 'has no branch b'),
    ('empty', [], ''),
], ids=str)
def test_teachers_that_do_not_fit(capsys, digits_folder, teacher_run, tmp_path, save, options, message):
    teacher = tmp_path / 'teacher' if save else teacher_run
    if isinstance(save, dict):
        save_teacher(teacher, **save)
    teacher.mkdir(exist_ok=True)
    line = error_line(
        capsys, digits_folder, *SMALL, '--output', tmp_path, '--method', 'distill', *PAIR[2:], '--teacher', teacher,
        *options)
    assert str(teacher) in line and message in line
