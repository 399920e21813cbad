"""The command line: `timm-vpl SUBCOMMAND`, `python -m timm_vpl SUBCOMMAND`, and train_vpl.py."""
import os
import sys

from . import __version__
from .errors import RunError, UsageError

USAGE = """usage: timm-vpl COMMAND [options]

commands:
  train     train a pair of timm models (timm-vpl train --help)

options:
  --help, --version
"""


def train(argv: list[str] | None = None, prog: str = 'train_vpl.py') -> int:
    """Train a pair; return the exit status: 0, 1 for a failure, 2 for a usage error, 130 for an interrupt."""
    from .options import parse_args
    args = parse_args(argv, prog)
    try:
        from .train import train  # torch and timm, once the options are known to be good
        train(args)
    except (RunError, UsageError) as e:
        print(f'{prog}: error: {e}', file=sys.stderr)
        return e.exit_status
    except KeyboardInterrupt:
        if os.environ.get('LOCAL_RANK', '0') == '0':
            print(f'{prog}: interrupted; checkpoints of completed epochs are kept', file=sys.stderr)
        return 130
    return 0


COMMANDS = {'train': train}


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
        print(f'timm-vpl: error: no command {argv[0]!r}, expected {" or ".join(COMMANDS)}', file=sys.stderr)
        return 2
    return COMMANDS[argv[0]](argv[1:], f'timm-vpl {argv[0]}')
