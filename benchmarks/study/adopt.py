"""Add to runs of the tag study-1 what a report needs and that tag did not write: FLOPs, data and environment.

    python benchmarks/study/adopt.py OUTPUT DATA

Run it on the machine and in the environment of the runs; OUTPUT is their folder, DATA the folder that they read.
"""
import argparse
import csv
from pathlib import Path

import torch
import yaml

from timm_vpl.engine.device import init_device
from timm_vpl.engine.environment import environment
from timm_vpl.engine.train import create_run
from timm_vpl.files import replacing
from timm_vpl.options.options import parse_args
from timm_vpl.tools.runs import read_run


def adopt(folder: Path, data: Path) -> None:
    """Write the files that are missing in a run's folder."""
    args = parse_args(['--config', str(folder / 'args.yaml'), '--data-dir', str(data), '--device', 'cpu'])
    run = create_run(args, init_device(args))
    (folder / 'data.yaml').write_text(yaml.safe_dump(run.data))
    (folder / 'environment.yaml').write_text(yaml.safe_dump([{**environment(run.device), 'timm_vpl': 'study-1'}]))
    with open(folder / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    with replacing(str(folder / 'summary.csv'), newline='') as file:
        writer = csv.DictWriter(file, [*rows[0], 'flops'])
        writer.writeheader()
        writer.writerows({**row, 'flops': int(row['images']) * run.flops} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path)
    parser.add_argument('data', type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in sorted(path.parent for path in args.output.glob('*/args.yaml')):
        if not read_run(folder).progress and not (folder / 'data.yaml').exists():
            adopt(folder, args.data / folder.name[folder.name.index('seed-'):])
            print(folder)


if __name__ == '__main__':
    main()
