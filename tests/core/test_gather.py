"""A pair in a loop of one's own, in real gloo processes, against one process on the concatenated batch; gathering."""
import itertools
import re

import pytest
import torch
from processes import run_ranks
from small import TinyModel, clone_state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_vpl import PairOutput, PairWrapper, VPLLoss

NUM_CLASSES = 3
TERMS = ('ce_a_loss', 'ce_b_loss', 'contrastive_loss', 'kl_loss', 'loss')
# Images of each process at each step of an epoch: short last batches of all, of one, and one that comes first.
PLANS = {
    2: [[(4, 4), (2, 2), (4, 1), (3, 4)], [(1, 1)], [(1, 3), (3, 2)]],
    3: [[(4, 4, 4), (2, 2, 2), (4, 4, 1), (1, 4, 3)], [(1, 1, 1)], [(2, 2, 2), (2, 1, 2)], [(3, 2, 1), (1, 1, 1)]],
}


def make_cases(world):
    """Pairs (settings, sizes by step): who learns, side of the affine layer, what is a negative, copies, targets.

    All combinations are those of test_losses.py; here each number of processes has others of them.
    """
    modes = itertools.product(('a', 'b', 'both'), ('none', 'a', 'b'), ('negative', 'ignore', 'positive'), (False, True))
    cases = [{
        'seed': seed, 'affine': affine, 'with_ids': with_ids, 'soft': seed % 4 > 1, 'criterion': {
            'contrastive_to': contrastive_to, 'kl_to': ('a', 'b', 'both')[seed % 3], 'same_class': same_class,
            'similarity': ('cosine', 'dot')[seed // 2 % 2], 'contrastive_weight': 0.7},
    } for seed, (contrastive_to, affine, same_class, with_ids) in enumerate(modes)]
    return list(zip(cases[world % 5::5], itertools.cycle(PLANS[world]), strict=False))


def make_pair(case):
    """The pair, the same in every process."""
    torch.manual_seed(case['seed'])
    widths = {'none': (6, 6), 'a': (5, 6), 'b': (6, 5)}[case['affine']]
    models = [TinyModel(NUM_CLASSES, width) for width in widths]
    return PairWrapper(*models, affine_side='b' if case['affine'] == 'none' else case['affine']).double()


def draw_batch(case, num_images):
    """A global batch: images, targets, and ids whose copies lie in different processes."""
    generator = torch.Generator().manual_seed(100 + case['seed'])
    x = torch.randn(num_images, 3, 8, 8, generator=generator, dtype=torch.float64)
    if case['soft']:
        target = torch.rand(num_images, NUM_CLASSES, generator=generator, dtype=torch.float64).softmax(1)
    else:
        target = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    ids = torch.randint(num_images // 2 + 1, (num_images,), generator=generator) if case['with_ids'] else None
    return x, target, ids


def make_criterion(gather=True, epoch=0, **kwargs):
    criterion = VPLLoss(10, x=0, y=0, tau=0.3, rho=2., gather=gather, **kwargs)
    criterion.set_epoch(epoch)
    return criterion


def random_output(num_images, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    fields = [torch.randn(num_images, dim, generator=generator, dtype=torch.float64) for dim in (3, 3, 6, 6)]
    return PairOutput(*(field.to(dtype).requires_grad_() for field in fields))


def cut(output, rows):
    return PairOutput(*(None if field is None else field[rows] for field in output))


def share(rank):
    return slice(4 * rank, 4 * rank + 4)


# what runs in the processes

class HostReads(TorchDispatchMode):
    """Counts the operations for which the host would wait for a device."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


def counted(calls, name):
    """Note each call that Python code makes of a collective, in this process from now on."""
    function = getattr(torch.distributed, name)
    setattr(torch.distributed, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))


def run_steps(rank, world):
    """Every case, the pair in DistributedDataParallel, one criterion: (terms, gradients, collectives, reads) a step."""
    results, calls = [], []
    for name in ('all_gather', 'all_reduce'):
        counted(calls, name)
    for case, plan in make_cases(world):
        criterion = make_criterion(**case['criterion'])
        pair = nn.parallel.DistributedDataParallel(make_pair(case))
        for sizes in plan:
            pair.zero_grad()
            x, target, ids = (
                None if values is None else values.split(sizes)[rank] for values in draw_batch(case, sum(sizes)))
            output = pair(x)._replace(sample_ids=ids)
            calls.clear()
            with HostReads() as reads:
                terms = criterion.terms(output, target)
            terms['loss'].backward()
            gradients = [parameter.grad.clone() for parameter in pair.parameters()]
            results.append((clone_state(terms), gradients, len(calls), reads.count))
    half = cut(random_output(4 * world, torch.bfloat16), share(rank))
    return results, clone_state(make_criterion().terms(half, torch.arange(4) % NUM_CLASSES))


def stage_gradients(rank, world):
    """Gradients of each stage, with and without the pair's terms, of a process's share or (rank None) of everything."""
    found = []
    for weights in ({}, {'contrastive_weight': 0., 'kl_weight': 0.}):
        pair = make_pair({'seed': 1, 'affine': 'b'})
        model = pair if rank is None else nn.parallel.DistributedDataParallel(pair)
        criterion = VPLLoss(3, x=33, y=34, tau=0.3, **weights)
        for epoch in range(3):
            x, target, _ = draw_batch({'seed': epoch, 'soft': False, 'with_ids': False}, 4 * world)
            rows = slice(None) if rank is None else share(rank)
            criterion.set_epoch(epoch)
            pair.zero_grad()
            criterion(model(x[rows]), target[rows]).backward()
            grads = [parameter.grad for parameter in pair.parameters()]
            found.append([None if grad is None else grad.clone() for grad in grads])
    return found


def run_guards(rank, world):
    """What may not communicate, called on one rank only, and what must be refused, in one process group."""
    found = {}

    def call(name, num_images=4, ranks=range(world), criterion=None):
        if rank in ranks:
            output = cut(random_output(4 * world), share(rank)) if num_images == 4 else random_output(num_images)
            target = torch.arange(num_images) % NUM_CLASSES
            try:
                found[name] = float((criterion or make_criterion())(output, target).detach())
            except Exception as error:  # a collective that others don't join raises in the end
                found[name] = f'{type(error).__name__}: {error}'

    call('local', criterion=make_criterion(gather=False))
    call('gather=False alone', ranks=[0], criterion=make_criterion(gather=False))
    call('eval alone', ranks=[0], criterion=make_criterion().eval())
    with torch.no_grad():
        call('no_grad alone', ranks=[0])

    # An even epoch, in which evaluation of another size takes nothing from it.
    criterion = make_criterion(epoch=1)
    call('even', criterion=criterion)
    call('eval of another size', 7, ranks=[0], criterion=criterion.eval())
    criterion.train()
    call('even again', criterion=criterion)
    call('short last batch', 2, criterion=criterion)
    # Within the epoch, one rank's batch is larger than what all agreed on: it refuses by itself, the others go on.
    call('larger', 5, ranks=[0], criterion=criterion)
    call('even after all', criterion=criterion)
    # The next epoch may have another size; and the processes agree anew.
    for epoch, num_images in ((2, 2), (3, 8)):
        criterion.set_epoch(epoch)
        call(f'epoch {epoch}', num_images, criterion=criterion)
    return found


# what looks at the results

@pytest.fixture(scope='module', params=[2, 3])
def steps(request, tmp_path_factory):
    return request.param, run_ranks(tmp_path_factory.mktemp('gather'), request.param, run_steps)


def test_loss_and_gradients_equal_one_process(steps):
    # The contrastive term is that of all images at once, the others the mean of the processes' means.
    world, ranks = steps
    cases = [(case, sizes, sizes == plan[0]) for case, plan in make_cases(world) for sizes in plan]
    for (case, sizes, is_first), *found in zip(cases, *(steps for steps, _ in ranks), strict=True):
        pair = make_pair(case)
        x, target, ids = draw_batch(case, sum(sizes))
        criterion = make_criterion(**case['criterion'])
        whole = pair(x)._replace(sample_ids=ids)
        want = {'contrastive_loss': criterion.terms(whole, target)['contrastive_loss']}
        for name in ('ce_a_loss', 'ce_b_loss', 'kl_loss'):
            want[name] = sum(criterion.terms(cut(whole, rows), target[rows])[name]
                             for rows in torch.arange(len(x)).split(sizes)) / world
        want['loss'] = sum((0.7 if name == 'contrastive_loss' else 1) * value for name, value in want.items())
        want['loss'].backward()
        gradients = [parameter.grad for parameter in pair.parameters()]
        # Guards the comparison: it would mean nothing where all gradients are zero.
        assert min(sizes) < 4 or all(gradient.abs().max() > 1e-6 for gradient in gradients), case
        off = [abs(sum(terms[name] for terms, *_ in found) / world - want[name].detach()) for name in TERMS]
        off += [(got - value).abs().max() for _, own, *_ in found for got, value in zip(own, gradients, strict=True)]
        assert all(value <= 1e-10 for value in off), (case, sizes)  # not of a NaN
        # Embeddings there and back, classes, ids; and one more, which the host reads, where the sizes are agreed on.
        calls = 2 + (case['criterion']['same_class'] != 'negative') + case['with_ids'] + is_first
        assert [counts for _, _, *counts in found] == [[calls, is_first]] * world, (case, sizes)


@pytest.mark.parametrize('world', [1, 2])  # of one process, too, DistributedDataParallel looks for unused parameters
def test_layers_that_a_stage_does_not_use(world, tmp_path):
    want = stage_gradients(None, world)
    assert [gradients[-1] is None for gradients in want] == [False, False, True, True, True, True]  # the affine layer's
    for found in run_ranks(tmp_path, world, stage_gradients):
        for gradients, wanted in zip(found, want, strict=True):
            for got, value in zip(gradients, wanted, strict=True):
                assert not got.any() if value is None else (got - value).abs().max() <= 1e-10


def test_bfloat16_is_gathered_in_float32(steps):
    world, ranks = steps
    want = make_criterion().terms(random_output(4 * world, torch.bfloat16), torch.arange(4).repeat(world) % 3)
    for name in TERMS:
        values = [terms[name] for _, terms in ranks]
        assert all(value.dtype == torch.float32 for value in values)
        assert float(sum(values) / world) == pytest.approx(float(want[name].detach()), rel=1e-5)


def test_evaluation_gathers_nothing_and_only_a_larger_batch_within_an_epoch_is_refused(tmp_path):
    guards = run_ranks(tmp_path, 3, run_guards)
    for rank, found in enumerate(guards):
        want = float(make_criterion()(cut(random_output(12), share(rank)), torch.arange(4) % NUM_CLASSES).detach())
        for name in {'local', *(['gather=False alone', 'eval alone', 'no_grad alone'] if rank == 0 else [])}:
            assert found[name] == pytest.approx(want, abs=1e-12), name
    message = guards[0].pop('larger')
    assert re.match(r'(Runtime|Value)Error: .*\b5\b', message) and re.search(r'\b4\b.*gather=False', message), message
    assert all(isinstance(value, float) for found in guards for value in found.values()), guards
