"""The published figures are those of the published runs."""
import re
import runpy
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / 'docs' / 'results' / 'runs' / 'first_block'


def test_the_pages_show_what_the_runs_say():
    table = runpy.run_path(str(ROOT / 'benchmarks' / 'study' / 'table.py'))['markdown'](RUNS)
    page = (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8')
    assert table in page
    known = set(re.findall(r'[+-]\d+\.\d+ \[.*?\] \(\d.*?\)', table))
    for text in (page, (ROOT / 'README.md').read_text(encoding='utf-8')):
        figures = re.findall(r'[+-]\d+\.\d+\s\[.*?\]\s\(\d.*?\)', text, re.DOTALL)
        assert figures and {' '.join(figure.split()) for figure in figures} <= known
    [best] = re.findall(r'the transformer alone reaches\s(\d+\.\d+)', page)
    assert re.search(rf'`b-flops` \| \d+ \|  \|  \| {best}, ', table)


def test_the_page_of_fine_tuning_shows_what_the_runs_say():
    script = runpy.run_path(str(ROOT / 'benchmarks' / 'study' / 'table.py'))
    table = script['markdown'](RUNS.with_name('finetune'))
    page = (ROOT / 'docs' / 'finetune.md').read_text(encoding='utf-8')
    assert table in page and table.count('(5)') == 7
    figures = re.findall(r'[+-]\d+\.\d+\s\[.*?\]\s\(\d.*?\)', page.replace(table, ''), re.DOTALL)
    moved = script['transfer'](RUNS.with_name('finetune_from_vpl'), RUNS.with_name('finetune'))
    known = [table, f'{moved["a"]}', f'{moved["b"]}']
    assert len(figures) == 6 and all(any(' '.join(figure.split()) in text for text in known) for figure in figures)


def test_published_runs_hold_no_path_of_a_machine():
    files = [path for path in RUNS.parent.rglob('*') if path.is_file()]
    assert len(files) >= 4 * 100
    for path in files:
        assert not re.search(r'(^|[\s:\'"])/\w+', path.read_text()), path
    plan = yaml.safe_load((ROOT / 'benchmarks' / 'study' / 'first_block.yaml').read_text())
    for row in plan['rows']:
        assert all((RUNS / f'{row["name"]}-seed-{seed}').is_dir() for seed in plan['seeds']), row
