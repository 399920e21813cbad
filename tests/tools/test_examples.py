"""The examples run and learn."""
import csv
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

from timm_vpl import TERMS
from timm_vpl.engine.checkpoint import read_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / 'examples'


def test_own_loop(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['own_loop.py', '--epochs', '2'])
    runpy.run_path(str(EXAMPLES / 'own_loop.py'), run_name='__main__')
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r'epoch (\d), stage (\d)', line).groups() for line in lines] == [('0', '1'), ('1', '2')]
    assert float(re.search(r'top-1 ([\d.]+) %', lines[-1])[1]) > 70  # the CNN; chance is 10 %
    assert len((EXAMPLES / 'own_loop.py').read_text().splitlines()) <= 75


def test_own_method(monkeypatch, tmp_path):
    terms = dict(TERMS)
    try:
        monkeypatch.setattr(sys, 'argv', [
            'own_method.py', '--config', 'quickstart', '--method', 'pair', '--term',
            'similarity,learner=b,width=32,weight=100,end=50', '--epochs', '2', '--stop-epoch', '1', '--no-export',
            '--batch-size', '128', '--output', str(tmp_path), '--experiment', 'run'])
        try:
            runpy.run_path(str(EXAMPLES / 'own_method.py'), run_name='__main__')
        except SystemExit as e:
            assert e.code == 0
    finally:
        TERMS.clear()
        TERMS.update(terms)
    with open(tmp_path / 'run' / 'summary.csv', newline='') as f:
        [row] = csv.DictReader(f)
    assert float(row['train_similarity_b_loss']) > 0 and 'train_kl_loss' not in row
    state = read_checkpoint(str(tmp_path / 'run' / 'last.pth.tar'))['task_state']['criterion']
    assert state['functions.similarity_b_loss.projection.weight'].shape[0] == 32


@pytest.mark.slow
def test_notebook(monkeypatch, tmp_path):
    nbclient = pytest.importorskip('nbclient', reason="no nbclient: pip install -e '.[test-all]'")
    import nbformat
    monkeypatch.setenv('PATH', os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))
    notebook = nbformat.read(EXAMPLES / 'quickstart.ipynb', as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={'metadata': {'path': str(tmp_path)}}).execute()
    printed = [output.text for cell in notebook.cells for output in cell.get('outputs', []) if 'text' in output]
    assert 'label 2, predicted' in printed[-1] and 'vpl-test_resnet' in ''.join(printed)
    assert (tmp_path / 'exported' / 'vpl-test_vit' / 'model.safetensors').is_file()
