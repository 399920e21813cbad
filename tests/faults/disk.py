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
from signals import alone, check, stop, until  # noqa: E402

NOT_SAVED = r'Not saved: {}: {}; the run goes on, older checkpoints are kept\n'


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


def _lines(log, cause) -> int:
    return len(re.findall(NOT_SAVED.format(r'\S+', cause), log.read_text()))


def check_files(folder: Path, names=()) -> None:
    """End this process if a checkpoint of a folder can't be read, a file is missing or one is left over."""
    pid = os.fork()
    if pid == 0:
        from timm_vpl.engine.checkpoint import read_checkpoint
        status = 1
        try:
            for path in folder.glob('*.pth.tar'):
                read_checkpoint(str(path))
            found = {path.name for path in folder.iterdir()}
            left = [name for name in found if 'tmp' in name]
            if left or set(names) - found:
                raise FileNotFoundError(f'{folder}: {found}')
            status = 0
        except Exception as e:
            print(e, file=sys.stderr, flush=True)
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
    log = folder / 'run.log'
    check(wait(scenario.start('run')) == [1], scenario, 'run')
    text = log.read_text()
    check('the disk may become full' in text and 'Traceback' not in text, scenario, 'run')
    check(_lines(log, 'No space left on device') > 2, scenario, 'run')
    check(text.endswith(f'error: --output {disk / "run"}: the last epoch could not be saved, see above\n'), scenario,
          'run')
    check_files(disk / 'run', ['last.pth.tar', 'summary.csv'])
    check(len((disk / 'run' / 'summary.csv').read_text().splitlines()) == 3, scenario, 'run')
    mount(disk, 'remount', 'size=100m')
    check(wait(scenario.start('run')) == [0], scenario, 'run')
    check('goes on with epoch' in log.read_text(), scenario, 'run')
    check_equal(folder / 'alone', disk / 'run')


def full_later(folder):
    """The same with room for one checkpoint more, so that the disk is full from the third epoch on."""
    full(folder, files=4.5)


def full_for_a_while(folder):
    """The disk is full and has room again: the run goes on, and ends as it would have."""
    scenario, disk = _small_disk(folder)
    log = folder / 'while.log'
    pids = scenario.start('while')
    check(wait(pids, until(log, r'Not saved(?s:.*)Train: 2 \[ *1/')) is None, scenario, 'while')
    mount(disk, 'remount', 'size=100m')
    check(wait(pids) == [0] and 'Traceback' not in log.read_text(), scenario, 'while')
    check(_lines(log, 'No space left on device') > 2, scenario, 'while')
    check_files(disk / 'while', ['last.pth.tar', 'best_a.pth.tar', 'best_b.pth.tar'])
    check_end(folder / 'alone', disk / 'while')


def stopped_while_full(folder):
    """A signal comes while the disk is full: the last line says that the run was not saved."""
    scenario, _ = _small_disk(folder)
    scenario.options.append('--save-images')
    text = stop(scenario, 'run', signal.SIGTERM, r'Not saved(?s:.*)Train: 2 \[ *1/')
    check(re.search(r'after epoch 2, batch \d+ of 12; NOT saved, older checkpoints are kept', text), scenario,
          'run')
    check('Traceback' not in text, scenario, 'run')


def removed(folder):
    """The run's folder is removed: it is made again, and what is saved from then on is there."""
    scenario = alone(folder)
    for name, pattern in (('early', r'Train: 0 \[ *3/'), ('late', r'Train: 2 \[ *3/')):
        log = folder / f'{name}.log'
        pids = scenario.start(name)
        check(wait(pids, until(log, pattern)) is None, scenario, name)
        (folder / name).rename(folder / f'{name}-removed')
        check(wait(pids) == [0] and 'Traceback' not in log.read_text(), scenario, name)
        check_files(folder / name, ['last.pth.tar', 'best_a.pth.tar', 'best_b.pth.tar', 'args.yaml'])
        check_end(folder / 'alone', folder / name)


def read_only(folder):
    """The disk becomes read-only and writable again: the run goes on; a run that starts on it is refused,
    one that is finished has nothing to write.
    """
    scenario = alone(folder)
    disk = _on_disk(scenario, 'size=200m')
    log = folder / 'run.log'
    pids = scenario.start('run')
    begun = until(log, r'Train: 0 \[ *3/')
    check(wait(pids, lambda: begun() and mount(disk, 'remount', 'ro')) is None, scenario, 'run')
    check(wait(pids, until(log, r'Train: 2 \[ *3/')) is None, scenario, 'run')
    mount(disk, 'remount', 'rw')
    check(wait(pids) == [0] and 'Traceback' not in log.read_text(), scenario, 'run')
    check(_lines(log, 'Read-only file system') > 2, scenario, 'run')
    check_files(disk / 'run', ['last.pth.tar', 'best_a.pth.tar', 'best_b.pth.tar'])
    check_end(folder / 'alone', disk / 'run')
    mount(disk, 'remount', 'ro')
    for name, status, line in (('run', 0, 'is finished; no file is changed'), ('new', 2, 'Read-only file system')):
        check(wait(scenario.start(name)) == [status], scenario, name)
        text = (folder / f'{name}.log').read_text()
        check(line in text.splitlines()[-1] and 'Traceback' not in text, scenario, name)


def truncated(folder):
    """The two newest checkpoints are truncated: the run goes on from the one before them, exactly."""
    scenario = alone(folder)
    run, log = folder / 'run', folder / 'run.log'
    pids = scenario.start('run')
    check(wait(pids, until(log, r'Train: 1 \[ *5/')) is None, scenario, 'run')
    kill(pids)
    wait(pids)
    newest = max(run.glob('recovery-1-*'), key=lambda path: int(path.name.split('-')[2].split('.')[0]))
    for path in (run / 'last.pth.tar', newest):
        content = path.read_bytes()  # its other names keep theirs
        path.unlink()
        path.write_bytes(content[:len(content) // 2])
    check(wait(scenario.start('run')) == [0], scenario, 'run')
    text = log.read_text()
    check(len(re.findall(r'Passed over: .*truncated, or not a checkpoint', text)) == 2, scenario, 'run')
    check(re.search(r'goes on with epoch 1, batch [2-6] of 12|goes on with epoch 0, batch 12 of 12', text), scenario,
          'run')
    check_equal(folder / 'alone', run)


if __name__ == '__main__':
    isolate()
    import timm_vpl.engine.train  # noqa: F401  for all processes at once
    globals()[sys.argv[1]](Path(sys.argv[2]))
