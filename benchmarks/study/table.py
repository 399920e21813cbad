"""Print the table of docs/results.md, or of docs/finetune.md, from published runs.

    python benchmarks/study/table.py docs/results/runs/first_block
    python benchmarks/study/table.py docs/results/runs/finetune
"""
import argparse
from pathlib import Path

from timm_vpl.tools.comparison import paired_difference
from timm_vpl.tools.report import make_groups, make_records, read_runs
from timm_vpl.tools.runs import read_run


def rows(folder: Path) -> list[tuple[str, ...]]:
    """Return a row for each way to train: accuracy of both models, differences to each alone, cost."""
    paths = sorted(str(path.parent) for path in folder.glob('*/args.yaml'))
    names = {path: Path(path).name.rpartition('-seed-')[0] for path in paths}
    records = make_records(make_groups(read_runs(paths), names))
    table = []
    for name in dict.fromkeys(record['framework'] for record in records):
        by_model = {record['model']: record for record in records if record['framework'] == name}
        cells = []
        for model in ('test_resnet', 'test_vit'):  # also where their names are those of exported folders
            record = next((record for name, record in by_model.items() if name.endswith(model)), None)
            if record is None:
                cells += ['', '', ''][:2 if model == 'test_resnet' else 3]
                continue
            top1, differences = record['top1'], {
                kind: baseline['text'] for kind, baseline in record['baselines'].items()}
            median = f', median {top1["median"]:.2f}, {top1["collapsed"]} collapsed' if model == 'test_vit' else ''
            cells += [f'{top1["mean"]:.2f}{median}', differences.get('epochs', '')]
            if model == 'test_vit':
                cells.append(differences.get('flops', ''))
        record = next(iter(by_model.values()))
        table.append((f'`{name}`', str(record['n']), *cells, f'{record["flops"] / 1e12:.2f}'))
    return table


def markdown(folder: Path) -> str:
    """Return the table as Markdown."""
    header = ('row', 'seeds', 'CNN', 'CNN − alone', 'transformer', 'transformer − alone, same epochs',
              'transformer − alone, same FLOPs', 'TFLOPs')
    return '\n'.join([f'| {" | ".join(header)} |', '|---' * len(header) + '|', *(
        f'| {" | ".join(row)} |' for row in rows(folder))])


def transfer(folder: Path, base: Path) -> dict[str, str]:
    """Return by side what a model alone gains where it begins with the weights of a pair: paired by seed.

    Args:
        folder: Runs SIDE-from-vpl-seed-N.
        base: Runs SIDE-seed-N, from weights that were trained alone.
    """
    def top1(path: Path, side: str) -> float:
        return float(list(read_run(path).rows.values())[-1][f'eval_ema_top1_{side}'])

    return {side: str(paired_difference([
        top1(path, side) - top1(base / path.name.replace('-from-vpl', ''), side)
        for path in sorted(folder.glob(f'{side}-from-vpl-seed-*'))])) for side in 'ab'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    print(markdown(parser.parse_args().folder))


if __name__ == '__main__':
    main()
