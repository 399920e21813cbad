"""Studies: plans, and real runs of them on the digits, killed and broken."""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs import differences, status_of
from runs import rows as rows_of

from timm_vpl.cli import main
from timm_vpl.errors import UsageError
from timm_vpl.tools.study import check_plan, read_plan

BASE = {
    'dataset': 'digits', 'model_a': 'test_resnet', 'model_b': 'test_vit', 'img_size': 24,
    'model_kwargs_b': {'patch_size': 4}, 'epochs': 1, 'batch_size': 64, 'workers': 0, 'lr_a': 0.003, 'lr_b': 0.003,
    'warmup_epochs': 0, 'aa': None, 'reprob': 0.0, 'export': False, 'checkpoint_hist': 1}
SOLO = {'name': 'a', 'method': 'solo', 'model_b': ''}
BROKEN = {'name': 'broken', 'method': 'solo', 'model_b': '', 'opt': 'lamb', 'opt_kwargs': {'nonsense': 1}}
STUDENT = {'name': 'student', 'method': 'distill', 'model_a': '', 'teacher': 'a'}


@pytest.fixture
def plan(tmp_path):
    """Write a plan and its base recipe, and return the path."""
    def write(*rows, recipe=(), **keys):
        (tmp_path / 'base.yaml').write_text(yaml.safe_dump({**BASE, **dict(recipe)}))
        path = tmp_path / 'plan.yaml'
        path.write_text(yaml.safe_dump({'base': 'base.yaml', 'seeds': [1, 2], 'rows': list(rows), **keys}))
        return path
    return write


def start(plan, output, *options):
    return subprocess.Popen(
        [sys.executable, '-m', 'timm_vpl', 'study', str(plan), '--output', str(output), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def here(capsys, plan, output, *options):
    """Do a study in this process, whose runs are processes; return its status and what it prints."""
    capsys.readouterr()
    status = status_of(main, ['study', plan, '--output', output, *options])
    return status, *capsys.readouterr()


def test_a_plan_is_plain_commands(plan, tmp_path, capsys):
    rows = STUDENT, {'name': 'vpl', 'tau': 0.1, 'scale': [0.5, 1], 'epochs': 3}, SOLO
    path = plan(*rows, data='seed-{seed}', options={'epochs': 2})
    status, out, err = here(capsys, path, tmp_path / 'out', '--print-commands', '--data-dir', tmp_path)
    assert (err, status) == (
        'timm-vpl study: error: a, seed 1: --dataset digits comes with the package, but a folder is given: '
        f'{tmp_path}/seed-1\n', 2)
    status, out, err = here(capsys, path, tmp_path / 'out', '--print-commands')
    common = f'--output {tmp_path}/out --experiment'
    config = f'timm-vpl train --config {tmp_path}/base.yaml'
    # A seed has all its rows before the next begins, a teacher comes before its student.
    assert (out.splitlines(), err) == ([line for seed in (1, 2) for line in (
        f'{config} --epochs=2 --method=solo --model-b= --seed {seed} {common} a-seed-{seed} --resume auto',
        f'{config} --epochs=3 --scale 0.5 1 --tau=0.1 --seed {seed} {common} vpl-seed-{seed} --resume auto',
        f'{config} --epochs=2 --method=distill --model-a= --seed {seed} --teacher {tmp_path}/out/a-seed-{seed} '
        f'{common} student-seed-{seed} --resume auto')], '')


@pytest.mark.parametrize('rows, keys, message', [
    ([SOLO], {'seed': [1]}, 'seed is not a key of a plan, did you mean seeds?'),
    ([SOLO], {'seeds': []}, 'seeds: expected a list of numbers'),
    ([SOLO], {'options': ['epochs']}, 'options: expected a mapping of options of all rows'),
    ([{'method': 'solo'}], {}, 'rows: expected a list of mappings, each with a name'),
    ([SOLO, SOLO], {}, 'rows: given twice: a, a'),
    ([{**SOLO, 'taw': 1}], {}, 'a: taw is not an option, did you mean tau?'),
    ([{**SOLO, 'teacher': 'a'}], {}, 'a: its teacher depends on itself'),
    ([SOLO], {'base': 'nowhere'}, '--config nowhere is neither a file nor the name of a recipe'),
    ([{**SOLO, 'lr_a': 'fast'}], {}, "a, seed 1: --lr-a: 'fast' is not a number > 0"),
    ([{**SOLO, 'name': '../a'}], {}, "a, seed 1: --experiment '../a-seed-1': expected the name of a folder"),
])
def test_wrong_plans(plan, tmp_path, rows, keys, message):
    with pytest.raises(UsageError) as error:
        check_plan(read_plan(plan(*rows, **keys), None, tmp_path / 'out'))
    assert message in str(error.value)


def test_a_row_runs_and_a_broken_one_is_listed(plan, tmp_path, capsys, digits_folder):
    """Two runs of one epoch; the second start skips what is done and refuses what has other options."""
    out, few = tmp_path / 'out', {'dataset': None, 'data_dir': str(digits_folder), 'batch_size': 8}
    status, printed, err = here(capsys, plan(BROKEN, SOLO, seeds=[1], recipe=few), out)
    assert status == 1
    assert err == ("Failed: broken-seed-1: status 2, timm-vpl train: error: --opt lamb: Lamb.__init__() got an "
                   "unexpected keyword argument 'nonsense'\n")
    assert 'a-seed-1: ' in printed and 'runs left: 0' in printed and '## Verdict' in printed
    finished = (out / 'a-seed-1' / 'summary.csv').stat().st_mtime_ns
    facts = yaml.safe_load((out / 'a-seed-1' / 'data.yaml').read_text())
    assert (facts['train']['images'], facts['validation']['images']) == (40, 17)
    assert facts['train']['files'] != facts['validation']['files']
    assert facts['train']['classes'] == [f'class{i}' for i in range(4)]
    [environment] = yaml.safe_load((out / 'a-seed-1' / 'environment.yaml').read_text())
    assert {'torch', 'timm', 'pillow', 'device', 'timm_vpl', 'threads'} == environment.keys()

    # A second start trains nothing of what is done, and measures by it.
    # The trial of seed 2 serves the limited study below, too.
    _, dry, err = here(capsys, plan(SOLO, seeds=[2, 1], recipe=few), out, '--dry-run')
    assert err == '' and re.match(
        r'row +runs left +minutes a run +core-hours\na +1 +0\.\d +0\.\d\d\n1 of 2 runs left: 0\.0\d hours', dry)
    assert (out / 'a-seed-1' / 'summary.csv').stat().st_mtime_ns == finished
    other = plan({**SOLO, 'lr_a': 0.1}, seeds=[1], recipe=few)
    with pytest.raises(UsageError, match='a-seed-1: was finished with lr_a 0.003, but the plan has 0.1; rename'):
        check_plan(read_plan(other, None, out))
    # What would not end in time is not started, nor what it would teach; a broken row is listed all the same.
    limited = plan(BROKEN, STUDENT, SOLO, seeds=[2], recipe=few)
    status, printed, err = here(capsys, limited, out, '--limit-minutes', '0.001')
    assert printed.splitlines()[:2] == [
        f'{name}-seed-2: not started, since it would not finish in time' for name in ('a', 'student')]
    assert status == 1 and err.startswith('Failed: broken-seed-2: its trial failed: ')


@pytest.mark.slow
def test_a_study_that_is_killed_twice_ends_as_one_that_is_not(plan, tmp_path):
    path = plan(SOLO, STUDENT, {'name': 'vpl'}, BROKEN, recipe={'epochs': 2, 'recovery_interval': 3})
    assert start(path, tmp_path / 'whole').wait() == 1
    out = tmp_path / 'killed'
    for run, number in (('student-seed-1', signal.SIGKILL), ('vpl-seed-2', signal.SIGTERM)):
        study = start(path, out)
        while not list(out.glob(f'{run}/recovery-*')):
            time.sleep(0.05)
            assert study.poll() is None
        if number == signal.SIGKILL:
            os.killpg(study.pid, number)
        else:
            study.send_signal(number)
        assert study.wait() in (-signal.SIGKILL, 128 + signal.SIGTERM)
    study = start(path, out)
    printed, err = study.communicate()
    assert study.returncode == 1 and [line.partition(':')[2][:15] for line in err.splitlines()] == [
        ' broken-seed-1:', ' broken-seed-2:']
    names = [f'{row}-seed-{seed}' for row in ('a', 'student', 'vpl') for seed in (1, 2)]
    for name in names:
        assert differences(tmp_path / 'whole' / name, out / name) == [], name
    # A teacher whose weights are gone is trained again for a student that is left.
    shutil.rmtree(out / 'student-seed-1')
    for file in (out / 'a-seed-1').glob('*.pth.tar'):
        file.unlink()
    start(path, out).wait()
    for name in ('a-seed-1', 'student-seed-1'):
        assert differences(tmp_path / 'whole' / name, out / name) == [], name


@pytest.mark.slow
def test_runs_of_two_processes(plan, tmp_path):
    path, out = plan(SOLO, seeds=[1]), tmp_path / 'out'
    study = start(path, out, '--nproc-per-node', '2')
    assert (study.communicate()[1], study.returncode) == ('', 0)
    assert {row['processes'] for row in rows_of(out / 'a-seed-1')} == {'2'}
    assert start(path, tmp_path / 'x', '--nproc-per-node', '2', '--print-commands').communicate()[0].startswith(
        'torchrun --standalone --nproc-per-node 2 -m timm_vpl train --config ')


@pytest.mark.slow
def test_two_studies_do_not_work_in_one_folder_and_a_dry_run_tells_the_time(plan, tmp_path):
    path, out = plan(SOLO, STUDENT, seeds=[1]), tmp_path / 'out'
    dry, err = start(path, out, '--dry-run').communicate()
    assert err == '' and '2 of 2 runs left: ' in dry and list(out.glob('*seed*')) == []
    study = start(path, out)
    while not (out / 'a-seed-1.log').exists():
        time.sleep(0.05)
    second = start(path, out)
    assert second.communicate()[1] == (
        f'timm-vpl study: error: {out}: another study, or a run of one, is running here\n')
    assert (second.returncode, study.wait()) == (1, 0)
    # Commands run by hand are runs of the study.
    by_hand = tmp_path / 'by-hand'
    for line in start(path, by_hand, '--print-commands').communicate()[0].splitlines():
        subprocess.run([sys.executable, '-m', 'timm_vpl', *shlex.split(line)[1:]], check=True, capture_output=True)
    assert start(path, by_hand, '--print-commands').communicate()[0].strip() == ''
    assert differences(out / 'student-seed-1', Path(by_hand, 'student-seed-1')) == []
