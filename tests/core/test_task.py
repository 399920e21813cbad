"""PairTask in a loop written for timm's own tasks, its streams, clipping and EMA, and in real gloo processes."""
import copy
import logging
import pickle
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from processes import load_results, run_ranks, run_script
from small import TinyModel
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, adaptive_clip_grad

from timm_vpl import PairOutput, PairTask, PairWrapper, StagedLoss, VPLLoss
from timm_vpl.core.methods import METHODS, Setting
from timm_vpl.core.seeding import BranchStreams
from timm_vpl.core.teacher import Teacher
from timm_vpl.core.terms import base_term

NUM_CLASSES = 4
CPU = torch.device('cpu')
DEIT = 'deit_tiny_distilled_patch16_224'
MODEL_KWARGS = {
    'test_vit': {'img_size': 32, 'depth': 2},
    DEIT: {'img_size': 32, 'embed_dim': 48, 'depth': 2, 'num_heads': 3},
}
# With E = 4, x = 25, y = 50: contrastive in epochs 0 and 1, KL from epoch 1 on.
EPOCHS = 4
STAGE_1 = ['ce_a_loss', 'ce_b_loss', 'contrastive_loss']
STAGE_2 = ['ce_a_loss', 'ce_b_loss', 'contrastive_loss', 'kl_loss']
STAGE_3 = ['ce_a_loss', 'ce_b_loss', 'kl_loss']
STAGES = [STAGE_1, STAGE_2, STAGE_3, STAGE_3]


def make_model(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=NUM_CLASSES, **{**MODEL_KWARGS.get(name, {}), **kwargs})


def make_pair(name_a='test_efficientnet', name_b='test_vit', seed=0, affine_side='b', **kwargs):
    model_a, model_b = make_model(name_a, seed=seed, **kwargs), make_model(name_b, seed=seed + 1, **kwargs)
    torch.manual_seed(seed + 2)
    return PairWrapper(model_a, model_b, affine_side=affine_side)


def make_criterion(epochs=EPOCHS, **kwargs):
    return VPLLoss(epochs, x=25, y=50, tau=0.2, **kwargs)


def learnable_batches(num_batches=2, batch_size=8):
    """Images that differ by class, with a little noise; fixed."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(NUM_CLASSES, 3, 32, 32, generator=generator)
    batches = []
    for _ in range(num_batches):
        target = torch.randperm(batch_size, generator=generator) % NUM_CLASSES
        batches.append((patterns[target] + 0.3 * torch.randn(batch_size, 3, 32, 32, generator=generator), target))
    return batches


def clone_state(value):
    return copy.deepcopy({key: tensor.detach() for key, tensor in value.items()})


def assert_equal_states(got, want):
    assert list(got) == list(want)
    assert [key for key in want if not torch.equal(got[key], want[key])] == []


# A loop in the style of timm's train script. It knows timm's tasks and their interface, nothing of pairs.

def run_like_timm(
        create_task,
        model,
        batches,
        epochs=EPOCHS,
        stop=None,
        output_dir=None,
        resume='',
        backend=None,
        accum_steps=1,
):
    """Train as timm's train.py does and return (task, optimizer, list of results by step, list of metrics)."""
    updates_per_epoch = (len(batches) + accum_steps - 1) // accum_steps
    optimizer = create_optimizer_v2(model, 'adamw', lr=2e-3, weight_decay=0.05)
    task = create_task(model, device=CPU, dtype=torch.float32, verbose=False)
    start_epoch = 0
    if resume:
        start_epoch = resume_task_checkpoint(task, resume, optimizer, log_info=False)
    task.setup_ema(decay=0.9, use_warmup=True)
    if resume:
        load_task_ema_checkpoint(task, resume)
    if backend:
        task.compile(backend=backend)
    saver = None
    if output_dir is not None:
        saver = CheckpointSaver(
            model=task.get_trainable_module(), optimizer=optimizer, task=task, checkpoint_dir=str(output_dir))

    steps, metrics = [], []
    for epoch in range(start_epoch, epochs if stop is None else stop):
        task.train()
        num_updates = epoch * updates_per_epoch
        last_accum_steps = len(batches) % accum_steps or accum_steps
        last_batch_idx_to_accum = len(batches) - last_accum_steps
        optimizer.zero_grad()
        for batch_idx, (input, target) in enumerate(batches):
            need_update = batch_idx + 1 == len(batches) or (batch_idx + 1) % accum_steps == 0
            step_accum_steps = last_accum_steps if batch_idx >= last_batch_idx_to_accum else accum_steps
            with nullcontext() if need_update else task.no_sync():
                result = task(input, target)
                loss = result['loss']
                steps.append({name: float(value.detach()) for name, value in result.items() if name.endswith('loss')})
                if accum_steps > 1:
                    loss /= step_accum_steps
                loss.backward()
            if not need_update:
                continue
            optimizer.step()
            num_updates += 1
            optimizer.zero_grad()
            task.update_ema(step=num_updates)
        metrics.append([validate_like_timm(task, batches, ema) for ema in (False, True)])
        if saver is not None:
            saver.save_checkpoint(epoch, metric=metrics[-1][0]['top1'])
    return task, optimizer, steps, metrics


def validate_like_timm(task, batches, ema):
    model = task.get_eval_model(ema=ema)
    model.eval()
    evaluator = task.create_evaluator()
    with torch.no_grad():
        for input, target in batches:
            output = model(input)
            if isinstance(output, (tuple, list)):
                output = output[0]
            evaluator.update(output, target)
    return evaluator.compute()


def vision_pair(seed=0, updates_per_epoch=2):
    def create_task(pair, **kwargs):
        return PairTask(pair, make_criterion(), updates_per_epoch=updates_per_epoch, **kwargs)

    return make_pair(seed=seed), create_task


def terms_of(steps):
    return [sorted(name for name in step if name != 'loss') for step in steps]


def test_trains_in_a_loop_that_knows_nothing_of_pairs():
    model, create_task = vision_pair()
    task, _, steps, metrics = run_like_timm(create_task, model, learnable_batches(), epochs=8)
    assert isinstance(task, TrainingTask) and len(steps) == 16
    for name in ('ce_a_loss', 'ce_b_loss'):
        assert steps[-1][name] < 0.5 * steps[0][name]
    # Validation saw branch a.
    for ema in (False, True):
        module = task.get_trainable_module(ema=True).module if ema else task.trainable_module
        evaluator = task.create_evaluator()
        for x, target in learnable_batches():
            evaluator.update(module.eval().model_a(x), target)
        assert metrics[-1][ema] == evaluator.compute()


@pytest.mark.parametrize(('num_batches', 'accum_steps'), [(3, 1), (5, 2)])
def test_stages_follow_optimizer_updates(num_batches, accum_steps):
    # Of five batches, two to an update: three updates an epoch too, the last of one batch.
    model, create_task = vision_pair(updates_per_epoch=3)
    task, _, steps, _ = run_like_timm(
        create_task, model, learnable_batches(num_batches, 4), epochs=EPOCHS + 1, accum_steps=accum_steps)
    assert terms_of(steps) == [terms for terms in [*STAGES, STAGE_3] for _ in range(num_batches)]
    assert task.num_updates == 3 * (EPOCHS + 1)
    for step in steps:
        assert step['loss'] == pytest.approx(sum(value for name, value in step.items() if name != 'loss'), rel=1e-6)


def test_stages_change_without_ema_and_with_calls_counted():
    task = PairTask(make_pair(), make_criterion(), updates_per_epoch=2, verbose=False)
    x, target = learnable_batches()[0]
    seen = []
    for _ in range(2 * EPOCHS):
        seen.append(sorted(name for name in task(x, target) if name.endswith('_loss')))
        task.update_ema()
    assert seen == [terms for terms in STAGES for _ in range(2)]
    assert task.num_updates == 2 * EPOCHS


@pytest.mark.slow
def test_compiled_in_that_loop():
    torch._dynamo.reset()
    model, create_task = vision_pair()
    plain_model = copy.deepcopy(model)
    task, _, steps, metrics = run_like_timm(create_task, model, learnable_batches(), epochs=2, backend='eager')
    plain, _, plain_steps, plain_metrics = run_like_timm(create_task, plain_model, learnable_batches(), epochs=2)
    assert terms_of(steps) == terms_of(plain_steps)
    assert list(task.get_checkpoint_state()['state_dict']) == list(plain.get_checkpoint_state()['state_dict'])
    for step, want in zip(steps, plain_steps, strict=True):
        assert step == {name: pytest.approx(value, rel=1e-4) for name, value in want.items()}
    assert metrics[-1][0]['loss'] == pytest.approx(plain_metrics[-1][0]['loss'], rel=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize('stop', [1, 3])
def test_resumed_run_equals_the_uninterrupted_one(stop, tmp_path):
    batches = learnable_batches()
    model, create_task = vision_pair()
    want, want_optimizer, want_steps, want_metrics = run_like_timm(create_task, model, batches)

    model, create_task = vision_pair()
    run_like_timm(create_task, model, batches, stop=stop, output_dir=tmp_path)
    model, create_task = vision_pair(seed=50)  # other weights, which the checkpoint replaces
    got, optimizer, steps, metrics = run_like_timm(
        create_task, model, batches, resume=str(tmp_path / 'last.pth.tar'))

    assert terms_of(steps) == [terms for terms in STAGES[stop:] for _ in range(2)]
    assert steps == want_steps[2 * stop:] and metrics == want_metrics[stop:]
    for ema, key in ((False, 'state_dict'), (True, 'state_dict_ema')):
        assert_equal_states(got.get_checkpoint_state(ema=ema)[key], want.get_checkpoint_state(ema=ema)[key])
    got_moments, want_moments = (each.state_dict()['state'] for each in (optimizer, want_optimizer))
    for index, state in want_moments.items():
        assert all(torch.equal(got_moments[index][name], value) for name, value in state.items())


def test_checkpoint_holds_the_pair_and_the_count(tmp_path):
    model, create_task = vision_pair()
    task, *_ = run_like_timm(create_task, model, learnable_batches(), stop=2, output_dir=tmp_path)
    checkpoint = torch.load(tmp_path / 'last.pth.tar', weights_only=True)
    assert list(checkpoint['state_dict']) == list(checkpoint['state_dict_ema']) == list(model.state_dict())
    assert {key.split('.')[0] for key in checkpoint['state_dict']} == {'model_a', 'model_b', 'affine'}
    assert checkpoint['task_state'] == {'num_updates': 4} and 'task_state_ema' not in checkpoint
    assert_equal_states(checkpoint['state_dict'], model.state_dict())


@pytest.mark.parametrize(('num_updates', 'terms'), [
    (None, STAGE_1), (0, STAGE_1), (4, STAGE_1), (5, STAGE_2), (9, STAGE_2), (10, STAGE_3), (99, STAGE_3)])
def test_resume_within_an_epoch_is_in_its_stage(num_updates, terms):
    task = PairTask(make_pair(), make_criterion(), updates_per_epoch=5, verbose=False)
    other = make_pair(seed=9)
    task.load_checkpoint_state(other.state_dict(), None if num_updates is None else {'num_updates': num_updates})
    assert task.num_updates == (num_updates or 0)
    assert sorted(name for name in task(*learnable_batches()[0]) if name.endswith('_loss')) == terms
    with pytest.raises(RuntimeError):
        task.load_checkpoint_state(other.model_a.state_dict())


def test_loop_that_counts_epochs_itself():
    task = PairTask(make_pair(), make_criterion(), verbose=False)
    batch = learnable_batches()[0]
    for epoch in (0, 1, 2, 3, 1):
        task.set_epoch(epoch)
        task.update_ema(step=1000)
        assert sorted(name for name in task(*batch) if name.endswith('_loss')) == STAGES[epoch]


def test_result_of_a_step():
    task = PairTask(make_pair(), make_criterion(contrastive_weight=0.5, kl_weight=2.), updates_per_epoch=2)
    x, target = learnable_batches()[0]
    task.update_ema(step=2)
    result = task(x, target)
    assert set(result) == {*STAGE_2, 'loss', 'output'}
    want = result['ce_a_loss'] + result['ce_b_loss'] + 0.5 * result['contrastive_loss'] + 2 * result['kl_loss']
    torch.testing.assert_close(result['loss'], want)
    assert result['output'].embed_b is not None and result['output'].sample_ids is None
    ids = torch.arange(8) // 2
    marked = task(x, target, ids)
    assert marked['output'].sample_ids is ids
    assert not torch.equal(marked['contrastive_loss'], result['contrastive_loss'])
    # The affine layer is not called where no term uses it.
    task.update_ema(step=4)
    assert task(x, target)['output'].embed_b is None


# gradient accumulation and clipping

def test_accumulated_gradients_are_the_mean_of_the_batches():
    pair = make_pair('test_convnext', affine_side='a')  # no BatchNorm
    task = PairTask(pair, make_criterion(), updates_per_epoch=1, verbose=False)
    batches = learnable_batches(3, 4)
    want = []
    for input, target in batches:
        pair.zero_grad()
        task(input, target)['loss'].backward()
        want.append([parameter.grad.clone() for parameter in pair.parameters()])
    pair.zero_grad()
    for i, (input, target) in enumerate(batches):
        with task.no_sync() if i < 2 else nullcontext():
            (task(input, target)['loss'] / 3).backward()
    for parameter, *grads in zip(pair.parameters(), *want, strict=True):
        torch.testing.assert_close(parameter.grad, sum(grads) / 3)


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def task_with_gradients(name_a='test_resnet', name_b='test_vit', scale=30.):
    task = PairTask(make_pair(name_a, name_b), make_criterion(), updates_per_epoch=1, verbose=False)
    task.update_ema(step=1)
    (scale * task(*learnable_batches()[0])['loss']).backward()
    return task, task.trainable_module


@pytest.mark.parametrize(('limits', 'mode'), [
    ({'a': 1., 'b': 0.5}, 'norm'),
    ({'a': 1., 'b': None}, 'norm'),
    ({'b': 1.}, 'norm'),
    ({'a': 1e9, 'b': 1e9}, 'norm'),
    ({'a': 1e-2, 'b': 1e-3}, 'value'),
], ids=str)
def test_each_branch_is_clipped_by_its_own_norm(limits, mode):
    task, pair = task_with_gradients()
    before = gradients(pair)
    task.clip_gradients(limits, mode=mode)
    norms = {}
    for side, prefixes in (('a', 'model_a.'), ('b', ('model_b.', 'affine.'))):
        names = [name for name in before if name.startswith(prefixes)]
        limit = limits.get(side)
        norms[side] = torch.cat([before[name].flatten() for name in names]).norm()
        for name in names:
            got, want = pair.get_parameter(name).grad, before[name]
            if limit is None or limit > 1e6:
                assert torch.equal(got, want), name
            elif mode == 'value':
                assert torch.equal(got, want.clamp(-limit, limit)), name
            else:
                torch.testing.assert_close(got, want * limit / (norms[side] + 1e-6), rtol=1e-5, atol=0.)
    assert min(norms.values()) > 1.5 and abs(norms['a'] - norms['b']) > 0.1


@pytest.mark.parametrize('name_b', ['test_vit', DEIT])
def test_adaptive_clipping_leaves_out_each_branchs_classifier(name_b):
    task, pair = task_with_gradients(name_b=name_b)
    heads = {name for name, _ in pair.named_parameters() if name.startswith(('model_a.fc.', 'model_b.head'))}
    assert len(heads) == (6 if name_b == DEIT else 4)
    rest = [parameter for name, parameter in pair.named_parameters() if name not in heads]
    got = task.get_clip_parameters(exclude_head=True)
    assert {id(parameter) for parameter in got} == {id(parameter) for parameter in rest} and len(got) == len(rest)
    everything = {id(parameter) for parameter in pair.parameters()}
    assert {id(parameter) for parameter in task.get_clip_parameters()} == everything
    assert {id(parameter) for parameter in task.clip_groups()['b']} == {
        id(parameter) for part in (pair.model_b, pair.affine) for parameter in part.parameters()}

    before = gradients(pair)
    task.clip_gradients({'a': 1e-4, 'b': 1e-4}, mode='agc')
    after = gradients(pair)
    assert all(torch.equal(after[name], before[name]) for name in heads)
    for name in before:
        pair.get_parameter(name).grad = before[name].clone()
    adaptive_clip_grad(rest, 1e-4)
    assert_equal_states(gradients(pair), after)
    assert not torch.equal(after['model_a.conv1.0.weight'], before['model_a.conv1.0.weight'])
    assert not torch.equal(after['model_b.patch_embed.proj.weight'], before['model_b.patch_embed.proj.weight'])


@pytest.mark.parametrize('side', ['a', 'b'])
def test_clip_parameters_of_one_branch(side):
    model = make_model('test_vit')
    pair = PairWrapper(model, None) if side == 'a' else PairWrapper(None, model)
    task = PairTask(pair, StagedLoss([base_term(side)]), verbose=False)
    assert list(task.clip_groups()) == [side]
    assert [id(parameter) for parameter in task.get_clip_parameters()] == [id(p) for p in model.parameters()]


# EMA

def test_ema_is_the_average_computed_by_hand():
    pair = make_pair('test_resnet')
    task = PairTask(pair, make_criterion(), updates_per_epoch=2, verbose=False)
    assert not task.has_ema() and task.get_checkpoint_state(ema=True) == {}
    ema = task.setup_ema(decay=0.9, use_warmup=True)
    assert task.has_ema() and list(ema.module.state_dict()) == list(pair.state_dict())
    assert list(task.get_checkpoint_state(ema=True)['state_dict_ema']) == list(pair.state_dict())
    want = clone_state(pair.state_dict())
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.05)
    task.train()
    for step in range(1, 6):
        task(*learnable_batches()[step % 2])['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step)
        decay = 0. if step == 1 else min(0.9, 1 - step ** (-2 / 3))
        for key, value in pair.state_dict().items():
            want[key] = decay * want[key] + (1 - decay) * value if value.is_floating_point() else value.clone()
    got = task.get_checkpoint_state(ema=True)['state_dict_ema']
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, msg=key)
    assert not torch.equal(got['affine.weight'], pair.affine.weight)

    # Evaluation runs the averaged weights, and the EMA's hooks serve its own branches.
    other = make_pair('test_resnet', seed=70).eval()
    other.load_state_dict(got)
    x = learnable_batches()[0][0]
    output = task.get_eval_model(ema=True).eval()(x)
    for field, expected in zip(output[:4], other(x)[:4], strict=True):
        assert torch.equal(field, expected)
    assert not torch.equal(output.logits_a, pair.eval()(x).logits_a)


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=['copy', 'pickle'])
def test_copied_task_is_the_task(clone):
    task = PairTask(make_pair('test_resnet', drop_rate=0.1), make_criterion(), updates_per_epoch=2,
                    streams=BranchStreams(0, 0, CPU), verbose=False)
    task.setup_ema(decay=0.9)
    tasks = [task]
    for step in range(1, 6):
        results = []
        for each in tasks:
            result = each(*learnable_batches()[step % 2])
            each.zero_grad()
            result['loss'].backward()
            torch.optim.SGD(each.trainable_module.parameters(), lr=0.05).step()
            each.update_ema(step=step)
            results.append(result)
        for result in results[1:]:
            assert list(result) == list(results[0])
            assert all(torch.equal(result[name], results[0][name]) for name in STAGES[(step - 1) // 2])
            assert_equal_states(tasks[1].state_dict(), task.state_dict())
        if step == 2:
            tasks.append(clone(task))


def test_ema_loads_back():
    task = PairTask(make_pair(), make_criterion(), updates_per_epoch=2, verbose=False)
    with pytest.raises(RuntimeError, match='setup_ema'):
        task.load_checkpoint_state(make_pair().state_dict(), ema=True)
    task.setup_ema(decay=0.9)
    other = make_pair(seed=33)
    task.load_checkpoint_state(other.state_dict(), ema=True)
    assert_equal_states(task.get_checkpoint_state(ema=True)['state_dict_ema'], other.state_dict())
    assert_equal_states(task.get_checkpoint_state()['state_dict'], make_pair().state_dict())
    assert task.num_updates == 0


# streams of random numbers

STOCHASTIC = {'drop_rate': 0.3, 'drop_path_rate': 0.3}


def shaken(model):
    """No layer at zero, so that drop path shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def pair_of(name_a, name_b, **kwargs):
    """A pair whose branches do not depend on each other; a name may be None."""
    models = [
        None if name is None else shaken(make_model(name, seed=seed, **STOCHASTIC))
        for seed, name in ((1, name_a), (2, name_b))
    ]
    torch.manual_seed(3)
    return PairWrapper(*models, **kwargs)


def streaming_task(pair, criterion=None, rank=0, seed=5):
    if criterion is None:
        solo = StagedLoss([base_term(side) for side in pair.sides])
        criterion = make_criterion() if len(pair.sides) == 2 else solo
    task = PairTask(pair, criterion, streams=BranchStreams(seed, rank, CPU), verbose=False)
    task.set_epoch(0)
    return task.train()


def logits_at(task, position, side='b'):
    task.streams.set_position(*position)
    return task(*learnable_batches()[0])['output'][side == 'b'].detach()


def test_draws_of_a_branch_do_not_depend_on_its_partner():
    partners = ['test_resnet', 'test_convnext', None]
    tasks = {name: streaming_task(pair_of(name, 'test_vit')) for name in partners}
    swapped = {name: streaming_task(pair_of('test_efficientnet', name)) for name in ('test_vit', 'test_convnext', None)}
    for position in ((0, 0), (0, 1), (3, 0)):
        outputs = [logits_at(task, position) for task in tasks.values()]
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        outputs = [logits_at(task, position, 'a') for task in swapped.values()]
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_draws_depend_on_position_branch_rank_and_seed_only():
    task = streaming_task(pair_of('test_resnet', 'test_vit'))
    first = logits_at(task, (1, 2))
    torch.rand(7)  # what else was drawn has no effect
    assert torch.equal(logits_at(task, (1, 2)), first)
    for position in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(logits_at(task, position), first)
    for other in ({'rank': 1}, {'seed': 6}):
        assert not torch.equal(logits_at(streaming_task(pair_of('test_resnet', 'test_vit'), **other), (1, 2)), first)
    # The same network as a and as b has two streams.
    model = make_model('test_vit', **STOCHASTIC)
    twins = streaming_task(PairWrapper(shaken(model), copy.deepcopy(model)))
    assert not torch.equal(logits_at(twins, (1, 2), 'a'), logits_at(twins, (1, 2), 'b'))
    assert torch.equal(*twins.eval()(*learnable_batches()[0])['output'][:2])


@pytest.mark.parametrize('affine_side', ['a', 'b'])
@pytest.mark.parametrize('names', [('test_resnet', 'test_vit'), ('test_byobnet', DEIT)], ids='+'.join)
def test_pair_with_weights_zero_trains_as_the_branches_alone(names, affine_side):
    pair = pair_of(*names, affine_side=affine_side)
    solos = {'a': PairWrapper(copy.deepcopy(pair.model_a), None), 'b': PairWrapper(None, copy.deepcopy(pair.model_b))}
    start = clone_state(pair.state_dict())
    tasks = {
        'pair': streaming_task(pair, make_criterion(contrastive_weight=0., kl_weight=0.)),
        'a': streaming_task(solos['a']),
        'b': streaming_task(solos['b']),
    }
    for task in tasks.values():
        optimizer = create_optimizer_v2(
            task.trainable_module, 'adamw', lr=3e-3, weight_decay=0.05, layer_decay=0.75)
        for epoch in range(2):
            task.set_epoch(epoch)
            for batch, (input, target) in enumerate(learnable_batches()):
                task.streams.set_position(epoch, batch)
                task(input, target)['loss'].backward()
                task.clip_gradients({'a': 1., 'b': 0.5})
                optimizer.step()
                optimizer.zero_grad()
    for side in 'ab':
        assert_equal_states(pair.branch(side).state_dict(), solos[side].branch(side).state_dict())
        moved = [
            name for name, parameter in pair.named_parameters()
            if name.startswith(f'model_{side}.') and not torch.equal(parameter, start[name])]
        assert len(moved) == len(list(pair.branch(side).parameters()))
    for key in ('affine.weight', 'affine.bias'):
        assert torch.equal(pair.get_parameter(key), start[key])


# precision, messages

def test_loss_is_float32_under_autocast():
    pair = make_pair('test_resnet')
    task = PairTask(pair, make_criterion(), updates_per_epoch=2, verbose=False)
    x, target = learnable_batches()[0]
    for step, terms in enumerate(STAGES):
        task.update_ema(step=2 * step)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            result = task(x, target)
        assert result['output'].logits_a.dtype == result['output'].logits_b.dtype == torch.bfloat16
        # All of its arithmetic is: the same as from the outputs in float32, without autocast.
        in_float32 = PairOutput(*(None if field is None else field.float() for field in result['output']))
        want = task.criterion.terms(in_float32, target)
        assert set(want) == {*terms, 'loss'}
        for name, value in want.items():
            assert result[name].dtype == torch.float32 and torch.isfinite(value), name
            assert torch.equal(result[name], value), name
        pair.zero_grad()
        result['loss'].backward()
        assert all(
            parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all()
            for parameter in pair.parameters() if parameter.grad is not None)


def messages(caplog, start='Epoch'):
    return [record.getMessage() for record in caplog.records
            if record.name == 'timm_vpl.core.task' and record.getMessage().startswith(start)]


def test_each_change_of_stage_is_logged_once(caplog):
    caplog.set_level(logging.INFO)
    task = PairTask(make_pair(), make_criterion(), updates_per_epoch=2)
    assert messages(caplog) == [] and len(messages(caplog, 'PairTask')) == 1
    assert 'stage 1' in messages(caplog, 'PairTask')[0]
    logged = {}
    for step in range(1, 2 * EPOCHS + 3):
        task.update_ema(step=step)
        logged[step] = messages(caplog)
        caplog.clear()
    lines = {step: line for step, line in logged.items() if line}
    assert list(lines) == [2, 4] and all(len(line) == 1 for line in lines.values())
    assert lines[2][0].startswith('Epoch 1: stage 2') and 'kl_loss' in lines[2][0]
    assert lines[4][0].startswith('Epoch 2: stage 3') and 'contrastive_loss' not in lines[4][0]


def test_quiet_task_logs_nothing(caplog):
    caplog.set_level(logging.INFO)
    task = PairTask(make_pair(), make_criterion(), updates_per_epoch=2, verbose=False)
    for step in range(1, 9):
        task.update_ema(step=step)
    assert [record for record in caplog.records if record.name.startswith('timm_vpl')] == []
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f'updates_per_epoch is {wrong}'):
            PairTask(make_pair(), make_criterion(), updates_per_epoch=wrong)


# what runs in the processes: float64, no BatchNorm

WORLD = 2
LOCAL_SIZE = 3
MICRO_BATCHES = 2
AFFINE = ('none', 'a', 'b')


def distributed_pair(affine, dtype=torch.float64):
    torch.manual_seed(7)
    model_a = TinyModel(NUM_CLASSES, 24 if affine == 'none' else 16)
    model_b = make_model('test_vit', seed=8, embed_dim=24, img_size=16, patch_size=8)
    torch.manual_seed(9)
    return PairWrapper(model_a, model_b, affine_side='b' if affine == 'none' else affine).to(dtype)


def three_stages(**kwargs):
    """One epoch in each stage."""
    return VPLLoss(3, x=33, y=34, tau=0.3, **kwargs)


def micro_batches(update, rank=None, dtype=torch.float64):
    """The batches of an optimizer update, global or one process's share."""
    generator = torch.Generator().manual_seed(update)
    batches = []
    for _ in range(MICRO_BATCHES):
        x = torch.randn(LOCAL_SIZE * WORLD, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
        target = torch.randint(NUM_CLASSES, (LOCAL_SIZE * WORLD,), generator=generator)
        share = slice(None) if rank is None else slice(rank * LOCAL_SIZE, (rank + 1) * LOCAL_SIZE)
        batches.append((x[share], target[share]))
    return batches


def take_gradients(pair):
    return {
        name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in pair.named_parameters()}


def train_task(
        rank,
        affine='b',
        updates=3,
        optimizer=torch.optim.SGD,
        in_place=False,
        frozen=False,
        compiled=False,
        dtype=torch.float64,
        **kwargs,
):
    """Train a PairTask, of one process on its share or (rank None) alone on everything.

    Returns:
        A dictionary by update: terms, loss, gradients after the first micro-batch and after all; of AdamW the weights.
    """
    pair = distributed_pair(affine, dtype=dtype)
    if frozen:
        pair.model_a.requires_grad_(False)
    task = PairTask(pair, three_stages(**kwargs), updates_per_epoch=1, verbose=False)
    keys = list(task.get_checkpoint_state()['state_dict'])
    if compiled:
        task.compile(backend='eager')
    if rank is not None:
        task.prepare_distributed()
    task.setup_ema(decay=0.5)  # copies the pair, not what the task keeps for the processes
    optimizer = optimizer([parameter for parameter in pair.parameters() if parameter.requires_grad], lr=0.05)
    steps = []
    for update in range(updates):
        total = 0.
        for i, (input, target) in enumerate(micro_batches(update, rank, dtype)):
            with task.no_sync() if i + 1 < MICRO_BATCHES else nullcontext():
                result = task(input, target)
                loss = result['loss']
                if in_place:  # as timm's train script divides it
                    loss /= MICRO_BATCHES
                else:
                    loss = loss / MICRO_BATCHES
                loss.backward()
            total += float(loss.detach())
            if i == 0:
                first = take_gradients(pair)
        steps.append({
            'terms': sorted(name for name in result if name.endswith('_loss')),
            'loss': total,
            'first': first,
            'gradients': take_gradients(pair),
        })
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=update + 1)
        if isinstance(optimizer, torch.optim.AdamW):
            steps[-1]['weights'] = clone_state(dict(pair.named_parameters()))
            steps[-1]['ema'] = clone_state(task.get_checkpoint_state(ema=True)['state_dict_ema'])
    assert list(task.get_checkpoint_state()['state_dict']) == keys
    assert list(task.get_checkpoint_state(ema=True)['state_dict_ema']) == keys
    return steps


def train_user_loop(rank, affine='b', **kwargs):
    """A user's own loop: one DistributedDataParallel around the pair, the criterion, no task."""
    pair = distributed_pair(affine)
    model = pair if rank is None else nn.parallel.DistributedDataParallel(pair)
    criterion = three_stages(**kwargs)
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.05)
    steps = []
    for epoch in range(3):
        criterion.set_epoch(epoch)
        total = 0.
        for i, (input, target) in enumerate(micro_batches(epoch, rank)):
            with model.no_sync() if rank is not None and i + 1 < MICRO_BATCHES else nullcontext():
                terms = criterion.terms(model(input), target)
                loss = terms['loss'] / MICRO_BATCHES
                loss.backward()
            total += float(loss.detach())
        steps.append({
            'terms': sorted(name for name in terms if name != 'loss'),
            'loss': total,
            'gradients': take_gradients(pair),
        })
        optimizer.step()
        optimizer.zero_grad()
    return steps


def train_method(rank, method, **options):
    """A method of several optimizer phases, or with a teacher, by the task, each branch with its own steps."""
    given = {'rho': 2., 'kl_weight': 0.7, 'tau': 0.3, 'contrastive_weight': 0.6, **options}
    kind = METHODS[method].options
    own = kind(**{name: value for name, value in given.items() if hasattr(kind, name)})
    pair, teacher = distributed_pair('none'), None
    sides = 'b' if METHODS[method].teacher == 'always' else 'ab'
    criterion = METHODS[method].criterion(own, Setting(sides, 3))
    if METHODS[method].teacher == 'always':
        config = {'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'input_size': (3, 16, 16)}
        teacher = Teacher(pair.model_a, 'a', config, config)
        pair = PairWrapper(None, pair.model_b)
    task = PairTask(pair, criterion, teacher=teacher, verbose=False).train()
    if rank is not None:
        task.prepare_distributed()
    task.set_epoch(0)
    optimizers = {side: torch.optim.SGD(pair.branch(side).parameters(), lr=0.05) for side in pair.sides}
    steps = []
    for update in range(3):
        input, target = micro_batches(update, rank)[0]
        found = {'terms': [], 'loss': 0., 'gradients': {}}
        for phase, learners in enumerate(task.phases):
            terms = task(input, target, phase=phase)
            terms['loss'].backward()
            found['terms'] += sorted(name for name in terms if name.endswith('_loss'))
            found['loss'] += float(terms['loss'].detach())
            found['gradients'].update({f'{phase}.{name}': grad for name, grad in take_gradients(pair).items()})
            for side in set(learners) & set(optimizers):
                optimizers[side].step()
                optimizers[side].zero_grad()
        steps.append(found)
    return steps


CASES = {
    'dml': (train_method, {'method': 'dml', 'dml_joint': False}),
    'distill': (train_method, {'method': 'distill', 'distill_terms': 'both'}),
    'task, affine none': (train_task, {'affine': 'none'}),
    'task, affine a': (train_task, {'affine': 'a', 'in_place': True}),
    'task, affine b': (train_task, {'affine': 'b'}),
    'task, affine a, a, both': (train_task, {'affine': 'a', 'contrastive_to': 'a', 'kl_to': 'both'}),
    'task, affine b, both, b': (train_task, {'affine': 'b', 'contrastive_to': 'both', 'kl_to': 'b'}),
    'task, weights zero': (train_task, {'contrastive_weight': 0., 'kl_weight': 0.}),
    'task, branch a frozen': (train_task, {'frozen': True}),
    'task, compiled': (train_task, {'compiled': True, 'dtype': torch.float32}),
    'task, AdamW': (train_task, {'updates': 4, 'optimizer': torch.optim.AdamW}),
    'user, affine none': (train_user_loop, {'affine': 'none'}),
    'user, affine a': (train_user_loop, {'affine': 'a', 'contrastive_to': 'a', 'kl_to': 'b'}),
    'user, affine b': (train_user_loop, {'affine': 'b', 'contrastive_to': 'both', 'kl_to': 'both'}),
    'user, weights zero': (train_user_loop, {'contrastive_weight': 0., 'kl_weight': 0.}),
}


def run_cases(rank, world):
    """Run all cases as one of the processes; an error is that case's result."""
    results = {}
    for name, (function, kwargs) in CASES.items():
        try:
            results[name] = function(rank, **kwargs)
        except Exception:
            results[name] = traceback.format_exc()
    return results


def main(folder):
    torch.set_num_threads(1)
    run_ranks(Path(folder), WORLD, run_cases)


# what looks at the results

@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    """Function name -> results of all ranks; a hang, a crash or a case's error fails with its message."""
    folder = tmp_path_factory.mktemp('processes')
    end = run_script(__file__, folder)
    results = [found or {} for found in load_results(folder, WORLD)]

    def find(name):
        for rank in range(WORLD):
            result = results[rank].get(name, f'no result, {end}')
            if isinstance(result, str):
                pytest.fail(f'{name}, rank {rank}: {result}')
        return [result[name] for result in results]

    return find


@pytest.mark.parametrize('name', [name for name in CASES if 'AdamW' not in name])
def test_processes_equal_one_process(name, processes):
    function, kwargs = CASES[name]
    tolerance = 1e-5 if kwargs.get('dtype') == torch.float32 else 1e-10
    ranks = processes(name)
    want = function(None, **kwargs)
    assert [len(steps) for steps in ranks] == [len(want)] * WORLD
    for update, expected in enumerate(want):
        got = [steps[update] for steps in ranks]
        assert all(step['terms'] == expected['terms'] for step in got)
        assert abs(sum(step['loss'] for step in got) / WORLD - expected['loss']) <= tolerance
        for key, value in expected['gradients'].items():
            for step in got:
                grad = step['gradients'][key]
                if value is None and function is train_user_loop:
                    # Every parameter stays in the graph of a single DistributedDataParallel, at a gradient of zeros.
                    assert grad is not None and not grad.any(), (update, key)
                elif value is None:
                    assert grad is None, (update, key)
                else:
                    assert (grad - value).abs().max() <= tolerance, (update, key)
            assert value is None or not torch.isnan(value).any()


def test_three_stages_were_run(processes):
    # Guards the comparison above: in each case each stage, and in the last no gradient for the affine layer.
    for name in ('task, affine a', 'task, affine b', 'user, affine a', 'user, affine b'):
        for steps in processes(name):
            assert [step['terms'] for step in steps] == [STAGE_1, STAGE_2, STAGE_3]
            weights = [step['gradients']['affine.weight'] for step in steps]
            assert all(weight.abs().max() > 1e-4 for weight in weights[:2])
            assert weights[2] is None if name.startswith('task') else not weights[2].any()


def test_first_micro_batch_is_not_reduced(processes):
    for affine in AFFINE:
        one, other = processes(f'task, affine {affine}')
        for step, other_step in zip(one, other, strict=True):
            for key, grad in step['gradients'].items():
                if grad is None:
                    continue
                assert torch.equal(grad, other_step['gradients'][key])
                assert not torch.equal(step['first'][key], other_step['first'][key]) or not step['first'][key].any()


def test_adamw_leaves_the_affine_layer_that_no_term_uses(processes):
    one, other = processes('task, AdamW')
    assert [step['terms'] for step in one] == [STAGE_1, STAGE_2, STAGE_3, STAGE_3]
    for step, other_step in zip(one, other, strict=True):
        for key in ('weights', 'ema'):
            assert_equal_states(step[key], other_step[key])
    for key, moves in (('affine.weight', [True, False, False]), ('model_b.head.weight', [True, True, True])):
        weights = [step['weights'][key] for step in one]
        assert [not torch.equal(*pair) for pair in zip(weights[1:], weights, strict=False)] == moves


@pytest.fixture
def one_process_group(tmp_path):
    """torchrun --nproc-per-node 1: DistributedDataParallel looks for unused parameters all the same."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_users_loop_in_one_distributed_process(one_process_group):
    pair = distributed_pair('b')
    model = nn.parallel.DistributedDataParallel(pair)
    criterion = three_stages()
    for epoch in (0, 1, 2, 2):
        criterion.set_epoch(epoch)
        pair.zero_grad()
        for input, target in micro_batches(epoch):
            criterion(model(input), target).backward()
        assert bool(pair.affine.weight.grad.any()) == (epoch < 2)


def test_model_replaced_under_distribution_is_refused(one_process_group):
    task = PairTask(distributed_pair('b'), three_stages(), updates_per_epoch=1, verbose=False)
    pair, batch = task.trainable_module, micro_batches(0)[0]
    for name, part in (('model_a', 'a'), ('affine', 'affine')):
        setattr(pair, name, copy.deepcopy(getattr(pair, name)))
        task.prepare_distributed()
        task(*batch)['loss'].backward()
        setattr(pair, name, copy.deepcopy(getattr(pair, name)))
        with pytest.raises(RuntimeError, match=f'part {part!r} .* replaced after prepare_distributed'):
            task(*batch)


def test_frozen_branch_is_not_wrapped(processes):
    for steps in processes('task, branch a frozen'):
        for step in steps:
            assert all((grad is None) == name.startswith('model_a.') for name, grad in step['gradients'].items()
                       if not name.startswith('affine.'))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
