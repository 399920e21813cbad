"""Whole runs of the training command on small real images."""
import pytest
import torch
import yaml
from runs import NOISE, PAIR, SMALL, TIMES, assert_equal_weights, error_line, last, rows, run, train_in

from timm_vpl.cli import train
from timm_vpl.engine.optim import create_scheduler
from timm_vpl.options.train import parse_args


def test_run_folder(digits_folder, tmp_path):
    folder = run(digits_folder, tmp_path, *NOISE)
    files = {path.name for path in folder.iterdir()}
    assert files == {
        'args.yaml', 'data.yaml', 'environment.yaml', 'summary.csv', 'last.pth.tar', 'model_best.pth.tar',
        'best_a.pth.tar', 'best_b.pth.tar', 'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar'}
    inodes = {path.stat().st_ino for path in folder.glob('*.tar')}
    assert len(inodes) == 2  # one file an epoch, the other names are links

    table = rows(folder)
    assert [row['epoch'] for row in table] == ['0', '1']
    terms = ['loss', 'ce_a_loss', 'ce_b_loss', 'contrastive_loss', 'kl_loss']
    metrics = [f'{metric}_{name}' for name in ('a', 'b', 'ens') for metric in ('loss', 'top1', 'top5')]
    metrics += ['agreement', 'alignment']
    assert list(table[0]) == [
        'epoch', *(f'train_{term}' for term in terms), 'eval_top1', *(f'eval_{metric}' for metric in metrics),
        *(f'eval_ema_{metric}' for metric in metrics), 'lr_a', 'lr_b', 'stage', 'num_epochs', 'processes',
        'images', 'flops', 'skipped', 'seconds', 'eval_seconds', 'images_per_second']
    assert [row['stage'] for row in table] == ['1', '2']  # epoch 0 is in the first 20 %, 1 of 2 not in the last
    assert table[0]['train_kl_loss'] == '' and float(table[1]['train_kl_loss']) >= 0
    means = [(float(row['eval_ema_top1_a']) + float(row['eval_ema_top1_b'])) / 2 for row in table]
    assert [float(row['eval_top1']) for row in table] == pytest.approx(means)

    checkpoint = last(folder)
    assert checkpoint['epoch'] == 1 and checkpoint['task_state'] == {'num_updates': 10}
    assert checkpoint['args']['class_names'] == ['class0', 'class1', 'class2', 'class3']
    assert {key.partition('.')[0] for key in checkpoint['state_dict']} == {'model_a', 'model_b', 'affine'}
    assert set(checkpoint['state_dict_ema']) == set(checkpoint['state_dict'])


def test_args_yaml_is_a_recipe_of_the_same_run(digits_folder, tmp_path):
    folder = run(digits_folder, tmp_path, *NOISE, name='first')
    assert train(['--config', str(folder / 'args.yaml'), '--output', str(tmp_path), '--experiment', 'again']) == 0
    assert_equal_weights(last(folder)['state_dict'], last(tmp_path / 'again')['state_dict'])
    with open(folder / 'args.yaml') as f:
        assert yaml.safe_load(f)['model_a'] == 'test_resnet'


def test_pair_with_weights_0_trains_each_branch_as_alone(digits_folder, tmp_path):
    options = [*NOISE, '--clip-grad', '1.0', '--mixup', '0.2']
    pair = run(digits_folder, tmp_path, *options, '--contrastive-weight', '0', '--kl-weight', '0', name='pair')
    weight = {key: state['affine.weight'] for key, state in last(pair).items() if key.startswith('state_dict')}
    assert torch.equal(weight['state_dict'], weight['state_dict_ema'])  # the affine layer has not moved
    for side, model in (('a', PAIR[:2]), ('b', PAIR[2:])):
        solo = run(digits_folder, tmp_path, *options, '--method', 'solo', name=f'solo_{side}', models=model)
        for key in ('state_dict', 'state_dict_ema'):
            assert_equal_weights(last(solo)[key], last(pair)[key], f'model_{side}.')
        assert [row[f'eval_loss_{side}'] for row in rows(solo)] == [row[f'eval_loss_{side}'] for row in rows(pair)]
        assert f'train_ce_{side}_loss' in rows(solo)[0] and 'train_kl_loss' not in rows(solo)[0]


def test_workers_do_not_change_a_run(digits_folder, tmp_path):
    options = [*NOISE, '--mixup', '0.2', '--cutmix', '1.0', '--mixup-off-epoch', '1']
    main = run(digits_folder, tmp_path, *options, name='main')
    workers = run(digits_folder, tmp_path, *options, '--workers', '2', name='workers')
    assert_equal_weights(last(main)['state_dict'], last(workers)['state_dict'])


def test_a_stopped_run_without_a_schedule(digits_folder, tmp_path):
    options = ['--stop-epoch', '1', '--val-interval', '2', '--sched', 'none', '--layer-decay', '0.5']
    folder = run(digits_folder, tmp_path, *options)
    assert len(rows(folder)) == 1 and float(rows(folder)[0]['eval_top1']) > 0 and (folder / 'best_b.pth.tar').exists()
    groups = last(folder)['optimizer']['param_groups']
    assert {group['lr'] / group['lr_scale'] for group in groups if 'lr_scale' in group} == {0.001}


def test_a_run_of_the_same_name_is_not_written_over(digits_folder, tmp_path):
    first = run(digits_folder, tmp_path, '--epochs', '1')
    before = (first / 'last.pth.tar').stat().st_mtime_ns
    run(digits_folder, tmp_path, '--epochs', '1')
    assert (first / 'last.pth.tar').stat().st_mtime_ns == before
    assert (tmp_path / 'run-1' / 'last.pth.tar').exists()


@pytest.mark.parametrize('options', [
    ['--amp', '--amp-dtype', 'bfloat16', '--clip-grad', '1.0', '--clip-mode', 'agc'],
    ['--grad-accum-steps', '2', '--opt', 'lamb', '--sched-on-updates'],
    ['--channels-last-a', '--grad-checkpointing-b', '--in-chans', '1', '--eval-metric', 'loss_b'],
    *(pytest.param(options, marks=pytest.mark.slow) for options in (
        ['--aug-repeats', '3', '--no-model-ema', '--layer-decay', '0.75'],
        ['--mixup', '0.8', '--bce-loss', '--val-interval', '2'],
        ['--similarity', 'dot', '--tau', '64', '--same-class', 'ignore', '--affine-side', 'a', '--kl-to', 'both'],
        ['--torchcompile', 'eager', '--save-epochs', '1'])),
], ids=lambda options: options[0])
def test_options_train(digits_folder, tmp_path, options):
    folder = run(digits_folder, tmp_path, *options)
    assert all(torch.isfinite(tensor).all() for tensor in last(folder)['state_dict'].values())
    assert float(rows(folder)[1]['train_loss']) > 0


def test_accumulated_batches_are_one_large_batch(digits_folder, tmp_path):
    # The images of an epoch that fill no whole update are one of their own, and each counts as much as any other.
    quiet = ['--opt', 'sgd', '--lr', '0.05', '--no-aug', '--contrastive-weight', '0', '--x', '0', '--epochs', '1']
    models = ['--model-a', 'test_convnext', '--model-b', 'test_vit']
    large = run(digits_folder, tmp_path, *quiet, '-b', '32', name='large', models=models)
    small = run(digits_folder, tmp_path, *quiet, '-b', '16', '--grad-accum-steps', '3', name='small', models=models)
    assert float(rows(small)[0]['train_loss']) == pytest.approx(float(rows(large)[0]['train_loss']), rel=1e-5)
    state, other = last(small)['state_dict'], last(large)['state_dict']
    for key in state:
        torch.testing.assert_close(state[key], other[key], rtol=1e-4, atol=1e-6, msg=key)


def test_a_schedule_by_updates(digits_folder, tmp_path):
    table = rows(run(digits_folder, tmp_path, '--sched-on-updates'))
    assert [float(row['lr_a']) for row in table] == pytest.approx([0.001, 0.0005])  # half of a cosine


def test_class_pairs_other_than_cnn_and_vit(digits_folder, tmp_path, caplog):
    run(digits_folder, tmp_path, '--epochs', '1', models=['--model-a', 'test_vit', '--model-b', 'test_resnet'])
    assert 'roles are swapped' in caplog.text


def test_two_processes_train_as_one(digits_folder, tmp_path):
    # Without BatchNorm, whose statistics are those of a process, and without draws that depend on the process. Not with
    # AdamW: it makes steps of a bias of the keys, whose gradient is 0 but for rounding.
    models = ['--model-a', 'test_convnext', '--model-b', 'test_vit']
    quiet = [
        '--opt', 'sgd', '--lr', '0.02', '--aa', '', '--reprob', '0', '--epochs', '3', '--x', '40', '--y', '30',
        '--eval-metric', 'top1_ens']
    one = run(digits_folder, tmp_path, *quiet, name='one', models=models)
    train_in(2, digits_folder, *models, *SMALL, *quiet, '-b', '4', '--output', tmp_path, '--experiment', 'two')
    two = tmp_path / 'two'
    assert [row['stage'] for row in rows(two)] == ['1', '1', '2']
    for key, value in rows(one)[2].items():
        if key not in ('processes', *TIMES):
            assert float(rows(two)[2][key]) == pytest.approx(float(value), rel=1e-3, abs=1e-4), key
    state, other = last(one)['state_dict'], last(two)['state_dict']
    for key in state:
        torch.testing.assert_close(state[key], other[key], rtol=1e-3, atol=1e-4, msg=key)


def test_noise_of_the_learning_rate_follows_the_seed():
    def noise(seed):
        options = parse_args([
            '--dataset', 'digits', *PAIR, '--lr', '0.01', '--lr-noise', '0', '--epochs', '4', '--seed', seed])
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.01)
        scheduler, _ = create_scheduler(options, optimizer, 5)
        scheduler.step(2)
        return optimizer.param_groups[0]['lr']
    assert noise('1') == noise('1') != noise('2')


def test_state_of_an_optimizer_that_does_not_fit(digits_folder, tmp_path, capsys):
    folder = run(digits_folder, tmp_path, '--stop-epoch', '1')
    for damage in (lambda state: state.pop('exp_avg'), lambda state: state.update(exp_avg=3),
                   lambda state: state.update(exp_avg=torch.zeros(3))):
        checkpoint = last(folder)
        damage(checkpoint['optimizer']['state'][0])
        torch.save(checkpoint, tmp_path / 'damaged.pth.tar')
        argv = [digits_folder, *PAIR, *SMALL, '--output', tmp_path, '--resume', tmp_path / 'damaged.pth.tar']
        line = error_line(capsys, *argv, statuses=[1])
        assert 'its optimizer does not have the same state for each parameter' in line
