"""For the time of the rebuild: the options as one flat namespace."""
from argparse import Namespace

from . import train
from .checks import check_shards, no_token, timm_model_names  # noqa: F401
from .recipes import recipe_path  # noqa: F401
from .refused import REFUSED  # noqa: F401
from .sections import INTERPOLATIONS  # noqa: F401

INPUT_OPTIONS = ('img_size', 'crop_pct', 'mean', 'std', 'interpolation')


def build_parser(prog='train_vpl.py'):
    parser = train.build_parser(prog)
    parser.presets = {dest: entry.default for dest, entry in parser.entries.items()}
    parser.how = {dest for dest, entry in parser.entries.items() if entry.row.how}
    parser.actions = lambda: parser.entries
    return parser


def mixup_active(args):
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def parse_args(argv=None, prog='train_vpl.py'):
    return train.namespace(train.parse_args(argv, prog))


def read_args(argv, prog='train_vpl.py'):
    options, given = train.read_args(argv, prog)
    return train.namespace(options), build_parser(prog), given


def recipe_values(args):
    return train.recipe_values(train.make_options(vars(args)))


def resume_command(args, folder):
    return train.resume_command(args.options, folder)


def changed_options(then, now, sides=None):
    return train.changed_options(then, now)


def options_without_effect(args: Namespace):
    return {dest for dests in train.idle_options(train.make_options(vars(args))).values() for dest in dests}
