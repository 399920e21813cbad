"""The page docs/options.md, made from the rows: `python -m timm_vpl.options.page > docs/options.md`."""
from collections.abc import Iterable, Sequence

from ..core.methods import METHODS
from ..core.option import ABSENT, SAME
from .parser import entries_of, show
from .refused import REFUSED
from .train import build_parser


def _table(*rows: Sequence[str]) -> str:
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return '\n'.join([header, f"|{'---|' * len(rows[0])}", *body])


def _listed(flags: Iterable[str]) -> str:
    return ', '.join(f'`{flag}`' for flag in flags) + '.'


def options_markdown() -> str:
    """Return the page of options: those of timm, those of each branch, what may change."""
    own = {dest for method in METHODS.values() for dest in entries_of(method.options)}
    entries = [entry for entry in build_parser().entries.values() if entry.row.help]
    kept = [entry for entry in entries if entry.row.recipe and entry.side != 'both']
    free = [entry for entry in kept if entry.resume == 'free' and entry.dest != 'batch_size']
    timms = [
        entry for entry in entries
        if entry.row.timm is not ABSENT and entry.side in (None, 'both') and entry.dest not in own]
    others = {
        entry.flag: f'default {entry.shown}, not {show(entry.row.timm)}: {entry.row.why}'
        for entry in timms if entry.row.timm is not SAME}
    others.update((name, f'refused, {reason}: {instead}') for name, (reason, instead) in REFUSED.items())
    return '\n\n'.join([
        '# Options',
        '<!-- Made by `python -m timm_vpl.options.page > docs/options.md`; change the rows, not this page. -->',
        "The options keep the names and the meaning of timm's train script; `python train_vpl.py --help` lists all.\n"
        'A recipe (`--config FILE`) is a flat YAML file of the same names, with `_` or `-`; the command line wins.',
        "## Options of timm's train script",
        "An `args.yaml` that timm's script wrote is a recipe, too (`-c args.yaml DIR --model-b NAME`): its `model` is\n"
        "the branch that the command line does not name. What it says of folders and of the device is left out.\n"
        "Options that are refused pass there where they do nothing in timm.",
        'These are the same here:',
        _listed(sorted(entry.flag for entry in timms if entry.row.timm is SAME)),
        'These are not:',
        _table(('option', 'here'), *((f'`{name}`', others[name]) for name in sorted(others))),
        '## Public commands',
        'These commands train a pair once `--model NAME` is `--model-a NAME --model-b PARTNER` (or the other way\n'
        'round) and `./distributed_train.sh 8` is `torchrun --nproc-per-node 8 train_vpl.py`: those of the\n'
        'documentation of timm (SE-ResNet34, EfficientNet-B2, SE-ResNeXt-26, MobileNetV3, ResNeXt-50), ResNet strikes\n'
        'back A1 to A3, DeiT-B and ConvNeXt-T. That of a ResNet50 with the JSD loss must leave out `--aug-splits 3\n'
        '--split-bn --jsd`. Give `--lr-a` and `--lr-b` where the partner needs another rate, and see the changed\n'
        'defaults above.',
        '## Images of each branch',
        "A branch is validated as timm validates its model: with the model's size, crop, interpolation, mean and\n"
        'deviation, also from scratch. Where those of the branches differ, validation reads each image twice; the log\n'
        'says in what. Training reads an image once, for the branch with the larger images; for the other it is\n'
        'resized and normalised anew on the device.',
        '## Options of each branch',
        'Each of these sets both branches; with `-a` or `-b` at its end it sets one (`--lr-a 0.005`), and wins.\n'
        'Given on the command line, the form for both also wins over what a recipe says of one branch.',
        '\n'.join(f'- `{entry.flag}`' for entry in entries if entry.side == 'both'),
        '## Options of a run that is continued',
        'A run that goes on from a checkpoint may have other values of these without a word:',
        _listed(entry.flag for entry in free),
        'Other values of these are refused, since it would be another run:',
        _listed(entry.flag for entry in kept if entry.resume == 'fixed' or entry.dest == 'batch_size'),
        'All others may change with a warning.\n',
    ])


if __name__ == '__main__':
    print(options_markdown(), end='')
