"""Tables: as Markdown, as columns on the screen, as CSV and JSON files."""
import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError, first_line
from ..files import writing

# A page: its parts as (kind, content), where a heading ('h2', 'h3') or a paragraph ('p') is text, a list ('ul') lines,
# a table (header, rows); in HTML also code ('pre') and images ('figures': an image and the lines below it, each). All
# text is escaped for the page's format.
Part = tuple[str, Any]


def markdown_page(parts: Iterable[Part]) -> list[str]:
    """Return the lines of a page in Markdown."""
    lines: list[str] = []
    for kind, content in parts:
        if kind == 'table':
            lines += markdown_table(*content)
        else:
            marks = {'h2': '## ', 'h3': '### ', 'p': '', 'ul': '- '}
            lines += [*(f'{marks[kind]}{text}' for text in (content if kind == 'ul' else [content])), '']
    return lines


def screen_page(parts: Iterable[Part]) -> list[str]:
    """Return the lines of the same on the screen; a heading is above a table."""
    lines: list[str] = []
    for kind, content in parts:
        lines += screen_table(*content) if kind == 'table' else ['', content] if kind == 'h2' else [content]
    return lines


def cells_of(header: Iterable, rows: Iterable[Iterable]) -> tuple[list[list[str]], list[bool]]:
    """Return the cells of a table as text, the header first, and of each column whether it is of numbers."""
    lines = [['-' if cell is None else str(cell) for cell in row] for row in (header, *rows)]
    return lines, [all(re.fullmatch(r'-|[-+]?\d+(\.\d+)?', cell) for cell in column[1:])
                   for column in zip(*lines, strict=True)]


def markdown_table(header: Sequence, rows: Iterable[Iterable]) -> list[str]:
    """Return the lines of a table in Markdown, and an empty one; None is shown as a dash."""
    head, *body = (f'| {" | ".join(line)} |' for line in cells_of(header, rows)[0])
    return [head, '|' + '---|' * len(header), *body, '']


def screen_table(header: Iterable, rows: Iterable[Iterable]) -> list[str]:
    """Return the lines of a table in columns, numbers aligned to the right."""
    lines, numbers = cells_of(header, rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ['  '.join(
        cell.rjust(width) if is_number else cell.ljust(width)
        for cell, width, is_number in zip(line, widths, numbers, strict=True)).rstrip() for line in lines]


def read_csv(path: str | Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a CSV file, [] if it does not exist.

    Args:
        path: The file.
        columns: The columns that it must have, in this order; any by default.

    Raises:
        RunError: It can't be read, or has other columns.
    """
    try:
        with open(path, newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file, restval='')
            rows = list(reader)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as e:
        raise RunError(f'{path}: cannot be read ({first_line(e, 80)})') from e
    if columns and tuple(reader.fieldnames or ()) != tuple(columns):
        raise RunError(f'{path}: not a results file of timm-vpl validate, move it away; expected the columns '
                       f'{", ".join(columns)}')
    return rows


def write_rows(path: str | Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Write these columns of rows as CSV, or as JSON by the file's name; replace an old file when complete.

    Raises:
        RunError: It can't be written.
    """
    rows = [{column: row[column] for column in columns if column in row} for row in rows]
    with writing(path, newline='', encoding='utf-8', errors='backslashreplace') as file:  # names that are not text
        if str(path).lower().endswith('.json'):
            file.write(json.dumps(rows, indent=2) + '\n')
        else:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
