"""What is known to fail is refused before the first epoch, most of it before the data are read."""
import shutil

import pytest
import timm
import torch
from hub import NOWHERE, use_hub
from huggingface_hub import constants
from runs import NOISE, PAIR, SMALL, differences, error_line, run, status_of

from timm_vpl.cli import train
from timm_vpl.core.methods import METHODS
from timm_vpl.engine.models import create_branch
from timm_vpl.options.train import parse_args
from timm_vpl.tools.export import ExportObserver


def test_a_file_of_which_no_weight_fits(digits_folder, tmp_path, capsys):
    state = timm.create_model('test_vit', num_classes=10).state_dict()
    torch.save({f'backbone.{key}': value for key, value in state.items()}, tmp_path / 'prefixed.pth')
    torch.save({key: state[key] for key in ('head.weight', 'head.bias')}, tmp_path / 'head.pth')
    for name in ('prefixed.pth', 'head.pth'):
        path = tmp_path / name
        line = error_line(capsys, digits_folder, *PAIR, *SMALL, '--pretrained-path-b', path, '--output', tmp_path)
        assert line == (
            f'--pretrained-path-b {path}: no weights fit test_vit: its keys are those of another model, or have a '
            f'prefix')
    torch.save({'cls_token': state['cls_token']}, tmp_path / 'part.pth')
    options = parse_args([
        '--dataset', 'digits', *PAIR, *SMALL, '--pretrained-path-b', str(tmp_path / 'part.pth')])
    model, drawn = (
        create_branch(each, 'b', {'input_size': (3, 32, 32)}, 10).state_dict()
        for each in (options, parse_args(['--dataset', 'digits', *PAIR, *SMALL])))
    assert [key for key in model if not torch.equal(model[key], drawn[key])] == ['cls_token']


def test_a_hub_out_of_reach_is_told_at_once(tmp_path, capsys, monkeypatch, caplog):
    use_hub(monkeypatch, NOWHERE, tmp_path)
    for options in (['--pretrained-a'], ['--model-a', 'hf-hub:org/name']):
        line = error_line(capsys, '--dataset', 'digits', *PAIR, *SMALL, *options)
        assert f'not in the cache of the Hub ({tmp_path}), and {NOWHERE} cannot be reached' in line
        assert 'Retrying' not in caplog.text
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        line = error_line(capsys, '--dataset', 'digits', *PAIR, *SMALL, *options)
        assert line.endswith(f'({tmp_path}), and HF_HUB_OFFLINE is set')
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)


def test_validation_is_tried_before_the_first_epoch(digits_folder, tmp_path, capsys, caplog):
    caplog.set_level('INFO')
    data = shutil.copytree(digits_folder, tmp_path / 'data')
    for path in (data / 'validation').rglob('*.png'):
        path.write_bytes(b'no image')
    argv = [data, *PAIR, *SMALL, '--output', tmp_path / 'output']
    assert status_of(train, argv) == 1
    assert 'Failed to load 10 consecutive samples' in capsys.readouterr().err
    assert 'Train:' not in caplog.text and not (tmp_path / 'output').exists()


def test_export_is_tried_before_the_first_epoch(digits_folder, tmp_path, capsys, caplog, monkeypatch):
    caplog.set_level('INFO')
    monkeypatch.setitem(METHODS, 'my own', METHODS['vpl'])  # no name of a folder
    argv = [digits_folder, *PAIR, *SMALL, '--method', 'my own', '--output', tmp_path / 'output']
    line = error_line(capsys, *argv, '--export')
    assert 'expected at most 96 letters' in line and line.endswith('; --no-export trains without an export')
    assert 'Train:' not in caplog.text and 'rises' not in caplog.text
    assert status_of(train, [*argv, '--epochs', '1', '--warmup-epochs', '1']) == 0 and 'Train:' in caplog.text
    assert '--warmup-epochs 1 of 1 epochs: the learning rate rises most of the time' in caplog.text


@pytest.mark.parametrize('workers', [pytest.param('0', marks=pytest.mark.slow), '2'])
def test_what_is_tried_changes_nothing(workers, digits_folder, tmp_path, monkeypatch):
    options = [*NOISE, '--mixup', '0.2', '--export', '--workers', workers, '--epochs', '1']
    folders = [run(digits_folder, tmp_path, *options, name='tried')]
    monkeypatch.setattr('timm_vpl.engine.train.try_validation', lambda run: None)
    monkeypatch.delattr(ExportObserver, 'start')
    folders.append(run(digits_folder, tmp_path, *options, name='not'))
    shutil.rmtree(folders[0] / 'export')
    shutil.rmtree(folders[1] / 'export')
    assert not differences(*folders)
