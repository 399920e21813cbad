"""Figures: panels of curves drawn with matplotlib, as PNG or SVG, the same bytes for the same numbers."""
import importlib.util
import math
import os
import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from ..files import writing
from ..text import one_line
from .curves import Line, Panel, run_panels, run_title

CURVES = 'curves.png'
INSTALL = 'pip install matplotlib'
WIDTH, LEFT, TOP, GAP, FOOT = 8., 0.9, 0.1, 0.55, 0.5  # inches
FONT, LABEL_FONT = 9.5, 8.5  # points
LABEL_CHARS = 36
_LETTER, _LINE = LABEL_FONT * 0.56 / 72, LABEL_FONT * 1.25 / 72  # of a label, inches
_SWATCH = 0.6  # inches from the axes to a label
_STYLE: dict[Any, Any] = {
    'font.size': FONT, 'axes.titlesize': FONT, 'axes.labelsize': FONT, 'xtick.labelsize': LABEL_FONT,
    'ytick.labelsize': LABEL_FONT, 'text.parse_math': False, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.edgecolor': '#777777', 'svg.hashsalt': 'timm-vpl', 'font.family': 'DejaVu Sans'}
_SHADES, _GREY = ('#f4f4f4', '#e7e7e7'), '#444444'


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec('matplotlib') is not None


def draw(panels: Sequence[Panel], file: IO[bytes], format: str, title: str, caption: str = '') -> Any:
    """Draw panels below each other and return the figure.

    Args:
        panels: The panels.
        file: The file.
        format: 'png' or 'svg'.
        title: Title of the figure.
        caption: A line below it.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    labels = [[_label(line, panel) for line in panel.lines] for panel in panels]
    right = _SWATCH + 0.1 + _LETTER * max(len(text) for each in labels for label in each for text in label)
    heights = [max(2.6 if panel.late or panel is panels[0] else 1.3, 0.2 + sum(map(len, each)) * _LINE)
               for panel, each in zip(panels, labels, strict=True)]
    spans = [_span_texts(panel) if panel is panels[0] else [] for panel in panels]
    strips = [0.17 * max(map(len, texts), default=0) for texts in spans]  # above the axes
    caption = textwrap.fill(caption, 108)
    width, foot = WIDTH - LEFT - right, FOOT + (0.1 + _LINE * (caption.count('\n') + 1) if caption else 0)
    height = TOP + sum(heights) + sum(strips) + GAP * len(panels) + foot
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about glyphs that the font lacks, in names
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, height), dpi=125)
        figure.text(0.1 / WIDTH, 1 - 0.1 / height, one_line(title, 90), va='top', weight='bold', size=FONT + 1)
        figure.text(0.1 / WIDTH, 0.08 / height, caption, va='bottom', size=LABEL_FONT, color=_GREY)
        top = height - TOP
        for panel, each, texts, tall, strip in zip(panels, labels, spans, heights, strips, strict=True):
            top -= GAP + strip + tall
            axes = figure.add_axes((LEFT / WIDTH, top / height, width / WIDTH, tall / height))
            _draw_panel(axes, panel, texts)
            axes.set_title(panel.title, loc='left', y=1 + strip / tall)
            axes.yaxis.set_label_coords((0.25 - LEFT) / width, 0.5)
            _write_labels(axes, panel, each, width, tall)
        axes.set_xlabel('epoch')
        figure.savefig(file, format=format, metadata={'Date': None} if format == 'svg' else {'Software': None})
    return figure


def draw_file(panels: Sequence[Panel], path: str, title: str, caption: str = '') -> None:
    """Draw into a PNG or SVG file, by its name; an old one stays until the new one is complete.

    Raises:
        RunError: It can't be written.
    """
    with writing(path, 'wb') as file:
        draw(panels, file, os.path.splitext(path)[1][1:].lower(), title, caption)


def draw_run(folder: str, rows: Iterable[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    """Draw curves.png in the folder of a run."""
    draw_file(run_panels(rows, options), os.path.join(folder, CURVES), run_title(options))


class _Wrapper(textwrap.TextWrapper):
    wordsep_re = re.compile(r'(\s+)|(?<=,)(?=\S)')  # after a comma too


def _label(line: Line, panel: Panel) -> list[str]:
    """Return the lines of a line's label: its last value, and what it is."""
    runs = f' ({line.runs})' if line.runs > 1 else ''
    return _Wrapper(LABEL_CHARS).wrap(f'{line.last:{panel.format}}{runs}  {one_line(line.label, 100)}')


def _span_texts(panel: Panel) -> list[list[str]]:
    """Return the lines of the labels of a panel's spans; none of one that is too narrow."""
    epochs = panel.spans[-1][1] - panel.spans[0][0] + 1 if panel.spans else 1
    widths = [75 * (end - start + 1) // epochs for start, end, _ in panel.spans]
    return [textwrap.wrap(text.replace(' → ', '\xa0→\xa0'), width) if width >= 8 else []
            for (_, _, text), width in zip(panel.spans, widths, strict=True)]


def _draw_panel(axes: Any, panel: Panel, span_texts: list[list[str]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
    for i, (start, end, _) in enumerate(panel.spans):
        axes.axvspan(start - 0.5, end + 0.5, color=_SHADES[i % 2], linewidth=0, zorder=0)
    for (start, end, _), texts in zip(panel.spans, span_texts, strict=False):
        axes.text((start + end) / 2, 1.02, '\n'.join(texts), transform=axes.get_xaxis_transform(), ha='center',
                  va='bottom', size=LABEL_FONT - 0.5, color=_GREY)
    for line in panel.lines:
        y = [float('nan') if y is None else y for y in line.y]
        axes.plot(line.x, y, **_style(line), label=line.label, marker='o' if len(y) <= 20 else '',
                  markersize=2 if line.thin else 3)
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.1, linewidth=0)
    if panel.is_log:
        axes.set_yscale('log')
    bottom, top = panel.bounds
    margin = 0.04 * (top - bottom or abs(top) or 1)
    highest = 100.5 if '%' in panel.unit else math.inf
    axes.set_ylim(*((bottom * 0.8, top * 1.25) if panel.is_log else (bottom - margin, min(top + margin, highest))))
    axes.set_xlim(-0.5, 0.5 + max(max([*line.x, *(end for _, end, _ in panel.spans)]) for line in panel.lines))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if panel.is_log else MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:.6g}'))
    axes.set_ylabel(panel.unit)
    axes.grid(axis='y', color='#d5d5d5', linewidth=0.6)
    axes.set_axisbelow(True)


def _style(line: Line) -> dict[str, Any]:
    dash = (0, tuple(float(length) / (1 if line.thin else 2) for length in line.dash.split())) if line.dash else '-'
    return {'color': line.color, 'linestyle': dash, 'linewidth': 0.9 if line.thin else 2,
            'alpha': 0.75 if line.thin else 1, 'solid_capstyle': 'butt'}


def _write_labels(axes: Any, panel: Panel, labels: list[list[str]], width: float, height: float) -> None:
    """Write the labels to the right of the lines' ends, without overlap, each joined to its end; sizes in inches."""
    ends = [(max(x for x, y in zip(line.x, line.y, strict=True) if y is not None), line.last) for line in panel.lines]
    to_fraction = axes.transAxes.inverted()
    places = [to_fraction.transform(axes.transData.transform(end)) for end in ends]
    centres = spread(
        [y * height for _, y in places], [len(label) * _LINE for label in labels], 0, height)
    for line, label, (x, y), centre in zip(panel.lines, labels, places, centres, strict=True):
        centre /= height
        beside = {'transform': axes.transAxes, 'clip_on': False}
        axes.plot([x, 1 + 0.05 / width, 1 + 0.25 / width], [y, y, centre], color=line.color, linewidth=0.6,
                  linestyle=':', **beside)
        axes.plot([1 + 0.25 / width, 1 + 0.52 / width], [centre, centre], **_style(line), **beside)
        axes.text(1 + _SWATCH / width, centre, '\n'.join(label), va='center', size=LABEL_FONT, linespacing=1.1,
                  **beside)


def spread(centres: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Return centres moved so that no heights overlap: up, and down again from the top.

    Args:
        centres: Wanted centres.
        heights: Height at each.
        low: Where the lowest may begin.
        high: Where the highest may end, if there is room for all.
    """
    order, moved = sorted(range(len(centres)), key=lambda i: centres[i]), list(centres)
    edge = low
    for i in order:
        moved[i] = max(moved[i], edge + heights[i] / 2)
        edge = moved[i] + heights[i] / 2
    edge = high
    for i in reversed(order):
        moved[i] = min(moved[i], edge - heights[i] / 2)
        edge = moved[i] - heights[i] / 2
    return moved
