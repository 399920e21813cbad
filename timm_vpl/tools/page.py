"""One self-contained HTML page, with its curves and images: it loads nothing, and foreign text is escaped."""
import base64
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template

from ..text import html, one_line
from .curves import Panel
from .tables import Part, cells_of

_ASSETS = Path(__file__).resolve().parents[1] / 'assets'
_PAGE = Template('''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none'; form-action 'none'; \
img-src data:; style-src '$style_hash'; script-src '$script_hash'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
''')
_CURVES = Template('''<p class="soft">$about</p>
<div id="curves"></div>
<noscript><p>The curves need JavaScript, which is part of this page.</p></noscript>
$body
<script type="application/json" id="data">$data</script>
<script>$script</script>''')


def make_page(title: str, parts: Iterable[Part], panels: Sequence[Panel] = (), about: str = '') -> str:
    """Return the page.

    Args:
        title: Title of it.
        parts: Its parts, in HTML.
        panels: The curves, above the parts.
        about: Text above the curves, in HTML.
    """
    style, script = (_ASSETS.joinpath(f'page.{kind}').read_text(encoding='utf-8') for kind in ('css', 'js'))
    body = '\n'.join(map(_html, parts))
    if panels:
        data = [{
            **asdict(panel), 'title': one_line(panel.title), 'log': panel.is_log, 'bounds': panel.bounds,
            'lines': [{**asdict(line), 'label': one_line(line.label)} for line in panel.lines]} for panel in panels]
        text = json.dumps(data, allow_nan=False).replace('<', r'\u003c')
        body = _CURVES.substitute(about=about, body=body, data=text, script=script)
    return _PAGE.substitute(
        title=html(title), style=style, style_hash=_hash(style), script_hash=_hash(script), body=body)


def _hash(text: str) -> str:
    """Return the source expression that the Content-Security-Policy allows for the style or script."""
    return f'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'


def _html(part: Part) -> str:
    kind, content = part
    if kind == 'table':
        lines, numbers = cells_of(*content)
        marks = [' class="number"' if is_number else '' for is_number in numbers]
        rows = [
            ''.join(f'<{tag}{mark}>{cell}</{tag}>' for cell, mark in zip(line, marks, strict=True))
            for tag, line in zip(('th', *['td'] * len(lines)), lines, strict=False)]
        head, *body = (f'<tr>{row}</tr>' for row in rows)
        return '\n'.join(['<div class="wide"><table>', f'<thead>{head}</thead>', *body, '</table></div>'])
    if kind == 'ul':
        return f'<ul>{"".join(f"<li>{text}</li>" for text in content)}</ul>'
    if kind == 'figures':
        return f'<div class="images">{"".join(_figure(*figure) for figure in content)}</div>'
    return f'<{kind}>{content}</{kind}>'


def _figure(image, lines: Iterable[str]) -> str:
    """Return an image of Pillow with the lines below it."""
    stream = io.BytesIO()
    image.save(stream, 'PNG')
    data, caption = base64.b64encode(stream.getvalue()).decode(), '<br>'.join(map(html, lines))
    return f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>\n'
