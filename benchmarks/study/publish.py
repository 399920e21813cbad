"""Publish finished runs: what a report needs of them, without a path of the machine, a few KB each.

    python benchmarks/study/publish.py OUTPUT docs/results/runs/NAME

OUTPUT is the folder of a study's runs. `timm-vpl report docs/results/runs/NAME/*` then prints their tables.
"""
import argparse
import csv
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
    if (folder / 'tensorboard').exists():
        write_gradients(folder, target)
    for name in FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)


def write_gradients(folder: Path, target: Path) -> None:
    """Write what TensorBoard has of the terms' gradients as gradients.csv, a row for each update that was measured."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / 'tensorboard'), size_guidance={'scalars': 0})
    events.Reload()
    names = [tag for tag in events.Tags()['scalars'] if tag.startswith('train/grad_') and 'grad_norm' not in tag]
    rows: dict[int, dict[str, float]] = {}
    for name in names:
        for event in events.Scalars(name):
            row = rows.setdefault(event.step, {'update': event.step})
            row[name.removeprefix('train/')] = float(f'{event.value:.4g}')
    with open(target / 'gradients.csv', 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, ['update', *(name.removeprefix('train/') for name in names)])
        writer.writeheader()
        writer.writerows(row for _, row in sorted(rows.items()))


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
