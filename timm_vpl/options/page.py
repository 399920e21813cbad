"""The page docs/options.md, made from the rows: `python -m timm_vpl.options.page > docs/options.md`."""
from collections.abc import Iterator, Sequence

from ..core.methods import METHODS
from ..core.option import ABSENT, SAME
from .commands import COMMANDS, command_parser
from .parser import Entry, OptionParser, entries_of, show
from .refused import REFUSED
from .train import build_parser

INTRO = """\
# Options

<!-- Made by `python -m timm_vpl.options.page > docs/options.md`; change the rows, not this page. -->

The options keep the names and the meaning of timm's train script; `timm-vpl train --help` lists all. A recipe
(`--config FILE`) is a flat YAML file of the same names, with `_` or `-`; the command line wins. An option that is on
or off has a form with `--no-`.

An option of each branch, marked a, b below, sets both branches. With `-a` or `-b` at its end it sets one (`--lr-a
0.005`), and wins. On the command line the form for both also wins over a recipe's value for one branch.

## From timm's train script

An `args.yaml` that timm's script wrote is a recipe, too (`-c args.yaml DIR --model-b NAME`): its `model` is the branch
that the command line does not name. Its options for folders and the device are ignored. Refused options are accepted
there if they do nothing in timm.

These options differ from timm:"""

AFTER = """\
These public commands train a pair once `--model NAME` is `--model-a NAME --model-b PARTNER` (or the other way round)
and `./distributed_train.sh 8` is `torchrun --nproc-per-node 8 train_vpl.py`: those of the documentation of timm
(SE-ResNet34, EfficientNet-B2, SE-ResNeXt-26, MobileNetV3, ResNeXt-50), ResNet strikes back A1 to A3, DeiT-B and
ConvNeXt-T. That of a ResNet50 with the JSD loss must leave out `--aug-splits 3 --split-bn --jsd`. Give `--lr-a` and
`--lr-b` where the partner needs another rate.

A branch is validated as timm validates its model: with the model's size, crop, interpolation, mean and deviation, also
from scratch. Where those of the branches differ, validation reads each image twice, and the log names the difference.
Training reads an image once, for the branch with the larger images; for the other it is resized and normalised again on
the device.

## train

Column timm: the default of timm's script, `=` where it is the same, empty where timm has no such option. Column
resume: whether a resumed run may have another value. *fixed* is refused, since it would be another run; *free* is
allowed; all others give a warning."""


def _table(*rows: Sequence[str]) -> str:
    header, *body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return '\n'.join([header, f"|{'---|' * len(rows[0])}", *body])


def _name(entry: Entry) -> str:
    if entry.row.positional:
        return f'`{entry.row.metavar}`'
    flags = ', '.join(f'`{flag}`' for flag in (*entry.row.flags, entry.flag))
    return flags + ' a, b' * (entry.side == 'both')


def _groups(parser: OptionParser) -> Iterator[tuple[str, list[Entry]]]:
    """Yield the groups of a parser's help, with the options that it shows."""
    for group in parser._action_groups:
        entries = [parser.entries[action.dest] for action in group._group_actions if action.dest in parser.entries]
        shown = [entry for entry in entries if entry.row.help and (entry.side in (None, 'both') or entry.row.own_only)]
        if shown:
            yield group.title or '', shown


def _timm(entry: Entry) -> str:
    if entry.dest in {dest for method in METHODS.values() for dest in entries_of(method.options)}:
        return ''
    return '=' if entry.row.timm is SAME else '' if entry.row.timm is ABSENT else show(entry.row.timm)


def _resume(entry: Entry) -> str:
    kind = 'fixed' if entry.dest == 'batch_size' else entry.resume
    return '' if kind == 'warned' or not entry.row.recipe else kind


def _what(entry: Entry) -> str:
    return entry.row.help + (f': {", ".join(entry.row.choices)}' if entry.row.choices else '')


def options_markdown() -> str:
    """Return the page of options: what differs from timm, and the options of each command."""
    parser = build_parser()
    others = {
        entry.flag: f'default {entry.shown}, not {show(entry.row.timm)}: {entry.row.why}'
        for _, entries in _groups(parser) for entry in entries if entry.row.timm not in (SAME, ABSENT)}
    others.update((name, f'refused, {reason}: {instead}') for name, (reason, instead) in REFUSED.items())
    parts = [INTRO, _table(('option', 'here'), *((f'`{name}`', others[name]) for name in sorted(others))), AFTER]
    for title, entries in _groups(parser):
        parts += [f'### {title}', _table(
            ('option', 'default', 'timm', 'resume', 'what'),
            *((_name(entry), entry.shown, _timm(entry), _resume(entry), _what(entry)) for entry in entries))]
    for name, (_, description) in COMMANDS.items():
        entries = [entry for _, each in _groups(command_parser(name)) for entry in each]
        parts += [f'## {name}', description, _table(
            ('option', 'default', 'what'), *((_name(entry), entry.shown, _what(entry)) for entry in entries))]
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    print(options_markdown(), end='')
