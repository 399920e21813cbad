"""The command line: `timm-vpl SUBCOMMAND`, `python -m timm_vpl SUBCOMMAND`, and train_vpl.py."""
import os
import sys
from collections.abc import Callable

from . import __version__
from .core.processes import launched
from .errors import Stopped, UsageError
from .options.commands import COMMANDS, parse_command
from .options.parser import as_given
from .options.train import take_args
from .text import one_line


def train(argv: list[str] | None = None, prog: str = 'train_vpl.py') -> int:
    """Train; return the exit status: 0, 1 for a failure, 2 for a usage error, 128 + N after signal N."""
    def work():
        options = take_args(argv, prog)
        import multiprocessing  # these, torch and timm, once the options are known to be good

        from .engine.train import train
        from .tools.trackers import observers_of
        try:
            train(options, observers_of(options))
        except UsageError as e:
            raise UsageError(as_given(str(e), options.command[1])) from e
        except Stopped as e:
            if launched().rank == 0:
                print(f'{prog}: {e}', file=sys.stderr)
            for worker in multiprocessing.active_children():
                worker.terminate()  # hung ones too, or Python would wait for each of them
            raise SystemExit(_end(e.exit_status)) from None
    return _finish(prog, work)


def command(name: str, argv: list[str], prog: str) -> int:
    """Do the work of a smaller command; return the exit status."""
    def work():
        options = parse_command(name, argv, prog)
        # Here, since they import torch and timm.
        if name == 'validate':
            from .tools.validate import validate_models
            validate_models(options)
        elif name == 'predict':
            from .tools.predict import predict_images
            return predict_images(options)
        elif name == 'inspect':
            from .tools.inspect import inspect_models
            inspect_models(options)
        elif name == 'export':
            from .tools.export import export_branches
            export_branches(options)
        elif name == 'report':
            from .tools.report import make_report
            print(make_report(options.run_dirs, options.format, options.plot, options.html))
        else:
            from .tools.study import run_study
            return run_study(options)
    return _finish(prog, work)


def _finish(prog: str, work: Callable[[], int | None]) -> int:
    """Do the work of a command and return its exit status; an error becomes one line."""
    try:
        return _end(work() or 0)
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        line, status = f'{prog}: interrupted', 130
    except Exception as e:  # of this package, of another, or of user code
        from .engine.boundary import as_line
        error = as_line(e)
        line, status = f'{prog}: error: {one_line(error)}', error.exit_status
    if launched().world_size > 1:
        from .engine.peers import fail
        return fail(line, status)
    print(line, file=sys.stderr)
    return status


def _end(status: int) -> int:
    """Return the exit status, unless there are other processes: then end this one at once.

    A thread of gloo's that frees a tensor while the interpreter ends aborts the process (pytorch PR 179291).
    """
    if launched().world_size > 1:
        from .engine.peers import end
        end(status)
    return status


USAGE = """usage: timm-vpl COMMAND [options]

commands:
  train     train a pair of timm models, or one
  validate  measure the accuracy of trained models
  predict   classify images with trained models
  inspect   compare two models, or the branches of a pair, image by image
  export    write each branch as a plain timm model, and push it to the Hub
  report    compare runs
  study     train each row of a plan with each seed, and report the best
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
    if argv[0] == 'train':
        return train(argv[1:], 'timm-vpl train')
    if argv[0] in COMMANDS:
        return command(argv[0], argv[1:], f'timm-vpl {argv[0]}')
    unknown = one_line(f'unknown command {argv[0]!r}, expected {" or ".join(["train", *COMMANDS])}')
    print(f'timm-vpl: error: {unknown}', file=sys.stderr)
    return 2
