import subprocess
import sys
from pathlib import Path


def test_each_room_imports_only_from_those_after_it():
    # In a process of its own: it switches off loggers that exist.
    done = subprocess.run(
        [sys.executable, '-c', 'from importlinter.cli import lint_imports; raise SystemExit(lint_imports())'],
        cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
