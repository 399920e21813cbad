"""The report as one HTML page: tables, curves to zoom in, options that differ, commands, environment. No network."""
import base64
import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from ..errors import UsageError
from ..options.parser import show
from ..options.train import train_command
from ..text import html, one_line
from .curves import BAND, Panel
from .runs import Run, differing
from .tables import Part, html_page

_ASSETS = Path(__file__).resolve().parents[1] / 'assets'
_PAGE = Template('''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none'; form-action 'none'; \
style-src '$style_hash'; script-src '$script_hash'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
<p class="soft">$about</p>
<div id="curves"></div>
<noscript><p>The curves need JavaScript, which this page carries itself.</p></noscript>
$body
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body>
</html>
''')


def make_page(parts: Iterable[Part], panels: Sequence[Panel], groups: Sequence[Any], unfinished: Sequence[Run]) -> str:
    """Return the page.

    Args:
        parts: Parts of the report, in HTML.
        panels: The curves.
        groups: The groups of finished runs.
        unfinished: Further runs.
    """
    style, script = (_ASSETS.joinpath(f'report.{kind}').read_text(encoding='utf-8') for kind in ('css', 'js'))
    data = [{
        **asdict(panel), 'title': one_line(panel.title), 'log': panel.is_log, 'bounds': panel.bounds,
        'lines': [{**asdict(line), 'label': one_line(line.label)} for line in panel.lines]} for panel in panels]
    runs = [*(run for group in groups for run in group.runs), *unfinished]
    return _PAGE.substitute(
        title=html(f'Report of {len(runs)} runs' if len(runs) > 1 else runs[0].path.resolve().name),
        about=f'Drag over a figure to zoom in, double-click for all epochs; a click on a name hides its line. '
              f'{BAND if len(runs) > 1 else ""} Epochs count from 0, as in summary.csv.',
        style=style, style_hash=_hash(style), script=script, script_hash=_hash(script),
        body='\n'.join([*html_page(parts), *html_page(_run_parts(groups, runs))]),
        data=json.dumps(data, allow_nan=False).replace('<', r'\u003c'))


def _hash(text: str) -> str:
    """Return what the Content-Security-Policy calls the one style, the one script that may be."""
    return f'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'


def _command(run: Run) -> str:
    """Return the command that repeats a run: with its options, or its args.yaml where one of them can't be told."""
    try:
        return train_command(run.options)
    except UsageError:
        return shlex.join(['timm-vpl', 'train', '--config', str(run.path / 'args.yaml')])


def _run_parts(groups: Sequence[Any], runs: Sequence[Run]) -> Iterable[Part]:
    """Yield what the tables do not show: options that differ, the command and the environment of each run."""
    recipes = [group.runs[0].recipe for group in groups]
    told = [name for name in differing(*recipes) if name not in ('data', 'teacher')]
    if told:
        yield 'h2', 'Options that differ'
        yield 'table', (['Framework', 'Epochs', *map(html, told)], [
            (html(group.name), group.runs[0].num_epochs,
             *(html(show(recipe[name])) if name in recipe else None for name in told))
            for group, recipe in zip(groups, recipes, strict=True)])
    yield 'h2', 'Commands'
    yield 'p', 'Options at their defaults are left out.'
    for run in runs:
        yield 'p', f'{html(run.path)}: {html(run.framework)}, seed {html(run.options.get("seed"))}'
        yield 'pre', html(_command(run))
    environments: dict[str, tuple[dict, list[Run]]] = {}
    for run in runs:
        for environment in run.environment:
            environments.setdefault(repr(environment), (environment, []))[1].append(run)
    names = list(dict.fromkeys(name for environment, _ in environments.values() for name in environment))
    if names:
        yield 'h2', 'Environment'
        yield 'table', (['Runs', *map(html, names)], [
            (f'{len(within)} of {len(runs)}', *(html(environment.get(name, '-')) for name in names))
            for environment, within in environments.values()])
