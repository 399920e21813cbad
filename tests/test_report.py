"""The report, on run folders written by hand: every expected figure is computed by hand."""
import json
import random
import subprocess
import sys

import pytest
import yaml

from timm_vpl.errors import UsageError
from timm_vpl.tools.comparison import Difference, paired_difference, sign_flip_p, t_quantile
from timm_vpl.tools.report import report

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
VALIDATION = 'model,epoch,branch,weights,data,set,images,loss,top1,top5\n'


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
    return json.loads(report(list(folders), 'json'))


def frameworks(*folders):
    return list(dict.fromkeys(record['framework'] for record in records(*folders)))


def tables(text):
    return text.partition('## Notes')[0]


def test_markdown(runs):
    text = report(runs)
    assert tables(text) == '''\
## digits

Top-1 (percent) of the last epoch, mean ± standard deviation (runs). Weights: EMA.

| Epochs | Framework | cnn | vit |
|---|---|---|---|
| 2 | solo | 58.00 ± 1.41 (2) | 75.00 (1) |
| 2 | VPL | 62.00 ± 1.41 (2) | 72.00 ± 2.83 (2) |

### Each branch

| Epochs | Framework | Model | validation top-1 | validation top-5 | best validation top-1 | median (collapsed) | best epoch | Δ solo, same epochs | Δ solo, same FLOPs |
|---|---|---|---|---|---|---|---|---|---|
| 2 | solo | cnn | 58.00 ± 1.41 (2) | 91.00 ± 0.00 (2) | 58.00 ± 1.41 (2) | 58.00 (0) | 1, 1 | - | - |
| 2 | VPL | cnn | 62.00 ± 1.41 (2) | 95.00 ± 1.41 (2) | 62.50 ± 2.12 (2) | 62.00 (0) | 1, 0 | +4.00 [+4.00, +4.00] (2) | - |
| 2 | solo | vit | 75.00 (1) | 95.00 (1) | 75.00 (1) | 75.00 (0) | 1 | - | - |
| 2 | VPL | vit | 72.00 ± 2.83 (2) | 93.00 ± 1.41 (2) | 72.00 ± 2.83 (2) | 72.00 (0) | 1, 1 | -1.00 (1) | - |

### Cost

| Epochs | Framework | Models | Processes | FLOPs | Image-passes | Time | Time an epoch | Device-hours | Time / solo's |
|---|---|---|---|---|---|---|---|---|---|
| 2 | solo | cnn | 2 | - | 200.00 | 20.00 s | 10.00 s | 0.0111 | - |
| 2 | solo | vit | 2 | - | 200.00 | 30.00 s | 15.00 s | 0.0167 | - |
| 2 | VPL | cnn + vit | 2 | - | 400.00 | 46.00 s | 23.00 s | 0.0256 | 0.92 |

### Until solo's final top-1

| Epochs | Framework | Model | Solo's top-1 | After epochs | FLOPs | Time | Solo's FLOPs | Solo's time |
|---|---|---|---|---|---|---|---|---|
| 2 | VPL | cnn | 58.00 | 1 | - | 22.00 s | - | 20.00 s |
| 2 | VPL | vit | 75.00 | not reached | - | - | - | 30.00 s |

'''  # noqa: E501
    notes = text.partition('## Notes')[2]
    assert 'on the evaluation set itself' in notes and 'GPU hours' in notes
    assert 'differs' not in notes and 'all different' not in notes and 'different images' not in notes


def test_json(runs):
    found = records(*runs)
    assert [(r['framework'], r['branch'], r['n']) for r in found] == [
        ('solo', 'a', 2), ('solo', 'b', 1), ('VPL', 'a', 2), ('VPL', 'b', 2)]
    a, b = found[2:]
    assert a['top1'] == {
        'mean': 62, 'std': pytest.approx(2 ** 0.5), 'n': 2, 'median': 62, 'collapsed': 0}
    assert a['figures']['best validation top-1']['mean'] == 62.5
    assert a['best_epochs'] == [1, 0] and a['seeds'] == [1, 2]
    assert a['runs'] == runs[:2] and a['weights'] == 'ema' and a['processes'] == [2]
    assert a['device_hours'] == pytest.approx(46 * 2 / 3600)
    solo = a['baselines']['epochs']
    assert (solo['mean'], solo['reached_epochs'], solo['reached_seconds']) == (4, 1, 22)
    solo = b['baselines']['epochs']
    assert (solo['n'], solo['mean'], solo['reached_epochs'], solo['reached_seconds'], solo['solo_seconds']) == (
        1, -1, None, None, 30)
    assert found[1]['top1']['std'] is None and found[1]['baselines'] == {}


def test_unfinished_runs_are_listed_and_never_averaged_in(make, runs):
    row = '0,1,,1,9,9,9,9,99,99,99,99,0.1,0.1,1,20,10,2,2,100\n'
    stopped = make('stopped', PAIR + row, seed=3)
    bad = make('bad', PAIR + row + '1,1,,nan,9,9,9,9,nan,99,99,99,0.1,0.1,1,20,10,2,2,100\n', seed=4)
    not_evaluated = make('blank', PAIR + row + '1,1,,,,,,,,,,,0.1,0.1,2,20,10,2,2,100\n', seed=6)
    empty, fresh = make('empty', '', seed=7), make('fresh', seed=8)
    unfinished = [stopped, bad, not_evaluated, empty, fresh]
    text = report([*runs, *unfinished])
    assert tables(text).startswith(tables(report(runs)))
    progress = [
        '1 of 2 epochs', '2 of 2 epochs, the last one not evaluated', '2 of 2 epochs, the last one not evaluated',
        '0 of 2 epochs', '0 of 2 epochs']
    listed = '\n'.join(f'| {run} | VPL | cnn + vit | {done} |' for run, done in zip(unfinished, progress, strict=True))
    assert '## Unfinished' in text and listed in text
    assert [(r['n'], r['unfinished']) for r in records(*runs, *unfinished) if not r['n']] == [
        (0, done) for done in progress]
    assert report([fresh]).splitlines()[0].startswith('## Unfinished')


def test_of_two_rows_of_an_epoch_the_later_one_counts(make):
    rows = '0,1,40,80,0.1,10,2,1,100\n1,1,50,90,0.1,10,2,1,100\n'
    resumed = make('resumed', RAW + rows + '1,1,60,95,0.1,30,2,2,100\n', method='solo', model_b='')
    record, = records(resumed)
    assert (record['top1']['mean'], record['seconds'], record['image_passes']) == (60, 40, 200)
    assert record['processes'] == [1, 2] and record['device_hours'] == pytest.approx((10 + 60) / 3600)
    assert '| 1 then 2 |' in report([resumed])


def test_without_ema_the_raw_weights_count(make):
    raw = solo_a(make, 'raw', 60, columns=RAW, model_ema=False)
    assert 'Weights: raw.' in report([raw])
    assert records(raw)[0]['weights'] == 'raw' and records(raw)[0]['top1']['mean'] == 60
    ema = solo_a(make, 'ema', 70, model_ema=True)
    text = report([raw, ema])
    assert 'Weights: EMA; raw: solo (model_ema=False, weights=raw) (cnn).' in text
    assert '| 2 | solo (model_ema=True, weights=ema) | 70.00 (1) |' in text


def test_real_and_v2_where_measured(make):
    def line(epoch, branch, weights, set_, top1):
        return f'"x,y",{epoch},{branch},{weights},d,{set_},5,1,{top1},99\n'

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
    text = report(runs)
    assert ('| validation top-1 | validation top-5 | ReaL top-1 | ReaL top-5 | V2 top-1 | V2 top-5 | best validation '
            'top-1 |') in text
    assert '| 2 | VPL | cnn | 60.00 ± 0.00 (2) | 94.00 ± 0.00 (2) | 66.00 (1) | 99.00 (1) | 44.00 (1) |' in text


def test_without_a_baseline_there_is_no_delta(make):
    other = [
        solo_a(make, 'model', 50, model_a='other'), solo_a(make, 'data', 50, dataset='torch/cifar10'),
        make('epochs', SOLO_A + '0,1,50,90,0.1,10,1,2,100\n', method='solo', model_b='', epochs=1)]
    found = [r for r in records(pair(make, 'vpl'), *other) if r['framework'] == 'VPL']
    assert [r['baselines'] for r in found] == [{}, {}]
    assert 'Until solo' not in tables(report([pair(make, 'again')]))


def test_the_baseline_is_the_nearest_and_its_differences_are_named(make):
    far = solo_a(make, 'far', 50, lr_base_a=0.1, batch_size=25)
    near = solo_a(make, 'near', 58, lr_base_a=0.1, x=0.0, lr_base_b=9)  # x and branch b don't matter
    vpl = pair(make, 'vpl', a=60)
    a = next(r for r in records(far, near, vpl) if r['framework'] == 'VPL' and r['branch'] == 'a')
    solo = a['baselines']['epochs']
    assert (solo['name'], solo['differs'], solo['mean']) == ('solo (batch_size=50)', ['lr_base'], 2)
    assert '- VPL, cnn, 2 epochs: its baseline of the same epochs, solo (batch_size=50), differs in lr_base.' in report(
        [far, near, vpl])
    exact = solo_a(make, 'exact', 57)
    a = next(r for r in records(far, near, vpl, exact) if r['framework'] == 'VPL' and r['branch'] == 'a')
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
        ('VPL (lr_base_a=0.005, tau=0.2)', 2), ('VPL (lr_base_a=0.005, tau=0.1)', 1),
        ('VPL (lr_base_a=0.1, tau=0.2)', 1)]
    parallel = make('parallel', PAIR + (
        '0,1,,1,9,9,9,9,50,90,50,80,0.1,0.1,1,20,10,2,8,100\n1,1,,1,9,9,9,9,50,90,50,80,0.1,0.1,1,20,10,2,8,100\n'))
    assert frameworks(runs[0], parallel) == ['VPL (processes=2)', 'VPL (processes=8)']


def test_how_a_run_was_done_makes_no_row(make):
    runs = [pair(make, 'plain')]
    for seed, (name, value) in enumerate({
            'recovery_minutes': 5.0, 'recovery_interval': 7, 'hang_timeout': 9.0, 'zero': True, 'on_nonfinite': 'skip',
            'nonfinite_limit': 3, 'deterministic': True, 'val_interval': 2, 'device': 'cuda'}.items(), start=2):
        runs.append(pair(make, name, seed=seed, **{name: value}))
    assert [(r['framework'], r['n']) for r in records(*runs)] == [('VPL', len(runs))] * 2
    # Nor does an option that has no effect beside the others.
    idle = [pair(make, f'idle{i}', seed=i, kl_weight=0.0, rho=float(i), x=10.0 * i) for i in (1, 2)]
    assert [(r['framework'], r['n']) for r in records(*idle)] == [('VPL without KL', 2)] * 2


# Differences


def baseline(folders, branch='b', framework='VPL', kind='epochs'):
    [record] = [r for r in records(*folders) if (r['branch'], r['framework']) == (branch, framework)]
    return record['baselines'][kind]


def test_no_gain_comes_out_of_nothing(make):
    # Measured: quick start, seed 1, both pair weights 0, whose branch b is that of the solo run of seed 1 to the bit.
    nothing = pair(make, 'nothing', b=89.17, contrastive_weight=0.0, kl_weight=0.0)
    solo = [solo_b(make, 'solo1', 89.17), solo_b(make, 'solo2', 57.50, seed=2)]
    found = baseline([nothing, *solo], framework='VPL without pair terms')
    assert (found['n'], found['mean'], found['low']) == (1, 0, None)
    assert '| 0.00' not in report([nothing, *solo]) and '| +0.00 (1) |' in report([nothing, *solo])
    found = baseline([nothing, solo[1]], framework='VPL without pair terms')
    assert 'mean' not in found and (found['text'], found['reason']) == ('-', 'no common seed (1 and 2)')
    note = '- VPL without pair terms, vit, 2 epochs: no difference to solo: no common seed (1 and 2).'
    assert note in report([nothing, solo[1]])


def test_a_planted_gain_is_found(make):
    gains = [2.5, 1.5, 2.25, 1.75, 2.0, 2.0]  # mean 2, deviation 0.3536, half of the interval 2.5706 * 0.1443
    folders = []
    for seed, gain in enumerate(gains):
        alone = 60 + 7 * seed % 5  # seeds differ by more than the gain
        folders += [pair(make, f'pair{seed}', b=alone + gain, seed=seed), solo_b(make, f'solo{seed}', alone, seed=seed)]
    found = baseline(folders)
    assert (found['n'], found['mean'], found['p']) == (6, 2, 2 / 2 ** 6)
    assert (found['low'], found['high']) == (pytest.approx(1.629, abs=1e-3), pytest.approx(2.371, abs=1e-3))
    assert '| +2.00 [+1.63, +2.37] (6, p 0.031) |' in report(folders)
    # Fewer seeds have no p.
    assert baseline(folders[:10])['p'] is None


def test_equal_rows_seldom_differ():
    draw = random.Random(0)
    differing = 0
    for _ in range(200):
        scores = [sorted((draw.gauss(50, 2), draw.gauss(50, 2)), key=lambda _: draw.random()) for _ in range(6)]
        difference = paired_difference([one - two for one, two in scores])
        differing += not difference.low < 0 < difference.high
    assert 4 <= differing <= 18


@pytest.mark.parametrize('change, reason', [
    ({'environment': [{'torch': '2.15', 'device': 'cpu'}]}, 'the seeds that both have differ in environment or data'),
    ({'environment': [*ENVIRONMENT, {'torch': '2.15'}]}, 'the seeds that both have differ in environment or data'),
    ({'data': {**DATA, 'train': {**DATA['train'], 'files': 'others'}}},
     'the seeds that both have differ in environment or data'),
    ({'environment': None}, 'the folders do not tell data and environment'),
])
def test_seeds_pair_in_one_environment_on_the_same_data(make, change, reason):
    folders = [pair(make, 'pair', b=72), solo_b(make, 'solo', 70, **change)]
    assert baseline(folders)['reason'] == reason
    folders += [pair(make, 'pair2', b=75, seed=2), solo_b(make, 'solo2', 70, seed=2)]
    assert (baseline(folders)['n'], baseline(folders)['mean']) == (1, 5)


def test_seeds_may_have_training_images_of_their_own(make):
    folders = []
    for seed in (1, 2):
        data = {**DATA, 'train': {**DATA['train'], 'files': f'subset {seed}'}}
        folders += [pair(make, f'pair{seed}', b=70 + seed, seed=seed, data=data),
                    solo_b(make, f'solo{seed}', 70, seed=seed, data=data)]
    assert (baseline(folders)['n'], baseline(folders)['mean']) == (2, 1.5)
    assert '- digits: the seeds are trained on different images.' in report(folders)


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
    assert '| +2.00 (1) | +0.50 (1) |' in report(folders)
    assert '| 2 | VPL | cnn + vit | 1 | 1.00 k | 400.00 |' in report(folders)


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
    assert '| 89.00 (1) |' in report(folders)


def test_a_split_keeps_its_name(make):
    line = '"x",1,b,ema,d,test,5,1,66,99\n'
    text = report([solo_b(make, 'run', 70, val_split='dev', validation=VALIDATION + line)])
    assert '| Epochs | Framework | Model | dev top-1 | dev top-5 | test top-1 | test top-5 | best dev top-1 |' in text
    assert '| 2 | solo | vit | 70.00 (1) | 95.00 (1) | 66.00 (1) | 99.00 (1) | 70.00 (1) |' in text


def test_runs_of_one_seed_are_noted(make):
    assert '- VPL, cnn, 2 epochs: the seeds are not all different (1, 1).' in report(
        [pair(make, 'one'), pair(make, 'two', a=61)])


@pytest.mark.parametrize('options, name', [
    ({'x': 0.0, 'y': 0.0}, 'VPL x=0 y=0'),
    ({'x': 33.5}, 'VPL x=33.5 y=20'),
    ({'contrastive_to': 'both', 'kl_to': 'both'}, 'VPL-Bi'),
    ({'contrastive_to': 'a', 'kl_to': 'b', 'x': 0}, 'VPL swapped x=0 y=20'),
    ({'contrastive_to': 'both'}, 'VPL CL->both KL->a'),
    ({'kl_weight': 0.0}, 'VPL without KL'),
    ({'x': 100.0, 'y': 0.0}, 'VPL without KL y=0'),
    ({'contrastive_weight': 0.0, 'kl_to': 'b', 'x': 0.0}, 'VPL without CL, KL->b x=0'),
    ({'contrastive_weight': 0.0, 'kl_weight': 0.0}, 'VPL without pair terms'),
    ({'method': 'dml'}, 'DML'),
    ({'method': 'dml', 'dml_joint': True, 'x': 0}, 'DML joint'),
    ({'method': 'distill', 'model_a': '', 'teacher': 'hf-hub:timm/resnet50.a1_in1k'}, 'DIS resnet50.a1_in1k -> vit'),
    ({'method': 'deit', 'model_a': '', 'teacher': 'regnety_160', 'distillation_type': 'hard'},
     'DeiT hard regnety_160 -> vit'),
    ({'method': 'deit', 'distillation_type': 'soft'}, 'DeiT soft online'),
    ({'method': 'cosub', 'model_a': ''}, 'cosub'),
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
    assert (record['framework'], record['n'], record['branch']) == ('DIS cnn -> vit', 2, 'b')
    assert record['top1']['mean'] == 70.5
    third = pair(make, 'student3', method='distill', model_a='', teacher=other)
    assert frameworks(*students, third) == [
        f'DIS cnn -> vit (teacher={teacher})' for teacher in (teachers[0], other)]


def test_a_frozen_branch_is_the_teacher(make):
    # Its learning rate and its EMA are missing.
    columns = PAIR.replace(',lr_a', ',unused').replace('ema_top1_a', 'unused1').replace('ema_top5_a', 'unused5')
    record, = records(pair(make, 'run', columns=columns, method='distill', teacher='somewhere/best_a.pth.tar'))
    assert (record['framework'], record['branch'], record['model']) == ('DIS cnn -> vit', 'b', 'vit')


def test_rows_of_several_pairs_name_them(make):
    text = report([
        pair(make, 'one'), pair(make, 'two', a=65, model_a='large'), pair(make, 'three', 66, 72, model_a='vit')])
    assert '''\
| Epochs | Framework | cnn | large | vit |
|---|---|---|---|---|
| 2 | VPL, cnn + vit | 60.00 (1) | - | 70.00 (1) |
| 2 | VPL, large + vit | - | 65.00 (1) | 70.00 (1) |
| 2 | VPL, vit + vit | - | - | 66.00 (1) / 72.00 (1) |
''' in text


def test_data_sets_side_by_side(make):
    flowers = {**DATA, 'train': {**DATA['train'], 'classes': ['rose', 'iris']}}
    runs = [pair(make, 'one'), pair(make, 'two', a=90, dataset='', data_dir='/data/flowers/', data=flowers)]
    text = report(runs)
    assert text.index('## 100 images in train, 50 in validation, 2 classes\n') < text.index('## digits\n')
    assert '''\
## All data sets

Top-1 of the last epoch; several figures in a cell: by number of epochs.

| Framework | Model | 100 images in train, 50 in validation, 2 classes | digits |
|---|---|---|---|
| VPL | cnn | 90.00 (1) | 60.00 (1) |
| VPL | vit | 70.00 (1) | 70.00 (1) |
''' in text
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


def test_old_folders_lack_costs(make):
    columns = PAIR.replace('num_epochs,processes,images', 'u1,u2,u3')
    record = records(pair(make, 'old', columns=columns))[0]
    assert record['num_epochs'] == 2  # of the option
    assert (record['processes'], record['image_passes'], record['device_hours'], record['seconds']) == (
        [], None, None, 40)
    assert '| 2 | VPL | cnn + vit | - | - | - | 40.00 s | 20.00 s | - | - |' in report([record['runs'][0]])


def test_large_costs_have_units(make):
    rows = ''.join(f'{epoch},1,50,90,0.1,4500,2,16,1281167\n' for epoch in (0, 1))
    run = make('large', SOLO_A + rows, method='solo', model_b='')
    assert '| 2 | solo | cnn | 16 | - | 2.56 M | 2.50 h | 1.25 h | 40.00 | - |' in report([run])


def test_markdown_is_escaped(make):
    assert '| 2 | VPL | `a\\x7cb` |' in report([pair(make, 'run', model_a='a|b')])


def test_wrong_paths(make, tmp_path):
    with pytest.raises(UsageError, match='^no run folder is given$'):
        report([])
    with pytest.raises(UsageError, match='nowhere: no such folder$'):
        report([str(tmp_path / 'nowhere')])
    for name, text in (('none', None), ('broken', 'a: [1'), ('other', 'model: resnet50\n'), ('list', '- 1\n')):
        folder = tmp_path / name
        folder.mkdir()
        if text:
            (folder / 'args.yaml').write_text(text)
        with pytest.raises(UsageError, match=f'{name} is not the folder of a run: it has no args.yaml that names'):
            report([pair(make, f'good_{name}'), str(folder)])
    with pytest.raises(UsageError, match='^--format html: expected one of md, json$'):
        report([pair(make, 'good')], 'html')
    (tmp_path / 'good' / 'validation.csv').mkdir()
    with pytest.raises(UsageError, match='validation.csv can not be read'):
        report([str(tmp_path / 'good')])


def test_nothing_heavy_is_imported():
    code = "import sys, timm_vpl.tools.report; print(sorted({'torch', 'timm', 'numpy'}.intersection(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '[]\n'
