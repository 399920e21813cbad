"""Write docs/results.md and docs/finetune.md: their templates, filled with figures of the published runs.

    python benchmarks/study/results.py
    python benchmarks/study/results.py --check     # write nothing; exit status 1 where a page is not what the runs say

The templates are `benchmarks/study/pages/*.md`. STUDY is a folder of `docs/results/runs`, ROW a way to train in it (its
runs are ROW-seed-N), SIDE `a` (the CNN) or `b` (the transformer):

    {{top1 STUDY ROW SIDE}}           mean top-1 of the averaged weights at the last epoch
    {{gain STUDY ROW OTHER SIDE}}     ROW's minus OTHER's, paired by seed; OTHER may be OTHER_STUDY/ROW
    {{reached STUDY ROW OTHER SIDE}}  epochs, and share of OTHER's FLOPs, until ROW has OTHER's final top-1
    {{seeds STUDY ROW}}               how many there are
    {{collapsed STUDY}}               runs below two thirds of the median of their row
    {{table STUDY ROW...}}            a row for each of these; without ROW for all; flops=ROW: alone at the pair's FLOPs
    {{curves STUDY ROW...}}           draws top-1 over epochs to docs/results/STUDY.svg, and links it
    {{sizes STUDY ROW OTHER...}}      draws the transformer's gain over numbers of images, of rows named ROW-NUMBER
    {{why STUDY ROW...}}              draws the gradients of each term in each branch, agreement, alignment and losses
"""
import argparse
import csv
import functools
import re
import sys
from pathlib import Path
from statistics import fmean, median

from timm_vpl.tools.comparison import Difference, paired_difference
from timm_vpl.tools.curves import BAND, BRANCH, DASHES, INK, ROWS, Line, Panel, group_panels
from timm_vpl.tools.plots import draw_file
from timm_vpl.tools.report import COLLAPSED, make_groups
from timm_vpl.tools.runs import Run, number, read_run

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / 'docs' / 'results' / 'runs'
PAGES = ROOT / 'benchmarks' / 'study' / 'pages'
GRADIENTS = 'gradients.csv'  # written by publish.py


@functools.cache
def read_study(study: str) -> dict[str, dict[str, Run]]:
    """Return the runs by row and seed."""
    found: dict[str, dict[str, Run]] = {}
    for path in sorted((RUNS / study).glob('*/args.yaml')):
        row, _, seed = path.parent.name.rpartition('-seed-')
        found.setdefault(row, {})[seed] = read_run(path.parent)
    return found


def accuracy(run: Run, side: str) -> float:
    """Return top-1 of the averaged weights at the last epoch."""
    return run.figure(side, run.num_epochs - 1)


def top1(study: str, row: str, side: str) -> str:
    """Return the mean over the seeds."""
    return f'{fmean(accuracy(run, side) for run in read_study(study)[row].values()):.2f}'


def pairs(study: str, row: str, other: str, side: str) -> list[tuple[Run, Run]]:
    """Return runs of both rows that have seed, images and environment in common."""
    *elsewhere, other = other.split('/')
    others = read_study(*elsewhere or [study])[other]
    found = [(run, others[seed]) for seed, run in read_study(study)[row].items() if seed in others]
    if not found or any(run.data != alone.data or machine(run) != machine(alone) for run, alone in found):
        raise ValueError(f'{study}: {row} and {other} have no seed in common, or other images or environments')
    return [(run, alone) for run, alone in found if side in run.sides and side in alone.sides]


def machine(run: Run) -> list[dict]:
    """Return what a run was trained on, but for the tag: they compute the same to the bit (the study's README)."""
    return [{name: value for name, value in each.items() if name != 'timm_vpl'} for each in run.environment]


def gains(study: str, row: str, other: str, side: str) -> Difference:
    """Return the difference of the last top-1."""
    return paired_difference(
        [accuracy(run, side) - accuracy(alone, side) for run, alone in pairs(study, row, other, side)])


def gain(study: str, row: str, other: str, side: str) -> str:
    """Return the same as text: mean, interval, seeds."""
    return str(gains(study, row, other, side))


def reached(study: str, row: str, other: str, side: str) -> str:
    """Return after how many epochs the mean of a row is that of another at its end, and the share of its FLOPs."""
    both = pairs(study, row, other, side)
    target = fmean(accuracy(alone, side) for _, alone in both)
    for epoch in both[0][0].rows:
        values = [run.figure(side, epoch) for run, _ in both]
        if None not in values and fmean(values) >= target:
            cost, whole = (fmean(run.total('flops', epochs) for run in runs) for runs, epochs in (
                ([run for run, _ in both], epoch + 1), ([alone for _, alone in both], None)))
            return f'{epoch + 1} epochs, {cost / whole:.2f} of the FLOPs'
    return 'never'


def seeds(study: str, row: str) -> str:
    """Return their number."""
    return str(len(read_study(study)[row]))


def collapsed(study: str) -> str:
    """Return the number of runs below two thirds of the median of their row."""
    rows = [[accuracy(run, side) for run in runs.values() if side in run.sides]
            for runs in read_study(study).values() for side in 'ab']
    return str(sum(value < COLLAPSED * median(values) for values in rows if values for value in values))


def table(study: str, *rows: str, flops: str = 'b-flops') -> str:
    """Return accuracy and differences to each model alone; columns that no row fills are left out."""
    runs = read_study(study)
    header = ('row', 'seeds', 'CNN', 'CNN − alone', 'transformer (median)', 'transformer − alone, same epochs',
              'transformer − alone, same FLOPs', 'TFLOPs')
    lines = []
    for row in rows or runs:
        sides = next(iter(runs[row].values())).sides
        cells = [f'`{row}`', seeds(study, row), *[''] * 6]
        for column, side in ((2, 'a'), (4, 'b')):
            if side in sides:
                middle = median(accuracy(run, side) for run in runs[row].values())
                cells[column] = top1(study, row, side) + (f' ({middle:.2f})' if side == 'b' else '')
            if side in sides and side in runs and row not in ('a', 'b', flops):
                cells[column + 1] = gain(study, row, side, side)
        if cells[5] and len(sides) == 2 and flops in runs:
            cells[6] = gain(study, row, flops, 'b')
        own = fmean(run.total('flops') for run in runs[row].values())
        teacher = {run.teacher.total('flops') for run in runs[row].values() if run.teacher}
        cells[7] = f'{own / 1e12:.2f}' + ''.join(f' + {cost / 1e12:.2f}' for cost in teacher)
        lines.append(cells)
    kept = [i for i, _ in enumerate(header) if any(cells[i] for cells in lines)]
    return '\n'.join(f'| {" | ".join(cells[i] for i in kept)} |'
                     for cells in (header, ['---'] * len(header), *lines))


def curves(study: str, *rows: str) -> str:
    """Draw top-1 over the epochs, a line a row, and return the link."""
    runs = read_study(study)
    chosen = [run for row in rows or runs for run in runs[row].values()]
    names = {str(run.path): run.path.name.rpartition('-seed-')[0] for run in chosen}
    groups = make_groups(chosen, names)
    draw_file(group_panels(groups), str(RUNS.parent / f'{study}.svg'), study, BAND)
    return f'![Top-1 over the epochs: {", ".join(rows or runs)}](results/{study}.svg)'


def sizes(study: str, row: str, *others: str) -> str:
    """Draw the mean gain over each of the others with its interval, and return the link."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 3.2), dpi=125, layout='constrained')
    axes = figure.add_subplot()
    counts = sorted(int(name.rpartition('-')[2]) for name in read_study(study) if name.startswith(f'{row}-'))
    for i, other in enumerate(others):
        found = [gains(study, f'{row}-{count}', f'{other}-{count}', 'b') for count in counts]
        axes.errorbar(
            [count * 1.03 ** i for count in counts], [each.mean for each in found], label=f'{row} − {other}',
            yerr=[[each.mean - each.low for each in found], [each.high - each.mean for each in found]],
            capsize=3, marker='o', color=ROWS[i + 1])
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xscale='log', xlabel='training images', ylabel='top-1 (points), transformer', xticks=counts,
             xticklabels=[f'{count:,}' for count in counts])
    axes.minorticks_off()
    axes.legend(frameon=False)
    path = RUNS.parent / f'{study}.svg'
    with rc_context({'svg.hashsalt': 'timm-vpl'}):
        figure.savefig(path, metadata={'Date': None})
    return f'![Gain of the transformer over the number of training images](results/{path.name})'


def why(study: str, *rows: str) -> str:
    """Draw what the terms do in each row, and return the links."""
    links = []
    for row in rows:
        [run] = read_study(study)[row].values()
        with open(run.path / GRADIENTS, encoding='utf-8') as file:
            norms = list(csv.DictReader(file))
        per_epoch = max(1, int(norms[-1]['update']) // run.num_epochs)
        lines = [Line(name.removeprefix('grad_'), [(int(each['update']) - 1) // per_epoch for each in norms], [
            number(each[name]) for each in norms], BRANCH[name[-1]], DASHES[i // 2 % len(DASHES)])
            for i, name in enumerate(name for name in norms[0] if name.startswith('grad_') and any(
                number(each[name]) for each in norms))]
        path = RUNS.parent / f'{study}_{row}.svg'
        draw_file([Panel('Norm of the gradient of a weighted term in a branch', 'norm', lines, format='#.2g'),
                   *likeness_panels(run)], str(path), row)
        links.append(f'![{row}: gradients, agreement and losses over the epochs](results/{path.name})')
    return '\n\n'.join(links)


def likeness_panels(run: Run) -> list[Panel]:
    """Return the panels of agreement and alignment, where known, and of the losses on training and held-out images."""
    def line(label: str, column: str, color: str, dash: str = '') -> Line:
        found = {epoch: row.get(column) for epoch, row in run.rows.items() if row.get(column) is not None}
        return Line(label, list(found), list(found.values()), color, dash)
    panels = [
        Panel('How often the branches agree, held-out images', '%', [line('agreement', 'eval_ema_agreement', INK)]),
        Panel('Cosine of an image\'s two embeddings', 'cosine', [line('alignment', 'eval_ema_alignment', INK)]),
        Panel("The labels' loss", 'loss', [
            each for side in run.sides for each in (
                line(f'{side} training', f'train_ce_{side}_loss', BRANCH[side]),
                line(f'{side} held out', f'eval_loss_{side}', BRANCH[side], DASHES[1]))])]
    return [panel for panel in panels if panel.lines[0].x]


FILLERS = {filler.__name__: filler for filler in (top1, gain, reached, seeds, collapsed, table, curves, sizes, why)}


def fill(template: str) -> str:
    """Return a template with its figures."""
    def found(match: re.Match) -> str:
        name, *words = match[1].split()
        return FILLERS[name](*(word for word in words if '=' not in word), **dict(
            word.split('=') for word in words if '=' in word))
    return re.sub(r'\{\{(.*?)\}\}', found, template)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing')
    args = parser.parse_args()
    for template in sorted(PAGES.glob('*.md')):
        page = ROOT / 'docs' / template.name
        text = fill(template.read_text(encoding='utf-8'))
        if args.check and page.read_text(encoding='utf-8') != text:
            sys.exit(f'results.py: {page} is not what the runs say: run it without --check')
        if not args.check:
            page.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
