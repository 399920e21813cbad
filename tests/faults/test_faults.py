"""Real runs that are killed, cut off and starved: the scripts of this folder, a case a test.

Most have the marker `faults` and run with `pytest -m faults -n 0`.
"""
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='kills processes as Linux has them')

FOLDER = Path(__file__).resolve().parent


def run(folder: Path, script: str, *args: str, seconds: float = 600) -> None:
    """Run a script of this folder and check that it ends well."""
    log = folder / 'output.txt'
    with open(log, 'wb') as stream:
        process = subprocess.Popen(
            [sys.executable, str(FOLDER / script), *args],
            stdout=stream,
            stderr=stream,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'TMPDIR': str(folder)},
            start_new_session=True,
        )
    try:
        end = process.wait(seconds)
    except subprocess.TimeoutExpired:
        end = f'none within {seconds} s'
    finally:
        for pid in _started_by(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    if end != 0:
        pytest.fail(f'{script} {" ".join(args)}: {end}\n{log.read_text()[-8000:]}', pytrace=False)


def _started_by(session: int) -> list[int]:
    """Return the ids of all processes of a session, those in groups of their own too."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):  # it has ended by now
            if int(path.read_text().rpartition(')')[2].split()[3]) == session:
                found.append(int(path.parent.name))
    return found


@functools.cache
def missing(*commands: str) -> str:
    """Return why commands can't be run in namespaces of their own, '' if they can."""
    if not commands:
        return ''
    if shutil.which('unshare') is None:
        return 'no command unshare'
    if os.geteuid() != 0:
        return 'only root may mount'
    done = subprocess.run(
        ['unshare', '--mount', '--pid', '--fork', '--mount-proc', 'sh', '-e', '-c', '\n'.join(commands)],
        capture_output=True, text=True)
    return done.stderr.strip()


NEEDS = {
    'disk': ['mount -t tmpfs tmpfs /mnt'],
    'nodes': [
        'mkdir -p /run/netns', 'mount -t tmpfs tmpfs /run/netns', 'ip netns add one', 'ip netns add two',
        'ip link add cable netns one type veth peer name cable netns two'],
}
CASES = {
    'signals': ['stopped', 'stopped_together', 'second_signal', 'hanging'],
    'disk': ['full', 'full_later', 'full_for_a_while', 'stopped_while_full', 'removed', 'read_only', 'truncated'],
    'nodes': ['late', 'killed', 'cut_off', 'uneven', 'stopped', 'restarted'],
}


@pytest.mark.parametrize('script, case', [
    ('signals', 'lost'),
    *(pytest.param(script, case, marks=pytest.mark.faults) for script, cases in CASES.items() for case in cases)])
def test_case(script, case, tmp_path):
    if reason := missing(*NEEDS.get(script, [])):
        pytest.skip(f'{script}.py can not run here: {reason}')
    run(tmp_path, f'{script}.py', case, str(tmp_path / 'runs'))


@pytest.mark.parametrize('args', [
    ['--kills', '2', '--methods', 'vpl', '--processes', '1'],
    pytest.param(['--kills', '2', '--methods', 'dml', '--processes', '2', '3'], marks=pytest.mark.faults),
], ids=['vpl', 'dml'])
def test_kill(args, tmp_path):
    run(tmp_path, 'kill.py', *args)


@pytest.mark.faults
def test_hundred_kills(tmp_path):
    run(tmp_path, 'kill.py', '--kills', '100', seconds=3600)
