"""`--zero`: an optimizer whose state is shared out over processes, against the same one in each of them, to the bit."""
import copy
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import timm.optim
import torch
from processes import load_results, run_ranks, run_script
from test_train import PAIR, SMALL, run
from torch import nn

from timm_vpl.engine import build
from timm_vpl.engine.zero import ShardedOptimizer
from timm_vpl.errors import UsageError
from timm_vpl.options.options import parse_args

NAMES = timm.optim.list_optimizers(exclude_filters=['fused*', 'bnb*', 'adahessian', 'kron*'])
EXTRA = {
    'adamw': [{'fused': True}, {'foreach': True}, {'amsgrad': True}],
    **{name: [{'max_grad_norm': None}] for name in NAMES if 'lamb' in name},
}
CASES = [(name, kwargs) for name in NAMES for kwargs in EXTRA.get(name, [{}])]
LEARNERS = 'ab ab ab a b a b ab'.split()  # of each step
WORLD = 2


def _create(name, kwargs, sharded):
    """A model and the optimizer of its groups, which are named as those of two branches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 12), nn.Conv2d(8, 6, 3), nn.Linear(12, 20))
    parameters = list(model.parameters())
    groups = [
        {'params': group, 'name': group_name, 'lr': lr, 'weight_decay': decay, 'lr_scale': lr}
        for group, group_name, lr, decay in (
            (parameters[0:4:2], 'a.0', 0.01, 0.1), (parameters[1:4:2], 'a.1', 0.02, 0.),
            (parameters[4:7], 'b.0', 0.03, 0.2), (parameters[7:], 'b.1', 0.01, 0.))]
    create = partial(timm.optim.create_optimizer_v2, opt=name, lr=0.03, **kwargs)
    return model, ShardedOptimizer(create(groups), create) if sharded else create(groups)


def _train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if group['name'][0] in LEARNERS[step]]
        for group in optimizer.param_groups:
            group['lr'] *= 0.9
            for parameter in group['params']:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups = groups


def _same(one, two):
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(_same, one, two))
    return one == two


def _elements(optimizer):
    return sum(
        value.numel() for state in optimizer.state.values() for value in state.values()
        if isinstance(value, torch.Tensor))


def optimizers(rank, world):
    """What differs, and the elements of state that there are without and with sharding, by optimizer."""
    results = []
    for name, kwargs in CASES:
        whole, optimizer = _create(name, kwargs, False)
        shared, sharded = _create(name, kwargs, True)
        found = []

        def compare(what, one, two, found=found):
            if not _same(one, two):
                found.append(what)

        compare('defaults', optimizer.defaults, sharded.defaults)
        _train(whole, optimizer, range(4))
        _train(shared, sharded, range(4))
        compare('weights', whole.state_dict(), shared.state_dict())
        sharded.consolidate_state_dict()
        state = [copy.deepcopy(sharded.state_dict()) if rank == 0 else None]
        torch.distributed.broadcast_object_list(state)
        compare('state', optimizer.state_dict(), state[0])
        sizes = _elements(optimizer), _elements(sharded) + _elements(sharded.optim)
        _train(whole, optimizer, range(4, 8))
        for again in (True, False):
            model, loaded = _create(name, kwargs, again)
            model.load_state_dict(shared.state_dict())
            loaded.load_state_dict(copy.deepcopy(state[0]))
            compare('loaded into', sizes[again], _elements(loaded) + (_elements(loaded.optim) if again else 0))
            _train(model, loaded, range(4, 8))
            compare(f'weights after loading, sharded: {again}', whole.state_dict(), model.state_dict())
            if again:
                loaded.consolidate_state_dict()
            if rank == 0 or not again:
                compare(f'state after loading, sharded: {again}', optimizer.state_dict(), loaded.state_dict())
        results.append((name, found, *sizes))
    return results


def runs(folder):
    """Whole runs of two processes, with and without, stopped and resumed."""
    from kill import check_equal, wait
    from signals import alone, check, stop
    course = ['--layer-decay', '0.8', '--clip-grad', '1', '--grad-accum-steps', '2', '--on-nonfinite', 'skip']
    for method, options, attempts in (
            ('vpl', course, [
                (['--zero'], r'Train: 0 \[ *1/'),
                (['--zero', '--stop-epoch', '2'], None),
                ([], r'Train: 2 \[ *1/'),
                (['--zero'], None),
            ]),
            ('dml', ['--opt', 'sgd', '--lr', '0.01', '--epochs', '2'], [(['--zero'], None)]),
    ):
        scenario = alone(folder / method, method, WORLD, options)
        for more, pattern in attempts:
            scenario.options = options + more
            if pattern:
                stop(scenario, 'zero', signal.SIGTERM, pattern)
            else:
                check(wait(scenario.start('zero')) == [0] * WORLD, scenario, 'zero')
        check_equal(folder / method / 'alone', folder / method / 'zero')
        (folder / method / 'equal').touch()


def main(folder):
    """Run all that needs several processes."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / 'faults'))
    run_ranks(Path(folder), WORLD, optimizers)
    runs(Path(folder) / 'runs')


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('zero')
    log = run_script(__file__, folder)
    return folder, load_results(folder, WORLD), log


def test_each_optimizer_does_the_same(found):
    _, ranks, log = found
    for results in ranks:
        assert results is not None, log
        assert [name for name, *_ in results] == [name for name, _ in CASES]
        assert not [(name, different) for name, different, *_ in results if different]


def test_each_process_has_its_share_of_the_state(found):
    _, ranks, log = found
    assert None not in ranks, log
    for (name, _, whole, one), (*_, other) in zip(*ranks, strict=True):
        assert one + other == whole, name
        assert name not in ('adamw', 'sgd') or max(one, other) < 0.6 * whole


@pytest.mark.parametrize('method', ['vpl', 'dml'])
def test_runs_end_as_without(found, method):
    folder, _, log = found
    assert (folder / 'runs' / method / 'equal').exists(), log


def test_one_process_is_warned(digits_folder, tmp_path, caplog):
    run(digits_folder, tmp_path, '--zero', '--epochs', '1', '--method', 'solo', models=PAIR[2:])
    assert caplog.text.count('--zero: no effect with one process') == 1


@pytest.mark.parametrize('options, line', [
    (['--opt', 'lookahead_adamw'], ''),
    (['--opt', 'kron'], ''),
    (['--opt', 'lamb'], r'--opt-kwargs max_grad_norm=None does without'),
], ids=lambda value: value[-1] if isinstance(value, list) else '')
def test_optimizers_that_can_not_be_shared_out(digits_folder, options, line):
    args = parse_args([str(digits_folder), *PAIR, *SMALL, '--zero', *options])
    args.distributed, args.world_size, args.num_classes = True, 2, 4
    pair = build.create_pair(args, build.resolve_data(args), torch.device('cpu'))
    with pytest.raises(UsageError, match=f'--opt {options[-1]}: --zero .*{line}') as error:
        build.create_optimizer(args, pair, build.learning_rates(args))
    assert '\n' not in str(error.value)


if __name__ == '__main__':
    main(sys.argv[1])
