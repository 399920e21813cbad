"""What a user of timm has: commands of public recipes and the `args.yaml` of timm's script, with a pair put in."""
import importlib.util
import math
import shlex
from pathlib import Path

import pytest
import yaml
from runs import error_line, rows

from timm_vpl.cli import train
from timm_vpl.core.option import SAME
from timm_vpl.options.recipes import read_recipe
from timm_vpl.options.refused import REFUSED, is_inert, refusal_of
from timm_vpl.options.train import build_parser, parse_args

COMMANDS = yaml.safe_load(Path(__file__).with_name('commands.yaml').read_text())
# What has to be left out of a command.
CHANGES = {'ResNet50 JSD': ['--aug-splits 3', '--split-bn', '--jsd']}
QUICK = ('ResNet50 JSD', 'DeiT-B')


def with_a_pair(name, side):
    """Return a command's options, with a tiny model of its kind as one branch and another as the partner."""
    text = COMMANDS[name]
    for left_out in CHANGES.get(name, ()):
        text = text.replace(f' {left_out} ', ' ')
    argv = shlex.split(text)
    at = argv.index('--model')
    own, partner = ('test_vit', 'test_resnet') if side == 'b' else ('test_resnet', 'test_vit')
    argv[at:at + 2] = [f'--model-{side}', own, f"--model-{'ab'['ba'.index(side)]}", partner]
    return argv


def refused(capsys, argv):
    return error_line(capsys, *argv, command=parse_args)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in COMMANDS])
def test_a_public_command_trains_a_pair(name, digits_folder, tmp_path):
    argv = [
        str(digits_folder), *with_a_pair(name, 'b' if name == 'DeiT-B' else 'a'), '--img-size', '32', '-b', '16',
        '-j', '0', '--warmup-epochs', '0', '--stop-epoch', '1', '--device', 'cpu', '--output', str(tmp_path),
        '--experiment', 'run', '--no-export', '--checkpoint-hist', '1']
    assert train(argv) == 0
    [row] = rows(tmp_path / 'run')
    assert math.isfinite(float(row['train_loss'])) and math.isfinite(float(row['eval_top1_b']))


def test_what_a_public_command_must_leave_out_is_named(digits_folder, capsys):
    argv = [digits_folder, *shlex.split(COMMANDS['ResNet50 JSD']), '--model-b', 'test_vit']
    for left_out in ('--model resnet50', *CHANGES['ResNet50 JSD']):
        line = refused(capsys, argv)
        words = left_out.split()
        assert line.startswith((f'{words[0]} is not available: ', 'unknown option --jsd, did you mean '))
        at = argv.index(words[0])
        argv[at:at + len(words)] = ['--model-a', 'test_resnet'] if words[0] == '--model' else []
    parse_args([str(arg) for arg in argv])


# timm's args.yaml


@pytest.mark.parametrize('name, own', [('defaults', 'a'), ('a2', 'a'), ('deit', 'b')])
def test_an_args_yaml_of_timm_is_a_recipe(name, own, timm_scripts, digits_folder, tmp_path, caplog):
    path = timm_scripts / f'args_{name}.yaml'
    timms = yaml.safe_load(path.read_text())
    partner = f"--model-{'b' if own == 'a' else 'a'}"
    argv = [
        str(digits_folder), '-c', str(path), partner, 'test_convnext', '--num-classes', '4', '--device', 'cpu',
        '--output', str(tmp_path), '--experiment', 'run', '--no-export']
    options = parse_args(argv)
    assert not caplog.records  # timm's defaults without effect are no mistake
    assert options.branches[own].model == timms['model']
    flat = options.flat()
    named = ('model', 'output', 'experiment', 'data', 'num_classes', 'local_rank')
    for dest, value in timms.items():
        value = tuple(value) if isinstance(value, list) else value
        for key in {dest, f'{dest}_a', f'{dest}_b'} & flat.keys() if value is not None and dest not in named else ():
            assert flat[key] == value
    assert train(argv) == 0


def test_the_model_of_a_timm_recipe_is_the_other_branch(digits_folder, tmp_path, capsys):
    path = tmp_path / 'args.yaml'
    path.write_text(
        'model: test_vit\nmodel_kwargs: {depth: 3}\ninitial_checkpoint: /no/where\noutput: /elsewhere\ndata: /data\n'
        'experiment: ../there\nresume: /no/last.pth.tar\nkd_model_name: null\n')

    def models(*argv):
        options = parse_args([str(digits_folder), '-c', str(path), '--initial-checkpoint', '', *argv])
        assert (options.run.output, options.run.experiment, options.run.resume) == ('', '', '')
        return {side: (branch.model, branch.model_kwargs) for side, branch in options.branches.items()}

    assert models('--model-a', 'test_resnet') == {'a': ('test_resnet', {}), 'b': ('test_vit', {'depth': 3})}
    assert models('--model-b', 'test_vit2') == {'a': ('test_vit', {'depth': 3}), 'b': ('test_vit2', {})}
    assert models('--method', 'solo', '--model-a', '') == {'b': ('test_vit', {'depth': 3})}
    assert models('--model-a', 'test_resnet', '--model-b', 'test_vit') == {
        'a': ('test_resnet', {}), 'b': ('test_vit', {'depth': 3})}
    assert refused(capsys, [digits_folder, '-c', path]) == (
        f'{path}: model: test_vit is one model of two: --model-b NAME makes it branch a, the partner of NAME, '
        f'--model-a NAME makes it branch b (--model-b "" with --method solo: it is alone)')
    assert refused(capsys, [digits_folder, '-c', path, '--model-a', 'test_resnet']) == (
        '--initial-checkpoint-b /no/where: no such file')


def test_the_rows_tell_of_timms_script(timm_scripts):
    """Each option of timm's script is an option here with the default that its row tells, or refused."""
    spec = importlib.util.spec_from_file_location('timm_train', timm_scripts / 'train.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    entries, timms = build_parser().entries, {action.dest: action for action in script.parser._actions}
    timms.pop('help')
    refusals = {name for name in REFUSED if not name.endswith('*')}
    for dest, action in timms.items():
        value = tuple(action.default) if isinstance(action.default, list) else action.default
        if dest in entries and dest != 'decay_epochs':  # None here: 90, but 0.2 for wsd and rsqrt
            row = entries[dest].row
            known = entries[dest].default if row.timm is SAME else row.timm
            assert known == value or not (known or value)
        elif dest not in entries:
            assert refusal_of('--' + dest.replace('_', '-'))
            refusals.discard('--' + dest.replace('_', '-'))
    assert refusals <= {'--task', '--loss', '--train-steps-per-epoch'}  # of later releases of that script
    written = read_recipe(timm_scripts / 'args_defaults.yaml')
    assert all(is_inert(dest, value) for dest, value in written.items() if dest in timms and dest not in entries
               and dest != 'model')
