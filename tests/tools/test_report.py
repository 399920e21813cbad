"""The report, on run folders written by hand: every expected figure is computed by hand."""
import json
import subprocess
import sys

import pytest
import yaml

from timm_vpl.errors import RunError, UsageError
from timm_vpl.tools.comparison import Difference, paired_difference, sign_flip_p, t_quantile
from timm_vpl.tools.report import make_report
from timm_vpl.tools.runs import COLUMNS

OPTIONS = {
    'method': 'vpl', 'model_a': 'cnn', 'model_b': 'vit', 'epochs': 2, 'dataset': 'digits', 'batch_size': 50,
    'x': 20.0, 'y': 20.0, 'contrastive_to': 'b', 'kl_to': 'a', 'tau': 0.2, 'lr_base_a': 0.005, 'lr_base_b': 0.002,
    'seed': 1, 'output': 'runs', 'experiment': '', 'workers': 4, 'log_interval': 50}
PAIR = (
    'epoch,train_loss,train_kl_loss,eval_top1,eval_top1_a,eval_top5_a,eval_top1_b,eval_top5_b,eval_ema_top1_a,'
    'eval_ema_top5_a,eval_ema_top1_b,eval_ema_top5_b,lr_a,lr_b,stage,seconds,images_per_second,num_epochs,processes,'
    'images\n')
SOLO_A = 'epoch,eval_top1,eval_ema_top1_a,eval_ema_top5_a,lr_a,seconds,num_epochs,processes,images\n'
SOLO_B = SOLO_A.replace('_a', '_b')
RAW = 'epoch,eval_top1,eval_top1_a,eval_top5_a,lr_a,seconds,num_epochs,processes,images\n'
DATA = {
    'train': {'version': 1, 'split': 'train', 'images': 100, 'classes': None, 'files': 'training'},
    'validation': {'version': 1, 'split': 'validation', 'images': 50, 'classes': None, 'files': 'held out'}}
ENVIRONMENT = [{'torch': '2.14', 'device': 'cpu'}]
VALIDATION = ','.join(COLUMNS) + '\n'


@pytest.fixture
def make(tmp_path):
    """Write a run's folder and return its path."""
    def make(name, summary=None, validation=None, data=DATA, environment=ENVIRONMENT, **options):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'args.yaml').write_text(yaml.safe_dump({**OPTIONS, **options}))
        for file, text in (
                ('summary.csv', summary), ('validation.csv', validation),
                ('data.yaml', data and yaml.safe_dump(data)),
                ('environment.yaml', environment and yaml.safe_dump(environment))):
            if text is not None:
                (folder / file).write_text(text)
        return str(folder)
    return make


def solo_a(make, name, top1, seed=1, columns=SOLO_A, **options):
    """A finished solo run of branch a whose last epoch has this top-1."""
    rows = f'0,40,40,80,0.1,10,2,2,100\n1,{top1},{top1},91,0.1,10,2,2,100\n'
    return make(name, columns + rows, method='solo', model_b='', seed=seed, **options)


def solo_b(make, name, top1, **options):
    rows = f'0,30,30,70,0.1,15,2,2,100\n1,{top1},{top1},95,0.1,15,2,2,100\n'
    return make(name, SOLO_B + rows, method='solo', model_a=None, **options)


def pair(make, name, a=60, b=70, validation=None, columns=PAIR, **options):
    """A finished run of a pair whose last epoch has these top-1."""
    rows = (
        f'0,1,,1,9,9,9,9,50,90,{b - 20},80,0.1,0.1,1,20,10,2,2,100\n'
        f'1,1,0.5,1,9,9,9,9,{a},94,{b},92,0.1,0.1,2,20,10,2,2,100\n')
    return make(name, columns + rows, validation, **options)


@pytest.fixture
def runs(make):
    """VPL with two seeds, solo a with two, solo b with one."""
    return [
        make('vpl1', PAIR + (
            '0,9,,9,1,1,1,1,54,90,40,80,0.1,0.1,1,20,10,2,2,100\n'
            '1,9,9,9,1,1,1,1,61,94,74,92,0.1,0.1,2,22,10,2,2,100\n')),
        make('vpl2', PAIR + (
            '0,9,,9,1,1,1,1,64,92,44,82,0.1,0.1,1,24,10,2,2,100\n'
            '1,9,9,9,1,1,1,1,63,96,70,94,0.1,0.1,2,26,10,2,2,100\n'), seed=2),
        solo_a(make, 'a1', 57), solo_a(make, 'a2', 59, seed=2), solo_b(make, 'b1', 75)]


def records(*folders):
    return json.loads(make_report(list(folders), 'json'))


def frameworks(*folders):
    return list(dict.fromkeys(record['framework'] for record in records(*folders)))


def tables(text):
    return text.partition('## Notes')[0]


def test_markdown(runs):
    text = make_report(runs)
    assert tables(text) == '''\
## digits

Top-1 (percent) of the last epoch, mean ± standard deviation (runs).

| Epochs | Framework | Models | cnn | vit |
|---|---|---|---|---|
| 2 | solo | cnn | 58.00 ± 1.41 (2) | - |
| 2 | solo | vit | - | 75.00 (1) |
| 2 | vpl | cnn + vit | 62.00 ± 1.41 (2) | 72.00 ± 2.83 (2) |

### Each branch

| Epochs | Framework | Models | Model | Weights | validation top-1 | validation top-5 | best validation top-1 | median (collapsed) | best epoch | Δ solo, same epochs | Δ solo, same FLOPs |
|---|---|---|---|---|---|---|---|---|---|---|---|
| 2 | solo | cnn | cnn | ema | 58.00 ± 1.41 (2) | 91.00 ± 0.00 (2) | 58.00 ± 1.41 (2) | 58.00 (0) | 1, 1 | - | - |
| 2 | vpl | cnn + vit | cnn | ema | 62.00 ± 1.41 (2) | 95.00 ± 1.41 (2) | 62.50 ± 2.12 (2) | 62.00 (0) | 1, 0 | +4.00 [+4.00, +4.00] (2) | - |
| 2 | solo | vit | vit | ema | 75.00 (1) | 95.00 (1) | 75.00 (1) | 75.00 (0) | 1 | - | - |
| 2 | vpl | cnn + vit | vit | ema | 72.00 ± 2.83 (2) | 93.00 ± 1.41 (2) | 72.00 ± 2.83 (2) | 72.00 (0) | 1, 1 | -1.00 (1) | - |

### Cost

| Epochs | Framework | Models | Processes | FLOPs | Image-passes | Time | Time an epoch | Device-hours | Time / solo's |
|---|---|---|---|---|---|---|---|---|---|
| 2 | solo | cnn | 2 | - | 200.00 | 20.00 s | 10.00 s | 0.0111 | - |
| 2 | solo | vit | 2 | - | 200.00 | 30.00 s | 15.00 s | 0.0167 | - |
| 2 | vpl | cnn + vit | 2 | - | 400.00 | 46.00 s | 23.00 s | 0.0256 | 0.92 |

### Until solo's final top-1

| Epochs | Framework | Models | Model | Solo's top-1 | After epochs | FLOPs | Time | Solo's FLOPs | Solo's time |
|---|---|---|---|---|---|---|---|---|---|
| 2 | vpl | cnn + vit | cnn | 58.00 | 1 | - | 22.00 s | - | 20.00 s |
| 2 | vpl | cnn + vit | vit | 75.00 | not reached | - | - | - | 30.00 s |

'''  # noqa: E501
    notes = text.partition('## Notes')[2]
    assert 'on the evaluation set itself' in notes and 'GPU hours' in notes
    assert 'differs' not in notes and 'all different' not in notes and 'different images' not in notes


def test_json(runs):
    found = records(*runs)
    assert [(r['framework'], r['branch'], r['n']) for r in found] == [
        ('solo', 'a', 2), ('solo', 'b', 1), ('vpl', 'a', 2), ('vpl', 'b', 2)]
    a, b = found[2:]
    assert a['top1'] == {'mean': 62, 'std': pytest.approx(2 ** 0.5), 'n': 2, 'median': 62, 'collapsed': 0}
    assert (a['best_epochs'], a['seeds'], a['runs'], a['processes']) == ([1, 0], [1, 2], runs[:2], [2])
    assert a['device_hours'] == pytest.approx(46 * 2 / 3600)
    solo = b['baselines']['epochs']
    assert (solo['n'], solo['mean'], solo['reached_epochs'], solo['solo_seconds']) == (1, -1, None, 30)


def test_unfinished_runs_are_listed_and_never_averaged_in(make, runs):
    row = '0,1,,1,9,9,9,9,99,99,99,99,0.1,0.1,1,20,10,2,2,100\n'
    stopped = make('stopped', PAIR + row, seed=3)
    bad = make('bad', PAIR + row + '1,1,,nan,9,9,9,9,nan,99,99,99,0.1,0.1,1,20,10,2,2,100\n', seed=4)
    not_evaluated = make('blank', PAIR + row + '1,1,,,,,,,,,,,0.1,0.1,2,20,10,2,2,100\n', seed=6)
    empty, fresh = make('empty', '', seed=7), make('fresh', seed=8)
    unfinished = [stopped, bad, not_evaluated, empty, fresh]
    text = make_report([*runs, *unfinished])
    assert tables(text).startswith(tables(make_report(runs)))
    progress = [
        '1 of 2 epochs', '2 of 2 epochs, the last one without top-1', '2 of 2 epochs, the last one without top-1',
        '0 of 2 epochs', '0 of 2 epochs']
    listed = '\n'.join(f'| {run} | vpl | cnn + vit | {done} |' for run, done in zip(unfinished, progress, strict=True))
    assert '## Unfinished' in text and listed in text
    assert [(r['n'], r['unfinished']) for r in records(*runs, *unfinished) if not r['n']] == [
        (0, done) for done in progress]
    assert make_report([fresh]).splitlines()[0].startswith('## Unfinished')


def test_of_two_rows_of_an_epoch_the_later_one_counts(make):
    rows = '0,1,40,80,0.1,10,2,1,100\n1,1,50,90,0.1,10,2,1,100\n'
    resumed = make('resumed', RAW + rows + '1,1,60,95,0.1,30,2,2,100\n', method='solo', model_b='')
    record, = records(resumed)
    assert (record['top1']['mean'], record['seconds'], record['image_passes']) == (60, 40, 200)
    assert record['processes'] == [1, 2] and record['device_hours'] == pytest.approx((10 + 60) / 3600)
    assert '| 1 then 2 |' in make_report([resumed])


def test_without_ema_the_raw_weights_count(make):
    raw = solo_a(make, 'raw', 60, columns=RAW, model_ema=False)
    assert records(raw)[0]['weights'] == 'raw' and records(raw)[0]['top1']['mean'] == 60
    ema = solo_a(make, 'ema', 70, model_ema=True)
    text = make_report([raw, ema])
    assert '| 2 | solo (model_ema=off, weights=raw) | cnn | cnn | raw | 60.00 (1) |' in text
    assert '| 2 | solo (model_ema=on, weights=ema) | cnn | cnn | ema | 70.00 (1) |' in text


def test_real_and_v2_where_measured(make):
    def line(epoch, branch, weights, set_, top1):
        return f'"x,y",{epoch},{branch},{weights},d,{set_},5,1,{top1},99,,,,\n'

    validation = VALIDATION + (
        line(1, 'a', 'ema', 'real', 66) + line(1, 'a', 'ema', 'v2', 11) + line(1, 'a', 'ema', 'v2', 44)
        + line(1, 'a', 'raw', 'real', 1) + line(1, 'b', 'ema', 'validation', 1) + line(0, 'b', 'ema', 'real', 2)
        + line(1, 'ens', 'ema', 'real', 3))
    runs = [pair(make, 'one', validation=validation), pair(make, 'two', seed=2)]
    a, b = records(*runs)
    a, b = a['figures'], b['figures']
    assert (a['ReaL top-1']['mean'], a['ReaL top-1']['n'], a['validation top-1']['n']) == (66, 1, 2)
    assert (a['V2 top-1']['mean'], a['V2 top-5']['mean'], a['best V2 top-1']['mean']) == (44, 99, 44)
    assert 'ReaL top-1' not in b and b['validation top-1']['mean'] == 70
    text = make_report(runs)
    assert ('| validation top-1 | validation top-5 | ReaL top-1 | ReaL top-5 | V2 top-1 | V2 top-5 | best validation '
            'top-1 |') in text
    assert '| vpl | cnn + vit | cnn | ema | 60.00 ± 0.00 (2) | 94.00 ± 0.00 (2) | 66.00 (1) | 99.00 (1) | 44.00' in text


def test_without_a_baseline_there_is_no_delta(make):
    other = [
        solo_a(make, 'model', 50, model_a='other'), solo_a(make, 'data', 50, dataset='torch/cifar10'),
        make('epochs', SOLO_A + '0,1,50,90,0.1,10,1,2,100\n', method='solo', model_b='', epochs=1)]
    found = [r for r in records(pair(make, 'vpl'), *other) if r['framework'] == 'vpl']
    assert [r['baselines'] for r in found] == [{}, {}]
    assert 'Until solo' not in tables(make_report([pair(make, 'again')]))


def test_the_baseline_is_the_nearest_and_its_differences_are_named(make):
    far = solo_a(make, 'far', 50, lr_base_a=0.1, batch_size=25)
    near = solo_a(make, 'near', 58, lr_base_a=0.1, x=0.0, lr_base_b=9)  # x and branch b don't matter
    vpl = pair(make, 'vpl', a=60)
    a = next(r for r in records(far, near, vpl) if r['framework'] == 'vpl' and r['branch'] == 'a')
    solo = a['baselines']['epochs']
    assert (solo['name'], solo['differs'], solo['mean']) == ('solo (batch_size=50)', ['lr_base'], 2)
    note = '- vpl, cnn, 2 epochs: its baseline of the same epochs, solo (batch_size=50), differs in lr_base.'
    assert note in make_report([far, near, vpl])
    exact = solo_a(make, 'exact', 57)
    a = next(r for r in records(far, near, vpl, exact) if r['framework'] == 'vpl' and r['branch'] == 'a')
    assert (a['baselines']['epochs']['differs'], a['baselines']['epochs']['mean']) == ([], 3)


def test_a_run_counts_once(make, tmp_path):
    run, fresh = pair(make, 'run'), make('fresh')
    (tmp_path / 'link').symlink_to(run)
    copy = pair(make, 'copy')
    found = records(run, run + '/', str(tmp_path / 'link'), copy, fresh, fresh + '/.')
    assert [(r['n'], r.get('unfinished')) for r in found] == [(1, None), (1, None), (0, '0 of 2 epochs')]


def test_runs_of_other_options_are_not_averaged(make):
    runs = [
        pair(make, 'one'), pair(make, 'two', a=61, seed=2, output='x', experiment='two', workers=1, log_interval=9),
        pair(make, 'three', a=70, tau=0.1), pair(make, 'four', a=70, lr_base_a=0.1)]
    assert [(r['framework'], r['n']) for r in records(*runs) if r['branch'] == 'a'] == [
        ('vpl (lr_base_a=0.005, tau=0.2)', 2), ('vpl (lr_base_a=0.005, tau=0.1)', 1),
        ('vpl (lr_base_a=0.1, tau=0.2)', 1)]
    parallel = make('parallel', PAIR + (
        '0,1,,1,9,9,9,9,50,90,50,80,0.1,0.1,1,20,10,2,8,100\n1,1,,1,9,9,9,9,50,90,50,80,0.1,0.1,1,20,10,2,8,100\n'))
    assert frameworks(runs[0], parallel) == ['vpl (processes=2)', 'vpl (processes=8)']


def test_how_a_run_was_done_makes_no_row(make):
    runs = [pair(make, 'plain')]
    for seed, (name, value) in enumerate({
            'recovery_minutes': 5.0, 'recovery_interval': 7, 'hang_timeout': 9.0, 'on_nonfinite': 'skip',
            'nonfinite_limit': 3, 'deterministic': True, 'val_interval': 2, 'device': 'cuda'}.items(), start=2):
        runs.append(pair(make, name, seed=seed, **{name: value}))
    assert [(r['framework'], r['n']) for r in records(*runs)] == [('vpl', len(runs))] * 2
    # Nor does an option that has no effect beside the others.
    idle = [pair(make, f'idle{i}', seed=i, kl_weight=0.0, rho=float(i), x=10.0 * i) for i in (1, 2)]
    assert [(r['framework'], r['n']) for r in records(*idle)] == [('vpl without kl', 2)] * 2


# Differences


def baseline(folders, branch='b', framework='vpl', kind='epochs'):
    [record] = [r for r in records(*folders) if (r['branch'], r['framework']) == (branch, framework)]
    return record['baselines'][kind]


def test_no_gain_comes_out_of_nothing(make):
    # Measured: quick start, seed 1, both pair weights 0, whose branch b is that of the solo run of seed 1 to the bit.
    nothing = pair(make, 'nothing', b=89.17, contrastive_weight=0.0, kl_weight=0.0)
    solo = [solo_b(make, 'solo1', 89.17), solo_b(make, 'solo2', 57.50, seed=2)]
    found = baseline([nothing, *solo], framework='vpl without contrastive and kl')
    assert (found['n'], found['mean'], found['low']) == (1, 0, None)
    assert '| 0.00' not in make_report([nothing, *solo]) and '| +0.00 (1) |' in make_report([nothing, *solo])
    found = baseline([nothing, solo[1]], framework='vpl without contrastive and kl')
    assert 'mean' not in found and (found['text'], found['reason']) == ('-', 'no common seed (1 and 2)')
    note = '- vpl without contrastive and kl, vit, 2 epochs: no difference to solo: no common seed (1 and 2).'
    assert note in make_report([nothing, solo[1]])


def test_a_planted_gain_is_found(make):
    gains = [2.5, 1.5, 2.25, 1.75, 2.0, 2.0]  # mean 2, deviation 0.3536, half of the interval 2.5706 * 0.1443
    folders = []
    for seed, gain in enumerate(gains):
        alone = 60 + 7 * seed % 5  # seeds differ by more than the gain
        folders += [pair(make, f'pair{seed}', b=alone + gain, seed=seed), solo_b(make, f'solo{seed}', alone, seed=seed)]
    found = baseline(folders)
    assert (found['n'], found['mean'], found['p']) == (6, 2, 2 / 2 ** 6)
    assert (found['low'], found['high']) == (pytest.approx(1.629, abs=1e-3), pytest.approx(2.371, abs=1e-3))
    assert '| +2.00 [+1.63, +2.37] (6, p 0.031) |' in make_report(folders)
    # Fewer seeds have no p.
    assert baseline(folders[:10])['p'] is None


@pytest.mark.parametrize('change', [
    {'environment': [{'torch': '2.15', 'device': 'cpu'}]}, {'environment': [*ENVIRONMENT, {'torch': '2.15'}]},
    {'data': {**DATA, 'train': {**DATA['train'], 'files': 'others'}}}, {'environment': None}])
def test_seeds_pair_in_one_environment_on_the_same_data(make, change):
    folders = [pair(make, 'pair', b=72), solo_b(make, 'solo', 70, **change)]
    found = baseline(folders)
    assert 'mean' not in found and found['reason'] == (
        'environment or data of the common seeds differ, or are not known')
    folders += [pair(make, 'pair2', b=75, seed=2), solo_b(make, 'solo2', 70, seed=2)]
    assert (baseline(folders)['n'], baseline(folders)['mean']) == (1, 5)


def test_seeds_may_have_training_images_of_their_own(make):
    folders = []
    for seed in (1, 2):
        data = {**DATA, 'train': {**DATA['train'], 'files': f'subset {seed}'}}
        folders += [pair(make, f'pair{seed}', b=70 + seed, seed=seed, data=data),
                    solo_b(make, f'solo{seed}', 70, seed=seed, data=data)]
    assert (baseline(folders)['n'], baseline(folders)['mean']) == (2, 1.5)
    assert '- digits: the seeds are trained on different images.' in make_report(folders)


def test_the_same_flops_whatever_the_epochs(make):
    def with_flops(name, columns, rows, each, **options):
        lines = ''.join(f'{row},{each}\n' for row in rows)
        return make(name, f'{columns.strip()},flops\n{lines}', **options)

    vpl = with_flops('vpl', PAIR, [f'{e},1,1,1,9,9,9,9,60,9,72,9,1,1,1,9,9,2,1,100' for e in (0, 1)], 500)
    solo = {'method': 'solo', 'model_a': ''}
    short = with_flops('short', SOLO_B, [f'{e},1,70,9,1,9,2,1,100' for e in (0, 1)], 260, **solo)
    long = with_flops('long', SOLO_B, [f'{e},1,71.5,9,1,9,4,1,100' for e in range(4)], 260, epochs=4, **solo)
    far = with_flops('far', SOLO_B, [f'{e},1,99,9,1,9,5,1,100' for e in range(5)], 260, epochs=5, **solo)
    folders = [vpl, short, long, far]
    assert (baseline(folders)['mean'], baseline(folders)['num_epochs']) == (2, 2)
    same = baseline(folders, kind='flops')  # 1000 of the pair, 1040 of four epochs, 1300 of five
    assert (same['mean'], same['num_epochs'], same['solo_flops'], same['differs']) == (0.5, 4, 1040, [])
    assert '| +2.00 (1) | +0.50 (1) |' in make_report(folders)
    assert '| 2 | vpl | cnn + vit | 1 | 1.00 k | 400.00 |' in make_report(folders)


def test_intervals_and_sign_flips():
    for df, value in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (30, 2.0423)):
        assert t_quantile(0.95, df) == pytest.approx(value, abs=1e-4)  # of printed tables
    assert t_quantile(0.99, 9) == pytest.approx(3.2498, abs=1e-4)
    assert paired_difference([1.0]) == Difference(1, 1.0)
    assert str(paired_difference([1.0, 2.0])) == '+1.50 [-4.85, +7.85] (2)'
    for differences in ([0.5, -1.0, 2.0, 3.0, -0.25, 1.0, 4.0], [1.0] * 6, [0.0] * 6, [1.0, -1.0] * 3):
        sums = [sum(d * (1 if bits >> i & 1 else -1) for i, d in enumerate(differences))
                for bits in range(2 ** len(differences))]
        expected = sum(abs(s) >= abs(sum(differences)) for s in sums) / len(sums)
        assert sign_flip_p(differences) == pytest.approx(expected)


def test_a_collapsed_run_is_counted(make):
    folders = [solo_b(make, f'b{seed}', top1, seed=seed) for seed, top1 in enumerate((89, 91, 57.5))]
    record, = records(*folders)
    assert (record['top1']['median'], record['top1']['collapsed']) == (89, 1)
    assert '| 89.00 (1) |' in make_report(folders)


def test_a_split_keeps_its_name(make):
    line = '"x",1,b,ema,d,test,5,1,66,99,,,,\n'
    text = make_report([solo_b(make, 'run', 70, val_split='dev', validation=VALIDATION + line)])
    assert '| Model | Weights | dev top-1 | dev top-5 | test top-1 | test top-5 | best dev top-1 |' in text
    assert '| solo | vit | vit | ema | 70.00 (1) | 95.00 (1) | 66.00 (1) | 99.00 (1) | 70.00 (1) |' in text


def test_runs_of_one_seed_are_noted(make):
    assert '- vpl, cnn, 2 epochs: the seeds are not all different (1, 1).' in make_report(
        [pair(make, 'one'), pair(make, 'two', a=61)])


@pytest.mark.parametrize('options, name', [
    ({'x': 0.0, 'y': 33.5}, 'vpl (x=0, y=33.5)'),
    ({'contrastive_to': 'both', 'kl_to': 'both'}, 'vpl (contrastive_to=both, kl_to=both)'),
    ({'kl_weight': 0.0, 'rho': 2.0}, 'vpl without kl'),  # which leaves rho without effect
    ({'method': 'dml', 'dml_joint': True, 'x': 0}, 'dml (dml_joint=on)'),
    ({'method': 'distill', 'model_a': '', 'teacher': 'hf-hub:timm/resnet50.a1_in1k'}, 'distill from resnet50.a1_in1k'),
    ({'method': 'deit', 'model_a': '', 'teacher': 'regnety_160', 'distillation_type': 'soft'},
     'deit from regnety_160 (distillation_type=soft)'),
    ({'method': 'deit'}, 'deit'),
    ({'method': 'my_own'}, 'my_own'),
])
def test_names(make, options, name):
    assert frameworks(pair(make, 'run', **options)) == [name]


def test_students_of_a_teacher_a_seed_are_one_group(make):
    teachers = [solo_a(make, f'teacher{seed}', 58, seed) for seed in (1, 2)]
    other = solo_a(make, 'other', 58, lr_base_a=0.1)
    students = [
        pair(make, f'student{i}', b=70 + i, method='distill', model_a='', teacher=teacher, seed=i)
        for i, teacher in enumerate(teachers)]
    record, = records(*students)
    assert (record['framework'], record['n'], record['branch']) == ('distill from cnn', 2, 'b')
    assert record['top1']['mean'] == 70.5
    third = pair(make, 'student3', method='distill', model_a='', teacher=other)
    assert frameworks(*students, third) == [
        f'distill from cnn (teacher={teacher})' for teacher in (teachers[0], other)]


def test_a_frozen_branch_is_the_teacher(make):
    # Its learning rate and its EMA are missing.
    columns = PAIR.replace(',lr_a', ',unused').replace('ema_top1_a', 'unused1').replace('ema_top5_a', 'unused5')
    record, = records(pair(make, 'run', columns=columns, method='distill', teacher='somewhere/best_a.pth.tar'))
    assert (record['framework'], record['branch'], record['model']) == ('distill from cnn', 'b', 'vit')


def test_rows_of_several_pairs_name_them(make):
    text = make_report([
        pair(make, 'one'), pair(make, 'two', a=65, model_a='large'), pair(make, 'three', 66, 72, model_a='vit')])
    assert '''\
| Epochs | Framework | Models | cnn | large | vit |
|---|---|---|---|---|---|
| 2 | vpl | cnn + vit | 60.00 (1) | - | 70.00 (1) |
| 2 | vpl | large + vit | - | 65.00 (1) | 70.00 (1) |
| 2 | vpl | vit + vit | - | - | 66.00 (1) / 72.00 (1) |
''' in text


def test_data_sets_side_by_side(make):
    flowers = {**DATA, 'train': {**DATA['train'], 'classes': ['rose', 'iris']}}
    runs = [pair(make, 'one'), pair(make, 'two', a=90, dataset='', data_dir='/data/flowers/', data=flowers)]
    text = make_report(runs)
    assert text.index('## 100 images in train, 50 in validation, 2 classes\n') < text.index('## digits\n')
    # Where data lie does not matter, where their identity is known; else a folder is all there is.
    moved = [pair(make, f'moved{i}', a=60 + i, dataset='', data_dir=f'/{i}', seed=i) for i in (1, 2)]
    assert records(*moved)[0]['n'] == 2
    unknown = [
        pair(make, f'unknown{i}', a=60 + i, dataset='wds/x', data_dir=f'/{i}', seed=i, data=None) for i in (1, 2)]
    assert [r['n'] for r in records(*unknown)] == [1] * 4


def test_a_solo_model_is_the_same_on_either_side(make):
    one, two = solo_a(make, 'one', 57), solo_b(make, 'two', 59, model_b='cnn', lr_base_b=0.005, seed=2)
    record, = records(one, two)
    assert (record['n'], record['top1']['mean'], record['seconds']) == (2, 58, 25)


def test_large_costs_have_units(make):
    rows = ''.join(f'{epoch},1,50,90,0.1,4500,2,16,1281167\n' for epoch in (0, 1))
    run = make('large', SOLO_A + rows, method='solo', model_b='')
    assert '| 2 | solo | cnn | 16 | - | 2.56 M | 2.50 h | 1.25 h | 40.00 | - |' in make_report([run])


def test_markdown_is_escaped(make):
    assert '| vpl | `a\\x7cb` + vit | `a\\x7cb` |' in make_report([pair(make, 'run', model_a='a|b')])


def test_wrong_paths(make, tmp_path):
    with pytest.raises(UsageError, match='^no run folder is given$'):
        make_report([])
    with pytest.raises(UsageError, match='nowhere: no such folder$'):
        make_report([str(tmp_path / 'nowhere')])
    for name, text in (('none', None), ('broken', 'a: [1'), ('other', 'model: resnet50\n'), ('list', '- 1\n')):
        folder = tmp_path / name
        folder.mkdir()
        if text:
            (folder / 'args.yaml').write_text(text)
        with pytest.raises(UsageError, match=f'{name} is not the folder of a run: it has no args.yaml that names'):
            make_report([pair(make, f'good_{name}'), str(folder)])
    pair(make, 'good')
    (tmp_path / 'good' / 'validation.csv').mkdir()
    with pytest.raises(RunError, match='validation.csv: cannot be read'):
        make_report([str(tmp_path / 'good')])


def test_nothing_heavy_is_imported():
    code = "import sys, timm_vpl.tools.report; print(sorted({'torch', 'timm', 'numpy'}.intersection(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '[]\n'
