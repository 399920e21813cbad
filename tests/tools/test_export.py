"""Exported branches: plain timm models, equal to the branch to the bit, with a card; and what is refused."""
import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from runs import rows, status_of
from safetensors.torch import load_file

from timm_vpl.cli import main, train
from timm_vpl.core.processes import Processes
from timm_vpl.core.task import PairTask
from timm_vpl.engine.checkpoint import Saver, read_checkpoint
from timm_vpl.engine.models import branch_config, create_pair, resolve_data
from timm_vpl.engine.optim import create_criterion, create_optimizer, learning_rates
from timm_vpl.engine.trained import load_branches
from timm_vpl.files import temporary
from timm_vpl.options.train import parse_args, recipe_values
from timm_vpl.tools.runs import COLUMNS
from timm_vpl.tools.tables import write_rows

# A process that has timm and not this package: loads each folder and leaves its logits.
RELOAD = '''
import sys
sys.modules['timm_vpl'] = None
import timm, torch
jobs = torch.load(sys.argv[1])
logits = {}
with torch.inference_mode():
    for folder, images in jobs.items():
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        logits[folder] = model(images)
torch.save(logits, sys.argv[1])
'''


def fails(argv, capsys, status, *words):
    """Check that a command ends with this status and one line that has these words."""
    capsys.readouterr()
    assert status_of(main, argv) == status
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and 'Traceback' not in error, error
    for word in words:
        assert str(word) in error, error


def test_branches_reload_to_the_bit(run_dir, tmp_path):
    assert sorted(os.listdir(run_dir / 'export')) == ['vpl-test_resnet', 'vpl-test_vit']
    assert main(['export', str(run_dir), '--out', str(tmp_path / 'raw'), '--no-ema']) == 0
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    folders = {
        str(parent / f'vpl-{name}'): (side, name, key)
        for parent, key in ((run_dir / 'export', 'state_dict_ema'), (tmp_path / 'raw', 'state_dict'))
        for side, name in (('a', 'test_resnet'), ('b', 'test_vit'))
    }
    torch.save(dict.fromkeys(folders, images), tmp_path / 'jobs.pt')
    result = subprocess.run([sys.executable, '-c', RELOAD, tmp_path / 'jobs.pt'], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    logits = torch.load(tmp_path / 'jobs.pt')
    for folder, (side, name, key) in folders.items():
        # Independent of the package: the prefix of the checkpoint's weights, in timm's model.
        state = torch.load(run_dir / f'best_{side}.pth.tar', weights_only=True)[key]
        model = timm.create_model(name, num_classes=4, **({'img_size': 32} if name == 'test_vit' else {})).eval()
        model.load_state_dict({
            key.removeprefix(f'model_{side}.'): value for key, value in state.items()
            if key.startswith(f'model_{side}.')})
        with torch.inference_mode():
            assert torch.equal(logits[folder], model(images)), folder
        assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'model.safetensors']
    assert not any(torch.equal(logits[str(run_dir / 'export' / name)], logits[str(tmp_path / 'raw' / name)])
                   for name in ('vpl-test_resnet', 'vpl-test_vit'))


def test_config_holds_what_was_trained(run_dir):
    model = timm.create_model(f'local-dir:{run_dir / "export" / "vpl-test_vit"}', pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()} == {
        'input_size': (3, 32, 32), 'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.2, 0.2), 'interpolation': 'bilinear',
        'crop_pct': 0.9, 'crop_mode': 'center'}
    assert model.num_classes == 4 and model.pretrained_cfg['label_names'] == ['class0', 'class1', 'class2', 'class3']
    written = json.loads((run_dir / 'export' / 'vpl-test_vit' / 'config.json').read_text())
    assert 'tag' not in written['pretrained_cfg'] and not any('drop' in key for key in written['model_args'])
    assert model.blocks[-1].drop_path1.__class__.__name__ == 'Identity'


def test_exports_are_starting_points(run_dir):
    folder = f'local-dir:{run_dir / "export" / "vpl-test_resnet"}'
    tuned = timm.create_model(folder, pretrained=True, num_classes=7)
    whole = timm.create_model(folder, pretrained=True)
    assert all(torch.equal(value, tuned.state_dict()[key]) for key, value in whole.state_dict().items()
               if not key.startswith('fc'))
    assert tuned(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    features = timm.create_model(folder, pretrained=True, features_only=True).eval()
    assert len(features(torch.zeros(1, 3, 32, 32))) == len(features.feature_info)


def test_other_classes_of_a_pretrained_branch_are_told(run_dir, run_options, digits_folder, tmp_path, caplog):
    data = shutil.copytree(digits_folder, tmp_path / 'data')
    for split in ('train', 'validation'):
        (data / split / 'class1').rename(data / split / 'zebra')
    model = f'local-dir:{run_dir / "export" / "vpl-test_vit"}'
    options = ['--method', 'solo', *run_options[4:], '--model-b', model, '--epochs', '1', '--no-export', '--output',
               str(tmp_path)]
    assert train([str(digits_folder), *options, '--pretrained']) == 0 and 'has different classes' not in caplog.text
    assert train([str(data), *options, '--pretrained']) == 0
    assert "different classes (class 1 is 'class1' in the model and 'class2' in the data);" in caplog.text


def test_card(run_dir):
    card = ModelCard.load(run_dir / 'export' / 'vpl-test_vit' / 'README.md')
    best = [row for row in rows(run_dir) if row['epoch'] == str(read_checkpoint(
        str(run_dir / 'best_b.pth.tar'))['epoch'])][0]
    assert card.data.library_name == 'timm' and card.data.pipeline_tag == 'image-classification'
    assert card.data.license == 'unknown' and {'timm', 'vpl'} <= set(card.data.tags)
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {
        'Top-1': pytest.approx(float(best['eval_ema_top1_b'])), 'Top-5': pytest.approx(float(best['eval_ema_top5_b']))}
    assert f'| validation | raw | {float(best["eval_top1_b"]):.3f} | {float(best["eval_top5_b"]):.3f} |' in card.text
    assert 'Partner in training: `test_resnet`' in card.text and 'crop_pct_b: 0.9' in card.text
    assert str(run_dir.parent) not in card.content and 'data_dir' not in card.content and 'seed: 3' in card.text
    for how in ('hang_timeout', 'recovery_minutes', 'nonfinite_limit', 'workers', 'device', 'experiment'):
        assert f'{how}:' not in card.text
    assert 'decay_milestones:' not in card.text and 'scale:' not in card.text  # defaults of several numbers


def test_card_takes_later_measurements(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / 'run')
    epoch = read_checkpoint(str(run / 'best_b.pth.tar'))['epoch']
    ours = {'branch': 'b', 'epoch': epoch, 'weights': 'ema', 'set': 'v2', 'images': 9, 'top1': 3, 'top5': 4,
            'img_size': 32, 'crop_pct': 0.9, 'interpolation': 'bilinear', 'data': '/data/val'}
    write_rows(run / 'validation.csv', COLUMNS, [{**ours, **other} for other in (
        {'set': 'real', 'images': 46837, 'top1': 61.5, 'top5': 88.25},
        {'set': 'test', 'images': 50, 'top1': 62.5, 'top5': 89},
        # Of another epoch, branch, preparation; not measured, no number.
        {'epoch': epoch + 7}, {'branch': 'a'}, {'img_size': 48}, {'crop_pct': 1.0}, {'top1': '', 'top5': ''},
        {'weights': 'raw', 'top1': 'nan', 'top5': 'nan'})])
    assert main(['export', str(run), '--branch', 'b', '--license', 'mit']) == 0
    card = ModelCard.load(run / 'export' / 'vpl-test_vit' / 'README.md')
    assert '| ReaL labels, 46837 images of val | ema | 61.500 | 88.250 |' in card.text and 'V2' not in card.text
    assert '| test, 50 images of val | ema | 62.500 | 89.000 |' in card.text
    assert card.data.license == 'mit' and len(card.data.eval_results) == 6
    later = [(result.dataset_name.partition('(')[2], result.metric_value) for result in card.data.eval_results[2::2]]
    assert later == [('ReaL labels, 46837 images of val)', 61.5), ('test, 50 images of val)', 62.5)]
    model = timm.create_model(f'local-dir:{run / "export" / "vpl-test_vit"}')
    assert model.pretrained_cfg['license'] == 'mit'


def test_weights_that_were_evaluated_are_exported(run_options, digits_folder, tmp_path):
    # With --model-ema-force-cpu timm, too, evaluates the raw weights alone: best epochs are theirs.
    options = [*run_options, '--epochs', '1', '--model-ema-force-cpu', '--output', str(tmp_path), '--experiment', 'run']
    assert train([str(digits_folder), *options]) == 0
    for side, name in (('a', 'test_resnet'), ('b', 'test_vit')):
        checkpoint = read_checkpoint(str(tmp_path / 'run' / f'best_{side}.pth.tar'))
        folder = tmp_path / 'run' / 'export' / f'vpl-{name}'
        for key, value in load_file(folder / 'model.safetensors').items():
            assert torch.equal(value, checkpoint['state_dict'][f'model_{side}.{key}'])
        card = ModelCard.load(folder / 'README.md')
        assert '(raw weights)' in card.text
        assert card.data.eval_results[0].metric_value == checkpoint['metrics'][f'top1_{side}']


def save_pair(folder, *options):
    """Save an untrained pair, its BatchNorm statistics moved, as a run saves it; return its checkpoint."""
    parsed = parse_args(['--dataset', 'digits', '--batch-size', '2', *options])
    configs = resolve_data(parsed)
    pair = create_pair(parsed, configs, parsed.input.num_classes or 7, Processes(torch.device('cpu')))
    generator = torch.Generator().manual_seed(0)
    for name, buffer in pair.named_buffers():
        if 'running_' in name:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    task = PairTask(pair, create_criterion(parsed, 2, torch.device('cpu')), verbose=False)
    task.setup_ema(decay=0.5)
    pair.averaged = [task.get_trainable_module(ema=True).module]  # a list: not part of the pair
    with torch.no_grad():
        for parameter in pair.averaged[0].parameters():
            parameter.mul_(0.9)
    saver = Saver(
        str(folder),
        task,
        create_optimizer(parsed, pair, learning_rates(parsed, 1)),
        recipe_values(parsed),
        {side: branch_config(pair.branch(side), configs[side], None) for side in pair.sides},
    )
    saver.save(0, {}, {'model_best': 1., **{f'best_{side}': 1. for side in pair.sides}})
    return pair, configs, str(folder / 'last.pth.tar')


SMALL_SWIN = ['embed_dim=24', 'depths=(1,1,2,1)', 'num_heads=(1,2,2,2)']
FAMILIES = [
    (['resnet10t', 'deit_tiny_distilled_patch16_224'],
     ['--img-size', '64', '--in-chans', '1', '--model-kwargs-b', 'depth=1']),
    (['regnetx_002', 'deit_tiny_distilled_patch16_224'], ['--img-size', '64', '--gp-a', 'max']),
    (['convnext_atto', 'swin_tiny_patch4_window7_224'],
     ['--img-size', '56', '--num-classes', '3', '--model-kwargs-b', *SMALL_SWIN]),
    (['efficientnet_lite0', 'pit_ti_224'], ['--img-size', '96']),
    (['mobilenetv4_conv_small_050', 'xcit_nano_12_p16_224'], ['--img-size', '64', '--num-classes', '11']),
    (['resnet18', 'eva02_tiny_patch14_224'], ['--img-size', '56']),
    (['resnet26', 'coatnet_pico_rw_224'], ['--img-size', '64']),
    (['tinynet_e', 'maxvit_rmlp_pico_rw_256'], ['--img-size', '64', '--bn-eps-a', '0.01']),
    (['repvgg_a0', 'levit_128s'], ['--img-size', '224']),
    (['test_efficientnet', 'cait_xxs24_224'], ['--img-size', '48', '--model-kwargs-b', 'depth=2']),
    (['densenet121', 'mobilevit_xxs'], ['--img-size', '64']),
    (['test_convnext', 'beit_base_patch16_224'],
     ['--img-size', '64', '--model-kwargs-b', 'depth=2', 'embed_dim=96', 'num_heads=4']),
    (['hgnetv2_b0', 'vit_tiny_patch16_224'],
     ['--img-size', '80', '--model-kwargs-b', 'global_pool=avg', 'class_token=False']),
]


@pytest.mark.parametrize('models, options', [
    pytest.param(*family, id='-'.join(family[0]), marks=[pytest.mark.slow] if i else [])
    for i, family in enumerate(FAMILIES)])
def test_families(tmp_path, models, options):
    pair, configs, checkpoint = save_pair(tmp_path, '--model-a', models[0], '--model-b', models[1], *options)
    assert main(['export', checkpoint]) == 0
    assert main(['export', checkpoint, '--no-ema', '--out', str(tmp_path / 'raw')]) == 0
    for side, name in zip('ab', models, strict=True):
        images = torch.randn(2, *configs[side]['input_size'], generator=torch.Generator().manual_seed(0))
        for place, trained in (('export', pair.averaged[0]), ('raw', pair)):
            model = timm.create_model(f'local-dir:{tmp_path / place / f"vpl-{name}"}', pretrained=True).train()
            assert model(images).shape == (2, model.num_classes)  # of a distillation token there is no trace
            model = timm.create_model(f'local-dir:{tmp_path / place / f"vpl-{name}"}', pretrained=True).eval()
            with torch.inference_mode():
                assert torch.equal(model(images), trained.branch(side).eval()(images))
            # With equal logits, the very preprocessing of validation gives the very accuracy.
            config = timm.data.resolve_model_data_config(model)
            for key, value in configs[side].items():
                assert (tuple(config[key]) if isinstance(config[key], list) else config[key]) == value, key


def test_two_branches_of_one_architecture(tmp_path):
    _, _, checkpoint = save_pair(tmp_path, '--model-a', 'test_vit', '--model-b', 'test_vit', '--img-size', '32')
    assert main(['export', checkpoint, '--name-b', 'twin']) == 0
    for side in 'ab':
        assert main(['export', checkpoint, '--branch', side]) == 0
    assert sorted(os.listdir(tmp_path / 'export')) == ['twin', 'vpl-test_vit-a', 'vpl-test_vit-b']


def test_killed_run(run_dir, tmp_path):
    shutil.copy(run_dir / 'last.pth.tar', tmp_path / 'recovery-0-7.pth.tar')
    Path(temporary(tmp_path / 'last.pth.tar')).write_bytes(b'')
    assert main(['export', str(tmp_path)]) == 0
    assert len(os.listdir(tmp_path / 'export')) == 2


class Bomb:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def without(*keys, **changes):
    """Return a function that changes a checkpoint."""
    return lambda checkpoint: {**{key: value for key, value in checkpoint.items() if key not in keys}, **changes}


REFUSALS = {  # a change of the checkpoint, options, status and words
    'no averaged weights': (without('state_dict_ema'), ['--ema'], 2, '--ema', 'no averaged weights'),
    'no such branch': (None, ['--branch', 'c'], 2, '--branch'),
    'branch not there': (lambda c: {**c, 'branches': {'a': c['branches']['a']}}, ['--branch', 'b'], 2, 'no branch b'),
    'names alike': (None, ['--name-a', 'x', '--name-b', 'x'], 2, '--name-a'),
    'name of the Hub': (None, ['--push-to', 'or g'], 2, '--push-to', 'or g'),
    'path of the Hub': (None, ['--push-to', 'org/x'], 2, '--push-to', 'org/x'),
    'empty name of the Hub': (None, ['--push-to', ''], 2, '--push-to: /vpl-test_resnet is not a name'),
    'model name of the Hub': (None, ['--push-to', 'org', '--name-a', 'bad--name'], 2, 'bad--name'),
    'no word on the models': (without('branches'), [], 1, 'its models are not known'),
    'list of branches': (without(branches=['a']), [], 1, 'branches'),
    'branches of text': (without(branches={'a': 'test_resnet', 'b': 'x'}), [], 1, 'branches'),
    'weights without names': (without(state_dict={1: torch.zeros(1)}), [], 1, 'state_dict'),
    'weights of text': (without(state_dict={'model_a.x': 'text'}), [], 1, 'state_dict'),
    'weights of others': (without(state_dict={}), ['--no-ema'], 1, 'no weights under model_a.*', 'test_resnet'),
    'averaged weights none': (without(state_dict_ema=None), [], 1, 'state_dict_ema'),
}


@pytest.mark.parametrize('change, options, status, words', [
    pytest.param(change, options, status, words, id=case)
    for case, (change, options, status, *words) in REFUSALS.items()])
def test_refusals(run_dir, tmp_path, capsys, monkeypatch, change, options, status, words):
    monkeypatch.chdir(tmp_path)
    checkpoint = read_checkpoint(str(run_dir / 'last.pth.tar'))
    torch.save(change(checkpoint) if change else checkpoint, 'last.pth.tar')
    fails(['export', 'last.pth.tar', *options], capsys, status, *words)
    assert os.listdir() == ['last.pth.tar']


def test_files_that_are_no_checkpoint(run_dir, tmp_path, capsys):
    fails(['export', tmp_path / 'none'], capsys, 2, tmp_path / 'none')
    fails(['export', tmp_path], capsys, 2, tmp_path, 'no checkpoint')
    whole = (run_dir / 'last.pth.tar').read_bytes()
    (tmp_path / 'truncated').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'pickle').write_bytes(pickle.dumps({'state_dict': Bomb()}))
    for file in (tmp_path / 'truncated', tmp_path / 'pickle', run_dir / 'summary.csv',
                 run_dir / 'export/vpl-test_vit/README.md'):
        fails(['export', file], capsys, 1, file)
    assert not Path('ran').exists()
    # The one class that is allowed: timm's saver stores its options as a Namespace.
    checkpoint = read_checkpoint(str(run_dir / 'last.pth.tar'))
    torch.save({**checkpoint, 'extra': argparse.Namespace(model='x')}, tmp_path / 'timm.pth.tar')
    assert len(load_branches(str(tmp_path / 'timm.pth.tar'))) == 2


def test_onnx(run_dir, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
    pytest.importorskip('onnxscript', reason='the extra onnx is not installed')
    assert main(['export', str(run_dir), '--out', str(tmp_path), '--onnx', '--branch', 'b']) == 0
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(str(tmp_path / 'vpl-test_vit' / 'model.onnx'))
    logits = torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
    model = timm.create_model(f'local-dir:{tmp_path / "vpl-test_vit"}', pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-4)


def test_onnx_without_its_packages(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    fails(['export', run_dir, '--out', tmp_path / 'out', '--onnx'], capsys, 2, '--onnx', 'timm-vpl[onnx]')
    assert not any((tmp_path / 'out').iterdir())


def test_what_a_user_added_to_an_export_is_kept(run_dir, tmp_path, capsys):
    run = shutil.copytree(run_dir, tmp_path / 'run')
    assert main(['export', str(run)]) == 0  # as the run left them: made anew
    fails(['export', run, '--branch', 'a', '--out', run / 'export'], capsys, 2, 'vpl-test_resnet exists', '--overwrite')
    card = run / 'export' / 'vpl-test_vit' / 'README.md'
    card.write_text(card.read_text().replace('# vpl-test_vit', '# My model'))
    fails(['export', run], capsys, 2, 'vpl-test_vit exists', '--overwrite')
    assert '# My model' in card.read_text()
    assert main(['export', str(run), '--branch', 'a']) == 0
    (run / 'export' / 'vpl-test_resnet' / 'notes.txt').write_text('mine')
    fails(['export', run, '--branch', 'a'], capsys, 2, '--overwrite')
    assert main(['export', str(run), '--overwrite']) == 0 and '# My model' not in card.read_text()


@pytest.mark.parametrize('out, files', [
    ([], {}), (['--out'], {'thesis.tex': 'mine'}), ([], {'config.json': '{}', 'model.safetensors': ''}),
    (['--out'], {'README.md': '# Mine', 'config.json': '{}', 'model.safetensors': ''})], ids=str)
def test_only_exports_are_replaced(run_dir, tmp_path, capsys, out, files):
    run = shutil.copytree(run_dir, tmp_path / 'run')
    folder = run / 'export' / 'vpl-test_vit'
    shutil.rmtree(folder)
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    fails(['export', run, '--overwrite', *out, *([folder.parent] if out else [])], capsys, 2, folder, 'not an export')
    assert {path.name: path.read_text() for path in folder.iterdir()} == files
