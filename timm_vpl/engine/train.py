"""Training: one start of a run, from its options to its end."""
import contextlib
import faulthandler
import logging
import os
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import torch
import yaml
from timm.models import safe_model_name
from timm.utils import get_outdir, setup_default_logging

from ..core.teacher import Teacher
from ..data.loaders import create_eval_loader
from ..data.splits import split_card
from ..errors import RunError, UsageError
from ..files import replacing
from ..options.options import recipe_values
from . import models
from .boundary import as_line
from .checkpoint import Saver
from .control import Control, Stopped
from .device import LOST, agreement, from_all, from_first, init_device, is_lost
from .environment import environment
from .evaluate import evaluate
from .log import SUMMARY, log_plan
from .loop import fit, save_recovery
from .resume import find_start, load_checkpoint, output_of, restore_ranks, resume
from .run import Run, create_run

_logger = logging.getLogger('train')


def train(args, observers: Iterable[Any] = ()) -> None:
    """Train as the options say; they come from `options.parse_args`.

    Args:
        args: Options.
        observers: Each may have methods of these names, which the first process calls: start(run), log(run, losses),
            validated(run, row), end(run); and finished(folder), whether nothing of its own is missing there.

    Raises:
        RunError: Anything went wrong; the message is one line.
        UsageError: The options can't be right.
        Stopped: A signal came.
    """
    if not logging.getLogger().handlers:
        setup_default_logging()
    options = recipe_values(args)  # as given, before device and data fill in what was not
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):
            faulthandler.enable(sys.__stderr__)  # stacks after a crash in native code
    device = init_device(args)
    if args.rank:
        logging.getLogger().setLevel(logging.ERROR)
    run = None
    try:
        start = _find_start(args)
        with agreement(args):
            checkpoint = load_checkpoint(start) if start.path else None
            run = create_run(args, device, start)
            run.observers = observers
            if checkpoint:
                resume(run, checkpoint, options)
        check_data(run)
        if from_first(args, start.auto and checkpoint is not None and args.rank == 0 and is_finished(run)):
            _logger.info(f'--resume auto: nothing to train or to export, the run in {os.path.dirname(start.path)} is '
                         f'finished; no file is changed')
            return
        with agreement(args):
            if args.rank == 0:
                open_folder(run, options, checkpoint)
        begin(run, checkpoint)
        checkpoint = None  # it may be large
        with run.control:
            fit(run)
    except Stopped:
        raise
    except Exception as e:
        lost = LOST if args.distributed and is_lost(e) else None
        place, folder = (run.place, run.output_dir) if run else ('', None)
        raise as_line(e, place, lost, folder, show=getattr(args, 'traceback', False)) from e
    finally:
        if args.distributed:
            with contextlib.suppress(RuntimeError):  # of a group that is already broken
                torch.distributed.destroy_process_group()


def _find_start(args):
    """Return where all processes begin."""
    # torchrun counts only the restarts for which a process of the same machine has failed.
    restarted = any(from_all(args, os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'))
    start = None
    with agreement(args):
        if args.rank == 0:
            start = find_start(args, restarted)
    return from_first(args, start)


def check_data(run: Run) -> None:
    """Raise UsageError in all processes if they do not see the same data."""
    facts = from_all(run.args, {
        **{f'{role} {name}': value for role, identity in run.data.items() for name, value in identity.items()},
        'number of training batches': len(run.loader_train),
        'number of validation batches': len(run.loader_eval),
    })
    for rank, other in enumerate(facts):
        for name, value in other.items():
            if value != facts[0][name]:
                if run.args.rank:
                    raise SystemExit(UsageError.exit_status)
                shown = f' ({facts[0][name]} and {value})' if isinstance(value, int) else ''
                raise UsageError(f'data: processes 0 and {rank} do not see the same {name}{shown}; each machine needs '
                                 f'the same files')


def is_finished(run: Run) -> bool:
    """Return whether the folder of a run that goes on holds all that the run would leave there."""
    folder, epochs = os.path.dirname(run.start.path), run.progress.epoch
    if epochs < run.end_epoch:
        return False
    try:
        with open(os.path.join(folder, SUMMARY), encoding='utf-8') as f:  # written after all else of an epoch
            written = any(line.startswith(f'{epochs - 1},') for line in f)
        return written and all(
            observer.finished(folder) for observer in run.observers if hasattr(observer, 'finished'))
    except (OSError, RunError, UsageError, ValueError):
        return False  # the run goes on and says why


def open_folder(run: Run, options: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
    """Make the run's folder, or enter it again, and all that writes to it.

    Args:
        run: The run.
        options: Options as given, which the folder and its checkpoints keep.
        checkpoint: The checkpoint that the run goes on from.
    """
    args, data_config = run.args, models.loader_config(run.configs)
    run.output_dir = _create_output_dir(run, data_config, options)
    run.saver = Saver(
        run.output_dir,
        run.task,
        run.optimizer,
        {**options, 'num_classes': args.num_classes, 'class_names': run.class_names, 'data_config': data_config},
        {side: models.branch_config(run.pair.branch(side), run.configs[side], run.class_names)
         for side in run.pair.sides},
        scaler=run.update.scaler,
        decreasing='loss' in args.eval_metric,
        max_history=args.checkpoint_hist,
        milestones=args.save_epochs or (),
    )
    if checkpoint and os.path.samefile(os.path.dirname(run.start.path) or '.', run.output_dir):
        run.saver.resume(checkpoint.get('saver', {}), run.start.path, checkpoint.get('epoch'))
    log_plan(run)
    run.tell('start')


def _create_output_dir(run, data_config, options) -> str:
    args, start = run.args, run.start
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'),
        args.method,
        *(safe_model_name(getattr(args, f'model_{side}')) for side in args.sides),
        str(data_config['input_size'][-1]),
    ])
    try:
        # A run of the same name is continued with --resume, never written over.
        output_dir = get_outdir(output_of(args), name, inc=not (start.path or start.auto))
        if start.path and not args.experiment:
            _logger.info(f'New folder {output_dir}: --output and --experiment continue in the old one')
        environments = _environments(output_dir) if start.path else []
        now = environment(run.device)
        environments += [now] if now not in environments[-1:] else []
        contents = {'train': split_card(run.loader_train.images), 'validation': split_card(run.loader_eval.dataset)}
        data = {**run.data, 'contents': contents}
        for name, content in (('args', options), ('data', data), ('environment', environments)):
            with replacing(os.path.join(output_dir, f'{name}.yaml')) as f:
                yaml.safe_dump(content, f, default_flow_style=False, sort_keys=name != 'data')
    except (AssertionError, OSError) as e:
        raise UsageError(f'--output {output_of(args)}: {e}') from e
    return output_dir


def _environments(output_dir: str) -> list[dict[str, Any]]:
    """Return the environments in which a run has been trained so far."""
    try:
        with open(os.path.join(output_dir, 'environment.yaml')) as f:
            found = yaml.safe_load(f)
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    return found if isinstance(found, list) else []


def begin(run: Run, checkpoint: dict[str, Any] | None) -> None:
    """Join the processes of a run that is built, and give each its own part of the checkpoint."""
    args, task = run.args, run.task
    if args.distributed:
        task.prepare_distributed(
            device_ids=[args.local_rank] if run.device.type == 'cuda' else None,
            **({'broadcast_buffers': False} if args.no_ddp_bb else {}),  # torch's default without a warning
        )
        task.train()
        size = models.loader_config(run.configs)['input_size']
        task.settle_buckets(torch.zeros(args.batch_size, *size, device=run.device), run.autocast)
    if checkpoint and run.start.epoch is None:
        restore_ranks(run, checkpoint)
    if task.teacher is not None and (run.progress.epoch, run.progress.batch) == (0, 0):
        validate_teacher(run, task.teacher)
    run.control = Control(args.distributed, args.hang_timeout, args.recovery_minutes if args.rank == 0 else 0)
    if checkpoint and not run.start.auto:
        save_recovery(run)  # so that it is this place, not a later one of the old course, that is newest


def validate_teacher(run: Run, teacher: Teacher) -> None:
    """Evaluate the frozen teacher once, on images prepared its own way, and log what it knows."""
    args = run.args
    loader = create_eval_loader(args, run.loader_eval.dataset, teacher.data_config, run.device)
    metrics = evaluate(
        lambda input: {'teacher': teacher.branch(input)[0]}, ['teacher'], loader, run.device, run.autocast,
        args.distributed)['teacher']
    _logger.info(f'Teacher: top1 {metrics["top1"]:.3f}  top5 {metrics["top5"]:.3f}')
