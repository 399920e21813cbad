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
    'signals': ['stopped', 'stopped_together', 'second_signal', 'hanging', 'stalled', 'stalled_together',
                'stalled_apart'],
    'disk': ['full', 'full_later', 'full_for_a_while', 'stopped_while_full', 'removed', 'read_only', 'truncated'],
    'nodes': ['late', 'killed', 'cut_off', 'uneven', 'mistaken', 'stopped', 'restarted'],
}


FAILURES = [
    'usage', 'usage-of-first', 'usage-of-all', 'missing', 'other-data', 'memory', 'worker', 'data', 'validation',
    'code', 'export', 'lost']


@pytest.mark.parametrize('script, case', [
    (script, case) for script, cases in CASES.items() for case in cases])
@pytest.mark.faults
def test_case(script, case, tmp_path):
    if reason := missing(*NEEDS.get(script, [])):
        pytest.skip(f'{script}.py cannot run here: {reason}')
    run(tmp_path, f'{script}.py', case, str(tmp_path / 'runs'))


@pytest.mark.parametrize('case, processes', [
    ('code', '2'), *(pytest.param(case, processes, marks=pytest.mark.faults) for processes in ('2', '3', 'nodes')
                     for case in FAILURES)])
def test_one_of_several_fails(case, processes, tmp_path):
    if processes == 'nodes' and (reason := missing(*NEEDS['nodes'])):
        pytest.skip(f'failures.py cannot run here: {reason}')
    run(tmp_path, 'failures.py', case, processes, str(tmp_path / 'runs'))


@pytest.mark.parametrize('args', [
    ['--only', '0', '--each', '2', '--faults', '2'],
    pytest.param(['--only', '4', '--each', '3', '--faults', '3'], marks=pytest.mark.faults),
], ids=['1 process', '2 processes'])
def test_kill(args, tmp_path):
    run(tmp_path, 'kill.py', *args)


@pytest.mark.faults
def test_hundred_and_twenty_faults(tmp_path):
    run(tmp_path, 'kill.py', '--faults', '120', seconds=7200)
