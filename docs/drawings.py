"""Draw how Vision Pair Learning works, as SVG for light and dark pages: `python docs/drawings.py`.

images/flow-*.svg: what a step computes, and where gradients go. images/stages-*.svg: which terms are on at which epoch,
as StageSchedule says.
"""
from pathlib import Path

from timm_vpl import StageSchedule

IMAGES = Path(__file__).parent / 'images'
THEMES = {
    'light': {
        'ink': '#1c1e21', 'soft': '#5a6068', 'edge': '#c3c8ce', 'fill': '#f4f4f5', 'a': '#0072b2', 'b': '#d55e00'},
    'dark': {
        'ink': '#e6e7e9', 'soft': '#a3a9b2', 'edge': '#4a5058', 'fill': '#1d2024', 'a': '#6cb1ff', 'b': '#ff9d5c'},
}
WIDTH, BOX_WIDTH, BOX_HEIGHT = 760, 104, 44
X = {'images': 62, 'branch': 214, 'embed': 372, 'logits': 530, 'labels': 688}  # centres
Y = {'a': 56, 'pair': 160, 'affine': 212, 'b': 286}


def box(theme, x, y, title, note='', color='edge', width=BOX_WIDTH, height=BOX_HEIGHT):
    """Return a box with its text, centred at (x, y)."""
    lines = [f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}" rx="6" '
             f'fill="{theme["fill"]}" stroke="{theme[color]}" stroke-width="1.5"/>',
             text(theme, x, y + (-2 if note else 5), title, weight='bold')]
    return lines + ([text(theme, x, y + 14, note, color='soft', size=11.5)] if note else [])


def text(theme, x, y, words, color='ink', size=13, weight='normal', anchor='middle'):
    """Return a line of text."""
    return (f'<text x="{x:g}" y="{y:g}" fill="{theme[color]}" font-size="{size}" font-weight="{weight}" '
            f'text-anchor="{anchor}">{words}</text>')


def sub(letter, index):
    """Return a letter with an index."""
    return f'{letter}<tspan dy="4" font-size="10">{index}</tspan>'


def arrow(theme, points, color='ink', dashed=False):
    """Return an arrow along points: solid forward, dashed for a gradient."""
    path = 'M' + ' L'.join(f'{x:g} {y:g}' for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ''
    return (f'<path d="{path}" fill="none" stroke="{theme[color]}" stroke-width="{2 if dashed else 1.5}"{dash} '
            f'marker-end="url(#{color})"/>')


def stop(theme, x, y):
    """Return a bar across an arrow that passes no gradient."""
    return (f'<path d="M{x - 11:g} {y:g} h22" stroke="{theme["ink"]}" stroke-width="3"/>')


def svg(theme, height, title, lines):
    """Return the file."""
    markers = [
        f'<marker id="{color}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{theme[color]}"/></marker>'
        for color in ('ink', 'a', 'b')]
    return '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif">',
        f'<title>{title}</title>', '<defs>', *markers, '</defs>', *lines, '</svg>', ''])


def flow(theme):
    """Return the drawing of a step."""
    half, apart = BOX_WIDTH / 2, 9
    lines = [*box(theme, X['images'], Y['pair'], 'images', 'one batch'),
             *box(theme, X['embed'], Y['pair'], 'contrastive', 'eq. 3 to 5', 'b'),
             *box(theme, X['logits'], Y['pair'], 'KL', 'eq. 6', 'a'),
             *box(theme, X['embed'], Y['affine'] + 17, 'P', color='b', width=34, height=26)]
    names = {'a': ('branch a', 'CNN'), 'b': ('branch b', 'transformer')}
    for side, sign in (('a', -1), ('b', 1)):
        y = Y[side]
        lines += [*box(theme, X['branch'], y, *names[side], side),
                  *box(theme, X['embed'], y, sub('h', side), 'embedding', side, 84),
                  *box(theme, X['logits'], y, sub('z', side), 'class scores', side, 84),
                  *box(theme, X['labels'], y, 'CE', 'labels, eq. ' + '12'['ab'.index(side)], side)]
        begin = X['images'] + half
        lines.append(arrow(theme, [(begin, Y['pair'] + 8 * sign), (138, Y['pair'] + 8 * sign), (138, y),
                                   (X['branch'] - half - 2, y)]))
        edges = [(X['branch'] + half, X['embed'] - 42), (X['embed'] + 42, X['logits'] - 42),
                 (X['logits'] + 42, X['labels'] - half)]
        for left, right in edges:
            lines += [arrow(theme, [(left, y - apart / 2), (right - 2, y - apart / 2)]),
                      arrow(theme, [(right, y + apart / 2), (left + 2, y + apart / 2)], side, dashed=True)]
    top, bottom = Y['pair'] - BOX_HEIGHT / 2, Y['pair'] + BOX_HEIGHT / 2
    below, above, affine = Y['a'] + BOX_HEIGHT / 2, Y['b'] - BOX_HEIGHT / 2, Y['affine'] + 17
    x, z = X['embed'], X['logits']
    lines += [
        arrow(theme, [(x, below), (x, top - 2)]), stop(theme, x, (below + top) / 2),  # h_a is led nowhere
        arrow(theme, [(x - 5, above), (x - 5, affine + 15)]), arrow(theme, [(x - 5, affine - 13), (x - 5, bottom + 2)]),
        arrow(theme, [(x + 5, bottom), (x + 5, affine - 15)], 'b', dashed=True),
        arrow(theme, [(x + 5, affine + 13), (x + 5, above - 2)], 'b', dashed=True),
        arrow(theme, [(z - 5, below), (z - 5, top - 2)]),
        arrow(theme, [(z + 5, top), (z + 5, below + 2)], 'a', dashed=True),
        arrow(theme, [(z, above), (z, bottom + 2)]), stop(theme, z, (above + bottom) / 2),
    ]
    y = 342
    lines += [
        arrow(theme, [(30, y), (66, y)]), text(theme, 74, y + 4, 'forward', size=12, anchor='start'),
        arrow(theme, [(196, y), (160, y)], 'a', dashed=True),
        text(theme, 204, y + 4, 'gradient into a', size=12, anchor='start'),
        arrow(theme, [(356, y), (320, y)], 'b', dashed=True),
        text(theme, 364, y + 4, 'gradient into b', size=12, anchor='start'),
        stop(theme, 494, y), text(theme, 513, y + 4, 'no gradient', size=12, anchor='start'),
        text(theme, 606, y + 4, 'P: affine layer', size=12, anchor='start'),
    ]
    return svg(theme, 360, 'A step of Vision Pair Learning: forward and gradients', lines)


def stages(theme, epochs=100, x=20, y=20):
    """Return the drawing of the stages."""
    schedule, left, right, top, row = StageSchedule(epochs, x, y), 190, 740, 44, 30

    def place(epoch):
        return left + (right - left) * epoch / epochs

    on = {
        'labels (CE of a and of b)': (range(epochs), 'soft', 'both learn'),
        'contrastive term': ([e for e in range(epochs) if schedule.contrastive(e)], 'b', 'b learns from a'),
        'KL term': ([e for e in range(epochs) if schedule.kl(e)], 'a', 'a learns from b')}
    lines = []
    for number in (1, 2, 3):
        own = [e for e in range(epochs) if schedule.stage(e) == number]
        begin, end = place(own[0]), place(own[-1] + 1)
        lines.append(text(theme, (begin + end) / 2, 24, f'stage {number}', weight='bold'))
        lines += [f'<path d="M{begin:g} 8 V{top + 3 * row + 6}" stroke="{theme["edge"]}"/>'] if own[0] else []
    for i, (name, (own, color, note)) in enumerate(on.items()):
        begin, end, middle = place(own[0]), place(own[-1] + 1), top + i * row + 11
        lines += [
            text(theme, left - 12, middle + 4, name, anchor='end'),
            f'<rect x="{begin:g}" y="{middle - 11}" width="{end - begin:g}" height="22" rx="4" fill="{theme["fill"]}" '
            f'stroke="{theme[color]}" stroke-width="1.5"/>',
            text(theme, (begin + end) / 2, middle + 4, note, color, size=12)]
    y_axis = top + 3 * row + 22
    lines += [text(theme, place(epoch), y_axis, f'{epoch} %', 'soft', 12) for epoch in (0, x, 100 - y, 100)]
    lines.append(text(theme, left - 32, y_axis, f'epochs, x = {x}, y = {y}', 'soft', 12, anchor='end'))
    return svg(theme, y_axis + 14, 'Stages of Vision Pair Learning: which terms are on at which epoch', lines)


def drawings():
    """Return the files: text by name."""
    return {f'{draw.__name__}-{name}.svg': draw(theme) for draw in (flow, stages) for name, theme in THEMES.items()}


if __name__ == '__main__':
    for file, content in drawings().items():
        (IMAGES / file).write_text(content, encoding='utf-8')
