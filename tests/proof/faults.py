"""Plants the faults of faults.yaml in a copy of the package, one at a time, and runs the test that has to catch each.

`python tests/proof/faults.py` takes a quarter of an hour at most on one quiet core. A fault counts as caught where its
test fails; one that breaks the import does not. `--list` shows the faults, `--only 3 17` plants two.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds for the test of a fault
FAULTS = [{'room': room, **fault} for room, faults in yaml.safe_load(
    Path(__file__).with_suffix('.yaml').read_text()).items() for fault in faults]


def only_place(found: list[Path], what: str) -> Path:
    """Return the only one of these.

    Raises:
        SystemExit: There are others, or none.
    """
    if len(found) != 1:
        raise SystemExit(f'{what} stands {len(found)} times, not once: {", ".join(map(str, found))}')
    return found[0]


def place_of(fault: dict[str, str], root: Path) -> Path:
    """Return the module in which a fault is planted."""
    found = [path for path in (root / 'timm_vpl').rglob('*.py') for _ in range(path.read_text().count(fault['old']))]
    return only_place(found, f'{fault["meaning"]}: its old text ({fault["old"]})')


def test_of(fault: dict[str, str], root: Path) -> str:
    """Return the test of a fault with the path of its file."""
    file, _, name = fault['test'].partition('::')
    return f'{only_place(list((root / "tests").rglob(file)), file)}::{name}'


def run_tests(tests: list[str], root: Path, seconds: float) -> tuple[int | str, str]:
    """Return pytest's exit status for tests of a copy, and the end of what it says."""
    # No compiled modules: a fault of the same length within a second would be taken for the module before.
    environ = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(root), 'PYTHONDONTWRITEBYTECODE': '1'}
    command = [sys.executable, '-m', 'pytest', '-n', '0', '-x', '-p', 'no:cacheprovider', '-m', '', *tests]
    log = root.parent / 'log.txt'
    with open(log, 'w') as stream:
        try:
            status = subprocess.run(command, cwd=root, env=environ, stdout=stream, stderr=stream, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f'hangs for {seconds} s', log.read_text()[-2000:]
    return status.returncode, log.read_text()[-2000:]


def prove(numbers: list[int], root: Path) -> list[int]:
    """Plant faults one at a time, print a line for each, and return the numbers of those that are not caught.

    Raises:
        SystemExit: A fault has no place, or a test fails without any.
    """
    faults = {number: FAULTS[number - 1] for number in numbers}
    places = {number: place_of(fault, root) for number, fault in faults.items()}
    tests = {number: test_of(fault, root) for number, fault in faults.items()}
    status, said = run_tests(list(dict.fromkeys(tests.values())), root, LIMIT * len(tests))
    if status != 0:
        raise SystemExit(f'without a fault: status {status}\n{said}')
    missed = []
    for number, fault in faults.items():
        before, begun = places[number].read_text(), time.monotonic()
        places[number].write_text(before.replace(fault['old'], fault['new']))
        status, said = run_tests([tests[number]], root, LIMIT)
        places[number].write_text(before)
        seconds = time.monotonic() - begun
        verdict = {1: 'caught', 0: 'NOT CAUGHT'}.get(status, f'BROKEN, status {status}')
        print(f'{number:2}  {fault["room"]:8}{verdict}, {seconds:.0f} s: {fault["meaning"]}', flush=True)
        if status != 1:
            missed.append(number)
            print(said, flush=True)
    return missed


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says and return the exit status."""
    every = range(1, len(FAULTS) + 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', type=int, metavar='N', choices=every, default=list(every),
                        help='numbers of faults, as --list shows them')
    parser.add_argument('--list', action='store_true', help='print the faults, where they are planted, and their tests')
    args = parser.parse_args(argv)
    if args.list:
        for number in args.only:
            fault = FAULTS[number - 1]
            place = place_of(fault, ROOT).relative_to(ROOT)
            print(f'{number:2}  {fault["room"]:8}{fault["meaning"]} ({place}; {fault["test"]})')
        return 0
    with tempfile.TemporaryDirectory(prefix='timm-vpl-proof-') as work:
        root = Path(work, 'checkout')
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
            '.git', '__pycache__', 'output', '.*_cache', 'results', '*.egg-info'))
        missed = prove(args.only, root)
    print(f'{len(args.only) - len(missed)} of {len(args.only)} faults caught, not caught: {missed}')
    return bool(missed)


if __name__ == '__main__':
    sys.exit(main())
