"""The command lines and recipes of command_lines.yaml: refused with the line that stands there, warned of, or taken."""
import logging
import os
import shlex
from pathlib import Path

import pytest
import yaml
from runs import PAIR, SMALL, error_line

from timm_vpl.options.train import changed_options, parse_args, recipe_values

TABLE = yaml.safe_load(Path(__file__).with_name('command_lines.yaml').read_text())
WORDS = {
    'A': PAIR[:2], 'B': PAIR[2:], 'PAIR': PAIR, 'DIGITS': ['--dataset', 'digits', *PAIR],
    'STUDENT': ['--model-b', 'deit_tiny_distilled_patch16_224', '--model-kwargs-b', 'depth=2', 'embed_dim=48',
                'num_heads=3']}
FILES = ['FILE', 'FILE.tar', 'FOLDER']


@pytest.fixture(autouse=True)
def here(digits_folder, tmp_path, monkeypatch):
    """A current folder with the files that the command lines name."""
    monkeypatch.chdir(tmp_path)
    for name in FILES[:2]:
        Path(name).touch()
    Path('FOLDER').symlink_to(digits_folder)


def words_of(text):
    return [word for each in shlex.split(text) for word in WORDS.get(each, [each])]


def assert_says(line, wanted):
    assert line == wanted if isinstance(wanted, str) else all(part in line for part in wanted), line


@pytest.mark.parametrize('words, wanted', [*TABLE['command lines'].items(), *TABLE['terms'].items()])
def test_refused_before_anything_is_written(words, wanted, capsys, monkeypatch):
    monkeypatch.setattr('timm_vpl.engine.optim.find_spec', lambda package: None)  # as where it is not installed
    assert_says(error_line(capsys, *SMALL, '--output', 'output', *words_of(words)), wanted)
    assert sorted(os.listdir()) == FILES


@pytest.mark.parametrize('words, warnings', TABLE['warnings'].items())
def test_warnings(words, warnings, caplog):
    with caplog.at_level(logging.WARNING, logger='timm_vpl'):
        parse_args(words_of(words))
    assert caplog.messages == warnings


@pytest.mark.parametrize('case', [
    pytest.param(case, id=f'{claim} ({i})') for claim, cases in TABLE['taken'].items() for i, case in enumerate(cases)])
def test_taken(case):
    argv = words_of(case['words'])
    if 'recipe' in case:
        Path('recipe.yaml').write_text(case['recipe'])
        argv += ['-c', 'recipe.yaml']
    options = parse_args(argv)
    found = {**options.flat(), 'sides': options.sides}
    assert {name: list(found[name]) if isinstance(found[name], tuple) else found[name] for name in case['gives']} == (
        case['gives'])
    Path('again.yaml').write_text(yaml.safe_dump(recipe_values(options)))
    again = parse_args(['-c', 'again.yaml'])
    assert {**again.flat(), 'config': options.run.config} == options.flat() and again.sides == options.sides


@pytest.mark.parametrize('then, now, fixed, others', TABLE['changed'])
def test_changed(then, now, fixed, others):
    values = [recipe_values(parse_args(words_of(words))) for words in (then, now)]
    assert changed_options(*values) == (fixed, others)


@pytest.mark.parametrize('text, wanted', TABLE['recipes'])
def test_refused_recipes(text, wanted, capsys):
    Path('recipe.yaml').write_text(text)
    line = error_line(capsys, *WORDS['DIGITS'], '-c', 'recipe.yaml', command=parse_args)
    assert line.startswith('recipe.yaml')
    assert_says(line.removeprefix('recipe.yaml'), wanted)
    assert sorted(os.listdir()) == [*FILES, 'recipe.yaml']
