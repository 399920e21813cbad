"""One HTML page that stands alone: no script, no address, its images in it; text of others stays text."""
import base64
import io
from collections.abc import Iterable
from typing import Any

from PIL import Image

from ..text import html

# Nothing is fetched and nothing runs, whatever the page holds.
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; color: #222 }
body { display: flex; flex-wrap: wrap; column-gap: 3rem; align-items: flex-start; background: #fff }
h1, h2, p, .images { flex: 0 0 100%; min-width: 0; margin: .5rem 0; overflow-wrap: anywhere }
section { max-width: 100%; overflow-x: auto }
table { border-collapse: collapse; font-size: 14px }
td, th { padding: .15rem 0 .15rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd }
.text { padding: .15rem .6rem .15rem 0; text-align: left; white-space: normal }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem }
figure { margin: 0 }
figure img { width: 100% }
figcaption { font-size: 13px; line-height: 1.3 }
</style>
"""


def page(title: str, parts: Iterable[Any], caption: str, figures: Iterable[tuple[Image.Image, list[str]]]) -> str:
    """Return a page: its title, parts (a line, or a table as `table` takes it), and images with lines below."""
    body = [f'<p>{html(part)}</p>' if isinstance(part, str) else table(*part) for part in parts]
    return '\n'.join([
        f'{_PAGE}<title>{html(title)}</title>', f'<h1>{html(title)}</h1>', *body, f'<h2>{html(caption)}</h2>',
        '<div class=images>', *(figure(image, lines) for image, lines in figures), '</div>', ''])


def table(title: str, header: Iterable, rows: Iterable[Iterable], texts: int) -> str:
    """Return a table whose first columns, so many, are text and the others numbers; narrow ones stand side by side."""
    lines = [f'<section><h2>{html(title)}</h2>', '<table>']
    for tag, cells in (('th', header), *(('td', row) for row in rows)):
        kinds = (f'{tag} class=text' if i < texts else tag for i in range(len(tuple(cells))))
        lines.append(f'<tr>{"".join(f"<{kind}>{html(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))}')
    return '\n'.join([*lines, '</table></section>'])


def figure(image: Image.Image, lines: Iterable[Any]) -> str:
    """Return an image with lines of text below it."""
    stream = io.BytesIO()
    image.save(stream, 'PNG')
    data, caption = base64.b64encode(stream.getvalue()).decode(), '<br>'.join(map(html, lines))
    return f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
