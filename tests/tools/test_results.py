"""The published figures are those of the published runs."""
import re
import runpy
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / 'docs' / 'results' / 'runs'
FIGURE = re.compile(r'[+-]\d+\.\d+\s+\[.*?\]\s+\(\d.*?\)', re.DOTALL)


def test_the_pages_show_what_the_runs_say():
    script = runpy.run_path(str(ROOT / 'benchmarks' / 'study' / 'results.py'))
    script['fill'].__globals__['draw_file'] = lambda *args: None  # the test writes nothing
    for template in script['PAGES'].glob('*.md'):
        text = template.read_text(encoding='utf-8')
        assert (ROOT / 'docs' / template.name).read_text(encoding='utf-8') == script['fill'](text)
        assert not FIGURE.search(text)  # none is written by hand


def test_figures_elsewhere_are_those_of_the_pages():
    known = ' '.join(' '.join((ROOT / 'docs' / page).read_text(encoding='utf-8').split())
                     for page in ('results.md', 'finetune.md'))
    figures = FIGURE.findall((ROOT / 'README.md').read_text(encoding='utf-8'))
    assert figures and all(' '.join(figure.split()) in known for figure in figures)


def test_published_runs_hold_no_path_of_a_machine():
    files = [path for path in RUNS.rglob('*') if path.is_file()]
    assert len(files) >= 4 * 100
    for path in files:
        assert not re.search(r'(^|[\s:\'"])/\w+', path.read_text()), path
    plan = yaml.safe_load((ROOT / 'benchmarks' / 'study' / 'first_block.yaml').read_text())
    for row in plan['rows']:
        assert all((RUNS / 'first_block' / f'{row["name"]}-seed-{seed}').is_dir() for seed in plan['seeds']), row
