"""Losses and gradients that are not finite: found, named, left out or the end of the run; never in weights or EMA."""
import pytest
import timm
import torch
from runs import summary
from test_train import NOISE, PAIR, SMALL, last, run

from timm_vpl.cli import train
from timm_vpl.core.task import PairTask
from timm_vpl.engine import train as train_module
from timm_vpl.engine.checkpoint import read_checkpoint
from timm_vpl.engine.finite import FiniteCheck

OPTIONS = [*NOISE, '--epochs', '2', '--x', '0', '--opt', 'adamw', '--clip-grad', '1.0']


def poison(monkeypatch, bad, spoil):
    """Let `spoil(result)` change what the task returns at some of its calls."""
    forward, calls = PairTask.forward, [0]

    def poisoned(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        if calls[0] in bad:
            spoil(result)
        calls[0] += 1
        return result
    monkeypatch.setattr(PairTask, 'forward', poisoned)


def everywhere(result):
    result['kl_loss'] = result['kl_loss'] * float('nan')
    result['loss'] = result['loss'] * float('inf')


def in_b(result):
    result['loss'] = result['loss'] + result['output'].logits_b.sum() * float('nan')


def fail(capsys, data, output, *options):
    argv = [str(data), *PAIR, *SMALL, *OPTIONS, '--output', str(output), '--experiment', 'run', *options]
    assert train(argv) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('train_vpl.py: error: ')
    return error


@pytest.mark.parametrize('spoil, names', [
    (everywhere, 'kl_loss, loss, gradient of branch a, gradient of branch b'),
    (in_b, 'loss, gradient of branch b'),
])
def test_stop_names_what_is_bad(digits_folder, tmp_path, monkeypatch, capsys, spoil, names):
    poison(monkeypatch, {7}, spoil)
    error = fail(capsys, digits_folder, tmp_path, '--recovery-interval', '1')
    assert 'epoch 1, batch 2: not finite: ' in error and error.count('not finite') == 1
    assert set(names.split(', ')) == set(error.partition('not finite: ')[2].partition(' (process')[0].split(', '))
    assert 'older checkpoints are as they were' in error
    assert sorted(path.name for path in (tmp_path / 'run').glob('recovery*')) == [
        'recovery-1-0.pth.tar', 'recovery-1-1.pth.tar']
    for path in (tmp_path / 'run').glob('*.tar'):
        checkpoint = read_checkpoint(str(path))
        for key in ('state_dict', 'state_dict_ema'):
            assert all(tensor.isfinite().all() for tensor in checkpoint[key].values())


@pytest.mark.parametrize('options', [[], ['--opt-kwargs', 'fused=True'], ['--method', 'dml']], ids=' '.join)
def test_skip_leaves_the_update_out(digits_folder, tmp_path, monkeypatch, caplog, options):
    options = [*OPTIONS, *options, '--on-nonfinite', 'skip']
    phases = 2 if 'dml' in options else 1
    bad = {phases * 3 + i for i in range(phases)}

    def spoil(result):
        result['loss'] = result['loss'] * float('nan')
    with monkeypatch.context() as patch:
        poison(patch, bad, spoil)
        skipped = run(digits_folder, tmp_path, *options, name='skipped')
    assert caplog.text.count('this update is left out (1 in a row)') == 1
    assert 'epoch 0, batch 3: not finite: ' in caplog.text

    # The same, with the update taken out by hand.
    calls, update = [0], train_module.update

    def without(run, learners, clip_limits):
        calls[0] += 1
        if calls[0] - 1 in bad:
            run.optimizer.zero_grad()
            return {side: torch.ones(()) for side in learners}
        return update(run, learners, clip_limits)
    monkeypatch.setattr(train_module, 'update', without)
    by_hand = run(digits_folder, tmp_path, *options, name='by_hand')
    for key in ('state_dict', 'state_dict_ema'):
        state, other = last(skipped)[key], last(by_hand)[key]
        assert all(torch.equal(state[name], other[name]) and state[name].isfinite().all() for name in state)
    assert summary(skipped) == summary(by_hand)


def test_skip_has_a_limit(digits_folder, tmp_path, monkeypatch, capsys, caplog):
    poison(monkeypatch, {1, *range(3, 99)}, everywhere)
    error = fail(capsys, digits_folder, tmp_path, '--on-nonfinite', 'skip', '--nonfinite-limit', '2')
    assert 'epoch 1, batch 0: not finite: ' in error and '3 updates in a row' in error
    assert caplog.text.count('left out (1 in a row)') == 2 and caplog.text.count('left out (2 in a row)') == 1


def test_a_run_that_diverges(digits_folder, tmp_path, capsys):
    error = fail(capsys, digits_folder, tmp_path, '--opt', 'sgd', '--lr', '1e30')
    assert 'epoch 0, batch ' in error and 'not finite: ' in error


def test_a_validation_that_is_not_finite_is_no_result(digits_folder, tmp_path, caplog):
    # Running statistics that are NaN: training is as ever, in validation branch a has no logits that are numbers.
    model = timm.create_model('test_resnet', num_classes=4)
    model.bn1.running_mean.fill_(torch.nan)
    torch.save(model.state_dict(), tmp_path / 'nan.pth')
    options = [*OPTIONS, '--initial-checkpoint-a', str(tmp_path / 'nan.pth'), '--export']
    folder = run(digits_folder, tmp_path, *options, '--stop-epoch', '1')
    names = 'loss_a, loss_ens, ema_loss_a, ema_loss_ens'
    assert f'Epoch 0: not finite: {names}; it is no best epoch for them' in caplog.messages
    row = summary(folder)[0]
    assert {key for key, value in row.items() if value == 'nan'} == {
        'eval_top1', *(f'eval_{ema}{metric}_{name}' for ema in ('', 'ema_') for metric in ('loss', 'top1', 'top5')
                       for name in ('a', 'ens'))}
    checkpoint = last(folder)
    assert checkpoint['saver']['branch_metrics'] == {'b': float(row['eval_ema_top1_b'])} and 'metric' not in checkpoint
    found = {path.name for path in folder.glob('*.pth.tar')}
    assert found == {'last.pth.tar', 'checkpoint-0.pth.tar', 'best_b.pth.tar'}
    assert {path.name for path in (folder / 'export').iterdir()} == {'vpl-test_vit'}
    assert 'nan' not in (folder / 'export' / 'vpl-test_vit' / 'README.md').read_text()

    for key in ('state_dict', 'state_dict_ema'):
        checkpoint[key]['model_a.bn1.running_mean'].zero_()
    torch.save({**checkpoint, 'ranks': checkpoint['ranks'].nan_to_num()}, folder / 'last.pth.tar')
    run(digits_folder, tmp_path, *options, '--resume', 'auto')
    assert last(folder)['saver']['best_epoch'] is None and (folder / 'model_best.pth.tar').exists()
    assert read_checkpoint(str(folder / 'best_a.pth.tar'))['epoch'] == 1
    assert {path.name for path in (folder / 'export').iterdir()} == {'vpl-test_resnet', 'vpl-test_vit'}


def test_large_gradients_are_finite():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3e38)
    check = FiniteCheck(torch.device('cpu'))
    groups = [{'name': 'a.0', 'params': [parameter]}]
    assert check.gradients(groups) == {'a': 0} and torch.equal(parameter.grad, torch.full((4,), 3e38))
    parameter.grad[2] = -torch.inf
    assert check.gradients(groups) == {'a': 1}
