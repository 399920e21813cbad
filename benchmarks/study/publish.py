"""Publish finished runs: what a report needs of them, without a path of the machine, a few KB each.

    python benchmarks/study/publish.py OUTPUT docs/results/runs/NAME

OUTPUT is the folder of a study's runs. `timm-vpl report docs/results/runs/NAME/*` then prints their tables.
"""
import argparse
import shutil
import sys
from pathlib import Path

import yaml

from timm_vpl.errors import UsageError
from timm_vpl.tools.runs import read_run

FILES = ('summary.csv', 'validation.csv', 'data.yaml', 'environment.yaml')
PLACES = ('data_dir', 'output', 'config')  # options that are paths of a machine
NAMES = ('teacher', 'pretrained_path_a', 'pretrained_path_b', 'initial_checkpoint_a', 'initial_checkpoint_b')


def publish(folder: Path, target: Path) -> None:
    """Write what there is to publish of a finished run."""
    target.mkdir(parents=True, exist_ok=True)
    options = yaml.safe_load((folder / 'args.yaml').read_text())
    options = {
        name: Path(value).name if name in NAMES and value else value
        for name, value in options.items() if name not in PLACES}
    (target / 'args.yaml').write_text(yaml.safe_dump(options))
    for name in FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path)
    parser.add_argument('target', type=Path)
    args = parser.parse_args()
    for folder in sorted(path.parent for path in args.output.glob('*/args.yaml')):
        try:
            progress = read_run(folder).progress
        except UsageError as error:
            sys.exit(f'publish.py: error: {error}')
        print(f'{folder.name}: {f"left out, {progress}" if progress else "published"}')
        if not progress:
            publish(folder, args.target / folder.name)


if __name__ == '__main__':
    main()
