"""PairTask in a loop written for timm's own tasks, its streams, clipping and EMA, and in real gloo processes."""
import copy
import logging
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
from processes import run_ranks
from small import CPU, DEIT, NUM_CLASSES, TinyModel, assert_equal_states, clone_state, make_model, make_pair
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3, adaptive_clip_grad

from timm_vpl import PairOutput, PairTask, PairWrapper, StagedLoss, VPLLoss
from timm_vpl.core.ema import Ema
from timm_vpl.core.methods import METHODS, Setting
from timm_vpl.core.seeding import BranchStreams
from timm_vpl.core.teacher import Teacher
from timm_vpl.core.terms import Term, base_term

# With E = 4, x = 25, y = 50: contrastive in epochs 0 and 1, KL from epoch 1 on.
EPOCHS = 4
STAGE_1 = ['ce_a_loss', 'ce_b_loss', 'contrastive_loss']
STAGE_2 = ['ce_a_loss', 'ce_b_loss', 'contrastive_loss', 'kl_loss']
STAGE_3 = ['ce_a_loss', 'ce_b_loss', 'kl_loss']
STAGES = [STAGE_1, STAGE_2, STAGE_3, STAGE_3]


def make_criterion(epochs=EPOCHS, **kwargs):
    return VPLLoss(epochs, x=25, y=50, tau=0.2, **kwargs)


def make_task(pair=None, criterion=None, updates_per_epoch=2, verbose=False, **kwargs):
    return PairTask(pair or make_pair(), criterion or make_criterion(), updates_per_epoch, verbose=verbose, **kwargs)


def learnable_batches(num_batches=2, batch_size=8):
    """Images that differ by class, with a little noise; fixed."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(NUM_CLASSES, 3, 32, 32, generator=generator)
    batches = []
    for _ in range(num_batches):
        target = torch.randperm(batch_size, generator=generator) % NUM_CLASSES
        batches.append((patterns[target] + 0.3 * torch.randn(batch_size, 3, 32, 32, generator=generator), target))
    return batches


BATCH = learnable_batches()[0]


def terms_of(result):
    return sorted(name for name in result if name.endswith('_loss'))


# A loop in the style of timm's train script. It knows timm's tasks and their interface, nothing of pairs.

def run_like_timm(task, batches=None, epochs=EPOCHS, stop=None, output_dir=None, resume='', accum_steps=1):
    """Train as timm's train.py does and return (optimizer, list of results by step, list of metrics)."""
    batches = batches or learnable_batches()
    updates_per_epoch = (len(batches) + accum_steps - 1) // accum_steps
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'adamw', lr=2e-3, weight_decay=0.05)
    start_epoch = resume_task_checkpoint(task, resume, optimizer, log_info=False) if resume else 0
    task.setup_ema(decay=0.9, use_warmup=True)
    if resume:
        load_task_ema_checkpoint(task, resume)
    saver = output_dir and CheckpointSaver(
        model=task.get_trainable_module(), optimizer=optimizer, task=task, checkpoint_dir=str(output_dir))

    steps, metrics = [], []
    for epoch in range(start_epoch, stop or epochs):
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
        metrics.append([validate_like_timm(task, task.get_eval_model(ema=ema), batches) for ema in (False, True)])
        if saver:
            saver.save_checkpoint(epoch, metric=metrics[-1][0]['top1'])
    return optimizer, steps, metrics


def validate_like_timm(task, model, batches):
    model.eval()
    evaluator = task.create_evaluator()
    with torch.no_grad():
        for input, target in batches:
            output = model(input)
            evaluator.update(output[0] if isinstance(output, (tuple, list)) else output, target)
    return evaluator.compute()


def test_trains_in_a_loop_that_knows_nothing_of_pairs():
    task = make_task()
    _, steps, metrics = run_like_timm(task, epochs=8)
    assert isinstance(task, TrainingTask) and len(steps) == 16
    for name in ('ce_a_loss', 'ce_b_loss'):
        assert steps[-1][name] < 0.5 * steps[0][name]
    # Validation saw branch a.
    for ema, pair in ((False, task.trainable_module), (True, task.get_trainable_module(ema=True).module)):
        assert metrics[-1][ema] == validate_like_timm(task, pair.model_a, learnable_batches())


@pytest.mark.parametrize(('num_batches', 'accum_steps'), [(3, 1), (5, 2)])
def test_stages_follow_optimizer_updates(num_batches, accum_steps):
    # Of five batches, two to an update: three updates an epoch too, the last of one batch.
    task = make_task(updates_per_epoch=3)
    _, steps, _ = run_like_timm(task, learnable_batches(num_batches, 4), epochs=EPOCHS + 1, accum_steps=accum_steps)
    assert [terms_of(step) for step in steps] == [terms for terms in [*STAGES, STAGE_3] for _ in range(num_batches)]
    assert task.num_updates == 3 * (EPOCHS + 1)
    for step in steps:
        assert step['loss'] == pytest.approx(sum(step[name] for name in terms_of(step)), rel=1e-6)


@pytest.mark.parametrize('count', ['calls', 'epochs'])
def test_stages_of_a_loop_that_counts_otherwise(count):
    # Calls of update_ema, without an average; or the epochs, which it then sets itself.
    task = make_task(updates_per_epoch=2 if count == 'calls' else None)
    for epoch, terms in enumerate(STAGES):
        if count == 'epochs':
            task.set_epoch(epoch)
        for _ in range(2):
            assert terms_of(task(*BATCH)) == terms
            task.update_ema(step=None if count == 'calls' else 1000)
    assert task.num_updates == (2 * EPOCHS if count == 'calls' else 1000)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    want, got = make_task(), make_task(make_pair(seed=50))  # other weights, which the checkpoint replaces
    want_optimizer, want_steps, want_metrics = run_like_timm(want)
    interrupted = make_task()
    run_like_timm(interrupted, stop=2, output_dir=tmp_path)
    checkpoint = torch.load(tmp_path / 'last.pth.tar', weights_only=True)
    assert list(checkpoint['state_dict_ema']) == list(checkpoint['state_dict'])
    assert checkpoint['task_state'] == {'num_updates': 4} and 'task_state_ema' not in checkpoint
    assert_equal_states(checkpoint['state_dict'], interrupted.trainable_module.state_dict())
    with pytest.raises(RuntimeError, match='setup_ema'):
        got.load_checkpoint_state(checkpoint['state_dict_ema'], ema=True)

    optimizer, steps, metrics = run_like_timm(got, resume=str(tmp_path / 'last.pth.tar'))
    assert steps == want_steps[4:] and metrics == want_metrics[2:]
    for ema, key in ((False, 'state_dict'), (True, 'state_dict_ema')):
        assert_equal_states(got.get_checkpoint_state(ema=ema)[key], want.get_checkpoint_state(ema=ema)[key])
    got_moments, want_moments = (each.state_dict()['state'] for each in (optimizer, want_optimizer))
    for index, state in want_moments.items():
        assert_equal_states(got_moments[index], state)


@pytest.mark.parametrize(('num_updates', 'terms'), [
    (None, STAGE_1), (0, STAGE_1), (4, STAGE_1), (5, STAGE_2), (9, STAGE_2), (10, STAGE_3), (99, STAGE_3)])
def test_resume_within_an_epoch_is_in_its_stage(num_updates, terms):
    task, other = make_task(updates_per_epoch=5), make_pair(seed=9)
    task.load_checkpoint_state(other.state_dict(), None if num_updates is None else {'num_updates': num_updates})
    assert task.num_updates == (num_updates or 0)
    assert terms_of(task(*BATCH)) == terms
    with pytest.raises(RuntimeError):
        task.load_checkpoint_state(other.model_a.state_dict())


def test_result_of_a_step():
    task = make_task(criterion=make_criterion(contrastive_weight=0.5, kl_weight=2.))
    task.update_ema(step=2)
    result = task(*BATCH)
    assert set(result) == {*STAGE_2, 'loss', 'output'}
    want = result['ce_a_loss'] + result['ce_b_loss'] + 0.5 * result['contrastive_loss'] + 2 * result['kl_loss']
    torch.testing.assert_close(result['loss'], want)
    assert result['output'].embed_b is not None and result['output'].sample_ids is None
    ids = torch.arange(8) // 2
    marked = task(*BATCH, ids)
    assert marked['output'].sample_ids is ids
    assert not torch.equal(marked['contrastive_loss'], result['contrastive_loss'])
    # The affine layer is not called where no term uses it.
    task.update_ema(step=4)
    assert task(*BATCH)['output'].embed_b is None


# clipping

def gradients(module):
    return {name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in module.named_parameters()}


def task_with_gradients(name_b='test_vit'):
    task = make_task(make_pair(name_b=name_b))
    task.update_ema(step=2)  # all terms are on
    (30 * task(*BATCH)['loss']).backward()
    return task, task.trainable_module, gradients(task.trainable_module)


@pytest.mark.parametrize(('limits', 'mode'), [
    ({'a': 1., 'b': 0.5}, 'norm'), ({'a': 1., 'b': None}, 'norm'), ({'b': 1.}, 'norm'), ({'a': 1e9, 'b': 1e9}, 'norm'),
    ({'a': 1e-2, 'b': 1e-3}, 'value')], ids=str)
def test_each_branch_is_clipped_by_its_own_norm(limits, mode):
    task, pair, before = task_with_gradients()
    task.clip_gradients(limits, mode=mode)
    norms = {}
    for side, prefixes in (('a', 'model_a.'), ('b', ('model_b.', 'affine.'))):
        names = [name for name in before if name.startswith(prefixes)]
        limit = limits.get(side)
        norms[side] = torch.cat([before[name].double().flatten() for name in names]).norm()
        for name in names:
            got, want = pair.get_parameter(name).grad, before[name]
            if limit is None or limit > 1e6:
                assert torch.equal(got, want), name
            elif mode == 'value':
                assert torch.equal(got, want.clamp(-limit, limit)), name
            else:
                torch.testing.assert_close(
                    got, (want * limit / (norms[side] + 1e-6)).float(), rtol=1e-5, atol=0., msg=name)
    assert min(norms.values()) > 1.5 and abs(norms['a'] - norms['b']) > 0.1


@pytest.mark.parametrize('name_b', ['test_vit', DEIT])
def test_adaptive_clipping_leaves_out_each_branchs_classifier(name_b):
    task, pair, before = task_with_gradients(name_b)
    heads = {name for name, _ in pair.named_parameters() if name.startswith(('model_a.fc.', 'model_b.head'))}
    assert len(heads) == (6 if name_b == DEIT else 4)
    rest = [parameter for name, parameter in pair.named_parameters() if name not in heads]
    assert list(map(id, task.get_clip_parameters(exclude_head=True))) == list(map(id, rest))
    assert list(map(id, task.get_clip_parameters())) == list(map(id, pair.parameters()))

    task.clip_gradients({'a': 1e-4, 'b': 1e-4}, mode='agc')
    after = gradients(pair)
    assert all(torch.equal(after[name], before[name]) for name in heads)
    for name in before:
        pair.get_parameter(name).grad = before[name].clone()
    adaptive_clip_grad(rest, 1e-4)
    assert_equal_states(gradients(pair), after)
    for name in ('model_a.conv1.0.weight', 'model_b.patch_embed.proj.weight'):
        assert not torch.equal(after[name], before[name])


# EMA

def assert_equal_emas(timms, task, step):
    timms.update(task.trainable_module, step=step)
    task.update_ema(step=step)
    assert_equal_states(task.get_checkpoint_state(ema=True)['state_dict_ema'], timms.module.state_dict())


@pytest.mark.parametrize('kwargs', [{}, {'use_warmup': True}, {'foreach': False}], ids=str)
def test_ema_is_that_of_timm(kwargs):
    task = make_task()
    pair, timms = task.trainable_module, ModelEmaV3(task.trainable_module, decay=0.9, **kwargs)
    assert not task.has_ema() and task.get_checkpoint_state(ema=True) == {}
    task.setup_ema(decay=0.9, **kwargs)
    for step in range(1, 7):
        for tensor in [*pair.parameters(), *pair.buffers()]:
            tensor.data.add_(torch.randn(tensor.shape) if tensor.is_floating_point() else 1)
        if step == 3:  # tensors are replaced
            pair.double().float()
            task.trainable_module_ema.module.double().float()
        if step == 5:
            task.load_checkpoint_state(copy.deepcopy(timms.module.state_dict()), ema=True)
            task.trainable_module_ema = copy.deepcopy(task.trainable_module_ema)
        assert_equal_emas(timms, task, step)
        average = task.trainable_module_ema.module.affine.weight
        assert step == 1 or not torch.equal(average, pair.affine.weight)


class Around(nn.Module):
    """A model around another, as adapters are."""

    def __init__(self, base):
        super().__init__()
        self.base, self.num_classes, self.get_classifier = base, base.num_classes, base.get_classifier

    def forward(self, x):
        return self.base(x)


@pytest.mark.parametrize('kwargs', [{}, {'foreach': False}], ids=str)
def test_ema_follows_what_was_replaced(kwargs):
    task = make_task()
    pair, timms = task.trainable_module, ModelEmaV3(task.trainable_module, decay=0.9, **kwargs)
    assert isinstance(task.setup_ema(decay=0.9, **kwargs), Ema)
    changes = [
        lambda: setattr(pair.model_a, 'fc', nn.Linear(96, NUM_CLASSES)),
        lambda: pair.reset_classifier(NUM_CLASSES),
        lambda: setattr(pair, 'model_a', make_model('test_resnet', seed=3)),
        lambda: setattr(pair, 'model_b', Around(pair.model_b)),
        lambda: None,
    ]
    for step, change in enumerate(changes, 2):
        assert_equal_emas(timms, task, step)
        change()
    pair.model_b.base.norm = nn.LayerNorm(3)
    with pytest.raises(RuntimeError, match='setup_ema'):
        task.update_ema(step=9)


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=['copy', 'pickle'])
def test_copied_task_is_the_task(clone):
    tasks = [make_task(make_pair(drop_rate=0.1), streams=BranchStreams(0, 0, CPU))]
    tasks[0].setup_ema(decay=0.9)
    for step, batch in enumerate(2 * learnable_batches(), 1):
        results = []
        for task in tasks:
            results.append(task(*batch))
            task.zero_grad()
            results[-1]['loss'].backward()
            torch.optim.SGD(task.trainable_module.parameters(), lr=0.05).step()
            task.update_ema(step=step)
        assert all(list(each) == list(results[0]) for each in results)
        assert all(torch.equal(results[-1][name], results[0][name]) for name in terms_of(results[0]))
        assert_equal_states(tasks[-1].state_dict(), tasks[0].state_dict())
        if step == 2:
            tasks.append(clone(tasks[0]))


# optimizers that are made elsewhere

class Mapped(nn.Module):
    """A term with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(NUM_CLASSES, NUM_CLASSES)

    def forward(self, output, target):
        return (self.layer(output.logits_b) - output.logits_a.detach()).square().mean()


def test_groups_made_by_hand():
    pair = make_pair()
    task = make_task(pair, StagedLoss([base_term('a'), base_term('b'), Term('mapped_loss', Mapped())]))
    groups = [{'params': list(pair.branch(side).parameters()), 'lr': lr} for side, lr in (('a', 0.), ('b', 0.1))]
    layer = task.criterion.functions['mapped_loss'].layer
    for more, lacking in (
            (pair.affine, '4 parameters .*, affine.weight, affine.bias, functions.mapped_loss.layer.weight, '),
            (layer, '2 parameters .*, functions.mapped_loss.layer.weight, functions.mapped_loss.layer.bias: ')):
        with pytest.raises(ValueError, match=f'the optimizer lacks {lacking}'):
            task.check_optimizer(torch.optim.SGD(groups, lr=0.1))
        groups.append({'params': list(more.parameters())})
    optimizer = torch.optim.SGD(groups, lr=0.1)
    task.check_optimizer(optimizer)
    before = {'layer': layer.weight.clone(), **clone_state(dict(pair.named_parameters()))}
    task(*BATCH)['loss'].backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before['layer'])
    for name, parameter in pair.named_parameters():
        assert torch.equal(parameter, before[name]) == (not name.startswith('model_b.'))


def test_optimizer_that_timm_makes_of_the_pair_has_all():
    task = make_task()
    for kwargs in ({}, {'layer_decay': 0.75}, {'layer_decay': 0.5, 'layer_decay_no_opt_scale': 0.3}):
        task.check_optimizer(create_optimizer_v2(task.get_trainable_module(), 'adamw', weight_decay=0.05, **kwargs))


# streams of random numbers; that a pair with weights zero trains as its branches alone: test_train.py

STOCHASTIC = {'drop_rate': 0.3, 'drop_path_rate': 0.3}


def streaming_task(pair, rank=0, seed=5):
    criterion = make_criterion() if len(pair.sides) == 2 else StagedLoss([base_term(side) for side in pair.sides])
    task = make_task(pair, criterion, None, streams=BranchStreams(seed, rank, CPU))
    task.set_epoch(0)
    return task.train()


def logits_at(task, position, side='b'):
    task.streams.set_position(*position)
    return task(*BATCH)['output'][side == 'b'].detach()


def test_draws_of_a_branch_do_not_depend_on_its_partner():
    for side, names in (
            ('b', [('test_resnet', 'test_vit'), ('test_convnext', 'test_vit'), (None, 'test_vit')]),
            ('a', [('test_resnet', 'test_vit'), ('test_resnet', 'test_convnext'), ('test_resnet', None)])):
        tasks = [streaming_task(make_pair(*both, **STOCHASTIC)) for both in names]
        for position in ((0, 0), (0, 1), (3, 0)):
            outputs = [logits_at(task, position, side) for task in tasks]
            assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_draws_depend_on_position_branch_rank_and_seed_only():
    task = streaming_task(make_pair(**STOCHASTIC))
    first = logits_at(task, (1, 2))
    torch.rand(7)  # what else was drawn has no effect
    assert torch.equal(logits_at(task, (1, 2)), first)
    for position in ((1, 3), (2, 2), (2, 1)):
        assert not torch.equal(logits_at(task, position), first)
    for other in ({'rank': 1}, {'seed': 6}):
        assert not torch.equal(logits_at(streaming_task(make_pair(**STOCHASTIC), **other), (1, 2)), first)
    # The same network as a and as b has two streams.
    model = make_model('test_vit', **STOCHASTIC)
    twins = streaming_task(PairWrapper(model, copy.deepcopy(model)))
    assert not torch.equal(logits_at(twins, (1, 2), 'a'), logits_at(twins, (1, 2), 'b'))
    assert torch.equal(*twins.eval()(*BATCH)['output'][:2])


# precision, messages

def test_loss_is_float32_under_autocast():
    task = make_task()
    task.update_ema(step=2)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(*BATCH)
    assert result['output'].logits_a.dtype == result['output'].logits_b.dtype == torch.bfloat16
    # All of its arithmetic is: the same as from the outputs in float32, without autocast.
    in_float32 = PairOutput(*(None if field is None else field.float() for field in result['output']))
    want = task.criterion.terms(in_float32, BATCH[1])
    assert_equal_states({name: result[name] for name in (*STAGE_2, 'loss')}, want)
    result['loss'].backward()
    for grad in gradients(task.trainable_module).values():
        assert grad.dtype == torch.float32 and torch.isfinite(grad).all()


@pytest.mark.parametrize('verbose', [True, False])
def test_each_change_of_stage_is_logged_once(caplog, verbose):
    caplog.set_level(logging.INFO)
    task = make_task(verbose=verbose)
    for step in range(1, 2 * EPOCHS + 3):
        task.update_ema(step=step)
    if verbose:  # a run that goes on
        task = make_task(updates_per_epoch=None, verbose=True)
        task.load_task_state({'num_updates': 4})
        task.set_epoch(2)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith('timm_vpl')]
    starts = ['PairTask: criterion=VPLLoss, stage 1', 'Epoch 1: stage 2', 'Epoch 2: stage 3', 'PairTask: ',
              'Epoch 2: stage 3'] if verbose else []
    assert [line[:len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert not verbose or 'kl_loss' in lines[1] and 'contrastive_loss' not in lines[2]


@pytest.mark.parametrize('wrong', [0, -1])
def test_wrong_updates_per_epoch(wrong):
    with pytest.raises(ValueError, match=f'updates_per_epoch is {wrong}'):
        make_task(updates_per_epoch=wrong)


# what runs in the processes: float64, no BatchNorm

WORLD, LOCAL_SIZE, MICRO_BATCHES = 2, 3, 2


def distributed_pair(affine, dtype=torch.float64):
    torch.manual_seed(7)
    model_a = TinyModel(width=24 if affine == 'none' else 16)
    model_b = make_model('test_vit', seed=8, embed_dim=24, img_size=16, patch_size=8)
    torch.manual_seed(9)
    return PairWrapper(model_a, model_b, affine_side='b' if affine == 'none' else affine).to(dtype)


def three_stages(**kwargs):
    """One epoch in each stage."""
    return VPLLoss(3, x=33, y=34, tau=0.3, **kwargs)


def micro_batches(update, rank=None, dtype=torch.float64):
    """The batches of an optimizer update, global or one process's share."""
    generator = torch.Generator().manual_seed(update)
    share = slice(None) if rank is None else slice(rank * LOCAL_SIZE, (rank + 1) * LOCAL_SIZE)
    batches = []
    for _ in range(MICRO_BATCHES):
        x = torch.randn(LOCAL_SIZE * WORLD, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
        target = torch.randint(NUM_CLASSES, (LOCAL_SIZE * WORLD,), generator=generator)
        batches.append((x[share], target[share]))
    return batches


def start_task(pair, criterion, rank, compiled):
    task = PairTask(pair, criterion, updates_per_epoch=1, verbose=False)
    keys = list(pair.state_dict())
    if compiled:
        task.compile(backend='eager')
    if rank is not None:
        task.prepare_distributed()
    task.setup_ema(decay=0.5)  # copies the pair, not what the task keeps for the processes
    assert list(task.get_checkpoint_state()['state_dict']) == keys
    assert list(task.get_checkpoint_state(ema=True)['state_dict_ema']) == keys
    return task


def train(
        rank, affine='b', updates=3, optimizer=torch.optim.SGD, in_place=False, frozen=False, compiled=False,
        dtype=torch.float64, **kwargs):
    """Train a task of one process on its share or (rank None) alone on everything.

    Returns:
        A dictionary by update: terms, loss, gradients after the first micro-batch and after all, and the weights.
    """
    pair = distributed_pair(affine, dtype=dtype)
    if frozen:
        pair.model_a.requires_grad_(False)
    task = start_task(pair, three_stages(**kwargs), rank, compiled)
    optimizer = optimizer([parameter for parameter in pair.parameters() if parameter.requires_grad], lr=0.05)
    steps = []
    for update in range(updates):
        step = {'loss': 0.}
        for i, batch in enumerate(micro_batches(update, rank, dtype)):
            with task.no_sync() if i + 1 < MICRO_BATCHES else nullcontext():
                result = task(*batch)
                loss = result['loss']
                if in_place:  # as timm's train script divides it
                    loss /= MICRO_BATCHES
                else:
                    loss = loss / MICRO_BATCHES
                loss.backward()
            step['loss'] += float(loss.detach())
            step.setdefault('first', gradients(pair))
        optimizer.step()
        weights = clone_state(dict(pair.named_parameters()))
        steps.append({**step, 'terms': terms_of(result), 'gradients': gradients(pair), 'weights': weights})
        optimizer.zero_grad()
        task.update_ema(step=update + 1)
    return steps


def train_method(rank, method, **own):
    """A method of several optimizer phases, or with a teacher, by the task, each branch with its own steps."""
    pair, teacher, sides = distributed_pair('none'), None, 'ab'
    if METHODS[method].teacher == 'always':
        config = {'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'input_size': (3, 16, 16)}
        teacher, pair, sides = Teacher(pair.model_a, 'a', config, config), PairWrapper(None, pair.model_b), 'b'
    criterion = METHODS[method].criterion(METHODS[method].options(rho=2., kl_weight=0.7, **own), Setting(sides, 3))
    task = PairTask(pair, criterion, teacher=teacher, verbose=False).train()
    if rank is not None:
        task.prepare_distributed()
    task.set_epoch(0)
    optimizers = {side: torch.optim.SGD(pair.branch(side).parameters(), lr=0.05) for side in sides}
    steps = []
    for update in range(3):
        batch = micro_batches(update, rank)[0]
        step = {'terms': [], 'loss': 0., 'gradients': {}}
        for phase, learners in enumerate(task.phases):
            result = task(*batch, phase=phase)
            result['loss'].backward()
            step['terms'] += terms_of(result)
            step['loss'] += float(result['loss'].detach())
            step['gradients'].update({f'{phase}.{name}': grad for name, grad in gradients(pair).items()})
            for side in set(learners) & set(sides):
                optimizers[side].step()
                optimizers[side].zero_grad()
        steps.append(step)
    return steps


CASES = {
    'dml': (train_method, {'method': 'dml', 'dml_joint': False}),
    'distill': (train_method, {
        'method': 'distill', 'distill_terms': 'both', 'tau': 0.3, 'contrastive_weight': 0.6}),
    'affine none': (train, {'affine': 'none'}),
    'affine a': (train, {'affine': 'a', 'in_place': True}),
    'affine b': (train, {'affine': 'b'}),
    'affine a, a, both': (train, {'affine': 'a', 'contrastive_to': 'a', 'kl_to': 'both'}),
    'affine b, both, b': (train, {'affine': 'b', 'contrastive_to': 'both', 'kl_to': 'b'}),
    'weights zero': (train, {'contrastive_weight': 0., 'kl_weight': 0.}),
    'branch a frozen': (train, {'frozen': True}),
    'compiled': (train, {'compiled': True, 'dtype': torch.float32}),
    'AdamW': (train, {'updates': 4, 'optimizer': torch.optim.AdamW}),
}


def run_cases(rank, world):
    return {name: function(rank, **kwargs) for name, (function, kwargs) in CASES.items()}


# what looks at the results

@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    """The results of each process, by case."""
    return run_ranks(tmp_path_factory.mktemp('processes'), WORLD, run_cases)


@pytest.mark.parametrize('name', [name for name in CASES if 'AdamW' not in name])
def test_processes_equal_one_process(name, processes):
    function, kwargs = CASES[name]
    tolerance = 1e-5 if kwargs.get('dtype') == torch.float32 else 1e-10
    for expected, *got in zip(function(None, **kwargs), *(results[name] for results in processes), strict=True):
        assert all(step['terms'] == expected['terms'] for step in got)
        assert abs(sum(step['loss'] for step in got) / WORLD - expected['loss']) <= tolerance
        for key, value in expected['gradients'].items():
            for grad in (step['gradients'][key] for step in got):
                # Not of a NaN. Where no term has a parameter, it gets no gradient.
                assert grad is None if value is None else (grad - value).abs().max() <= tolerance, key


@pytest.mark.parametrize('name', ['affine a', 'affine b'])
def test_three_stages_were_run(name, processes):
    # Guards the comparison above: in each case each stage, and in the last no gradient for the affine layer.
    for steps in (results[name] for results in processes):
        assert [step['terms'] for step in steps] == [STAGE_1, STAGE_2, STAGE_3]
        weights = [step['gradients']['affine.weight'] for step in steps]
        assert all(weight.abs().max() > 1e-4 for weight in weights[:2])
        assert weights[2] is None


@pytest.mark.parametrize('affine', ['none', 'a', 'b'])
def test_first_micro_batch_is_not_reduced(affine, processes):
    for step, other in zip(*(results[f'affine {affine}'] for results in processes), strict=True):
        for key, grad in step['gradients'].items():
            assert grad is None or torch.equal(grad, other['gradients'][key])
            assert grad is None or not torch.equal(step['first'][key], other['first'][key]) or not step[
                'first'][key].any()


def test_adamw_leaves_the_affine_layer_that_no_term_uses(processes):
    one, other = (results['AdamW'] for results in processes)
    assert [step['terms'] for step in one] == [STAGE_1, STAGE_2, STAGE_3, STAGE_3]
    for step, other_step in zip(one, other, strict=True):
        assert_equal_states(step['weights'], other_step['weights'])
    for key, moves in (('affine.weight', [True, False, False]), ('model_b.head.weight', [True, True, True])):
        weights = [step['weights'][key] for step in one]
        assert [not torch.equal(*pair) for pair in zip(weights[1:], weights, strict=False)] == moves


@pytest.fixture
def one_process_group(tmp_path):
    """As torchrun --nproc-per-node 1."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_model_replaced_under_distribution_is_refused(one_process_group):
    task = make_task(distributed_pair('b'), three_stages())
    pair, batch = task.trainable_module, micro_batches(0)[0]
    for name, part in (('model_a', 'a'), ('affine', 'affine')):
        task.prepare_distributed(device_ids=[CPU])  # timm's script names its device, torch takes none on a CPU
        task(*batch)['loss'].backward()
        assert pair.affine.weight.grad.any()
        setattr(pair, name, copy.deepcopy(getattr(pair, name)))
        with pytest.raises(RuntimeError, match=f'part {part!r} .* replaced after prepare_distributed'):
            task(*batch)
