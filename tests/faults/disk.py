"""Disks that are full, gone or read-only, against real runs; `python tests/faults/disk.py CASE FOLDER`, as root.

Each case is a function that raises if a run does not end as it should. The script has namespaces of its own for mounts
and processes: whatever becomes of it, none of either is left.
"""
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kill import check_equal, kill, wait  # noqa: E402
from signals import Live, alone  # noqa: E402

NOT_SAVED = r'Not saved: {}: {}; the run continues, older checkpoints are kept\n'
WHOLE = ['last.pth.tar', 'best_a.pth.tar', 'best_b.pth.tar']


def isolate() -> None:
    """Start this script again in namespaces of its own, which end with it."""
    if os.environ.get('TIMM_VPL_ISOLATED') != '1':
        os.environ['TIMM_VPL_ISOLATED'] = '1'
        command = ['unshare', '--mount', '--pid', '--fork', '--kill-child', '--mount-proc', sys.executable, *sys.argv]
        os.execvp(command[0], command)


def mount(folder: Path, *options) -> bool:
    """Mount a disk in memory, or change its options; return whether that went well."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', str(folder)], capture_output=True, text=True)
    if done.returncode and 'busy' not in done.stderr:  # a file is being written
        raise SystemExit(done.stderr)
    return done.returncode == 0


def _on_disk(scenario, *options):
    """Let the runs of a scenario write to a disk of their own, and return its folder."""
    disk = scenario.folder / 'disk'
    mount(disk, *options)
    scenario.options = ['--output', str(disk)]
    return disk


def _small_disk(folder, files=3.5):
    """Return a scenario and its disk, which has room for so many checkpoints; the run `alone` is elsewhere.

    Two recovery checkpoints and one that is being written fit into the first epoch, `last` comes on top.
    """
    options = ['--checkpoint-hist', '1']
    scenario = alone(folder, options=options)
    disk = _on_disk(scenario, f'size={int(files * (folder / "alone" / "last.pth.tar").stat().st_size)}')
    scenario.options += options
    return scenario, disk


def _not_saved(run, cause) -> bool:
    """Return whether saves failed for this cause, more than once or twice."""
    return len(re.findall(NOT_SAVED.format(r'\S+', cause), run.text)) > 2


def check_files(folder: Path, names=()) -> None:
    """End this process if a checkpoint of a folder can't be read, a file is missing or one is left over."""
    pid = os.fork()  # this process must not start threads
    if pid == 0:
        status = 1
        try:
            from timm_vpl.engine.checkpoint import read_checkpoint
            for path in folder.glob('*.pth.tar'):
                read_checkpoint(str(path))
            found = {path.name for path in folder.iterdir()}
            status = int(any('tmp' in name for name in found) or not found >= set(names))
            print(sorted(found), flush=True)
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f'{folder} is not as it should be, see above')


def check_end(folder: Path, other: Path) -> None:
    """End this process if two runs ended with another state, whatever else they have kept."""
    check_equal(folder, other, r'summary|last.pth.tar: (?!saver)')


def full(folder, files=3.5):
    """The disk is full from the second epoch on: the run ends with status 1; on a larger disk it goes on exactly."""
    scenario, disk = _small_disk(folder, files)
    run = Live(scenario)
    text = run.ends(1)
    run.check('the disk may become full' in text and _not_saved(run, 'No space left on device'))
    run.check(text.endswith(f'error: --output {disk / "run"}: the last epoch could not be saved, see above\n'))
    check_files(disk / 'run', ['last.pth.tar', 'summary.csv'])
    run.check(len((disk / 'run' / 'summary.csv').read_text().splitlines()) == 3)
    mount(disk, 'remount', 'size=100m')
    run = Live(scenario)
    run.check('continues with epoch' in run.ends(0))
    check_equal(folder / 'alone', disk / 'run')


def full_later(folder):
    """The same with room for one checkpoint more, so that the disk is full from the third epoch on."""
    full(folder, files=4.5)


def full_for_a_while(folder):
    """The disk is full and has room again: the run goes on, and ends as it would have."""
    scenario, disk = _small_disk(folder)
    run = Live(scenario).until(r'Not saved(?s:.*)Train: 2 \[ *1/')
    mount(disk, 'remount', 'size=100m')
    run.ends(0)
    run.check(_not_saved(run, 'No space left on device'))
    check_files(disk / 'run', WHOLE)
    check_end(folder / 'alone', disk / 'run')


def stopped_while_full(folder):
    """A signal comes while the disk is full: the last line says that the run was not saved."""
    scenario, _ = _small_disk(folder)
    scenario.options.append('--save-images')
    run = Live(scenario).until(r'Not saved(?s:.*)Train: 2 \[ *1/')
    run.check(re.search(
        r'after epoch 2, batch \d+ of 12; NOT saved, older checkpoints are kept', run.stop(signal.SIGTERM)))


def removed(folder):
    """The run's folder is removed: it is made again, and what is saved from then on is there."""
    scenario = alone(folder)
    for name, pattern in (('early', r'Train: 0 \[ *3/'), ('late', r'Train: 2 \[ *3/')):
        run = Live(scenario, name).until(pattern)
        (folder / name).rename(folder / f'{name}-removed')
        run.ends(0)
        check_files(folder / name, [*WHOLE, 'args.yaml'])
        check_end(folder / 'alone', folder / name)


def read_only(folder):
    """The disk becomes read-only and writable again: the run goes on; a run that starts on it is refused,
    one that is finished has nothing to write.
    """
    scenario = alone(folder)
    disk = _on_disk(scenario, 'size=200m')
    run = Live(scenario).until(r'Train: 0 \[ *3/', lambda: mount(disk, 'remount', 'ro'))
    run.until(r'Train: 2 \[ *3/')
    mount(disk, 'remount', 'rw')
    run.ends(0)
    run.check(_not_saved(run, 'Read-only file system'))
    check_files(disk / 'run', WHOLE)
    check_end(folder / 'alone', disk / 'run')
    mount(disk, 'remount', 'ro')
    for name, status, line in (('run', 0, 'is finished; no file is changed'), ('new', 2, 'Read-only file system')):
        run = Live(scenario, name)
        run.check(line in run.ends(status).splitlines()[-1])


def truncated(folder):
    """The two newest checkpoints are truncated: the run goes on from the one before them, exactly."""
    scenario = alone(folder)
    run = Live(scenario).until(r'Train: 1 \[ *5/')
    kill(run.pids)
    wait(run.pids)
    newest = max(
        (folder / 'run').glob('recovery-1-*'), key=lambda path: int(path.name.split('-')[2].split('.')[0]))
    for path in (folder / 'run' / 'last.pth.tar', newest):
        content = path.read_bytes()  # its other names keep theirs
        path.unlink()
        path.write_bytes(content[:len(content) // 2])
    run = Live(scenario)
    text = run.ends(0)
    run.check(len(re.findall(r'Skipped: .*truncated, or not a checkpoint', text)) == 2)
    run.check(re.search(r'continues with epoch 1, batch [2-6] of 12|continues with epoch 0, batch 12 of 12', text))
    check_equal(folder / 'alone', folder / 'run')


if __name__ == '__main__':
    isolate()
    import timm_vpl.engine.train  # noqa: F401  for all processes at once
    globals()[sys.argv[1]](Path(sys.argv[2]))
