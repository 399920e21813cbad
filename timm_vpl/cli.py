"""The command line: `timm-vpl SUBCOMMAND`, `python -m timm_vpl SUBCOMMAND`, and train_vpl.py."""
import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

from . import __version__
from .errors import RunError, UsageError, first_line
from .options.options import (
    INTERPOLATIONS,
    add_dataset_options,
    check_dataset,
    check_model_name,
    name_data_dir,
    parse_args,
    speaks,
)
from .options.parsing import ANY_NUMBER, COUNT, POSITIVE, WHOLE, KeyValues, OptionParser
from .text import one_line


def train(argv: list[str] | None = None, prog: str = 'train_vpl.py') -> int:
    """Train; return the exit status: 0, 1 for a failure, 2 for a usage error, 128 + N after signal N."""
    args = parse_args(argv, prog)

    def work():
        from .engine.control import Stopped  # torch and timm, once the options are known to be good
        from .engine.train import train
        try:
            train(args)
        except Stopped as e:
            if args.rank == 0:
                print(f'{prog}: {e}', file=sys.stderr)
            raise SystemExit(e.exit_status) from None
    return _finish(prog, work)


def export(argv: list[str], prog: str) -> int:
    """Export the branches of a trained pair; return the exit status."""
    def work():
        args = _parse(export_parser(prog), argv)
        for side in ('a', 'b'):
            if getattr(args, f'model_{side}'):
                check_model_name(f'--model-{side}', getattr(args, f'model_{side}'))
        from .tools.export import export
        export(args)
    return _finish(prog, work)


def validate(argv: list[str], prog: str) -> int:
    """Validate trained models; return the exit status."""
    def work():
        try:
            args = _validate_args(argv, prog)
        except UsageError as e:
            if speaks():
                raise
            time.sleep(2)  # torchrun ends all processes when the first ends; let the one that speaks be it
            raise SystemExit(e.exit_status) from None
        from .tools.validation import validate
        validate(args)
    return _finish(prog, work)


def _validate_args(argv: list[str], prog: str) -> argparse.Namespace:
    """Return the options of `timm-vpl validate`, checked as far as that needs no data."""
    parser = validate_parser(prog)
    args = argparse.Namespace(**{**parser.presets, **name_data_dir(parser.parse(argv))})
    args.prefetcher = not args.no_prefetcher
    if not os.path.exists(args.model):
        if os.path.dirname(args.model) and ':' not in args.model:
            raise UsageError(f'MODEL {args.model}: no such file or folder (on the Hub: hf-hub:{args.model})')
        check_model_name('MODEL', args.model)
    check_dataset(args, (args.val_split, *filter(None, [args.check_data])))
    if args.imagenet_v2:
        for flag, given in (('--class-map', args.class_map), ('--real-labels', args.real_labels is not None)):
            if given:
                raise UsageError(f'--imagenet-v2: says what the labels are, it can not go with {flag}')
    for flag, path in (('--real-labels', args.real_labels), ('--file-list', args.file_list)):
        if path and not os.path.isfile(path):
            raise UsageError(f'{flag} {path}: no such file')
    if args.results_file:
        if os.path.splitext(args.results_file)[1].lower() not in ('.csv', '.json'):
            raise UsageError(f'--results-file {args.results_file}: ends neither in .csv nor in .json')
        if not os.path.isdir(os.path.dirname(args.results_file) or '.'):
            raise UsageError(f'--results-file {args.results_file}: no such folder')
    return args


def report(argv: list[str], prog: str) -> int:
    """Print the table of several runs; return the exit status."""
    def work():
        args = _parse(report_parser(prog), argv)
        from .tools.report import report
        print(report(args.run_dirs, args.format))
    return _finish(prog, work)


def study(argv: list[str], prog: str) -> int:
    """Do the runs of a plan; return the exit status."""
    status = 0

    def work():
        nonlocal status
        args = _parse(study_parser(prog), argv)
        from .tools.study import study
        status = study(args)
    return _finish(prog, work) or status


def _finish(prog: str, work: Callable[[], None]) -> int:
    """Do the work of a command and return its exit status; an expected error becomes one line."""
    try:
        work()
    except (RunError, UsageError) as e:
        print(f'{prog}: error: {one_line(e)}', file=sys.stderr)
        return e.exit_status
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        if os.environ.get('LOCAL_RANK', '0') == '0':
            print(f'{prog}: interrupted', file=sys.stderr)
        return 130
    except Exception as e:  # of this package, of another, or of user code
        with tempfile.NamedTemporaryFile(
                'w', prefix='timm-vpl-', suffix='.txt', encoding='utf-8', errors='replace', delete=False) as file:
            traceback.print_exc(file=file)
        message = one_line(f'{type(e).__name__}: {first_line(e)}')
        print(f'{prog}: error: {message} (traceback: {file.name})', file=sys.stderr)
        return RunError.exit_status
    return 0


# The parsers of the smaller commands; that of training is in options.py.


def _parse(parser: OptionParser, argv: list[str]) -> argparse.Namespace:
    """Return all options, with their defaults where they were not given."""
    return argparse.Namespace(**{**parser.presets, **parser.parse(argv)})


def export_parser(prog: str = 'timm-vpl export') -> OptionParser:
    """Return the parser of `timm-vpl export`."""
    parser = OptionParser(
        prog=prog,
        usage='%(prog)s CHECKPOINT_OR_RUN_DIR [options]',
        description='Write each branch of a trained pair as a folder that timm loads without this package.',
    )
    add = parser.option
    parser.add_argument('source', metavar='CHECKPOINT_OR_RUN_DIR', help="checkpoint, or folder of a run: each branch's "
                        'best epoch')
    add('--branch', 'both', 'branch to export', choices=['a', 'b', 'both'])
    add('--ema', None, 'averaged weights (--no-ema: the raw ones)', shown='averaged where they were evaluated',
        action=argparse.BooleanOptionalAction)
    add('--out', None, 'folder of the exported folders', shown='export, in the folder of the run', metavar='DIR')
    add('--name-a', None, 'name of branch a', shown='the method and the architecture', metavar='NAME')
    add('--name-b', None, 'name of branch b', shown='likewise', metavar='NAME')
    add('--overwrite', False, 'replace exports that exist, edited ones too')
    add('--license', 'unknown', "licence of the weights, by the Hub's identifier", metavar='ID')
    add('--onnx', False, 'write model.onnx too, compared with torch (extra: onnx)')
    parser.section('Hugging Face Hub')
    add('--push-to', None, 'upload each branch to this organisation or user, a repository each', metavar='ORG')
    add('--private', False, 'create private repositories')
    add('--revision', None, 'branch of the repository to upload to, created if need be', shown='main', metavar='REV')
    parser.section('Weights that do not say what they belong to')
    for side in ('a', 'b'):
        add(f'--model-{side}', None, f'timm name of branch {side}', metavar='MODEL')
        add(f'--model-kwargs-{side}', {}, 'further arguments of this model', nargs='*', action=KeyValues,
            metavar='KEY=VALUE')
    add('--num-classes', None, 'number of classes', shown='that of --class-map', type=COUNT)
    add('--class-map', '', "file of the classes' names in order of their indices", metavar='FILENAME')
    _add_input_options(parser)
    return parser


def validate_parser(prog: str = 'timm-vpl validate') -> OptionParser:
    """Return the parser of `timm-vpl validate`."""
    parser = OptionParser(
        prog=prog,
        usage='%(prog)s MODEL DIR [options]',
        description='Validate trained models: loss, top-1 and top-5 accuracy.',
    )
    add = parser.option
    parser.add_argument('model', metavar='MODEL', help='folder of a run or checkpoint (both branches, raw and '
                        'averaged), exported folder, hf-hub:ID or timm name')
    add_dataset_options(parser)
    add('--val-split --split', 'validation', 'split to validate on', metavar='NAME')
    add('--num-samples', None, 'images, where the data set does not tell', type=COUNT, dest='val_num_samples')
    add('--real-labels', None, "score ImageNet's validation images by their ReaL labels too (timm's, or those of a "
        'JSON file)', nargs='?', const='', metavar='FILE')
    add('--imagenet-v2', False, 'the folders are the class numbers 0 to 999, as ImageNet-V2 has them')
    add('--file-list', None, 'validate only on the files that this file names, one a line', metavar='FILE')
    add('--per-class', None, "each class's accuracy too: the mean and the lowest on screen, all in a CSV file if one "
        'is named', nargs='?', const='', metavar='FILE')
    add('--check-data', None, 'name the images that lie in the training split too, by the content of their files; of '
        "another name than 'train' if one is given", nargs='?', const='train', metavar='SPLIT')
    parser.section('Model parameters')
    _add_input_options(parser)
    add('-b --batch-size', 256, 'images a step, of each process', type=COUNT)
    add('--channels-last', False, 'use the channels-last memory layout')
    add('--results-file', None, 'CSV or JSON file for the results', shown='validation.csv, in the folder of a run',
        metavar='FILE')
    parser.section('Device parameters')
    add('--device', None, 'device', shown='cuda, then mps, then cpu', metavar='DEVICE')
    add('--amp', False, 'run in mixed precision')
    add('--amp-dtype', 'float16', 'the lower precision', choices=['float16', 'bfloat16'])
    add('-j --workers', 4, 'processes that load data', type=WHOLE)
    add('--pin-mem', False, 'pin the memory of the loader')
    add('--no-prefetcher', False, 'do not use the prefetching loader')
    add('--local-rank --local_rank', 0, argparse.SUPPRESS, type=WHOLE)
    return parser


def report_parser(prog: str = 'timm-vpl report') -> OptionParser:
    """Return the parser of `timm-vpl report`."""
    parser = OptionParser(
        prog=prog,
        usage='%(prog)s RUN_DIR... [options]',
        description='Compare finished runs: accuracy over seeds, cost, speed of convergence.',
    )
    parser.add_argument('run_dirs', nargs='+', metavar='RUN_DIR', help='folder of a run')
    parser.option('--format', 'md', 'format of the table', choices=['md', 'json'])
    return parser


def study_parser(prog: str = 'timm-vpl study') -> OptionParser:
    """Return the parser of `timm-vpl study`."""
    parser = OptionParser(
        prog=prog,
        usage='%(prog)s PLAN.yaml [--data-dir DIR] [options]',
        description='Train each row of a plan with each seed, compare them, and say which is best.',
    )
    parser.add_argument('plan', metavar='PLAN.yaml', help='base recipe, seeds and rows (a name and options each)')
    add = parser.option
    add('--data-dir', None, "folder of images; the plan's `data` names a folder in it", metavar='DIR')
    add('--output', None, 'folder of all runs', shown='./output/study/PLAN', metavar='PATH')
    add('--jobs', 1, 'runs at a time', type=COUNT)
    add('--limit-minutes', None, 'start no run that would not end in this time', type=POSITIVE)
    add('--print-commands', False, 'print the commands of the runs that are left, one a line, and run none')
    add('--dry-run', False, 'print what the runs that are left would take, after an epoch of each row')
    return parser


def _add_input_options(parser: OptionParser) -> None:
    """Add the options that say how images are prepared, where that is not the model's own way."""
    add = parser.option
    add('--img-size', None, 'height and width of the images', shown="the model's", type=COUNT)
    add('--in-chans', None, 'channels of the images', shown="the model's", type=COUNT)
    add('--input-size', None, 'channels, height, width of the images', shown="the model's", nargs=3, type=COUNT)
    add('--crop-pct', None, 'centre crop', shown="the model's", type=POSITIVE)
    add('--mean', None, 'mean of the pixels', shown="the model's", nargs='+', type=ANY_NUMBER)
    add('--std', None, 'deviation of the pixels', shown="the model's", nargs='+', type=POSITIVE)
    add('--interpolation', '', 'interpolation', shown="the model's", choices=['', *INTERPOLATIONS], metavar='NAME')


COMMANDS = {'train': train, 'validate': validate, 'export': export, 'report': report, 'study': study}

USAGE = """usage: timm-vpl COMMAND [options]

commands:
  train     train a pair of timm models, or one
  validate  measure the accuracy of trained models
  export    write each branch as a plain timm model, and push it to the Hub
  report    compare runs
  study     train each row of a plan with each seed, and say which is best
(timm-vpl COMMAND --help)

options:
  --help, --version
"""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ('-h', '--help'):
        print(USAGE, end='')
        return 0
    if argv[0] == '--version':
        print(f'timm-vpl {__version__}')
        return 0
    if argv[0] not in COMMANDS:
        unknown = one_line(f'no command {argv[0]!r}, expected {" or ".join(COMMANDS)}')
        print(f'timm-vpl: error: {unknown}', file=sys.stderr)
        return 2
    return COMMANDS[argv[0]](argv[1:], f'timm-vpl {argv[0]}')
