"""The examples run and learn."""
import re
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / 'examples'


def test_own_loop(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['own_loop.py', '--epochs', '2'])
    runpy.run_path(str(EXAMPLES / 'own_loop.py'), run_name='__main__')
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r'epoch (\d), stage (\d)', line).groups() for line in lines] == [('0', '1'), ('1', '2')]
    assert float(re.search(r'top-1 ([\d.]+) %', lines[-1])[1]) > 70  # the CNN; chance is 10 %
    assert len((EXAMPLES / 'own_loop.py').read_text().splitlines()) <= 60
