"""The rooms of the package keep apart, and its public names have types."""
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_public_names_have_types_for_a_checker_of_the_users(tmp_path):
    (tmp_path / 'user.py').write_text(
        'from timm_vpl import METHODS, VPLLoss\nreveal_type(VPLLoss(1).stage())\nreveal_type(METHODS["vpl"].models)\n')
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--follow-imports=silent', '--ignore-missing-imports', tmp_path / 'user.py'],
        cwd=Path(__file__).parents[1], capture_output=True, text=True)
    revealed = re.findall('Revealed type is "(.*)"', done.stdout.replace('builtins.', ''))
    assert revealed == ['int', 'tuple[int, ...]'], done.stdout


def test_each_room_imports_only_from_those_after_it():
    # In a process of its own: it switches off loggers that exist.
    done = subprocess.run(
        [sys.executable, '-c', 'from importlinter.cli import lint_imports; raise SystemExit(lint_imports())'],
        cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
