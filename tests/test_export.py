"""Exported branches: plain timm models, equal to the branch to the bit, with a card; and what is refused."""
import argparse
import csv
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
from safetensors.torch import load_file

from timm_vpl.cli import main, train
from timm_vpl.core.task import PairTask
from timm_vpl.engine import build
from timm_vpl.engine.checkpoint import PairCheckpointSaver, read_checkpoint
from timm_vpl.engine.trained import branch_config, load_branches
from timm_vpl.options.options import parse_args, recipe_values

OPTIONS = [
    '--model-a', 'test_resnet', '--model-b', 'test_vit', '--img-size', '32', '-b', '8', '--epochs', '2',
    '--warmup-epochs', '0', '--lr', '0.002', '--workers', '0', '--device', 'cpu', '--model-ema-decay', '0.5',
    '--mean', '0.4', '0.5', '0.6', '--std', '0.2', '--crop-pct', '0.9', '--interpolation', 'bilinear', '--seed', '3',
    '--drop-path', '0.1', '--hang-timeout', '99', '--recovery-minutes', '9', '--nonfinite-limit', '7']

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


@pytest.fixture(scope='module')
def run_dir(digits_folder, tmp_path_factory):
    """The folder of a short training run, exported at its end."""
    output = tmp_path_factory.mktemp('runs')
    assert train([str(digits_folder), *OPTIONS, '--output', str(output), '--experiment', 'run']) == 0
    return output / 'run'


def reload_elsewhere(jobs, tmp_path):
    """Return each folder's logits on its images, computed where timm_vpl can not be imported."""
    file = tmp_path / 'jobs.pt'
    torch.save(jobs, file)
    result = subprocess.run([sys.executable, '-c', RELOAD, str(file)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return torch.load(file)


def rows(folder):
    with open(folder / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))


def fails(argv, capsys, status, *words):
    """Check that a command ends with this status and one line that has these words."""
    capsys.readouterr()
    assert main([str(arg) for arg in argv]) == status
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
    logits = reload_elsewhere(dict.fromkeys(folders, images), tmp_path)
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
        assert set(load_file(os.path.join(folder, 'model.safetensors'))) == set(model.state_dict())
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


def test_other_classes_of_a_pretrained_branch_are_told(run_dir, digits_folder, tmp_path, caplog):
    data = shutil.copytree(digits_folder, tmp_path / 'data')
    for split in ('train', 'validation'):
        (data / split / 'class1').rename(data / split / 'zebra')
    model = f'local-dir:{run_dir / "export" / "vpl-test_vit"}'
    options = ['--method', 'solo', *OPTIONS[4:], '--model-b', model, '--epochs', '1', '--no-export', '--output',
               str(tmp_path)]
    assert train([str(digits_folder), *options, '--pretrained']) == 0 and 'knows other classes' not in caplog.text
    assert train([str(data), *options]) == 0 and 'knows other classes' not in caplog.text
    assert train([str(data), *options, '--pretrained']) == 0
    assert "its classifier knows other classes, class 1 is 'class1' to it and 'class2' in the data;" in caplog.text


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
    assert 'Partner in training: `test_resnet`' in card.text and 'crop_pct: 0.9' in card.text
    assert str(run_dir.parent) not in card.content and 'data_dir' not in card.content and 'seed: 3' in card.text
    for how in ('hang_timeout', 'recovery_minutes', 'nonfinite_limit', 'workers', 'device', 'experiment'):
        assert f'{how}:' not in card.text


def test_card_takes_later_measurements(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / 'run')
    epoch = read_checkpoint(str(run / 'best_b.pth.tar'))['epoch']
    part = '0.9,bilinear,/data/val'
    lines = [
        'branch,epoch,weights,set,images,top1,top5,img_size,crop_pct,interpolation,data',
        f'b,{epoch},ema,real,46837,61.5,88.25,32,{part}', f'b,{epoch + 7},ema,v2,9,1,2,32,{part}',
        f'a,{epoch},ema,v2,9,3,4,32,{part}', f'b,{epoch},ema,v2,9,3,4,48,{part}',
        f'b,{epoch},ema,v2,9,3,4,32,1.0,bilinear,/data/val', f'b,{epoch},ema,test,50,62.5,89,32,{part}',
        f'b,{epoch},ema,v2,9,,,32,{part}', f'b,{epoch},raw,v2,9,nan,nan,32,{part}',
    ]
    (run / 'validation.csv').write_text('\n'.join(lines) + '\n')
    assert main(['export', str(run), '--branch', 'b', '--license', 'mit']) == 0
    card = ModelCard.load(run / 'export' / 'vpl-test_vit' / 'README.md')
    assert '| ReaL labels, 46837 images of val | ema | 61.500 | 88.250 |' in card.text and 'V2' not in card.text
    assert '| test, 50 images of val | ema | 62.500 | 89.000 |' in card.text
    assert card.data.license == 'mit' and len(card.data.eval_results) == 6
    model = timm.create_model(f'local-dir:{run / "export" / "vpl-test_vit"}')
    assert model.pretrained_cfg['license'] == 'mit'


def test_weights_that_were_evaluated_are_exported(digits_folder, tmp_path):
    # With --model-ema-force-cpu timm, too, evaluates the raw weights alone: best epochs are theirs.
    options = [*OPTIONS, '--model-ema-force-cpu', '--output', str(tmp_path), '--experiment', 'run']
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
    args = parse_args(['--dataset', 'digits', '--batch-size', '2', *options])
    args.world_size, args.distributed = 1, False
    args.num_classes = args.num_classes or 7
    configs = build.resolve_data(args)
    pair = build.create_pair(args, configs, torch.device('cpu'))
    generator = torch.Generator().manual_seed(0)
    for name, buffer in pair.named_buffers():
        if 'running_' in name:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    task = PairTask(pair, build.create_criterion(args, 2, torch.device('cpu')), verbose=False)
    task.setup_ema(decay=0.5)
    pair.averaged = [task.get_trainable_module(ema=True).module]  # a list: not part of the pair
    with torch.no_grad():
        for parameter in pair.averaged[0].parameters():
            parameter.mul_(0.9)
    saver = PairCheckpointSaver(
        task,
        build.create_optimizer(args, pair, build.learning_rates(args)),
        recipe_values(args),
        {side: branch_config(pair.branch(side), configs[side], None) for side in pair.sides},
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save(0, {}, metric=1., branch_metrics=dict.fromkeys(pair.sides, 1.))
    return pair, configs, str(folder / 'last.pth.tar')


SMALL_SWIN = ['embed_dim=24', 'depths=(1,1,2,1)', 'num_heads=(1,2,2,2)']
FAMILIES = [
    (['resnet10t', 'vit_tiny_patch16_224'], ['--img-size', '64', '--in-chans', '1']),
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


@pytest.mark.parametrize('count', [
    pytest.param(2, id='some'), pytest.param(len(FAMILIES), id='all', marks=pytest.mark.slow)])
def test_families(tmp_path, count):
    jobs, expected = {}, {}
    for i, (models, options) in enumerate(FAMILIES[:count]):
        (tmp_path / str(i)).mkdir()
        pair, configs, checkpoint = save_pair(
            tmp_path / str(i), '--model-a', models[0], '--model-b', models[1], *options)
        assert main(['export', checkpoint]) == 0
        assert main(['export', checkpoint, '--no-ema', '--out', str(tmp_path / str(i) / 'raw')]) == 0
        for side, name in zip('ab', models, strict=True):
            images = torch.randn(2, *configs[side]['input_size'], generator=torch.Generator().manual_seed(i))
            for place, trained in (('export', pair.averaged[0]), ('raw', pair)):
                folder = str(tmp_path / str(i) / place / f'vpl-{name}')
                jobs[folder] = images
                with torch.inference_mode():
                    expected[folder] = trained.branch(side).eval()(images)
                # With equal logits, the very preprocessing of validation gives the very accuracy.
                config = timm.data.resolve_model_data_config(timm.create_model(f'local-dir:{folder}'))
                for key, value in configs[side].items():
                    assert (tuple(config[key]) if isinstance(config[key], list) else config[key]) == value, key
    logits = reload_elsewhere(jobs, tmp_path)
    assert len(logits) == 4 * count
    for folder in jobs:
        assert torch.equal(logits[folder], expected[folder]), folder


def test_two_branches_of_one_architecture(tmp_path):
    _, _, checkpoint = save_pair(tmp_path, '--model-a', 'test_vit', '--model-b', 'test_vit', '--img-size', '32')
    assert main(['export', checkpoint, '--name-b', 'twin']) == 0
    assert sorted(os.listdir(tmp_path / 'export')) == ['twin', 'vpl-test_vit-a']


def test_weights_that_do_not_say_what_they_belong_to(run_dir, tmp_path, capsys):
    checkpoint = read_checkpoint(str(run_dir / 'best_a.pth.tar'))
    average = tmp_path / 'averaged.pth'  # as timm's avg_checkpoints.py and clean_checkpoint.py write it
    torch.save(checkpoint['state_dict_ema'], average)
    fails(['export', average], capsys, 2, average, '--model-a', '--num-classes')
    fails(['export', average, '--model-a', 'test_resnet'], capsys, 2, '--num-classes')
    fails(['export', average, '--model-a', 'test_resnet', '--num-classes', '5'], capsys, 1, average, 'test_resnet')
    fails(['export', average, '--model-b', 'test_vitt', '--num-classes', '4'], capsys, 2, 'test_vitt', 'test_vit')
    names = tmp_path / 'classes.txt'
    names.write_text('zero\none\ntwo\nthree\n')
    input_options = ['--img-size', '32', '--mean', '0.4', '0.5', '0.6', '--std', '0.2', '0.2', '0.2', '--crop-pct',
                     '0.9', '--interpolation', 'bilinear']
    assert main(['export', str(average), '--model-a', 'test_resnet', '--model-b', 'test_vit', '--class-map',
                 str(names), *input_options]) == 0
    for name in ('test_resnet', 'test_vit'):
        ours = timm.create_model(f'local-dir:{tmp_path / "export" / name}', pretrained=True)
        whole = timm.create_model(f'local-dir:{run_dir / "export" / f"vpl-{name}"}', pretrained=True)
        assert timm.data.resolve_model_data_config(ours) == timm.data.resolve_model_data_config(whole)
        assert ours.pretrained_cfg['label_names'] == ['zero', 'one', 'two', 'three']
        if name == 'test_resnet':
            assert all(map(torch.equal, ours.state_dict().values(), whole.state_dict().values()))


def test_killed_run(run_dir, tmp_path, capsys):
    killed = tmp_path / 'killed'
    killed.mkdir()
    fails(['export', killed], capsys, 2, killed, 'no checkpoint')
    shutil.copy(run_dir / 'last.pth.tar', killed / 'recovery-0-7.pth.tar')
    (killed / 'tmp.pth.tar').write_bytes(b'')
    assert main(['export', str(killed)]) == 0
    assert len(os.listdir(killed / 'export')) == 2


def test_bad_checkpoints_are_refused(run_dir, tmp_path, capsys):
    whole = (run_dir / 'last.pth.tar').read_bytes()
    truncated = tmp_path / 'truncated.pth.tar'
    truncated.write_bytes(whole[:len(whole) // 2])
    fails(['export', truncated], capsys, 1, truncated, 'truncated')

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / 'ran'),))

    bomb = tmp_path / 'bomb.pth.tar'
    torch.save({'state_dict': {}, 'args': Bomb()}, bomb)
    fails(['export', bomb], capsys, 1, bomb, 'refused')
    with open(tmp_path / 'pickle.pth.tar', 'wb') as f:
        pickle.dump({'state_dict': Bomb()}, f)
    fails(['export', tmp_path / 'pickle.pth.tar'], capsys, 1, 'pickle.pth.tar')
    torch.save({'state_dict': {}, 'args': Path('x')}, bomb)
    fails(['export', bomb], capsys, 1, bomb, 'refused')
    assert not (tmp_path / 'ran').exists()

    # The one class that is allowed: timm's saver stores its options as a Namespace.
    checkpoint = read_checkpoint(str(run_dir / 'last.pth.tar'))
    torch.save({**checkpoint, 'extra': argparse.Namespace(model='x')}, tmp_path / 'timm.pth.tar')
    assert len(load_branches(str(tmp_path / 'timm.pth.tar'))) == 2


def test_usage_errors(run_dir, tmp_path, capsys):
    fails(['export', tmp_path / 'none'], capsys, 2, tmp_path / 'none')
    out = tmp_path / 'out'
    assert main(['export', str(run_dir), '--branch', 'a', '--out', str(out)]) == 0
    before = (out / 'vpl-test_resnet' / 'model.safetensors').stat().st_mtime_ns
    fails(['export', run_dir, '--out', out], capsys, 2, out, '--overwrite')
    assert (out / 'vpl-test_resnet' / 'model.safetensors').stat().st_mtime_ns == before
    assert not (out / 'vpl-test_vit').exists()
    assert main(['export', str(run_dir), '--out', str(out), '--overwrite']) == 0
    assert sorted(os.listdir(out)) == ['vpl-test_resnet', 'vpl-test_vit']
    fails(['export', run_dir, '--branch', 'c'], capsys, 2, '--branch')
    fails(['export', run_dir, '--name-a', 'x', '--name-b', 'x'], capsys, 2, '--name-a')
    fails(['export', run_dir, '--push-to', 'or g'], capsys, 2, '--push-to', 'or g')
    fails(['export', run_dir, '--push-to', 'org', '--name-a', 'bad--name'], capsys, 2, 'bad--name')
    checkpoint = read_checkpoint(str(run_dir / 'last.pth.tar'))
    del checkpoint['state_dict_ema']
    torch.save(checkpoint, tmp_path / 'no_ema.pth.tar')
    fails(['export', tmp_path / 'no_ema.pth.tar', '--ema'], capsys, 2, '--ema', 'no averaged weights')


def test_distillation_head_leaves_no_trace(tmp_path):
    _, _, checkpoint = save_pair(
        tmp_path, '--model-a', 'test_resnet', '--model-b', 'deit_tiny_distilled_patch16_224', '--img-size', '32',
        '--model-kwargs-b', 'depth=1')
    assert main(['export', checkpoint, '--branch', 'b']) == 0
    model = timm.create_model(
        f'local-dir:{tmp_path / "export" / "vpl-deit_tiny_distilled_patch16_224"}', pretrained=True).train()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_onnx(run_dir, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
    pytest.importorskip('onnxscript', reason='the extra onnx is not installed')
    assert main(['export', str(run_dir), '--out', str(tmp_path), '--onnx']) == 0
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for name in ('vpl-test_resnet', 'vpl-test_vit'):
        session = onnxruntime.InferenceSession(str(tmp_path / name / 'model.onnx'))
        logits = torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
        model = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).eval()
        with torch.inference_mode():
            torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-4)


def test_onnx_without_its_packages(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    fails(['export', run_dir, '--out', tmp_path / 'out', '--onnx'], capsys, 2, '--onnx', 'timm-vpl[onnx]')
    assert not any((tmp_path / 'out').iterdir())


def test_names_stay_inside_the_folder(run_dir, tmp_path, capsys):
    keep = tmp_path / 'keep'
    keep.mkdir()
    (keep / 'file').write_text('mine')
    for name in ('../keep', '.', '..', str(keep), 'a/b', 'a b', ''):
        argv = ['export', run_dir, '--branch', 'a', '--out', tmp_path / 'out', '--overwrite']
        if name:
            fails([*argv, '--name-a', name], capsys, 2, '--name-a')
        checkpoint = read_checkpoint(str(run_dir / 'best_a.pth.tar'))
        checkpoint['args']['method'] = '../../keep'
    torch.save(checkpoint, tmp_path / 'hostile.pth.tar')
    fails(['export', tmp_path / 'hostile.pth.tar'], capsys, 2, '../../keep')
    assert (keep / 'file').read_text() == 'mine'


def test_what_a_user_added_to_an_export_is_kept(run_dir, tmp_path, capsys):
    run = shutil.copytree(run_dir, tmp_path / 'run')
    assert main(['export', str(run)]) == 0  # as the run left them: made anew
    card = run / 'export' / 'vpl-test_vit' / 'README.md'
    card.write_text(card.read_text().replace('# vpl-test_vit', '# My model'))
    fails(['export', run], capsys, 2, 'vpl-test_vit exists', '--overwrite')
    assert '# My model' in card.read_text()
    assert main(['export', str(run), '--branch', 'a']) == 0
    (run / 'export' / 'vpl-test_resnet' / 'notes.txt').write_text('mine')
    fails(['export', run, '--branch', 'a'], capsys, 2, '--overwrite')
    assert main(['export', str(run), '--overwrite']) == 0 and '# My model' not in card.read_text()


@pytest.mark.parametrize('files', [
    {}, {'thesis.tex': 'mine'}, {'config.json': '{}', 'model.safetensors': ''},
    {'README.md': '# Mine', 'config.json': '{}', 'model.safetensors': ''}], ids=len)
@pytest.mark.parametrize('out', [[], ['--out']], ids=len)
def test_only_exports_are_replaced(run_dir, tmp_path, capsys, files, out):
    run = shutil.copytree(run_dir, tmp_path / 'run')
    folder = run / 'export' / 'vpl-test_vit'
    shutil.rmtree(folder)
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    fails(['export', run, '--overwrite', *out, *([folder.parent] if out else [])], capsys, 2, folder, 'not an export')
    assert {path.name: path.read_text() for path in folder.iterdir()} == files


def test_branch_of_a_twin_keeps_its_side_in_the_name(tmp_path):
    _, _, checkpoint = save_pair(tmp_path, '--model-a', 'test_vit', '--model-b', 'test_vit', '--img-size', '32')
    for side in 'ab':
        assert main(['export', checkpoint, '--branch', side]) == 0
    assert sorted(os.listdir(tmp_path / 'export')) == ['vpl-test_vit-a', 'vpl-test_vit-b']


def test_branch_that_is_not_there(tmp_path, capsys):
    _, _, checkpoint = save_pair(tmp_path, '--method', 'solo', '--model-a', 'test_resnet', '--img-size', '32')
    fails(['export', checkpoint, '--branch', 'b'], capsys, 2, 'has no branch b')
    fails(['export', tmp_path, '--branch', 'b'], capsys, 2, 'has no branch b')


def test_checkpoint_of_timms_own_saver(tmp_path, run_dir):
    """A pair trained in a loop of one's own: timm's saver, a Namespace of its options, no word on the models."""
    checkpoint = read_checkpoint(str(run_dir / 'last.pth.tar'))
    for key in ('branches', 'metrics', 'timm_vpl_version'):
        del checkpoint[key]
    state = {f'module.{key}': value for key, value in checkpoint['state_dict'].items()}
    torch.save({**checkpoint, 'state_dict': state, 'args': argparse.Namespace(model='x')}, tmp_path / 'timm.pth.tar')
    argv = ['export', str(tmp_path / 'timm.pth.tar'), '--model-a', 'test_resnet', '--num-classes', '4', '--no-ema',
            '--img-size', '32']
    assert main(argv) == 0
    model = timm.create_model(f'local-dir:{tmp_path / "export" / "test_resnet"}', pretrained=True)
    assert all(torch.equal(value, checkpoint['state_dict'][f'model_a.{key}'])
               for key, value in model.state_dict().items())


@pytest.mark.parametrize('change', [
    {'branches': ['a']}, {'branches': {'a': 'test_resnet', 'b': 'x'}}, {'state_dict': {1: torch.zeros(1)}},
    {'state_dict': {'model_a.x': 'text'}}, {'state_dict_ema': None}, {'branches': {'a': {'architecture': 3}}},
    {'branches': {'a': {'architecture': '../x', 'pretrained_cfg': {}}}},
], ids=str)
def test_malformed_checkpoints(run_dir, tmp_path, capsys, change):
    torch.save({**read_checkpoint(str(run_dir / 'last.pth.tar')), **change}, tmp_path / 'odd.pth.tar')
    capsys.readouterr()
    assert main(['export', str(tmp_path / 'odd.pth.tar')]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and str(tmp_path / 'odd.pth.tar') in error, error


@pytest.mark.parametrize('name', ['args.yaml', 'summary.csv', 'export/vpl-test_vit/README.md'])
def test_files_that_are_no_checkpoint(run_dir, capsys, name):
    fails(['export', run_dir / name], capsys, 1, run_dir / name)


def test_class_map_gives_each_class_its_index(tmp_path, run_dir, capsys):
    average = tmp_path / 'averaged.pth'
    torch.save(read_checkpoint(str(run_dir / 'best_a.pth.tar'))['state_dict_ema'], average)
    names = tmp_path / 'classes.txt'
    names.write_text('zero\none\ntwo\nthree\nfour\n')
    argv = ['export', average, '--model-a', 'test_resnet', '--class-map', names]
    fails([*argv, '--num-classes', '4'], capsys, 2, '--num-classes 4', '5 classes')
    bomb = tmp_path / 'bomb.pkl'
    bomb.write_bytes(b'cos\nsystem\n(S"true"\ntR.')
    fails([*argv[:4], '--class-map', bomb], capsys, 2, bomb)
