"""The report, on run folders written by hand: every expected figure is computed by hand."""
import csv
import io
import json
import subprocess
import sys

import pytest
import yaml

from timm_vpl.errors import UsageError
from timm_vpl.report import FIELDS, report

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
VALIDATION = 'model,epoch,branch,weights,data,set,images,loss,top1,top5\n'


@pytest.fixture
def make(tmp_path):
    """Write a run's folder and return its path."""
    def make(name, summary=None, validation=None, **options):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'args.yaml').write_text(yaml.safe_dump({**OPTIONS, **options}))
        for file, text in (('summary.csv', summary), ('validation.csv', validation)):
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

| Epochs | Framework | Model | val top-1 | val top-5 | best val top-1 | best val top-5 | best epoch | Δ solo |
|---|---|---|---|---|---|---|---|---|
| 2 | solo | cnn | 58.00 ± 1.41 (2) | 91.00 ± 0.00 (2) | 58.00 ± 1.41 (2) | 91.00 ± 0.00 (2) | 1, 1 | - |
| 2 | VPL | cnn | 62.00 ± 1.41 (2) | 95.00 ± 1.41 (2) | 62.50 ± 2.12 (2) | 93.00 ± 1.41 (2) | 1, 0 | +4.00 |
| 2 | solo | vit | 75.00 (1) | 95.00 (1) | 75.00 (1) | 95.00 (1) | 1 | - |
| 2 | VPL | vit | 72.00 ± 2.83 (2) | 93.00 ± 1.41 (2) | 72.00 ± 2.83 (2) | 93.00 ± 1.41 (2) | 1, 1 | -3.00 |

### Cost

| Epochs | Framework | Models | Processes | Image-passes | Time | Time an epoch | Device-hours | Time / solo's |
|---|---|---|---|---|---|---|---|---|
| 2 | solo | cnn | 2 | 200.00 | 20.00 s | 10.00 s | 0.0111 | - |
| 2 | solo | vit | 2 | 200.00 | 30.00 s | 15.00 s | 0.0167 | - |
| 2 | VPL | cnn + vit | 2 | 400.00 | 46.00 s | 23.00 s | 0.0256 | 0.92 |

### Until solo's final top-1

| Epochs | Framework | Model | Solo's top-1 | After epochs | Image-passes | Time | Solo's image-passes | Solo's time |
|---|---|---|---|---|---|---|---|---|
| 2 | VPL | cnn | 58.00 | 1 | 200.00 | 22.00 s | 200.00 | 20.00 s |
| 2 | VPL | vit | 75.00 | not reached | - | - | 200.00 | 30.00 s |

'''
    notes = text.partition('## Notes')[2]
    assert 'on the evaluation set itself' in notes and 'GPU hours' in notes
    assert 'differs' not in notes and 'seeds' not in notes


def test_json_and_csv(runs):
    found = records(*runs)
    assert [(r['framework'], r['branch'], r['n'], r['status']) for r in found] == [
        ('solo', 'a', 2, 'finished'), ('solo', 'b', 1, 'finished'), ('VPL', 'a', 2, 'finished'),
        ('VPL', 'b', 2, 'finished')]
    a, b = found[2:]
    assert a['last_val_top1_mean'] == 62 and a['last_val_top1_std'] == pytest.approx(2 ** 0.5)
    assert a['best_val_top1_mean'] == 62.5 and a['best_epochs'] == [1, 0] and a['seeds'] == [1, 2]
    assert a['runs'] == runs[:2] and a['weights'] == 'ema' and a['processes'] == [2]
    assert a['device_hours'] == pytest.approx(46 * 2 / 3600)
    assert (a['delta'], a['reached_epochs'], a['reached_seconds'], a['reached_image_passes']) == (4, 1, 22, 200)
    assert (b['delta'], b['reached_epochs'], b['reached_seconds'], b['solo_seconds']) == (-3, None, None, 30)
    assert a['last_real_top1_mean'] is None and a['last_real_top1_n'] == 0
    assert found[1]['last_val_top1_std'] is None and found[1]['baseline'] is None

    rows = list(csv.DictReader(io.StringIO(report(runs, 'csv'))))
    assert list(rows[0]) == FIELDS == list(a)
    for row, record in zip(rows, found, strict=True):
        for name, value in record.items():
            cell = ' '.join(map(str, value)) if isinstance(value, list) else '' if value is None else str(value)
            assert row[name] == cell, name


def test_unfinished_runs_are_listed_and_never_averaged_in(make, runs):
    row = '0,1,,1,9,9,9,9,99,99,99,99,0.1,0.1,1,20,10,2,2,100\n'
    stopped = make('stopped', PAIR + row, seed=3)
    torn = make('torn', PAIR + row + '1,1,,1,9,9,9,9,99,99,99,99,0.1,0.1,1,20,10,2,2,1', seed=4)
    merged = make('merged', PAIR + '0,1,,1,9' + row + row.replace('0', '1', 1), seed=5)
    not_evaluated = make('blank', PAIR + row + '1,1,,,,,,,,,,,0.1,0.1,2,20,10,2,2,100\n', seed=6)
    empty, fresh = make('empty', '', seed=7), make('fresh', seed=8)
    unfinished = [stopped, torn, merged, not_evaluated, empty, fresh]
    text = report([*runs, *unfinished])
    assert tables(text).startswith(tables(report(runs)))
    progress = [
        '1 of 2 epochs', '1 of 2 epochs', '1 of 2 epochs', '2 of 2 epochs, the last one not evaluated',
        '0 of 2 epochs', '0 of 2 epochs']
    listed = '\n'.join(f'| {run} | VPL | cnn + vit | {done} |' for run, done in zip(unfinished, progress, strict=True))
    assert '## Unfinished' in text and listed in text
    found = [r for r in records(*runs, *unfinished) if r['status'] != 'finished']
    assert [r['status'] for r in found] == [f'unfinished, {done}' for done in progress]
    assert {(r['n'], r['branch'], r['last_val_top1_mean'], r['seconds']) for r in found} == {(0, None, None, None)}
    assert report([fresh]).splitlines()[0].startswith('## Unfinished')


def test_of_two_rows_of_an_epoch_the_later_one_counts(make):
    rows = '0,1,40,80,0.1,10,2,1,100\n1,1,50,90,0.1,10,2,1,100\n'
    resumed = make('resumed', RAW + rows + '1,1,60,95,0.1,30,2,2,100\n', method='solo', model_b='')
    record, = records(resumed)
    assert (record['last_val_top1_mean'], record['seconds'], record['image_passes']) == (60, 40, 200)
    assert record['processes'] == [1, 2] and record['device_hours'] == pytest.approx((10 + 60) / 3600)
    assert '| 1 then 2 |' in report([resumed])


def test_without_ema_the_raw_weights_count(make):
    raw = solo_a(make, 'raw', 60, columns=RAW, model_ema=False)
    assert 'Weights: raw.' in report([raw])
    assert records(raw)[0]['weights'] == 'raw' and records(raw)[0]['last_val_top1_mean'] == 60
    ema = solo_a(make, 'ema', 70, model_ema=True)
    text = report([raw, ema])
    assert 'Weights: EMA; raw: solo (model_ema=False, weights=raw) (cnn).' in text
    assert '| 2 | solo (model_ema=True, weights=ema) | 70.00 (1) |' in text


def test_real_and_v2_where_measured(make):
    def line(epoch, branch, weights, set_, top1):
        return f'"x,y",{epoch},{branch},{weights},d,{set_},5,1,{top1},99\n'

    validation = VALIDATION + (
        line(1, 'a', 'ema', 'real', 66) + line(1, 'a', 'ema', 'v2', 11) + line(1, 'a', 'ema', 'v2', 44)
        + line(1, 'a', 'raw', 'real', 1) + line(1, 'b', 'ema', 'val', 1) + line(0, 'b', 'ema', 'real', 2)
        + line(1, 'ens', 'ema', 'real', 3))
    runs = [pair(make, 'one', validation=validation), pair(make, 'two', seed=2)]
    a, b = records(*runs)
    assert (a['last_real_top1_mean'], a['last_real_top1_n'], a['last_val_top1_n']) == (66, 1, 2)
    assert (a['last_v2_top1_mean'], a['last_v2_top5_mean'], a['best_v2_top1_mean']) == (44, 99, 44)
    assert b['last_real_top1_n'] == 0 and b['last_val_top1_mean'] == 70
    text = report(runs)
    assert '| val top-1 | val top-5 | ReaL top-1 | ReaL top-5 | V2 top-1 | V2 top-5 | best val top-1 |' in text
    assert '| 2 | VPL | cnn | 60.00 ± 0.00 (2) | 94.00 ± 0.00 (2) | 66.00 (1) | 99.00 (1) | 44.00 (1) |' in text


def test_without_a_baseline_there_is_no_delta(make):
    other = [
        solo_a(make, 'model', 50, model_a='other'), solo_a(make, 'data', 50, dataset='torch/cifar10'),
        make('epochs', SOLO_A + '0,1,50,90,0.1,10,1,2,100\n', method='solo', model_b='', epochs=1)]
    found = [r for r in records(pair(make, 'vpl'), *other) if r['framework'] == 'VPL']
    assert [(r['baseline'], r['delta'], r['solo_top1']) for r in found] == [(None, None, None)] * 2
    assert 'Until solo' not in tables(report([pair(make, 'again')]))


def test_the_baseline_is_the_nearest_and_its_differences_are_named(make):
    far = solo_a(make, 'far', 50, lr_base_a=0.1, batch_size=25)
    near = solo_a(make, 'near', 58, lr_base_a=0.1, x=0.0, lr_base_b=9)  # x and branch b don't matter
    vpl = pair(make, 'vpl', a=60)
    a = next(r for r in records(far, near, vpl) if r['framework'] == 'VPL' and r['branch'] == 'a')
    assert (a['baseline'], a['baseline_differs'], a['delta']) == ('solo (batch_size=50)', ['lr_base'], 2)
    assert '- VPL, cnn, 2 epochs: its baseline, solo (batch_size=50), differs in lr_base.' in report(
        [far, near, vpl])
    exact = solo_a(make, 'exact', 57)
    a = next(r for r in records(far, near, vpl, exact) if r['framework'] == 'VPL' and r['branch'] == 'a')
    assert (a['baseline_differs'], a['delta']) == ([], 3)


def test_a_run_counts_once(make, tmp_path):
    run, fresh = pair(make, 'run'), make('fresh')
    (tmp_path / 'link').symlink_to(run)
    copy = pair(make, 'copy')
    found = records(run, run + '/', str(tmp_path / 'link'), copy, fresh, fresh + '/.')
    assert [(r['n'], r['status']) for r in found] == [
        (1, 'finished'), (1, 'finished'), (0, 'unfinished, 0 of 2 epochs')]


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


def test_runs_of_one_seed_are_noted(make):
    assert '- VPL, cnn + vit, 2 epochs: the seeds are not all different (1, 1).' in report(
        [pair(make, 'one'), pair(make, 'two', a=61)])


@pytest.mark.parametrize('options, name', [
    ({'x': 0.0, 'y': 0.0}, 'VPL x=0 y=0'),
    ({'x': 33.5}, 'VPL x=33.5 y=20'),
    ({'contrastive_to': 'both', 'kl_to': 'both'}, 'VPL-Bi'),
    ({'contrastive_to': 'a', 'kl_to': 'b', 'x': 0}, 'VPL swapped x=0 y=20'),
    ({'contrastive_to': 'both'}, 'VPL CL->both KL->a'),
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
    assert record['last_val_top1_mean'] == 70.5
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
    runs = [pair(make, 'one'), pair(make, 'two', a=90, dataset='', data_dir='/data/flowers/')]
    text = report(runs)
    assert text.index('## /data/flowers\n') < text.index('## digits\n') < text.index('''\
## All data sets

Top-1 of the last epoch; several figures in a cell: by number of epochs.

| Framework | Model | /data/flowers | digits |
|---|---|---|---|
| VPL | cnn | 90.00 (1) | 60.00 (1) |
| VPL | vit | 70.00 (1) | 70.00 (1) |
''')
    # Where a named data set lies does not matter, for a folder it is all there is.
    cached = [pair(make, f'cached{i}', a=60 + i, dataset='torch/cifar10', data_dir=f'/{i}', seed=i) for i in (1, 2)]
    assert records(*cached)[0]['n'] == 2
    shards = [pair(make, f'shards{i}', a=60 + i, dataset='wds/x', data_dir=f'/{i}', seed=i) for i in (1, 2)]
    assert [r['n'] for r in records(*shards)] == [1] * 4


def test_a_solo_model_is_the_same_on_either_side(make):
    one, two = solo_a(make, 'one', 57), solo_b(make, 'two', 59, model_b='cnn', lr_base_b=0.005, seed=2)
    record, = records(one, two)
    assert (record['n'], record['last_val_top1_mean'], record['seconds']) == (2, 58, 25)


def test_old_folders_lack_costs(make):
    columns = PAIR.replace('num_epochs,processes,images', 'u1,u2,u3')
    record = records(pair(make, 'old', columns=columns))[0]
    assert record['status'] == 'finished' and record['num_epochs'] == 2  # of the option
    assert (record['processes'], record['image_passes'], record['device_hours'], record['seconds']) == (
        [], None, None, 40)
    assert '| 2 | VPL | cnn + vit | - | - | 40.00 s | 20.00 s | - | - |' in report([record['runs'][0]])


def test_large_costs_have_units(make):
    rows = ''.join(f'{epoch},1,50,90,0.1,4500,2,16,1281167\n' for epoch in (0, 1))
    run = make('large', SOLO_A + rows, method='solo', model_b='')
    assert '| 2 | solo | cnn | 16 | 2.56 M | 2.50 h | 1.25 h | 40.00 | - |' in report([run])


def test_markdown_is_escaped(make):
    assert '| 2 | VPL | a\\|b |' in report([pair(make, 'run', model_a='a|b')])


def test_missing_run_is_listed(make, tmp_path):
    good, gone = pair(make, 'good'), str(tmp_path / 'seed4')
    text = report([good, gone])
    assert f'| {gone} | - | - | missing |' in text and text.startswith(report([good]).partition('## Notes')[0])
    assert json.loads(report([good, gone], 'json'))[-1]['status'] == 'missing'
    assert ',missing,0,' in report([good, gone], 'csv').splitlines()[-1]


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
    with pytest.raises(UsageError, match='^--format html: expected one of md, csv, json$'):
        report([pair(make, 'good')], 'html')
    (tmp_path / 'good' / 'validation.csv').mkdir()
    with pytest.raises(UsageError, match='validation.csv can not be read'):
        report([str(tmp_path / 'good')])


def test_nothing_heavy_is_imported():
    code = "import sys, timm_vpl.report; print(sorted({'torch', 'timm', 'numpy'}.intersection(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '[]\n'
