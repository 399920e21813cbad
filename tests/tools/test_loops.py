"""The pair and its loss in a plain loop, Lightning and accelerate: the real packages, one process and two."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node']


@pytest.mark.slow
@pytest.mark.parametrize(('package', 'processes'), [
    ('own', 2), ('lightning', 1), ('lightning', 2), ('accelerate', 1), ('accelerate', 2)])
def test_loop(package, processes, tmp_path):
    if package != 'own':  # plain torch
        pytest.importorskip(package, reason=f"no {package}: pip install -e '.[test-all]'")
    command = [str(ROOT / 'examples' / f'{package}_loop.py'), '--epochs', '5']
    if processes > 1:
        command = [*command, '--devices', '2'] if package == 'lightning' else [*TORCHRUN, str(processes), *command]
    result = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=900,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''})
    lines = re.findall(
        r'^epoch (\d), stage (\d): top-1 ([\d.]+) % / ([\d.]+) %, (\d) process', result.stdout, re.MULTILINE)
    assert [line[:2] for line in lines] == list(zip('01234', '12223', strict=True)), result.stderr[-3000:]
    assert all(int(line[4]) == processes for line in lines)
    assert float(lines[-1][2]) > 70 and float(lines[-1][3]) > 20  # chance is 10 %
