"""Runs of all terms by name: stopped and resumed to the bit, on one process and several, and exported."""
import json
import shutil

import pytest
import timm
import torch
import yaml
from runs import NOISE, PAIR, SMALL, differences, last, rows, run, status_of, train_in
from test_resume import stopped

from timm_vpl.cli import train
from timm_vpl.engine.checkpoint import read_checkpoint

TERMS = [
    'kl,learner=b,temperature=4,confidence=true', 'kl,learner=a,leader=average,when=leader-ahead',
    'tokens,learner=b,weight=3,over=fade,end=70', 'embed,learner=a,distance=cosine',
    'ofa,learner=b,features=stage2+stage4,start=30', 'contrastive,learner=b,end=80', 'dist,learner=b,weight=0.5',
    'dkd,learner=a', 'token,learner=b,leader=a']
STUDENT = ['--model-b', 'deit_tiny_distilled_patch16_224', '--model-kwargs-b', 'embed_dim=48', 'depth=4', 'num_heads=3',
           'patch_size=8']
LONG = [
    *NOISE, *STUDENT, '--method', 'pair', *(word for term in TERMS for word in ('--term', term)), '--gate-split',
    'validation', '--epochs', '3', '--log-interval', '1', '--recovery-interval', '2', '--clip-grad', '1', '-vb', '4']


def test_stopped_in_mid_epoch(digits_folder, tmp_path, caplog):
    whole = run(digits_folder, tmp_path / 'whole', *LONG)
    assert '--gate-split validation is also --val-split' in caplog.text
    stopped(r'Train: 1 \[ *[12]/', run, digits_folder, tmp_path / 'part', *LONG)
    recovery = sorted((tmp_path / 'part' / 'run').glob('recovery-1-*'))[0]
    first = read_checkpoint(str(recovery))['task_state']['criterion']
    assert not differences(whole, run(digits_folder, tmp_path / 'part', *LONG, '--resume', 'auto'))
    state = last(whole)['task_state']
    assert set(state['accuracies']) == {'a', 'average'}
    assert all(not torch.equal(first[key], value) for key, value in state['criterion'].items())  # each layer has moved
    assert {key.split('.')[1] for key in first} == {'tokens_b_loss', 'embed_a_loss', 'ofa_b_loss'}
    table = rows(whole)
    assert [row['train_tokens_b_loss'] != '' for row in table] == [True, True, True]
    assert [row['train_ofa_b_loss'] != '' for row in table] == [False, True, True]
    assert table[0]['train_kl_a_loss'] == ''  # the gate is shut in the first epoch


@pytest.mark.parametrize('processes', [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes(digits_folder, tmp_path, processes):
    options = [digits_folder, *PAIR, *SMALL, *LONG, '-b', '4', '--experiment', 'run']
    train_in(processes, *options, '--output', tmp_path / 'whole')
    part = shutil.copytree(tmp_path / 'whole', tmp_path / 'part') / 'run'
    recovery = sorted(part.glob('recovery-2-*'))[0]
    train_in(processes, *options, '--output', tmp_path / 'part', '--resume', recovery)
    assert not differences(tmp_path / 'whole' / 'run', tmp_path / 'part' / 'run')


def test_a_recipe_of_terms_and_an_export_without_their_layers(digits_folder, tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump({
        'method': 'pair', 'model_a': 'test_resnet', 'model_b': 'test_vit', 'terms': [
            {'term': 'tokens', 'learner': 'b', 'features': ['stage2', 'blocks.5'], 'weight': 3, 'projection': True,
             'leader_features': ['stage2', 'layer4']},
            'kl,learner=a']}))
    folder = run(digits_folder, tmp_path, '-c', str(recipe), '--export', '--epochs', '1', models=[])
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert args['terms'] == [
        'tokens,learner=b,weight=3,features=stage2+blocks.5,leader_features=stage2+layer4', 'kl,learner=a']
    again = run(digits_folder, tmp_path, '-c', str(folder / 'args.yaml'), name='again', models=[])
    assert not {name for name in differences(folder, again) if name.endswith('.pth.tar')}
    model = timm.create_model(f'local-dir:{folder}/export/pair-test_vit', pretrained=True)
    assert model.num_classes == 4
    assert json.loads((folder / 'export' / 'pair-test_vit' / 'config.json').read_text())['architecture'] == 'test_vit'


def test_images_are_kept_back_for_a_gate(digits_folder, tmp_path, capsys):
    gated = ['--dataset', 'digits', *PAIR, *SMALL, '--method', 'pair', '--term', 'kl,learner=a,when=leader-ahead']
    assert train([str(digits_folder), *PAIR, *SMALL, '--gate-pct', '2', '--output', str(tmp_path)]) == 2
    assert '--gate-pct 2: 100 of 40 images, more than half, cannot be held out' in capsys.readouterr().err
    assert train([*gated, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'x', '-b', '64']) == 0
    (row,) = rows(tmp_path / 'x')
    assert int(row['images']) == (1437 - 100) // 64 * 64


def test_a_teacher_beside_a_pair_whose_images_differ(digits_folder, tmp_path):
    """A gate compares the teacher too, each on images of its own; one without a classifier teaches by its features."""
    teacher = run(digits_folder, tmp_path, '--method', 'solo', '--epochs', '1', name='teacher', models=PAIR[:2])
    options = ['--method', 'pair', '--img-size-b', '48', '--model-kwargs-b', 'img_size=48', '--epochs', '2',
               '--term', 'kl,learner=b,leader=teacher,when=leader-ahead', '--term', 'kl,learner=a', '--gate-split',
               'validation', '--teacher', str(teacher)]
    state = last(run(digits_folder, tmp_path, *options, name='pair'))['task_state']
    assert set(state['accuracies']) == {'b', 'teacher'}
    model = timm.create_model('test_vit', num_classes=0, img_size=32)
    timm.models.save_for_hf(model, tmp_path / 'headless', model_args={'img_size': 32})
    options = ['--method', 'pair', '--term', 'tokens,learner=a,leader=teacher', '--teacher', str(tmp_path / 'headless')]
    folder = run(digits_folder, tmp_path, *options, name='headless-pair', models=PAIR[:2])
    assert float(rows(folder)[1]['train_tokens_a_loss']) > 0
    command = [digits_folder, *PAIR, *SMALL, '--output', tmp_path, *options, '--term', 'kl,learner=b,leader=teacher']
    assert status_of(train, command) == 2
