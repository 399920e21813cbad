"""Training: one start of a run, from its options to its end."""
import contextlib
import faulthandler
import logging
import os
import sys
from collections.abc import Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import safe_model_name
from timm.utils import get_outdir

from ..bars import set_output
from ..core.teacher import Teacher
from ..data.loaders import create_eval_loader
from ..data.splits import split_card
from ..errors import RunError, Stopped, UsageError
from ..files import is_temporary, replacing
from ..options.train import Options, recipe_values
from . import models, peers
from .boundary import as_line, refusing
from .checkpoint import Saver
from .control import Control, Stalled
from .device import by_first, from_all, init_device, is_lost
from .environment import environment
from .evaluate import evaluate
from .log import SUMMARY, log_plan
from .loop import fit, give_up, save_recovery, stop_here, try_validation
from .owner import Owner
from .resume import find_start, load_checkpoint, output_of, restore_ranks, resume
from .run import Run, create_run

_logger = logging.getLogger('train')


@peers.together()
def train(options: Options, observers: Iterable[Any] = ()) -> None:
    """Train by the options, which come from `options.parse_args`.

    Args:
        options: Options.
        observers: Each may have methods of these names, which the first process calls: start(run); updated(run), after
            each update; log(run, figures), every --log-interval; validated(run, row), after each epoch; end(run);
            close(run), however the run ends; and finished(folder), whether its output there is complete.

    Raises:
        RunError: Anything went wrong; the message is one line.
        UsageError: The options are invalid.
        Stopped: A signal came.
    """
    set_output(options.run.quiet, options.run.no_progress)
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):
            faulthandler.enable(sys.__stderr__)  # stacks after a crash in native code
    run, owner, failed = None, Owner(), False
    processes = init_device(options.device.device, options.loader.workers, options.run.deterministic)
    set_output(options.run.quiet, options.run.no_progress, processes.rank == 0)
    try:
        start = find_start(options, processes, owner)
        checkpoint = load_checkpoint(start) if start.path else None
        run = create_run(options, processes, start)
        run.observers = observers
        if checkpoint:
            resume(run, checkpoint)
        check_data(run)
        if by_first(processes, lambda: start.auto and checkpoint is not None and is_finished(run)):
            _logger.info(
                f'--resume auto: nothing to do, the run in {os.path.dirname(start.path)} is finished; no file is '
                f'changed')
            return
        try_validation(run)
        run.output_dir = by_first(processes, lambda: open_folder(run, checkpoint, owner))
        begin(run, checkpoint)
        checkpoint = None  # it may be large
        with run.control:
            try:
                fit(run)
            except Stalled as e:
                stop_here(run, str(e))
    except Stopped:
        raise
    except Exception as e:
        failed = processes.distributed  # then the message comes first, and ends the processes
        place, folder = (run.place, run.output_dir) if run else ('', None)
        lost = peers.LOST if failed and is_lost(e) else None
        raise as_line(e, place, lost, folder, show=options.run.traceback) from e
    finally:
        if not failed:
            if run is not None:
                run.notify('close')
            owner.release()


def check_data(run: Run) -> None:
    """Raise UsageError in all processes if their data differ."""
    facts: dict[str, Any] = {
        f'{role} {name}': value for role, identity in run.data.items() for name, value in identity.items()}
    facts['number of training batches'] = len(run.loader_train)
    facts['number of validation batches'] = len(run.loader_eval)
    everywhere = from_all(run.processes, facts)
    for rank, other in enumerate(everywhere):
        for name, value in everywhere[0].items():
            if value != other[name]:
                shown = f' ({value} and {other[name]})' if isinstance(value, int) else ''
                raise UsageError(f'data: processes 0 and {rank} do not see the same {name}{shown}; each machine needs '
                                 f'the same files')


def is_finished(run: Run) -> bool:
    """Return whether the folder of a resumed run already contains all output of the run."""
    folder, epochs = os.path.dirname(run.start.path), run.progress.epoch
    if epochs < run.end_epoch or any(map(is_temporary, os.listdir(folder))):
        return False
    try:
        with open(os.path.join(folder, SUMMARY), encoding='utf-8') as f:  # written after all else of an epoch
            written = any(line.startswith(f'{epochs - 1},') for line in f)
        return written and all(
            observer.finished(folder) for observer in run.observers if hasattr(observer, 'finished'))
    except (OSError, RunError, UsageError, ValueError):
        return False  # the run continues and reports the reason


def open_folder(run: Run, checkpoint: dict[str, Any] | None, owner: Owner) -> str:
    """Make the run's folder, or reopen it, with all that writes to it; return the folder.

    Args:
        run: The run.
        checkpoint: The checkpoint that the run resumes from.
        owner: The ownership of the folder.
    """
    data_config, recipe = models.loader_config(run.configs), recipe_values(run.options)
    run.output_dir = _create_output_dir(run, data_config, recipe, owner)
    run.saver = Saver(
        run.output_dir,
        run.task,
        run.optimizer,
        {**recipe, 'num_classes': run.pair.num_classes, 'class_names': run.class_names, 'data_config': data_config},
        {side: models.branch_config(run.pair.branch(side), run.configs[side], run.class_names)
         for side in run.pair.sides},
        scaler=run.update.scaler,
        decreasing='loss' in run.options.run.eval_metric,
        max_history=run.options.run.checkpoint_hist,
        milestones=run.options.run.save_epochs or (),
        check=owner.check,
    )
    if checkpoint and os.path.samefile(os.path.dirname(run.start.path) or '.', run.output_dir):
        run.saver.resume(checkpoint.get('saver', {}), run.start.path, checkpoint.get('epoch'))
    log_plan(run)
    run.notify('start')
    return run.output_dir


def _create_output_dir(run, data_config, recipe, owner) -> str:
    options, start = run.options, run.start
    name = options.run.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'),
        options.method,
        *(safe_model_name(options.branches[side].model) for side in options.sides),
        str(data_config['input_size'][-1]),
    ])
    with refusing(f'--output {output_of(options)}', AssertionError, OSError):
        # A run of the same name is continued with --resume, never written over.
        output_dir = get_outdir(output_of(options), name, inc=not (start.path or start.auto))
        owner.claim(output_dir)
        if start.path and not options.run.experiment:
            _logger.info(f'New folder {output_dir}: give --output and --experiment to continue in the old one')
        contents = {'train': split_card(run.loader_train.images), 'validation': split_card(run.loader_eval.dataset)}
        if run.class_weights is not None:
            names = run.class_names or map(str, range(run.pair.num_classes))
            weights = [round(weight, 6) for weight in run.class_weights.tolist()]
            contents['train']['class_weights'] = dict(zip(names, weights, strict=False))
        data = {**run.data, 'contents': contents}
        environments = _environments(output_dir) if start.path else []
        now = environment(run.device)
        environments += [now] if now not in environments[-1:] else []
        for name, content in (('args', recipe), ('data', data), ('environment', environments)):
            with replacing(os.path.join(output_dir, f'{name}.yaml')) as f:
                yaml.safe_dump(content, f, default_flow_style=False, sort_keys=name != 'data')
    return output_dir


def _environments(output_dir: str) -> list[dict[str, Any]]:
    """Return the environments in which a run has been trained so far."""
    try:
        found = yaml.safe_load(Path(output_dir, 'environment.yaml').read_text())
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    return found if isinstance(found, list) else []


def begin(run: Run, checkpoint: dict[str, Any] | None) -> None:
    """Join the processes of a built run, and give each its part of the checkpoint."""
    options, processes, task = run.options, run.processes, run.task
    if processes.distributed:
        task.prepare_distributed(
            device_ids=[processes.local_rank] if run.device.type == 'cuda' else None,
            **({'broadcast_buffers': False} if options.device.no_ddp_bb else {}),  # torch's default without a warning
        )
    if processes.distributed or task.criterion.parts:
        task.train()
        size = models.loader_config(run.configs)['input_size']
        with refusing(f'--method {options.method}', ValueError):
            task.settle(torch.zeros(options.loader.batch_size, *size, device=run.device), run.autocast)
    if checkpoint and run.start.epoch is None:
        restore_ranks(run, checkpoint)
    if task.teacher is not None and (run.progress.epoch, run.progress.batch) == (0, 0) \
            and task.teacher.branch.model.num_classes == run.pair.num_classes:
        validate_teacher(run, task.teacher)
    minutes = options.run.recovery_minutes if processes.rank == 0 else 0
    run.control = Control(processes.distributed, options.run.hang_timeout, minutes, partial(give_up, run))
    if checkpoint and not run.start.auto:
        save_recovery(run)  # so that this position is the newest, not a later one of the old course


def validate_teacher(run: Run, teacher: Teacher) -> None:
    """Evaluate the frozen teacher once, on images prepared for it, and log its accuracy."""
    loader = create_eval_loader(run.options.loader, run.loader_eval.dataset, teacher.data_config, run.processes)
    metrics = evaluate(
        lambda input: {'teacher': teacher.branch(input)[0]}, ['teacher'], loader, run.device, run.autocast,
        run.processes.distributed)['teacher']
    _logger.info(f'Teacher: top1 {metrics["top1"]:.3f}  top5 {metrics["top5"]:.3f}')
