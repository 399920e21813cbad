"""Each wrong command line of training and each wrong recipe of refusals.yaml ends in the line that stands beside it."""
import logging
import os
import shlex
from pathlib import Path

import pytest
import yaml
from runs import PAIR, SMALL, error_line

from timm_vpl.options.train import parse_args

REFUSALS = yaml.safe_load(Path(__file__).with_suffix('.yaml').with_stem('refusals').read_text())
WORDS = {
    'A': PAIR[:2], 'B': PAIR[2:], 'PAIR': PAIR, 'DIGITS': ['--dataset', 'digits', *PAIR],
    'STUDENT': ['--model-b', 'deit_tiny_distilled_patch16_224', '--model-kwargs-b', 'depth=2', 'embed_dim=48',
                'num_heads=3']}


def words_of(text):
    return [word for each in shlex.split(text) for word in WORDS.get(each, [each])]


def assert_says(line, wanted):
    assert line == wanted if isinstance(wanted, str) else all(part in line for part in wanted), line


@pytest.mark.parametrize('words, wanted', [*REFUSALS['command lines'].items(), *REFUSALS['terms'].items()])
def test_command_lines(words, wanted, capsys, digits_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('timm_vpl.engine.optim.find_spec', lambda package: None)  # as where it is not installed
    Path('FILE').touch()
    Path('FOLDER').symlink_to(digits_folder)
    assert_says(error_line(capsys, *SMALL, '--output', 'output', *words_of(words)), wanted)
    assert sorted(os.listdir()) == ['FILE', 'FOLDER']


@pytest.mark.parametrize('words, warnings', REFUSALS['warnings'].items())
def test_warnings(words, warnings, caplog):
    with caplog.at_level(logging.WARNING, logger='timm_vpl'):
        parse_args(words_of(words))
    assert caplog.messages == warnings


@pytest.mark.parametrize('text, wanted', REFUSALS['recipes'])
def test_recipes(text, wanted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('recipe.yaml').write_text(text)
    line = error_line(capsys, *WORDS['DIGITS'], '-c', 'recipe.yaml', command=parse_args)
    assert line.startswith('recipe.yaml')
    assert_says(line.removeprefix('recipe.yaml'), wanted)
    assert os.listdir() == ['recipe.yaml']
