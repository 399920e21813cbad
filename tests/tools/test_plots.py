"""Curves: what is drawn is what the runs' files say, whatever their names are."""
import base64
import csv
import hashlib
import io
import json
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import yaml
from runs import PAIR, SMALL, status_of

from timm_vpl.cli import main, train
from timm_vpl.options.train import make_options, read_args, recipe_values, train_command
from timm_vpl.tools import plots, trackers
from timm_vpl.tools.curves import Line, Panel, group_panels, run_panels
from timm_vpl.tools.report import make_groups, make_records, make_report, read_runs
from timm_vpl.tools.runs import read_run

RESULTS = Path(__file__).resolve().parents[2] / 'docs' / 'results'
RUNS = RESULTS / 'runs' / 'first_block'
RUN = RUNS / 'vpl-seed-1'
HOSTILE = '<script>alert(1)</script>&"\'$x$'


def column(folder, name):
    """Return (epochs, values) of a column of a run's file, of the epochs that have one."""
    with open(Path(folder) / 'summary.csv', newline='') as file:
        cells = [(int(row['epoch']), float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    return [epoch for epoch, _ in cells], [value for _, value in cells]


def drawn(panels, format='png'):
    """Return the lines of each axes of a figure by label, and the figure's bytes."""
    file = io.BytesIO()
    figure = plots.draw(panels, file, format, 'title', 'caption')
    return figure, [
        {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith('_')}
        for axes in figure.axes], file.getvalue()


def points(line):
    """Return (epochs, values) of a line, without its gaps."""
    kept = [(x, y) for x, y in zip(*line.get_data(), strict=True) if y == y]
    return [x for x, _ in kept], [y for _, y in kept]


@pytest.mark.parametrize('name', ['first_block/vpl-seed-1', 'screen/kl4-tokens10-seed-1', 'first_block/a-seed-1'])
def test_the_figure_of_a_run_shows_its_file(name):
    run = read_run(RESULTS / 'runs' / name)
    figure, (top1, terms, lrs), _ = drawn(run_panels(run.rows.values(), run.options))
    header = (run.path / 'summary.csv').read_text().partition('\n')[0].split(',')
    prefixes = {'raw': '', 'EMA': 'ema_'}
    wanted = {f'{label} {weights}': f'eval_{prefix}top1_{side}' for side, label in (
        ('a', 'a'), ('b', 'b'), ('ens', 'average')) for weights, prefix in prefixes.items()}
    wanted = {label: name for label, name in wanted.items() if name in header}
    assert list(top1) == list(wanted) and len(wanted) in (2, 6)
    for label, line in top1.items():
        assert points(line) == column(run.path, wanted[label])
    assert {f'train_{label}_loss' for label in terms} == {
        name for name in header if name.endswith('_loss') and name.startswith('train_')} - {'train_loss'}
    for label, line in terms.items():
        assert points(line) == column(run.path, f'train_{label}_loss')
    for label, line in lrs.items():
        assert points(line) == column(run.path, f'lr_{label}')
    assert len(lrs) == len(run.sides)
    colors = {side: lines[label].get_color() for lines in (terms,) for side in 'ab' if (label := f'ce_{side}') in lines}
    assert all(line.get_color() == colors[label] for label, line in lrs.items())
    last = [text.get_text() for text in figure.axes[0].texts]
    assert {f'{line.get_ydata()[-1]:.2f}  {label}' for label, line in top1.items()} <= set(last)


def test_stages_are_shaded_and_say_what_is_learnt():
    run = read_run(RUN)
    epochs, stages = column(RUN, 'stage')
    expected = [(group[0][0] - 0.5, group[-1][0] + 0.5) for group in (
        list(each) for _, each in groupby(zip(epochs, stages, strict=True), key=lambda pair: pair[1]))]
    panels = run_panels(run.rows.values(), run.options)
    assert [text for *_, text in panels[0].spans] == [
        'stage 1: contrastive → b', 'stage 2: contrastive → b, kl → a', 'stage 3: kl → a']
    figure, _, _ = drawn(panels)
    for axes in figure.axes:
        assert [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches] == expected
    texts = [' '.join(text.get_text().split()) for text in figure.axes[0].texts]
    assert [text for *_, text in panels[0].spans] == texts[:3]

    tokens = read_run(RESULTS / 'runs' / 'screen' / 'kl4-tokens10-seed-1')
    assert run_panels(tokens.rows.values(), tokens.options)[0].spans == [(0, 99, 'kl_b, tokens_b')]
    alone = read_run(RUNS / 'a-seed-1')
    assert run_panels(alone.rows.values(), alone.options)[0].spans == []


def test_a_first_epoch_has_whole_ticks():
    run = read_run(RUN)
    figure, (losses, lrs), _ = drawn(run_panels(list(run.rows.values())[:1], run.options))
    assert set(losses) == {'ce_a', 'ce_b', 'contrastive'} and set(lrs) == {'a', 'b'}
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [x for x in axes.get_xticks() if low <= x <= high] == [0]


def test_a_term_that_is_off_leaves_a_gap():
    rows = [{'epoch': e, 'train_ce_a_loss': 2., 'train_kl_b_loss': '' if e == 1 else 1., 'lr_a': .1} for e in range(3)]
    (losses, lrs) = run_panels(rows, {'method': 'pair', 'model_a': 'x', 'model_b': 'y'})
    assert [line.y for line in losses.lines] == [[2., 2., 2.], [1, None, 1]]
    assert losses.spans == [(0, 0, 'kl_b'), (1, 1, 'labels alone'), (2, 2, 'kl_b')]
    _, ((lines), _), _ = drawn([losses, lrs])
    assert points(lines['kl_b']) == ([0, 2], [1, 1]) and len(lines['kl_b'].get_xdata()) == 3


def test_what_is_not_finite_is_not_drawn_and_all_right_is_the_top():
    nan = float('nan')
    rows = [{'epoch': e, 'eval_top1_a': each, 'train_ce_a_loss': each, 'train_kl_b_loss': each, 'lr_a': nan}
            for e, each in enumerate((1., 100., nan))]
    panels = run_panels(rows, {'method': 'pair', 'model_a': 'x', 'model_b': 'y'})
    assert [panel.unit for panel in panels] == ['top-1 (%)', 'loss']
    assert panels[0].spans == [(0, 1, 'kl_b'), (2, 2, 'not finite')]
    figure, _, _ = drawn(panels)
    assert figure.axes[0].get_ylim()[1] == 100.5
    assert [axes.get_xlim() for axes in figure.axes] == [(-0.5, 2.5)] * 2


@pytest.mark.parametrize(('epochs', 'bounds'), [(2, (0., 1.)), (10, (5., 9.))])
def test_the_low_values_of_a_long_run_may_lie_below_its_panel(epochs, bounds):
    values = list(map(float, range(epochs)))
    assert Panel('', '', [Line('', list(range(epochs)), values)], late=True).bounds == bounds


def test_the_overlay_shows_mean_and_range_of_the_seeds():
    """That of docs/results/first_block.svg."""
    runs = read_runs(sorted(map(str, RUNS.iterdir())))
    groups = make_groups(runs)
    records = make_records(groups)
    panels = group_panels(groups)
    figure, axes, _ = drawn(panels, 'svg')
    assert [panel.title for panel in panels] == ['test_resnet', 'test_vit']
    count = 0
    for panel, lines, each in zip(panels, axes, figure.axes, strict=True):
        bands = dict(zip(lines, each.collections, strict=True))
        for record in (record for record in records if record['model'] == panel.title):
            name = record['framework']
            label = f'{name}, {record["num_epochs"]} epochs' if name == 'solo' else name
            found = [column(folder, f'eval_ema_top1_{record["branch"]}') for folder in record['runs']]
            epochs, values = found[0][0], list(zip(*(values for _, values in found), strict=True))
            assert all(other == epochs for other, _ in found) and len(found) == record['n'] == 5
            assert points(lines[label]) == (epochs, list(map(fmean, values)))
            assert lines[label].get_ydata()[-1] == record['top1']['mean']
            edges = bands[label].get_paths()[0].vertices
            for epoch, at in zip(epochs, values, strict=True):
                here = [y for x, y in edges if x == epoch]
                assert (min(here), max(here)) == (min(at), max(at))
            count += 1
    assert count == len(records) == 17
    page = (RESULTS.parent / 'results.md').read_text(encoding='utf-8')
    assert '(results/first_block.svg)' in page and (RESULTS / 'first_block.svg').stat().st_size > 10_000


def test_rows_of_one_name_are_told_apart(tmp_path):
    def copy(name, **options):
        shutil.copytree(RUN, tmp_path / name)
        path = tmp_path / name / 'args.yaml'
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **options}))
        return str(tmp_path / name)

    def labels(*folders):
        groups = make_groups(read_runs(folders))
        panels = group_panels(groups)
        for panel in panels:
            assert len({(line.color, line.dash) for line in panel.lines}) == len(panel.lines)
        return {panel.title: [line.label for line in panel.lines] for panel in panels}

    twins, plain, other = copy('twins', model_a='test_vit'), copy('plain'), copy('other', model_a='cnn')
    assert labels(twins) == {'test_vit': ['vpl, a', 'vpl, b']}
    assert labels(plain, other) == {
        'test_resnet': ['vpl, test_resnet + test_vit'], 'cnn': ['vpl, cnn + test_vit'],
        'test_vit': ['vpl, test_resnet + test_vit', 'vpl, cnn + test_vit']}
    elsewhere = copy('elsewhere', dataset='hfds/x')
    assert list(labels(plain, elsewhere)) == [
        f'{model}, {data}' for data in ('2,000 images in train, 5,000 in dev, 10 classes', 'hfds/x')
        for model in ('test_resnet', 'test_vit')]


def test_the_same_numbers_give_the_same_bytes():
    run = read_run(RUN)
    panels = run_panels(run.rows.values(), run.options)
    for format in ('png', 'svg'):
        assert drawn(panels, format)[2] == drawn(panels, format)[2]


@pytest.mark.parametrize(('centres', 'expected'), [
    ([1, 5, 9], [1, 5, 9]), ([5, 5], [5, 6]), ([5.2, 5, 1], [6, 5, 1]), ([0, 0, 0], [0.5, 1.5, 2.5]),
    ([10, 9.9], [9.5, 8.5])])
def test_labels_do_not_lie_over_each_other(centres, expected):
    assert plots.spread(centres, [1] * len(centres), 0, 10) == pytest.approx(expected)


# The page


class Page(HTMLParser):
    """Tags with their attributes, and the text of each element by its tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [('', {})], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.setdefault(self.tags[-1][0], []).append(data)


def page_of(folders, tmp_path):
    make_report([str(folder) for folder in folders], html=str(tmp_path / 'page.html'))
    text = (tmp_path / 'page.html').read_text(encoding='utf-8')
    data = re.search(r'id="data">(.*?)</script>', text)
    return Page(text), json.loads(data[1]) if data else [], text


def test_the_page_shows_what_the_runs_say(tmp_path):
    folders = sorted(RUNS.glob('vpl-seed-*')) + sorted(RUNS.glob('[ab]-seed-*'))
    page, panels, _ = page_of(folders, tmp_path)
    assert [panel['title'] for panel in panels] == [
        'test_resnet', 'test_vit', 'average of the branches', 'ce_a', 'ce_b', 'contrastive', 'kl']
    columns = ['eval_ema_top1_a', 'eval_ema_top1_b', 'eval_ema_top1_ens', 'train_ce_a_loss', 'train_ce_b_loss',
               'train_contrastive_loss', 'train_kl_loss']
    for panel, name in zip(panels, columns, strict=True):
        for line in panel['lines']:
            row = line['label'] if line['label'] == 'vpl' else name.split('_')[-1] if 'top1' in name else name[9]
            found = [column(folder, name) for folder in RUNS.glob(f'{row}-seed-*')]
            values = list(zip(*(values for _, values in found), strict=True))
            assert line['x'] == found[0][0] and line['y'] == list(map(fmean, values))
            assert line['low'] == list(map(min, values)) and line['high'] == list(map(max, values))
    table = make_report([str(folder) for folder in folders])
    cells = {cell.strip() for line in table.splitlines() if line.startswith('|') for cell in line.split('|')}
    assert {text for text in page.texts['td'] if '±' in text} == {cell for cell in cells if '±' in cell}
    assert [text for text in page.texts['pre'] if '--seed=3' in text and '--method=solo' not in text]
    assert '5,000 in dev' in ''.join(page.texts['h2']) and 'Environment' in page.texts['h2']

    page, panels, _ = page_of([RUN], tmp_path)
    assert [panel['title'] for panel in panels][1:] == ['Terms of the loss, unweighted', 'Learning rate']
    for line in panels[1]['lines']:
        assert [y for y in line['y'] if y is not None] == column(RUN, f'train_{line["label"]}_loss')[1]
    assert panels[0]['spans'][0] == [0, 19, 'stage 1: contrastive → b']


def hostile(tmp_path):
    folder = tmp_path / HOSTILE.replace('/', '|')
    shutil.copytree(RUN, folder)
    options = yaml.safe_load((folder / 'args.yaml').read_text())
    options.update(model_a=HOSTILE, data_dir=HOSTILE, tau=HOSTILE, seed=HOSTILE, dataset=f'hfds/{HOSTILE}')
    (folder / 'args.yaml').write_text(yaml.safe_dump(options))
    (folder / 'environment.yaml').write_text(yaml.safe_dump([{HOSTILE: HOSTILE}]))
    summary = (folder / 'summary.csv').read_text()
    (folder / 'summary.csv').write_text(summary.replace('train_kl_loss', 'train_</script><b>_loss', 1))
    return folder


@pytest.mark.parametrize('others', [[], [RUN]])
def test_names_of_others_are_text_on_the_page_and_in_figures(tmp_path, others):
    folder = hostile(tmp_path)
    page, panels, text = page_of([folder, *others], tmp_path)
    kinds = [tag for tag, _ in page.tags]
    assert kinds.count('script') == 2 and kinds.count('b') == 0 and kinds.count('style') == 1
    for tag, attrs in page.tags:
        assert not {name for name in attrs if name.startswith('on') or name in ('src', 'href', 'style')}, tag
    assert HOSTILE in ''.join(page.texts['th']) and HOSTILE in ''.join(page.texts['td'])
    assert '</script><b>' in json.dumps(panels)
    [policy] = [attrs['content'] for tag, attrs in page.tags if attrs.get('http-equiv') == 'Content-Security-Policy']
    assert policy.startswith("default-src 'none'")
    for tag, source in (('style', 'style-src'), ('script', 'script-src')):
        [code] = re.findall(rf'<{tag}>(.*?)</{tag}>', text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{source} 'sha256-{digest}'" in policy
    make_report([str(folder), *map(str, others)], plot=str(tmp_path / 'figure.svg'))
    figure = (tmp_path / 'figure.svg').read_text()
    assert '<script' not in figure and '</script><b>' not in figure and '&lt;' in figure


def test_the_command_on_the_page_repeats_the_run():
    options = yaml.safe_load((RUN / 'args.yaml').read_text())
    assert options['lr_a'] != options['lr_b'] and options['model_kwargs_b']
    options['data_dir'] = str(RESULTS)
    command = shlex.split(train_command(options))
    assert command[:2] == ['timm-vpl', 'train']
    again = recipe_values(read_args(command[2:])[0])
    assert again == recipe_values(make_options(options))
    assert {name: value for name, value in options.items() if name in again} == {
        name: value for name, value in again.items() if name in options}


# Commands


def test_files_that_can_not_be_drawn(tmp_path, capsys, monkeypatch):
    def line(*argv):
        capsys.readouterr()
        assert status_of(main, ['report', RUN, *argv]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line.removeprefix('timm-vpl report: error: ')

    assert line('--plot', 'x.pdf') == '--plot x.pdf: expected a file name that ends in .png or .svg'
    assert line('--html', 'x.md') == '--html x.md: expected a file name that ends in .html or .htm'
    assert line('--plot', tmp_path / 'no' / 'x.png') == f'--plot {tmp_path}/no/x.png: no such folder'
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setattr('timm_vpl.tools.report.read_runs', lambda *args: pytest.fail('read'))
    assert line('--plot', 'x.png') == '--plot x.png: needs the package matplotlib (pip install matplotlib)'


def test_an_unfinished_run_alone_is_drawn_and_in_no_overlay(tmp_path, capsys):
    for name in ('one', 'two'):
        shutil.copytree(RUN, tmp_path / name)
        lines = (RUN / 'summary.csv').read_text().splitlines(keepends=True)
        (tmp_path / name / 'summary.csv').write_text(''.join(lines[:30 + len(name)]))
    (tmp_path / 'two' / 'args.yaml').write_text((RUN / 'args.yaml').read_text().replace('seed: 1', 'seed: 2'))
    assert main(['report', str(tmp_path / 'one'), '--plot', str(tmp_path / 'a.png')]) == 0
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    page, panels, _ = page_of([tmp_path / 'one', tmp_path / 'two'], tmp_path)
    assert panels == [] and 'Unfinished, not in any average of this report' in page.texts['h2']
    assert status_of(main, ['report', tmp_path / 'one', tmp_path / 'two', '--plot', tmp_path / 'b.png']) == 2
    assert capsys.readouterr().err.endswith(f'b.png: nothing to draw; {tmp_path}/one: 32 of 100 epochs\n')
    assert not (tmp_path / 'b.png').exists()


def test_curves_are_redrawn_at_each_validation_and_whole_after_a_resume(digits_folder, tmp_path, monkeypatch):
    drawn_rows = []

    def spy(folder, rows, options):
        drawn_rows.append([row['epoch'] for row in rows])
        plots.draw_run(folder, rows, options)

    monkeypatch.setattr(trackers, 'draw_run', spy)
    argv = [str(digits_folder), *PAIR, *SMALL, '--curves', '--epochs', '4', '--val-interval', '2', '--output',
            str(tmp_path), '--experiment', 'run']
    assert train([*argv, '--stop-epoch', '2']) == 0
    assert drawn_rows == [[0, 1], [0, 1]]
    assert train([*argv, '--resume', 'auto']) == 0
    assert drawn_rows[2:] == [[0, 1, 2, 3]] * 2
    picture = (tmp_path / 'run' / 'curves.png').read_bytes()
    run = read_run(tmp_path / 'run')
    plots.draw_run(str(tmp_path), run.rows.values(), run.options)
    assert (tmp_path / 'curves.png').read_bytes() == picture
    assert not list(tmp_path.rglob('*.tmp'))


def test_curves_never_end_a_run(tmp_path, monkeypatch, caplog):
    run = SimpleNamespace(
        output_dir=str(tmp_path / 'file' / 'run'), rows=[{'epoch': 0, 'lr_a': 1.}], options=make_options(
            {'method': 'solo', 'model_a': 'x'}))
    (tmp_path / 'file').touch()
    trackers.CurvesObserver().end(run)
    assert 'curves.png: cannot be drawn' in caplog.text
    caplog.clear()
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    caplog.set_level('INFO')
    trackers.CurvesObserver().start(run)
    trackers.CurvesObserver().end(run)
    assert [record.message for record in caplog.records] == [
        'No curves.png: it needs matplotlib (pip install matplotlib)']
