"""Files and names of others: none runs code, writes elsewhere, keeps a command busy or gives away a token."""
import functools
import http.server
import io
import json
import os
import pickle
import re
import shutil
import sys
import tarfile
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from hub import Hub, use_hub
from PIL import Image
from runs import PAIR, error_line, status_of
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

from timm_vpl.cli import main
from timm_vpl.data.sources import DigitsReader
from timm_vpl.engine.models import branch_config
from timm_vpl.engine.trained import load_branches
from timm_vpl.options.train import parse_args, recipe_values
from timm_vpl.text import code, code_block, markdown
from timm_vpl.tools.card import model_card
from timm_vpl.tools.report import make_report
from timm_vpl.tools.runs import COLUMNS
from timm_vpl.tools.tables import write_rows

DIGITS = ['--dataset', 'digits', *PAIR]
TRAIN = ['train', *DIGITS, '--img-size', '32', '-b', '8', '--workers', '0', '--device', 'cpu',
         '--epochs', '1', '--warmup-epochs', '0', '--output', 'output', '--no-curves']
EVAL = ['--dataset', 'digits', '--workers', '0', '--device', 'cpu']
CANARY = 'hf_CANARYcanaryCANARYcanaryCANARY12'


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)


def refused(argv, capsys, *words):
    """Check that a command ends with status 1 or 2 and one line that has these words; return the line."""
    line = error_line(capsys, *argv, command=main, statuses=(1, 2))
    assert len(line) < 1100
    for word in words:
        assert str(word) in line, line
    return line


# Checkpoints


class Bomb:
    """Leaves a folder where it is unpickled by a loader that runs code."""

    def __reduce__(self):
        return os.mkdir, (os.path.abspath('ran'),)


def save_bombs():
    """Save one of each kind of file that torch or numpy would unpickle, and return their names."""
    torch.save({'state_dict': {'x': torch.zeros(1)}, 'args': Bomb()}, 'bomb.pth.tar')
    torch.save({'x': Bomb()}, 'legacy.pth', _use_new_zipfile_serialization=False)
    Path('pickle.pth.tar').write_bytes(pickle.dumps({'state_dict': Bomb()}))
    Path('bomb.safetensors').write_bytes(pickle.dumps(Bomb()))
    np.savez('array.npz', **{'embedding/kernel': np.array([Bomb()], dtype=object)})
    Path('empty.pth').touch()
    return ['bomb.pth.tar', 'legacy.pth', 'pickle.pth.tar', 'bomb.safetensors', 'array.npz', 'empty.pth']


@pytest.mark.parametrize('argv', [
    [*TRAIN, '--initial-checkpoint-b'], [*TRAIN, '--pretrained-path-b'], [*TRAIN, '--resume'],
    ['train', *EVAL, '--model-b', 'deit_tiny_distilled_patch16_224', '--model-kwargs', 'depth=1', '--method', 'deit',
     '--img-size', '32', '--teacher'],
    ['validate', *EVAL], ['export'], ['export', '--model-b', 'test_vit', '--num-classes', '10'],
], ids=['initial', 'pretrained', 'resume', 'teacher', 'validate', 'export', 'export-named'])
def test_pickles_are_refused_without_running(argv, capsys):
    pickle.loads(pickle.dumps(Bomb()))
    assert Path('ran').is_dir()  # it is one
    Path('ran').rmdir()
    for name in save_bombs():
        refused([*argv, name], capsys)
        assert not Path('ran').exists(), name
    assert not Path('output').exists()


def model_folder(name, weights=None, **changes):
    """Write the folder of a model, changed, and return its name for timm."""
    folder = Path(name)
    folder.mkdir()
    config = {'architecture': 'test_vit', 'num_classes': 10, 'model_args': {'img_size': 32}, 'pretrained_cfg': {
        'input_size': [3, 32, 32], 'fixed_input_size': True, 'num_classes': 10, 'first_conv': 'patch_embed.proj',
        'classifier': 'head'}}
    config['pretrained_cfg'].update(changes.pop('pretrained_cfg', {}))
    (folder / 'config.json').write_text(json.dumps({**config, **changes}))
    if weights:
        shutil.copy(weights, folder / ('model.safetensors' if weights.endswith('safetensors') else 'pytorch_model.bin'))
    return str(folder.resolve())


@pytest.mark.parametrize('changes', [
    {'architecture': 'os.system'}, {'architecture': '../../test_vit'}, {'architecture': 3}, {'architecture': None},
    {'architecture': 'hf-hub:someone/model'}, {'architecture': ['test_vit']},
    {'model_args': {'checkpoint_path': 'bomb.pth.tar'}}, {'model_args': {'cache_dir': 'cache'}},
    {'model_args': {'pretrained_cfg_overlay': {'file': 'bomb.pth.tar'}}}, {'model_args': {'__class__': 'x', '': 1}},
    {'model_args': ['img_size']}, {'model_args': {'act_layer': 'os.system'}}, {'model_args': {'num_heads': 0}},
    {'model_args': {'patch_size': 0}}, {'model_args': {'img_size': []}}, {'model_args': {'embed_dim': 10**12}},
    {'model_args': {'pruned': True}}, {'model_args': {'features_only': True}},
    {'pretrained_cfg': {'input_size': []}},
    {'pretrained_cfg': {'input_size': [3, 10**9, 10**9], 'fixed_input_size': False}},
    {'pretrained_cfg': {'mean': 'x'}}, {'pretrained_cfg': {'std': [0, 0, 0]}}, {'pretrained_cfg': {'unknown': 1}},
    {'pretrained_cfg': {'interpolation': ['x']}}, {'pretrained_cfg': {'crop_pct': float('nan')}},
    {'label_names': 5}, {'label_names': '0123456789'}, {'label_names': [[1], [2]]},
], ids=str)
def test_config_json_of_others(changes, capsys):
    model = timm.create_model('test_vit', num_classes=10, img_size=32)
    save_file(model.state_dict(), 'good.safetensors')
    torch.save({'x': Bomb()}, 'bomb.pth.tar')
    folder = model_folder('model', 'good.safetensors', **changes)
    refused([*TRAIN, '--model-b', f'local-dir:{folder}', '--pretrained-b'], capsys, folder)
    if changes != {'model_args': {'features_only': True}}:  # it has weights that fit
        refused(['validate', folder, *EVAL], capsys, folder)
    assert not any(Path(name).exists() for name in ('ran', 'cache', 'output'))


def test_config_json_does_not_choose_the_weights(capsys):
    """A file or an address in it is not read: only what lies in its folder."""
    torch.save({'x': Bomb()}, 'bomb.pth.tar')
    elsewhere = {'file': os.path.abspath('bomb.pth.tar'), 'url': 'http://127.0.0.1:9/.profile', 'source': 'file',
                 'hf_hub_id': 'someone/model', 'hf_hub_filename': '../../x', 'custom_load': True}
    folder = model_folder('model', pretrained_cfg=elsewhere)
    refused(['validate', folder, *EVAL], capsys, f'No suitable checkpoints found in {folder}')
    for name in ('bomb.pth.tar', 'array.npz'):
        save_bombs()
        other = model_folder(f'with-{name}', name, pretrained_cfg=elsewhere)
        refused(['validate', other, *EVAL], capsys, other)
    assert not Path('ran').exists()


@pytest.mark.parametrize('text', ['[' * 100000, '[1]', 'null', '\0', '9' * 5000, '', '{"architecture": '])
def test_config_json_that_is_none(text, capsys):
    Path('model').mkdir()
    Path('model', 'config.json').write_text(text)
    refused(['validate', 'model', *EVAL], capsys, 'model: cannot be built')


@pytest.fixture(scope='module')
def checkpoint():
    """The checkpoint of a run, as far as export needs it."""
    state, branches = {}, {}
    for side, name in (('a', 'test_resnet'), ('b', 'test_vit')):
        model = timm.create_model(name, num_classes=2, **({'img_size': 32} if side == 'b' else {}))
        state.update({f'model_{side}.{key}': value for key, value in model.state_dict().items()})
        data_config = {**resolve_model_data_config(model), 'input_size': (3, 32, 32)}
        branches[side] = branch_config(model, data_config, ['cat', 'dog'])
    metrics = {f'{metric}_{side}': 50. for side in 'ab' for metric in ('top1', 'top5')}
    return {'state_dict': state, 'branches': branches, 'metrics': metrics, 'epoch': 0, 'args': {
        'method': 'vpl', 'model_a': 'test_resnet', 'model_b': 'test_vit', 'dataset': 'digits'}}


ELSEWHERE = '../../elsewhere'


def save(checkpoint, args=None, version='x'):
    """Save a checkpoint, with other options."""
    changes = {'args': {**checkpoint['args'], **(args or {})}, 'timm_vpl_version': version}
    torch.save({**checkpoint, **changes}, 'last.pth.tar')
    return 'last.pth.tar'


@pytest.mark.parametrize('key, change', [
    ('args', {'method': ELSEWHERE}), ('args', {'method': '/elsewhere'}), ('args', {'method': 'a\nb'}),
    ('args', {'method': 'x' * 300}), ('args', {'method': ['vpl']}), ('args', {'lr': torch.zeros(1)}), ('args', {1: 2}),
    ('metrics', {'top1_a': '50'}), ('metrics', {'top1_a': torch.ones(1)}),
    ('branches', {'a': {'architecture': ELSEWHERE}}), ('branches', {'a': {}}), ('branches', {'a': torch.zeros(1)}),
    ('branches', {'a': {'architecture': 'test_resnet', 'x': torch.zeros(1)}}), ('branches', {'a': {'x': {1: 2}}}),
], ids=str)
def test_checkpoints_of_others(checkpoint, key, change, capsys):
    Path('run').mkdir()
    torch.save({**checkpoint, key: {**checkpoint[key], **change}}, 'run/last.pth.tar')
    refused(['export', 'run'], capsys)
    if not isinstance(change.get('method'), str):  # that one only names the export
        refused(['export', 'run', '--name-a', 'a', '--name-b', 'b'], capsys)
    assert os.listdir() == ['run'] and os.listdir('run') == ['last.pth.tar']


def test_names_of_exports_stay_inside(checkpoint, capsys):
    save(checkpoint)
    for name in (ELSEWHERE, '/elsewhere', '..', '.', '-x', 'a b', 'x' * 300):
        refused(['export', 'last.pth.tar', f'--name-a={name}'], capsys, '--name-a', 'at most 96')
    refused(['export', 'last.pth.tar', '--out', 'x' * 300], capsys, '--out', 'too long')
    assert os.listdir() == ['last.pth.tar']


def test_card_of_a_checkpoint_of_others(checkpoint):
    """Text of others stays text: one line of Markdown, a value of the card's YAML, no code in the example."""
    evil = "x\n---\nlicense: mit\n'); import os #"
    args = {**checkpoint['args'], 'dataset': f'hfds/{evil}', 'input_img_mode': evil, 'teacher': evil, 'opt': evil}
    torch.save({**checkpoint, 'args': args, 'branches': {**checkpoint['branches'], ELSEWHERE: {}}}, 'last.pth.tar')
    assert main(['export', 'last.pth.tar']) == 0
    card = Path('export', 'vpl-test_vit', 'README.md').read_text()
    assert yaml.safe_load(card.split('---\n')[1])['license'] == 'unknown'
    example = card.partition('```python')[2].partition('```')[0]
    compile(example, 'example', 'exec')
    assert 'os' not in example.replace('rosoft', '').split()
    assert sorted(os.listdir('export')) == ['vpl-test_resnet', 'vpl-test_vit']


MARKUP = ['[x](https://evil)', '![x](//evil/x.png)', '<img src=x>', '``x` <b>', 'https://evil.org', 'www.evil.org',
          'a@b.org', 'a\\|<b>', '```', '\x1b[31m', '<!-- x', '&lt;', '**x**', '`', '']


@pytest.mark.parametrize('text', MARKUP)
def test_text_stays_text_in_markdown(text):
    """Outside code there is nothing of it, and the code ends where the text ends, in a table too."""
    for function in (markdown, code):
        shown = function(text)
        fence, inside = re.fullmatch('(`+)(.*?)\\1', shown).groups() if text or function is code else ('', '')
        assert not fence or len(fence) not in map(len, re.findall('`+', inside))
        assert not re.search(r'[|\n\x1b]', shown)
    lines = code_block(f'a: 1\n  {text}\n```\nb', 'yaml')
    assert not any(line.strip().startswith(lines[-1]) for line in '\n'.join(lines[1:-1]).split('\n'))
    assert [markdown(name) for name in ('imagenet-1k', 'test_vit', 'a, b (0.5 %)')] == [
        'imagenet-1k', 'test_vit', 'a, b (0.5 %)']


def outside_code(page):
    """Return what a page of Markdown shows outside code, by the rules of CommonMark."""
    page = re.sub(r'(?ms)^(````*)\w*\n.*?^ {0,3}\1`* *$', '', page)
    return re.sub(r'(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)', '', page)


MEANS = re.compile(r'evil|<|&lt|a@b|\*\*|\x1b|`')  # what any of MARKUP means to a renderer or a terminal


@pytest.mark.parametrize('text', MARKUP[:-1])
def test_card_shows_text_as_text(text, checkpoint):
    shown = code(text)
    args = {'dataset': f'hfds/{text}', 'method': text, 'model_a': text, 'teacher': text, 'val_split': text,
            'opt': f'{text}\n```\n{text}'}
    [branch] = load_branches(save(checkpoint, args, text), 'b')
    write_rows('validation.csv', COLUMNS, [{
        **branch.data_config, 'branch': 'b', 'epoch': 0, 'img_size': 32, 'weights': text, 'set': f'{text}.',
        'images': 9, 'data': 'x', 'top1': 3, 'top5': 4}])
    card = model_card(branch, 'x', 'ORG/x').content
    assert f'- Data: {shown}\n' in card and f'timm-vpl {shown}. It' in card and f'training: {shown}\n' in card
    assert f'({code(f"--method {text}")})' in card and f'| {shown} | raw | 50.000 |' in card
    assert f'| {code(f"{text}., 9 images of x")} | {shown} | 3.000 |' in card
    _, front, page = card.split('---\n', 2)
    assert text == 'www.evil.org' or 'datasets' not in yaml.safe_load(front)
    assert r'\e' not in front  # how YAML writes what a terminal would heed
    assert not MEANS.search(outside_code(page.rpartition('<!-- made by')[0]))


def run_of_others(name, top1, **options):
    """Write the folder of a run of one epoch, as far as a report needs it, and return its name."""
    Path(name).mkdir()
    Path(name, 'args.yaml').write_text(yaml.safe_dump({'model_b': '', 'epochs': 1, **options}))
    Path(name, 'summary.csv').write_text(
        'epoch,eval_top1,eval_top1_a,eval_top5_a,lr_a,seconds,num_epochs,processes,images\n'
        + (f'0,{top1},{top1},9,0.1,1,1,1,9\n' if top1 else ''))
    return name


@pytest.mark.parametrize('text', MARKUP[:-1])
def test_report_shows_text_as_text(text):
    shown, names = code(text), {'dataset': text, 'model_a': text, 'val_split': text}
    page = make_report([
        run_of_others('pair', 5, method='vpl', seed=f'{text}.', **{text: 1}, **names),
        *(run_of_others(f'solo-{top1}', top1, method='solo', seed=text, opt=text, **names) for top1 in (6, 7)),
        run_of_others('solo', 5, method='solo', seed=1, opt='sgd', **names),
        run_of_others('begun', None, method=text, **names)])
    assert f'## {shown}\n' in page and f'| {shown} |' in page
    # The notes with text of others, and the table of unfinished runs.
    differs = code(', '.join(sorted(['opt', text])))
    assert f'baseline of the same epochs, {code(f"solo (opt={text})")}, differs in {differs}.' in page
    assert 'no common seed' in page and 'the seeds are not all different' in page and f'| begun | {shown} |' in page
    assert not MEANS.search(outside_code(page))


@pytest.mark.parametrize('options, hub', [
    ({'data_dir': '/data/imagenet-1k'}, None), ({'dataset': 'torch/cifar10'}, None), ({'dataset': 'hfds/local'}, None),
    ({'dataset': 'hfds/timm/imagenet-1k-wds'}, 'timm/imagenet-1k-wds'), ({'dataset': 'HFIDS/mnist'}, 'mnist')])
def test_only_data_of_the_hub_is_named_as_such(options, hub, checkpoint):
    Path('local').mkdir()
    args = {'dataset': '', 'data_dir': None, **options}
    card = model_card(load_branches(save(checkpoint, args), 'b')[0], 'x', 'ORG/x')
    assert card.data.datasets == ([hub] if hub else None)
    assert {result.dataset_type for result in card.data.eval_results} == {hub or 'imagefolder'}


@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_exports_are_as_readable_as_the_umask_allows(umask, mode, checkpoint):
    before = os.umask(umask)
    try:
        assert main(['export', save(checkpoint)]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in Path('export').glob('*/*')} == {mode}


def test_measurements_of_others(checkpoint, capsys):
    torch.save(checkpoint, 'last.pth.tar')
    for text in ('branch,epoch\na,0\n', 'a,b\n' + 'x' * 200000 + ',1\n'):
        Path('validation.csv').write_text(text)
        refused(['export', 'last.pth.tar'], capsys, 'validation.csv')


# Recipes


def recipe(content):
    """Write a recipe, text or options, and return the words of a command that reads it."""
    text = content if isinstance(content, (str, bytes)) else yaml.safe_dump(content)
    Path('recipe.yaml').write_bytes(text if isinstance(text, bytes) else text.encode())
    return [*DIGITS, '-c', 'recipe.yaml']


def recipe_line(content, capsys):
    """Return how a recipe is refused."""
    return refused(['train', *recipe(content)], capsys, 'recipe.yaml')


LAUGHS = 'mean: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n' + ''.join(
    f'{name}: &{letter} [{", ".join([f"*{before}"] * 9)}]\n' for name, before, letter in zip(
        ('std', 'opt_betas', 'scale', 'ratio', 'lr_noise', 'wandb_tags', 'save_epochs', 'input_size'), 'abcdefgh',
        'bcdefghi', strict=True))


@pytest.mark.parametrize('text, message', [
    (LAUGHS, 'more than 10000 values'),
    *((text * 45000, 'nested too deeply') for text in ('[', '{', '- ')),
    ('x: 1\n' * 25000, 'more than 100000 bytes'),
    (b'lr: \xff', 'not a text file in UTF-8'),
    (b'lr: \0', 'not YAML'),
    ('%YAML 9' + '9' * 5000 + '.1\n---\na: 1', 'not YAML'),
])
def test_recipes_of_others(text, message, capsys):
    assert message in recipe_line(text, capsys)
    assert not Path('ran').exists()


def test_recipes_that_are_no_files(capsys):
    Path('folder').mkdir()
    os.mkfifo('pipe')
    for name, message in (('folder', 'a folder'), ('pipe', 'neither a file'), ('/dev/zero', 'neither a file')):
        refused(['train', '-c', name], capsys, f'--config {name} is {message}')
    with open('huge.yaml', 'wb') as file:
        file.truncate(100_000_000)
    refused(['train', '-c', 'huge.yaml'], capsys, 'huge.yaml is too large for a recipe')


def test_long_values_are_read(capsys):
    for value in ('(' * 90000, '-' * 90000 + '1', '9' * 90000, ' ' * 90000 + 'b', 'b=' * 40000, "'\\d'"):
        parse_args(recipe({'model_kwargs': f'a={value}'}))
    assert capsys.readouterr() == ('', '')


def test_code_of_a_data_set_only_by_the_command_line(capsys):
    line = recipe_line('dataset_trust_remote_code: true', capsys)
    assert line.endswith('a recipe cannot allow a data set to run code, only --dataset-trust-remote-code on the '
                         'command line can')
    args = parse_args([*DIGITS, '-c', 'recipe.yaml', '--dataset-trust-remote-code'])
    assert args.data.dataset_trust_remote_code and 'dataset_trust_remote_code' not in recipe_values(args)
    assert not parse_args(recipe('dataset_trust_remote_code: false')).data.dataset_trust_remote_code


@pytest.mark.parametrize('value', ['/elsewhere', '..', '../x', 'a/../../x'])
def test_output_of_a_recipe_stays_below(value, capsys):
    assert recipe_line(f'output: {value}', capsys).endswith(
        f'output: {value} is not below the current folder; give --output on the command line')
    args = parse_args([*DIGITS, '-c', 'recipe.yaml', '--output', value])
    assert args.run.output == value and 'output' not in recipe_values(args)
    assert parse_args(recipe('output: runs/mine')).run.output == 'runs/mine'


@pytest.mark.parametrize('name', [
    '..', '.', '.hidden', '../x', 'a/b', '/x', 'a\\b', ' ', ' a', 'a ', '-x', '~', 'a\nb', '\x1b[31m', 'x' * 201])
def test_experiment_is_a_name(name, capsys):
    for words in ([*DIGITS, f'--experiment={name}'], recipe({'experiment': name})):
        refused(['train', *words], capsys, '--experiment', 'not a path')


def test_names_of_experiments_that_are_taken():
    for name in ('', 'run', '007', 'a.b_c-d', 'lr=0.1 (2)', 'größe'):
        assert parse_args([*DIGITS, '--experiment', name]).run.experiment == name


@pytest.mark.parametrize('key', ['cache_dir', 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay'])
def test_a_recipe_chooses_no_files_for_timm(key, capsys):
    """With these, timm would download any address into any folder."""
    for name in ('model_kwargs', 'model_kwargs_b'):
        given = {name: {key: {'url': 'http://127.0.0.1:9/.profile'}}}
        assert recipe_line(given, capsys).endswith(f'{name}: {key} names files, only the command line can give it')
        assert recipe_line(f'{name}: {key}=x', capsys).endswith('only the command line can give it')


SHELL = ["x'; touch ran; '", 'x; touch ran', '$(touch ran)', '`touch ran`', 'x|touch ran', 'x>ran', 'x\ntouch ran', '*']


@pytest.mark.parametrize('place, message', [
    ('pipe:touch ran', 'in a shell'), ('PIPE:touch ran', 'in a shell'), ('pipe:touch ran; cat https://x', 'in a shell'),
    ('hf://datasets/a/b', 'the token of the Hub'), ('https://user:secret@host/x', 'no user name, password'),
    ('https://host/x?sig=secret', 'or query'), ('s3://bucket/x', 'an address begins with https://'),
    *((f'https://host/{text}', f'https://host/{text.split()[0]}') for text in SHELL),
])
def test_shards_run_no_commands(place, message, capsys):
    options = ['--dataset', 'wds/x', '--data-dir', place]
    recipe({'dataset': 'wds/x', 'data_dir': place})
    for argv in (
            ['train', *PAIR, *options], ['validate', 'test_vit', *options], ['train', *PAIR, '-c', 'recipe.yaml']):
        line = refused(argv, capsys, message, '--data-dir', 'digits and _-.,/+=% only')
        assert 'secret' not in line
    assert not Path('ran').exists()


@pytest.mark.parametrize('split', [
    'pipe:touch ran.tar', 'a.tar::pipe:touch ran.tar|5', "a.tar'; touch ran; echo '|64", 'x-{0..9}{1..2.tar',
    'x-{0..{1,2}}.tar', '${HOME}.tar', 'a.tar|5|6', *SHELL])
def test_splits_run_no_commands(split, capsys):
    wds = ['--dataset', 'wds/x', '--data-dir', '.']
    for flag in ('--train-split', '--val-split'):
        recipe({'dataset': 'wds/x', flag[2:]: split})
        for argv in ([*wds, flag, split], ['.', '-c', 'recipe.yaml']):
            refused(['train', *PAIR, *argv], capsys, flag, 'only')
    refused(['validate', 'test_vit', *wds, '--val-split', split], capsys, '--val-split')
    assert not Path('ran').exists()


@pytest.mark.parametrize('split', ['x-{0..999999999}.tar', 'x-{0..9999}{0..9999}.tar', 'x' + '{a,b}' * 40 + '.tar'])
def test_splits_of_too_many_shards(split, capsys):
    refused(['train', *PAIR, '--dataset', 'wds/x', '--data-dir', '.', '--train-split', split], capsys,
            '--train-split', 'more than the limit of 1000000')


def test_names_of_shards_that_are_taken():
    for split in ('train', 'train-{0000..0012}.tar', 'a.tar::b.tar|64', 'x/{a,b}-{0..9}.tar|5', '{0..9}/{00..99}.tar'):
        for place in ('.', 'https://host:8080/a/b', 'gs://bucket', 'file:///data', 'http://host'):
            args = parse_args([*PAIR, '--dataset', 'wds/x', '--data-dir', place, '--train-split', split])
            assert (args.data.train_split, args.data.data_dir) == (split, place)
    assert parse_args([*PAIR, '--dataset', 'tfds/mnist', '--train-split', 'train[:80%]'])


def shards(folder, info):
    """Write two shards of digits and what describes them."""
    folder.mkdir()
    reader = DigitsReader()
    with tarfile.open(folder / 'x-0.tar', 'w') as tar:
        for i in range(16):
            image = io.BytesIO()
            Image.open(reader[i][0]).resize((32, 32)).save(image, 'png')
            for name, data in ((f'{i}.png', image.getvalue()), (f'{i}.cls', str(reader.targets[i]).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shutil.copy(folder / 'x-0.tar', folder / 'x-1.tar')
    (folder / '_info.json').write_text(json.dumps(info))


def splits(*names):
    split = {'name': 'train', 'num_samples': 32, 'filenames': names, 'shard_lengths': [16] * len(names)}
    return {'splits': {'train': split, 'validation': {**split, 'name': 'validation'}}}


WDS = ['train', *PAIR, '--dataset', 'wds/x', '--data-dir', 'shards', *TRAIN[7:], '--num-classes', '10']


@pytest.mark.parametrize('info, message', [
    *((splits('x-0.tar', text), f'_info.json: {text.split()[0]}') for text in (*SHELL, 'pipe:touch ran', '{0..9}')),
    ([], 'could not be read'), ({'splits': []}, 'could not be read'),
    ({'splits': {'train': 5}}, 'could not be read'), (splits(), ' 0 shards'),
    ({'splits': {'train': {**splits('x-0.tar')['splits']['train'], 'num_samples': 'x'}}}, "'x' samples"),
], ids=str)
def test_info_of_shards_runs_no_commands(info, message, capsys):
    pytest.importorskip('webdataset', minversion='1.0', reason='the extra wds is not installed')
    shards(Path('shards'), info)
    refused(WDS, capsys, '--data-dir shards', message)
    assert not Path('ran').exists()


@pytest.mark.skipif(not shutil.which('curl'), reason='no curl, which webdataset reads addresses with')
def test_a_server_runs_no_commands(capsys):
    pytest.importorskip('webdataset', minversion='1.0', reason='the extra wds is not installed')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory='shards')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        for name, message in (("x'; touch ran; '", "x'; touch ran"), ('/dev/zero', 'not below the address')):
            shutil.rmtree('shards', ignore_errors=True)
            shards(Path('shards'), splits('x-0.tar', name))
            capsys.readouterr()
            refused([*WDS, '--data-dir', address], capsys, f'--data-dir {address}: split', '_info.json', message)
        server.shutdown()
    assert not Path('ran').exists()


def test_shards_are_read():
    pytest.importorskip('webdataset', minversion='1.0', reason='the extra wds is not installed')
    shards(Path('shards'), splits('x-0.tar', 'x-1.tar'))
    assert main([*WDS, '--experiment', 'named', '--no-export']) == 0
    assert main([*WDS, '--experiment', 'listed', '--no-export', '--train-split', 'x-{0..1}.tar|32', '--val-split',
                 'x-0.tar::x-1.tar|32']) == 0


def test_older_versions_of_webdataset_are_refused(capsys, monkeypatch):
    Path('shards').mkdir()
    for version, found in (('0.2.111', 'found 0.2.111'), (None, 'found none')):
        module = types.ModuleType('webdataset')
        module.__version__ = version
        monkeypatch.setitem(sys.modules, 'webdataset', module if version else None)
        refused(WDS, capsys, "--dataset wds/x: needs webdataset 1.0 or later (pip install 'timm-vpl[wds]')", found)


# Pipes in the place of files, and the report


def test_fifos_keep_nobody_waiting(capsys):
    os.mkfifo('fifo')
    os.mkfifo('fifo.tar')
    Path('run').mkdir()
    os.mkfifo('run/args.yaml')
    for argv in (
            ['train', 'fifo.tar', *PAIR], ['train', 'fifo', *PAIR], ['train', *TRAIN[1:], '--resume', 'fifo'],
            [*TRAIN, '--initial-checkpoint-b', 'fifo'], [*TRAIN, '--class-map', 'fifo'], [*TRAIN, '--teacher', 'fifo'],
            ['export', 'fifo'], ['validate', 'fifo', *EVAL], ['validate', 'test_vit', *EVAL, '--class-map', 'fifo'],
            ['validate', 'test_vit', *EVAL, '--file-list', 'fifo'], ['report', 'run'], ['report', 'fifo']):
        refused(argv, capsys)


@pytest.mark.parametrize('options, cell', [
    (LAUGHS, '1'), ('!!python/object/apply:os.mkdir [ran]: 1', '1'), ('<<: 5', '1'), ('lr: !!bool x', '1'),
    ('contrastive_to: [1]\nkl_to: {a: 1}\nx: {a: 1}\nteacher: [.]', '1'), ('model_b: {a: 1}\nseed: [1]', '1e308'),
    ('epochs: 1e300\ndata_dir: {a: 1}', '1e999'), ('epochs: 99999999999\nmodel_kwargs: {a: [1]}', 'x'),
])
def test_runs_of_others_in_a_report(options, cell, capsys):
    Path('run').mkdir()
    Path('run/args.yaml').write_text(f'method: vpl\nmodel_a: x\n{options}\n')
    Path('run/summary.csv').write_text(
        f'epoch,lr_a,eval_top1_a,images,seconds,processes,num_epochs\n0,1,{cell},{cell},{cell},{cell},{cell}\n')
    for format in ('md', 'json'):
        assert main(['report', 'run', '--format', format]) in (0, 2)
    assert 'Traceback' not in capsys.readouterr().err
    assert not Path('ran').exists()


def test_a_saver_of_others_names_files_of_its_folder():
    """What a checkpoint lists as its history is deleted in time: nothing elsewhere, nothing of another name."""
    from timm_vpl.engine.checkpoint import Ranks
    from timm_vpl.errors import RunError
    own = {'checkpoint_files': [
        ('../mine.txt', 1.), ('/etc/hosts', 1.), ('last.pth.tar', 1.), ('checkpoint-3.pth.tar', 2.)],
        'best_branches': {'a': (1., 3), '/../../x': (1., 3)}, 'pending': (3, 1.)}
    found = Ranks.from_state(own, ('a', 'b'))
    assert found.files == {'checkpoint-3': 2.} and found.bests == {'best_a': (1., 3)}
    for bad in ({'best_metric': 1., 'best_epoch': '..'}, {'checkpoint_files': 5}, {'checkpoint_files': [(1, 2)]}, 5):
        with pytest.raises(RunError, match="'saver' of the checkpoint is not that of a run"):
            Ranks.from_state(bad, ('a', 'b'))


# The token


def test_no_token_in_any_file_or_line(checkpoint, digits_folder, tmp_path, monkeypatch, capfd, caplog):
    """Commands that may know it, failing and succeeding; the Hub, on loopback, knows nothing of it."""
    torch.save(checkpoint, 'last.pth.tar')
    Path('recipe.yaml').write_text('lr: fast')
    commands = [
        [*TRAIN, '-c', 'recipe.yaml'], [*TRAIN, '--model-b', 'hf-hub:someone/model', '--pretrained-b'],
        ['validate', 'hf-hub:someone/model', *EVAL], [*TRAIN, '--teacher', 'hf-hub:someone/model', '--method', 'deit'],
        ['export', 'last.pth.tar', '--push-to', 'someone'],
        ['train', str(digits_folder), *PAIR, *TRAIN[7:], '--experiment', 'run', '--no-export']]
    with Hub({}) as hub:
        use_hub(monkeypatch, hub.url, tmp_path / 'home', CANARY)
        assert [status_of(main, argv) for argv in commands] == [2, 2, 2, 2, 1, 0]
    out, err = capfd.readouterr()
    assert err.count('error: ') == 5 and 'Traceback' not in err and CANARY not in out + err + caplog.text
    files = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert {'args.yaml', 'summary.csv', 'last.pth.tar', 'README.md', 'config.json'} <= {path.name for path in files}
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
