"""The report: finished runs side by side, differences paired by seed, as Markdown (the paper's tables) or JSON."""
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from statistics import fmean, median, stdev
from types import MappingProxyType
from typing import Any

from ..core.methods import METHODS
from ..errors import UsageError
from ..files import writing
from ..options.parser import show
from ..options.train import METHOD_OPTIONS, train_command
from ..text import html as as_html
from ..text import markdown
from .comparison import paired_difference
from .curves import BAND, group_panels, run_panels, run_title
from .page import make_page
from .plots import INSTALL, can_plot, draw_file
from .runs import COSTS, Run, data_title, differing, make_recipe, own_options, read_run, terms_off
from .tables import Part, markdown_page

METRICS = {'top1': 'top-1', 'top5': 'top-5'}
_SET_TITLES = {'real': 'ReaL', 'v2': 'V2'}
COLLAPSED = 2 / 3  # of the median of its row: a run below it counts as collapsed
SAME_COST = 0.1  # relative difference of FLOPs that counts as the same


def make_report(run_dirs: Sequence[str], format: str = 'md', plot: str | None = None, html: str | None = None) -> str:
    """Return the comparison of runs as text, and draw it.

    Runs that agree in all options that count are a group and averaged. Unfinished runs are listed, but not averaged.
    Paths of the same run, and copies of it, count once.

    Args:
        run_dirs: Folders of runs.
        format: 'md'; or 'json' for a record a branch of a group, with numbers that are not rounded.
        plot: PNG or SVG file for the curves: those of the groups; of one run alone, as its curves.png.
        html: HTML file for all results.

    Raises:
        UsageError: A folder is not that of a run, or none is given; matplotlib is missing.
        RunError: A file can't be read or written.
    """
    if plot and not can_plot():
        raise UsageError(f'--plot {plot}: needs the package matplotlib ({INSTALL})')
    runs = read_runs(run_dirs)
    unfinished = [run for run in runs if run.progress]
    groups = make_groups(run for run in runs if not run.progress)
    records = make_records(groups)
    alone = runs[0] if len(runs) == 1 and runs[0].rows else None
    panels = run_panels(alone.rows.values(), alone.options) if alone else group_panels(groups)
    if plot and not panels:
        raise UsageError(f'--plot {plot}: nothing to draw; {runs[0].path}: {runs[0].progress}')
    if plot:
        title = run_title(alone.options) if alone else '; '.join(dict.fromkeys(record['data'] for record in records))
        draw_file(panels, plot, title, '' if alone else BAND)
    if html:
        page = make_page(
            runs[0].path.resolve().name if len(runs) == 1 else f'Report of {len(runs)} runs',
            [*report_parts(records, unfinished, as_html), *_run_parts(groups, runs)],
            panels if alone else panels + group_panels(groups, further=True),
            f'Drag over a figure to zoom in, double-click for all epochs; a click on a name hides its line. '
            f'{"" if alone else BAND} Epochs count from 0, as in summary.csv.')
        with writing(html, encoding='utf-8') as file:
            file.write(page)
    if format == 'md':
        return to_markdown(records, unfinished)
    return json.dumps([*records, *(
        {'framework': run.framework, 'runs': [str(run.path)], 'n': 0, 'unfinished': run.progress}
        for run in unfinished)], indent=2)


def read_runs(run_dirs: Sequence[str]) -> list[Run]:
    """Return the runs of these folders, each once.

    Raises:
        UsageError: No folder is given, or one is not that of a run.
    """
    if not run_dirs:
        raise UsageError('no run folder is given')
    runs: dict[Any, Run] = {}
    for path in dict.fromkeys(map(Path, run_dirs)):
        run = read_run(path)
        runs.setdefault(repr((run.options, run.rows)) if run.rows else path.resolve(), run)
    return list(runs.values())


# Groups


@dataclass
class Group:
    """Finished runs of one recipe; `name` distinguishes it from other groups of the same models, data and epochs."""
    runs: list[Run]
    name: str = ''

    def __post_init__(self):
        self.run = self.runs[0]  # its recipe is that of all
        self.method = self.run.options['method']
        self.place = self.run.framework, self.run.models, self.run.recipe['data'], self.run.num_epochs

    def total(self, cost: str) -> Any:
        """Return the mean cost of the runs; None if one is not known."""
        return _mean([run.total(cost) for run in self.runs])


def make_groups(runs: Iterable[Run], names: Mapping[str, str] = MappingProxyType({})) -> list[Group]:
    """Return the groups of runs in the order of the report; equal names are completed by the options that differ.

    Args:
        runs: The runs.
        names: Names of groups, by the folder of a run in them.
    """
    groups: list[Group] = []
    for run in runs:
        found = [group.runs for group in groups if group.run.recipe == run.recipe]
        if found:
            found[0].append(run)
        else:
            groups.append(Group([run]))
    for group in groups:
        run = group.run
        alike = [other.run.recipe for other in groups if other.place == group.place]
        # Options that another one switches off are left out, if that one distinguishes the groups.
        named = {name for name in differing(*alike)
                 if len({repr(recipe[name]) for recipe in alike if name in recipe}) > 1}
        shown = [{name: recipe.get(name) for name in named} for recipe in alike]
        if any(shown.count(each) > 1 for each in shown):
            named = {*differing(*alike)}
        values = {**run.recipe, 'teacher': run.options.get('teacher')}
        parts = ', '.join(
            f'{name}={show(values.get(name))}'
            for name in sorted({*own_options(run), *named}.difference(terms_off(run))))
        group.name = names.get(str(run.path)) or (f'{run.framework} ({parts})' if parts else run.framework)
    order = {method: i for i, method in enumerate(dict.fromkeys(['solo', *METHODS]))}
    return sorted(groups, key=lambda group: (
        data_title(group.run), group.run.num_epochs, order.get(group.method, len(order))))


# Differences to training alone


def _baselines(group: Group, index: int, groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Return the baselines of a branch: solo runs of the same epochs, and of the same training FLOPs.

    They have the same model and data; of several groups, the one with the fewest further options that differ, and of
    the same FLOPs (within SAME_COST, whatever the epochs) the nearest.
    """
    run, flops = group.run, group.total('flops')
    recipe = {**run.recipe, **make_recipe(run.options, (run.sides[index],), run.teacher)}
    found: dict[str, list[tuple]] = {'epochs': [], 'flops': []}
    for solo in groups if group.method != 'solo' else ():
        names = [
            name for name in differing(recipe, solo.run.recipe)
            if name not in (*METHOD_OPTIONS, 'method', 'branch') and not name.endswith(('_a', '_b'))]
        if solo.method != 'solo' or {'data', 'model'}.intersection(names):
            continue
        further = [name for name in names if name not in ('epochs', 'num_epochs')]
        if 'num_epochs' not in names:
            found['epochs'].append((len(names), 0, further, solo))
        distance = abs((solo.total('flops') or 0) / flops - 1) if flops else 1
        if distance <= SAME_COST:
            found['flops'].append((len(further), distance, further, solo))
    return {
        kind: _baseline(group, index, *min(solos, key=lambda found: found[:2])[2:])
        for kind, solos in found.items() if solos}


def _baseline(group: Group, index: int, differs: list[str], solo: Group) -> dict[str, Any]:
    """Return the difference of a branch to its model alone, by runs of the same seed, data and environment."""
    by_seed = {(run.options.get('seed'), run.pairing): run for run in solo.runs if run.pairing}
    pairs = [
        (run, run.sides[index], by_seed[key]) for run in group.runs
        if (key := (run.options.get('seed'), run.pairing)) in by_seed]
    found = {'name': solo.name, 'num_epochs': solo.run.num_epochs, 'differs': differs, 'reason': '', 'text': '-'}
    if not pairs:
        seeds = [{str(run.options.get('seed')) for run in each.runs} for each in (group, solo)]
        listed = ' and '.join(', '.join(sorted(each)) for each in seeds)
        return {**found, 'reason': f'no common seed ({listed})' if not seeds[0] & seeds[1] else (
            'environment or data of the common seeds differ, or are not known')}
    gains = [_last(run, side) - _last(alone) for run, side, alone in pairs]
    target = fmean(_last(alone) for *_, alone in pairs)
    means = {epoch: [run.figure(side, epoch) for run, side, _ in pairs] for epoch in pairs[0][0].rows}
    # The cost until the mean of the branches reaches the final mean of their models alone.
    reached = next((
        epoch + 1 for epoch, values in means.items() if None not in values and fmean(values) >= target - 1e-9), None)
    difference = paired_difference(gains)
    return {
        **found, **asdict(difference), 'text': str(difference), 'gains': gains, 'solo_top1': target,
        'reached_epochs': reached,
        **{f'solo_{cost}': _mean([alone.total(cost) for *_, alone in pairs]) for cost in ('flops', 'seconds')},
        **{f'reached_{cost}': reached and _mean([run.total(cost, reached) for run, *_ in pairs])
           for cost in ('flops', 'seconds')}}


def _last(run: Run, side: str | None = None) -> float:
    return run.figure(side or run.sides[0], run.num_epochs - 1)


def _mean(values: list[Any]) -> Any:
    return None if None in values else fmean(values)


# Records


def make_records(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return a record a branch of a group."""
    return [_record(group, index, groups) for group in groups for index in range(len(group.run.sides))]


def _record(group: Group, index: int, groups: Sequence[Group]) -> dict[str, Any]:
    branches = [(run, run.sides[index]) for run in group.runs]  # a solo model may be a in one run, b in another
    run, side = branches[0]
    best = [run.best_epoch(side) for run, side in branches]
    last = [run.num_epochs - 1] * len(best)
    sets = dict.fromkeys(name for run in group.runs for name in run.sets)
    figures = {
        f'{title}{_SET_TITLES.get(set_, set_)} {METRICS[metric]}': figure
        for (title, epochs), set_, metric in product((('', last), ('best ', best)), sets, METRICS)
        if not (title and metric == 'top5') and (figure := _figure(branches, epochs, set_, metric))}
    return {
        'framework': group.name, 'method': group.method,
        **{name: run.options.get(name) or None for name in ('model_a', 'model_b')},
        'branch': side, 'model': run.models[index], 'data': data_title(run), 'num_epochs': run.num_epochs,
        'weights': run.weights, 'processes': run.processes, 'n': len(group.runs),
        'seeds': [run.options.get('seed') for run in group.runs],
        'subsets': len({repr(run.data.get('train')) for run in group.runs}) > 1,
        'runs': [str(run.path) for run in group.runs],
        'figures': figures, 'top1': figures[f'{_SET_TITLES.get(run.val_set, run.val_set)} {METRICS["top1"]}'],
        'best_epochs': best, **{cost: group.total(cost) for cost in COSTS},
        'teacher_flops': _mean([run.teacher and run.teacher.total('flops') for run in group.runs]),
        'baselines': _baselines(group, index, groups)}


def _figure(branches: list[tuple[Run, str]], epochs: list[int], set_: str, metric: str) -> dict[str, Any] | None:
    """Return mean, deviation, median and collapsed runs of a figure, over the runs that have it."""
    found = [run.figure(side, epoch, set_, metric) for (run, side), epoch in zip(branches, epochs, strict=True)]
    values = [value for value in found if value is not None]
    if not values:
        return None
    middle = median(values)
    return {
        'mean': fmean(values), 'std': stdev(values) if len(values) > 1 else None, 'n': len(values), 'median': middle,
        'collapsed': sum(value < COLLAPSED * middle for value in values)}


# Pages


def to_markdown(records: list[dict[str, Any]], unfinished: list[Run]) -> str:
    """Return the page of tables: for each data set accuracy, each branch, cost and convergence."""
    return '\n'.join(markdown_page(report_parts(records, unfinished, markdown))).rstrip('\n')


def report_parts(
        records: list[dict[str, Any]], unfinished: list[Run], safe: Callable[[Any], str]) -> Iterator[Part]:
    """Yield the parts of the page.

    Args:
        records: The records.
        unfinished: Runs that are not finished.
        safe: Escapes foreign text in the page's format.
    """
    records = [_safe(record, safe) for record in records]
    for data, of_data in groupby(records, key=lambda r: r['data']):  # which they are sorted by
        groups = [list(branches) for _, branches in groupby(of_data, key=lambda r: r['runs'])]
        yield 'h2', data
        yield from _tables(groups, [r for branches in groups for r in branches], safe)
    if unfinished:
        yield 'h2', 'Unfinished, not in any average of this report'
        yield 'table', (['Run', 'Framework', 'Models', 'Progress'], [
            (*map(safe, (run.path, run.framework, ' + '.join(run.models))), run.progress) for run in unfinished])
    if records:
        yield 'h2', 'Notes'
        yield 'ul', [*_NOTES, *dict.fromkeys(note for record in records for note in _notes(record, safe))]


def _safe(record: dict[str, Any], safe: Callable[[Any], str]) -> dict[str, Any]:
    """Return a record whose names are safe in a page, with its cells of the first columns."""
    names = {name: safe(record[name]) for name in ('framework', 'model', 'data')}
    models = ' + '.join(safe(record[name]) for name in ('model_a', 'model_b') if record[name])
    return {**record, **names, 'place': (record['num_epochs'], names['framework'], models)}


def _tables(groups: list[list[dict]], rows: list[dict], safe: Callable[[Any], str]) -> Iterator[Part]:
    """Yield the tables of a data set: of its groups, and of all their branches."""
    place = ('Epochs', 'Framework', 'Models')
    models = list(dict.fromkeys(r['model'] for r in sorted(rows, key=lambda r: r['branch'])))
    yield 'p', 'Top-1 (percent) of the last epoch, mean ± standard deviation (runs).'
    yield 'table', ([*place, *models], [
        (*branches[0]['place'],
         *(' / '.join(str(_shown(r['top1'])) for r in branches if r['model'] == name) or None for name in models))
        for branches in groups])
    names = dict.fromkeys(name for best in (False, True) for r in rows for name in r['figures']
                          if name.startswith('best ') == best)
    yield 'h3', 'Each branch'
    yield 'table', (
        [*place, 'Model', 'Weights', *map(safe, names), 'median (collapsed)', 'best epoch', 'Δ solo, same epochs',
         'Δ solo, same FLOPs'],
        [(*r['place'], r['model'], r['weights'], *(_shown(r['figures'].get(name)) for name in names),
          f'{r["top1"]["median"]:.2f} ({r["top1"]["collapsed"]})', ', '.join(map(str, r['best_epochs'])),
          *(r['baselines'].get(kind, {}).get('text') for kind in ('epochs', 'flops')))
         for r in sorted(rows, key=lambda r: (r['num_epochs'], models.index(r['model'])))])
    yield 'h3', 'Cost'
    yield 'table', (
        [*place, 'Processes', 'FLOPs', 'Image-passes', 'Time', 'Time an epoch', 'Device-hours', "Time / solo's"],
        [(*branches[0]['place'], *_costs(branches)) for branches in groups])
    reached = [
        (*r['place'], r['model'], f'{solo["solo_top1"]:.2f}', solo['reached_epochs'] or 'not reached',
         *(scale(solo[f'{who}_{cost}']) for who in ('reached', 'solo')
           for cost, scale in (('flops', _count), ('seconds', _time))))
        for r in rows if 'solo_top1' in (solo := r['baselines'].get('epochs', {}))]
    if reached:
        yield 'h3', "Until solo's final top-1"
        yield 'table', ([
            *place, 'Model', "Solo's top-1", 'After epochs', 'FLOPs', 'Time', "Solo's FLOPs", "Solo's time"], reached)


def _costs(branches: list[dict[str, Any]]) -> tuple:
    r = branches[0]
    seconds, hours = r['seconds'], r['device_hours']
    solos = [branch['baselines'].get('epochs', {}).get('solo_seconds') for branch in branches]
    return (
        ' then '.join(map(str, r['processes'])), _count(r['flops']), _count(r['image_passes']), _time(seconds),
        _time(seconds and seconds / r['num_epochs']), hours and (f'{hours:.2f}' if hours >= 1 else f'{hours:.3g}'),
        f'{seconds / sum(solos):.2f}' if all((seconds, *solos)) else None)


_NOTES = (
    'The best epoch (counted from 0, as in summary.csv) has the highest top-1 on the evaluation set itself, which '
    'overestimates it: compare last epochs.',
    f'Collapsed: below {COLLAPSED:.0%} of the median of its row.',
    'FLOPs: forward and backward of training as torch counts them, with the forward of a frozen teacher, without its '
    'training. An image-pass is one image through one network, forward, whatever its size.',
    'Time is that of training, without validation and without the training of a frozen teacher. Device-hours are '
    'time x processes: GPU hours, where each process has a GPU.',
    'Δ solo: points above the same model alone, by the seeds that both have, on the same data in the same environment: '
    'mean [95 % t interval] (seeds, p of the sign-flip test from 6 seeds on). Same FLOPs: a solo run that costs what '
    f"the whole pair costs, within {SAME_COST:.0%}, whatever its epochs. Time / solo's: 1 is to train each branch "
    "alone, one after the other. Until solo's final top-1: by the means over the same seeds.")


def _notes(r: dict[str, Any], safe: Callable[[Any], str]) -> Iterator[str]:
    """Yield the notes on a record."""
    what = f'{r["framework"]}, {r["model"]}, {r["num_epochs"]} epochs'
    for kind, baseline in r['baselines'].items():
        name, differs = safe(baseline['name']), ', '.join(baseline['differs'])
        if differs:
            yield f'{what}: its baseline of the same {kind}, {name}, differs in {safe(differs)}.'
        if baseline['reason']:
            yield f'{what}: no difference to {name}: {safe(baseline["reason"])}.'
    if r['teacher_flops']:
        yield f'{what}: the training of its teacher took {_count(r["teacher_flops"])} more FLOPs.'
    if len(set(r['seeds'])) < r['n']:
        yield f'{what}: the seeds are not all different ({safe(", ".join(map(str, r["seeds"])))}).'
    if r['subsets']:
        yield f'{r["data"]}: the seeds are trained on different images.'


def _run_parts(groups: Sequence[Group], runs: Sequence[Run]) -> Iterator[Part]:
    """Yield in HTML the details: options that differ, the command and the environment of each run."""
    named = [name for name in differing(*(group.run.recipe for group in groups)) if name not in ('data', 'teacher')]
    if named:
        yield 'h2', 'Options that differ'
        yield 'table', (['Framework', 'Epochs', *map(as_html, named)], [
            (as_html(group.name), group.run.num_epochs,
             *(as_html(show(group.run.recipe[name])) if name in group.run.recipe else None for name in named))
            for group in groups])
    yield 'h2', 'Commands'
    yield 'p', 'Options at their defaults are left out.'
    for run in runs:
        yield 'p', f'{as_html(run.path)}: {as_html(run.framework)}, seed {as_html(run.options.get("seed"))}'
        yield 'pre', as_html(_command(run))
    names = list(dict.fromkeys(name for run in runs for environment in run.environment for name in environment))
    if names:
        rows = [row for run in runs for row in {
            tuple(as_html(environment.get(name, '-')) for name in names): None for environment in run.environment}]
        yield 'h2', 'Environment'
        yield 'table', (['Runs', *map(as_html, names)], [
            (f'{rows.count(row)} of {len(runs)}', *row) for row in dict.fromkeys(rows)])


def _command(run: Run) -> str:
    """Return the command that repeats a run: with its options, or its args.yaml if one of them is not known."""
    try:
        return train_command(run.options)
    except UsageError:
        return shlex.join(['timm-vpl', 'train', '--config', str(run.path / 'args.yaml')])


def _shown(figure: dict[str, Any] | None) -> str | None:
    if figure is None:
        return None
    deviation = '' if figure['std'] is None else f' ± {figure["std"]:.2f}'
    return f'{figure["mean"]:.2f}{deviation} ({figure["n"]})'


def _scaled(value: float | None, units: tuple) -> str | None:
    if value is None:
        return None
    size, unit = next((step for step in units if value >= step[0]), units[-1])
    return f'{value / size:.2f}{unit}'


def _count(value: float | None) -> str | None:
    return _scaled(value, ((1e18, ' E'), (1e15, ' P'), (1e12, ' T'), (1e9, ' G'), (1e6, ' M'), (1e3, ' k'), (1, '')))


def _time(seconds: float | None) -> str | None:
    return _scaled(seconds, ((3600, ' h'), (60, ' min'), (1, ' s')))
