"""Safe display of foreign text, such as the names of data, classes and models, versions and paths."""
import html as _html
import re
from typing import Any

MAX_LINE = 1000


def one_line(text: Any, limit: int = MAX_LINE) -> str:
    """Return text as one line that is safe to print: without control characters, shortened in the middle."""
    line = ' '.join(str(text).split())
    line = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in line)
    return line if len(line) <= limit else f'{line[:limit * 2 // 3]} ... {line[-limit // 4:]}'


def markdown(text: Any) -> str:
    """Return text unchanged if it has no meaning in Markdown or HTML, else as code.

    Renderers make links of bare addresses too, whatever is escaped in them; in code none does.
    """
    line = one_line(text)
    is_plain = re.fullmatch(r'[\w ,.:;+=/%()±-]*', line) and not re.search(r'://|www\.|\b_|_\b', line, re.IGNORECASE)
    return line if is_plain else code(line)


def html(text: Any) -> str:
    """Return text as it is shown in HTML, in an element or in a quoted attribute."""
    return _html.escape(one_line(text))


def code(text: Any) -> str:
    """Return text as code in a line of Markdown, which may be one of a table."""
    line = one_line(text).replace('|', r'\x7c')
    pad = ' ' if line[:1] in ('', '`') or line[-1:] == '`' else ''
    return f'{_fence(line, 1)}{pad}{line}{pad}{_fence(line, 1)}'


def code_block(text: str, language: str) -> list[str]:
    """Return the lines of a block of code."""
    return [f'{_fence(text, 3)}{language}', text, _fence(text, 3)]


def _fence(text: str, least: int) -> str:
    """Return a fence of more backticks than the longest run in the text."""
    return '`' * max(least, *(1 + len(run) for run in re.findall('`*', text)))
