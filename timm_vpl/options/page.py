"""The page docs/options.md, made from the rows: `python -m timm_vpl.options.page > docs/options.md`."""
from collections.abc import Iterable, Sequence

from ..core.option import SAME
from .parser import show
from .refused import REFUSED
from .train import build_parser


def _table(*rows: Sequence[str]) -> str:
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return '\n'.join([header, f"|{'---|' * len(rows[0])}", *body])


def _listed(flags: Iterable[str]) -> str:
    return ', '.join(f'`{flag}`' for flag in flags) + '.'


def options_markdown() -> str:
    """Return the page of options: changed defaults, refused options, options of each branch, what may change."""
    entries = [entry for entry in build_parser().entries.values() if entry.row.help]
    kept = [entry for entry in entries if entry.row.recipe and entry.side != 'both']
    free = [entry for entry in kept if entry.resume == 'free' and entry.dest != 'batch_size']
    changed = [
        (f'`{entry.flag}`', entry.shown, show(entry.row.timm), entry.row.why)
        for entry in entries if entry.row.timm is not SAME and entry.side in (None, 'both')]
    return '\n\n'.join([
        '# Options',
        '<!-- Made by `python -m timm_vpl.options.page > docs/options.md`; change the rows, not this page. -->',
        "The options keep the names and the meaning of timm's train script; `python train_vpl.py --help` lists all.\n"
        'A recipe (`--config FILE`) is a flat YAML file of the same names, with `_` or `-`; the command line wins.',
        "## Defaults that differ from timm's",
        _table(('option', 'here', 'timm', 'why'), *changed),
        '## Options of each branch',
        'Each of these sets both branches; with `-a` or `-b` at its end it sets one (`--lr-a 0.005`), and wins.\n'
        'Given on the command line, the form for both also wins over what a recipe says of one branch.',
        '\n'.join(f'- `{entry.flag}`' for entry in entries if entry.side == 'both'),
        '## Options of timm that are refused',
        _table(('option', 'reason', 'instead'), *((f'`{name}`', *advice) for name, advice in REFUSED.items())),
        '## Options of a run that is continued',
        'A run that goes on from a checkpoint may have other values of these without a word:',
        _listed(entry.flag for entry in free),
        'Other values of these are refused, since it would be another run:',
        _listed(entry.flag for entry in kept if entry.resume == 'fixed' or entry.dest == 'batch_size'),
        'All others may change with a warning.\n',
    ])


if __name__ == '__main__':
    print(options_markdown(), end='')
