"""Losses and gradients that are not finite: found, named, left out or the end of the run; never in weights or EMA."""
import pytest
import timm
import torch
from runs import NOISE, PAIR, SMALL, last, run, summary

from timm_vpl import PairTask, PairWrapper, StagedLoss, base_term
from timm_vpl.cli import train
from timm_vpl.core.seeding import BranchStreams
from timm_vpl.engine.checkpoint import read_checkpoint
from timm_vpl.engine.step import Update

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
    (everywhere, 'kl_loss, loss, gradients'),
    (in_b, 'loss, gradients'),
])
def test_stop_names_what_is_bad(digits_folder, tmp_path, monkeypatch, capsys, spoil, names):
    poison(monkeypatch, {7}, spoil)
    error = fail(capsys, digits_folder, tmp_path, '--recovery-interval', '1')
    assert 'epoch 1, up to batch 2: not finite: ' in error and error.count('not finite') == 1
    found = error.partition('not finite: ')[2].partition(', in 1 update(s)')[0]
    assert set(names.split(', ')) == set(found.split(', '))
    assert 'older checkpoints are unchanged' in error
    assert sorted(path.name for path in (tmp_path / 'run').glob('recovery*')) == [
        'recovery-1-0.pth.tar', 'recovery-1-1.pth.tar']
    for path in (tmp_path / 'run').glob('*.tar'):
        checkpoint = read_checkpoint(str(path))
        for key in ('state_dict', 'state_dict_ema'):
            assert all(tensor.isfinite().all() for tensor in checkpoint[key].values())


@pytest.mark.parametrize('options', [
    [], pytest.param(['--opt-kwargs', 'fused=True'], marks=pytest.mark.slow), ['--method', 'dml']], ids=' '.join)
def test_skip_leaves_the_update_out(digits_folder, tmp_path, monkeypatch, caplog, options):
    options = [*OPTIONS, *options, '--on-nonfinite', 'skip']
    phases = 2 if 'dml' in options else 1
    bad = {phases * 3 + i for i in range(phases)}

    def spoil(result):
        result['loss'] = result['loss'] * float('nan')
    with monkeypatch.context() as patch:
        poison(patch, bad, spoil)
        skipped = run(digits_folder, tmp_path, *options, name='skipped')
    assert 'epoch 0, up to batch 4: not finite: ' in caplog.text and '; 1 skipped, at most 1 in a row' in caplog.text

    # The same, with the update taken out by hand.
    step, calls = Update.step, [0]

    def without(self, learners):
        calls[0] += 1
        if calls[0] - 1 not in bad:
            return step(self, learners)
        self.optimizer.zero_grad()
        self._found.append(torch.ones(()))
    monkeypatch.setattr(Update, 'step', without)
    by_hand = run(digits_folder, tmp_path, *options, name='by_hand')
    for key in ('state_dict', 'state_dict_ema'):
        state, other = last(skipped)[key], last(by_hand)[key]
        assert all(torch.equal(state[name], other[name]) and state[name].isfinite().all() for name in state)
    assert summary(skipped) == summary(by_hand)


def test_skip_has_a_limit(digits_folder, tmp_path, monkeypatch, capsys, caplog):
    poison(monkeypatch, {1, *range(3, 99)}, everywhere)
    options = ['--on-nonfinite', 'skip', '--nonfinite-limit', '2', '--log-interval', '1']
    error = fail(capsys, digits_folder, tmp_path, *options)
    assert 'epoch 1, up to batch 0: not finite: ' in error and '3 in a row (--nonfinite-limit 2)' in error
    assert caplog.text.count('1 skipped, at most 1 in a row') == 2
    assert caplog.text.count('1 skipped, at most 2 in a row') == 1


def test_a_run_that_diverges(digits_folder, tmp_path, capsys):
    error = fail(capsys, digits_folder, tmp_path, '--opt', 'sgd', '--lr', '1e30')
    assert 'epoch 0, up to batch ' in error and 'not finite: ' in error


def test_a_validation_that_is_not_finite_is_no_result(digits_folder, tmp_path, caplog):
    # Running statistics that are NaN: training is as ever, in validation branch a has no logits that are numbers.
    model = timm.create_model('test_resnet', num_classes=4)
    model.bn1.running_mean.fill_(torch.nan)
    torch.save(model.state_dict(), tmp_path / 'nan.pth')
    options = [*OPTIONS, '--initial-checkpoint-a', str(tmp_path / 'nan.pth'), '--export']
    folder = run(digits_folder, tmp_path, *options, '--stop-epoch', '1')
    names = 'loss_a, loss_ens, ema_loss_a, ema_loss_ens'
    assert f'Epoch 0: not finite: {names}; it is not a best epoch for them' in caplog.messages
    row = summary(folder)[0]
    assert {key for key, value in row.items() if value == 'nan'} == {
        'eval_top1', *(f'eval_{ema}{likeness}' for ema in ('', 'ema_') for likeness in ('agreement', 'alignment')),
        *(f'eval_{ema}{metric}_{name}' for ema in ('', 'ema_') for metric in ('loss', 'top1', 'top5')
          for name in ('a', 'ens'))}
    checkpoint = last(folder)
    assert checkpoint['saver']['best_branches'] == {'b': (float(row['eval_ema_top1_b']), 0)}
    assert 'metric' not in checkpoint
    found = {path.name for path in folder.glob('*.pth.tar')}
    assert found == {'last.pth.tar', 'checkpoint-0.pth.tar', 'best_b.pth.tar'}
    assert {path.name for path in (folder / 'export').iterdir()} == {'vpl-test_vit'}
    assert 'nan' not in (folder / 'export' / 'vpl-test_vit' / 'README.md').read_text()

    for key in ('state_dict', 'state_dict_ema'):
        checkpoint[key]['model_a.bn1.running_mean'].zero_()
    torch.save({**checkpoint, 'ranks': checkpoint['ranks'].nan_to_num()}, folder / 'last.pth.tar')
    run(digits_folder, tmp_path, *options, '--resume', 'auto')
    assert last(folder)['saver']['best_epoch'] == 1 and (folder / 'model_best.pth.tar').exists()
    assert read_checkpoint(str(folder / 'best_a.pth.tar'))['epoch'] == 1
    assert {path.name for path in (folder / 'export').iterdir()} == {'vpl-test_resnet', 'vpl-test_vit'}


def test_large_gradients_are_finite():
    pair = PairWrapper(timm.create_model('test_vit', num_classes=2, img_size=32), None)
    task = PairTask(pair, StagedLoss([base_term('a')]), streams=BranchStreams(0, 0, torch.device('cpu')), verbose=False)
    groups = [{'params': list(pair.parameters()), 'side': 'a'}]
    for spoil, counted in ((0., 0), (3e38, 0), (-torch.inf, 1), (torch.nan, 1)):
        update = Update(task, torch.optim.SGD(groups, lr=0.), 1)
        for parameter in pair.parameters():
            parameter.grad = torch.full_like(parameter, spoil)
        update.step('a')
        assert [int(found) for found in update._found] == [counted]
