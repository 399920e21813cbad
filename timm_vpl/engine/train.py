"""Training: build the parts, then train and validate epoch by epoch, and save."""
import contextlib
import copy
import csv
import faulthandler
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

import torch
import torchvision
import yaml
from timm.models import safe_model_name
from timm.utils import AverageMeter, distribute_bn, get_outdir, setup_default_logging
from torch.utils.data import IterableDataset

from ..core.seeding import BranchStreams
from ..core.task import PairTask
from ..data.data import (
    TrainLoader,
    create_eval_loader,
    create_eval_loaders,
    create_split,
    create_train_loader,
    data_errors,
    resolve_classes,
    skipped_images,
    split_card,
)
from ..data.identity import data_identity
from ..errors import RunError, UsageError, first_line
from ..files import replacing
from ..options.options import recipe_values, resume_command
from ..tools.export import export_run, missing_exports
from . import build
from .checkpoint import PairCheckpointSaver, checkpoint_bytes
from .control import GIVE_UP, GO_ON, SAVE, STOP, Control, stop_line
from .device import agreement, from_all, from_first, init_device, is_lost
from .environment import environment
from .evaluate import evaluate, evaluate_pair
from .finite import KEPT, FiniteCheck
from .resume import Progress, find_checkpoint, load_checkpoint, restore_ranks, resume, run_state
from .trained import branch_config

_logger = logging.getLogger('train')

OUTPUT = './output/train'
SUMMARY = 'summary.csv'


@dataclass
class Run:
    """The parts of a training run."""
    args: Any
    device: torch.device
    task: PairTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    num_epochs: int
    scaler: torch.amp.GradScaler
    autocast: Callable
    loader_train: TrainLoader
    loader_eval: Any
    updates_per_epoch: int
    columns: list
    configs: dict[str, dict]  # data configuration of each branch
    class_names: list[str] | None
    data: dict[str, dict]  # identity of the training and the validation images
    flops: int  # of training, for an image
    finite: FiniteCheck
    progress: Progress = field(default_factory=Progress)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of summary.csv
    control: Control = field(default_factory=Control)
    saver: PairCheckpointSaver | None = None
    output_dir: str | None = None

    @property
    def pair(self):
        """The pair that is trained."""
        return self.task.get_trainable_module()

    @property
    def end_epoch(self) -> int:
        """Completed epochs at the end of this start."""
        return min(self.num_epochs, self.args.stop_epoch or self.num_epochs)

    @property
    def statistics(self) -> list[torch.Tensor]:
        """Running statistics of BatchNorm, of the pair and its EMA: what processes do not have in common."""
        ema = self.task.get_trainable_module(ema=True)
        return [
            buffer for module in (self.pair, *([] if ema is None else [ema.module]))
            for name, buffer in module.named_buffers() if 'running_mean' in name or 'running_var' in name]


def train(args) -> None:
    """Train as the options say; they come from `options.parse_args`."""
    if not logging.getLogger().handlers:
        setup_default_logging()
    options = recipe_values(args)  # as given, before device and data fill in what was not
    if not faulthandler.is_enabled():
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # no stderr
            faulthandler.enable(sys.__stderr__)  # stacks after a crash in native code
    args.output = args.output or OUTPUT
    device = init_device(args)
    if args.rank:
        logging.getLogger().setLevel(logging.ERROR)
    try:
        # torchrun counts only the restarts for which a process of the same machine has failed.
        restarted = any(from_all(args, os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'))
        with agreement(args):
            if args.rank == 0:
                args.resume = find_checkpoint(args, restarted)
        args.resume, args.resume_auto, args.start_epoch, args.no_resume_opt = from_first(
            args, (args.resume, args.resume_auto, args.start_epoch, args.no_resume_opt))
        with agreement(args):
            checkpoint = load_checkpoint(args) if args.resume else None
            run = create_run(args, device)
            if checkpoint:
                resume(run, checkpoint, options)
        check_data(run)
        if from_first(args, args.resume_auto and checkpoint and args.rank == 0 and is_finished(run)):
            _logger.info(f'--resume auto: nothing to train or to export, the run in {os.path.dirname(args.resume)} is '
                         f'finished; no file is changed')
            return
        with agreement(args):
            if args.rank == 0:
                open_folder(run, options, checkpoint)
        with data_errors():
            start(run, checkpoint)
            checkpoint = None  # it may be large
            with run.control:
                fit(run)
    except RuntimeError as e:
        if 'deterministic' in str(e) and args.deterministic:
            raise RunError(f'--deterministic: {first_line(e, 400)}') from e
        if not (args.distributed and is_lost(e)):
            raise
        raise RunError(
            f'process {args.rank}: another process ended or can not be reached ({first_line(e)}); see the lines '
            f'before this one, of the other machines too') from e
    finally:
        if args.distributed:
            with contextlib.suppress(RuntimeError):  # of a group that is already broken
                torch.distributed.destroy_process_group()


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
    folder, epochs = os.path.dirname(run.args.resume), run.progress.epoch
    if epochs < run.end_epoch:
        return False
    try:
        with open(os.path.join(folder, SUMMARY), encoding='utf-8') as f:  # written after all else of an epoch
            written = any(line.startswith(f'{epochs - 1},') for line in f)
        return written and not (run.args.export and missing_exports(folder))
    except (OSError, RunError, UsageError, ValueError):
        return False  # the run goes on and says why


def start(run: Run, checkpoint: dict[str, Any] | None) -> None:
    """Join the processes of a run that is built, and give each its own part of the checkpoint."""
    args, task = run.args, run.task
    if args.distributed:
        task.prepare_distributed(
            device_ids=[args.local_rank] if run.device.type == 'cuda' else None,
            **({'broadcast_buffers': False} if args.no_ddp_bb else {}),  # torch's default without a warning
        )
        task.train()
        size = build.loader_config(run.configs)['input_size']
        task.settle_buckets(torch.zeros(args.batch_size, *size, device=run.device), run.autocast)
    if checkpoint and args.start_epoch is None:
        restore_ranks(run, checkpoint)
    if task.teacher is not None and (run.progress.epoch, run.progress.batch) == (0, 0):
        validate_teacher(run)
    run.control = Control(args.distributed, args.hang_timeout, args.recovery_minutes if args.rank == 0 else 0)
    if checkpoint and not args.resume_auto:
        save_recovery(run)  # so that it is this place, not a later one of the old course, that is newest


def create_run(args, device: torch.device) -> Run:
    """Build everything that a run needs, but for what the processes do together and what writes to disk.

    Args:
        args: Options, completed by `init_device`.
        device: Device of this process.
    """
    dataset_train = create_split(args, args.train_split, is_training=True)
    dataset_eval = create_split(args, args.val_split, is_training=False)
    class_names = resolve_classes(args, dataset_train, dataset_eval)
    data = {
        role: {'split': split, **data_identity(dataset, class_names)} for role, split, dataset in (
            ('train', args.train_split, dataset_train), ('validation', args.val_split, dataset_eval))}
    configs = build.resolve_data(args)
    data_config = build.loader_config(configs)

    teacher = build.create_teacher(args, data_config, class_names)
    pair = build.create_pair(args, configs, device, teacher)
    build.check_pretrained_classes(args, pair, class_names)
    lrs = build.learning_rates(args)
    optimizer = build.create_optimizer(args, pair, lrs)
    loader_train = create_train_loader(args, dataset_train, data_config, device)
    loader_eval = create_eval_loaders(args, dataset_eval, configs, device)

    updates_per_epoch = math.ceil(len(loader_train) / args.grad_accum_steps)
    scheduler, num_epochs = build.create_scheduler(args, optimizer, updates_per_epoch)
    criterion = build.create_criterion(args, num_epochs, device)
    if len(criterion.phases) > 1 and args.grad_accum_steps > 1:
        raise UsageError(f'--grad-accum-steps {args.grad_accum_steps}: --method {args.method} has '
                         f'{len(criterion.phases)} optimizer phases a batch, 1 is the only value')
    task = PairTask(
        pair,
        criterion,
        streams=BranchStreams(args.seed, args.rank, device),
        teacher=teacher,
        device=device,
        verbose=args.rank == 0,
    )
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )
    if args.torchcompile:
        _check_compile(args)
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)

    amp_dtype = torch.float16 if args.amp_dtype == 'float16' else torch.bfloat16
    run = Run(
        args=args,
        device=device,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        num_epochs=num_epochs,
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp and amp_dtype == torch.float16),
        autocast=partial(torch.autocast, device.type, dtype=amp_dtype) if args.amp else contextlib.nullcontext,
        loader_train=loader_train,
        loader_eval=loader_eval,
        updates_per_epoch=updates_per_epoch,
        columns=_eval_columns(pair.sides, ema=args.model_ema and not args.model_ema_force_cpu),
        configs=configs,
        class_names=class_names,
        data=data,
        flops=build.training_flops(task, configs),
        progress=Progress(args.start_epoch or 0),
        finite=FiniteCheck(device, skip=args.on_nonfinite == 'skip', limit=args.nonfinite_limit),
    )
    if args.eval_metric not in run.columns:
        raise UsageError(f'--eval-metric {args.eval_metric}: expected one of {", ".join(run.columns)}')
    return run


def open_folder(run: Run, options: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
    """Make the run's folder, or enter it again, and all that writes to it.

    Args:
        run: The run.
        options: Options as given, which the folder and its checkpoints keep.
        checkpoint: The checkpoint that the run goes on from.
    """
    args, data_config = run.args, build.loader_config(run.configs)
    run.output_dir = _create_output_dir(run, data_config, options)
    run.saver = PairCheckpointSaver(
        run.task,
        run.optimizer,
        {**options, 'num_classes': args.num_classes, 'class_names': run.class_names, 'data_config': data_config},
        {side: branch_config(run.pair.branch(side), run.configs[side], run.class_names) for side in run.pair.sides},
        amp_scaler=run.scaler if run.scaler.is_enabled() else None,
        checkpoint_dir=run.output_dir,
        recovery_dir=run.output_dir,
        decreasing='loss' in args.eval_metric,
        max_history=args.checkpoint_hist,
    )
    if checkpoint and os.path.samefile(os.path.dirname(args.resume) or '.', run.output_dir):
        run.saver.load_state_dict(checkpoint.get('saver', {}), args.resume)
    _log_plan(run)
    if args.log_wandb:
        _start_wandb(args, options)


def _check_compile(args):
    for flag, value, known in (
            ('--torchcompile', args.torchcompile, torch.compiler.list_backends(exclude_tags=())),
            ('--torchcompile-mode', args.torchcompile_mode, [None, *torch._inductor.list_mode_options()]),
    ):
        if value not in known:
            raise UsageError(f'{flag} {value}: expected one of {", ".join(filter(None, known))}')


def _eval_columns(sides, ema) -> list:
    """Return the names of the evaluation metrics, as columns and for --eval-metric."""
    names = [*sides, 'ens'] if len(sides) > 1 else list(sides)
    columns = [f'{metric}_{name}' for name in names for metric in ('loss', 'top1', 'top5')]
    return ['top1', *columns, *(f'ema_{column}' for column in columns if ema)]


def _create_output_dir(run, data_config, options) -> str:
    args = run.args
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'),
        args.method,
        *(safe_model_name(getattr(args, f'model_{side}')) for side in args.sides),
        str(data_config['input_size'][-1]),
    ])
    output = args.output
    try:
        # A run of the same name is continued with --resume, never written over.
        output_dir = get_outdir(output, name, inc=not (args.resume or args.resume_auto))
        if args.resume and not args.experiment:
            _logger.info(f'New folder {output_dir}: --output and --experiment continue in the old one')
        environments = _environments(output_dir) if args.resume else []
        now = environment(run.device)
        environments += [now] if now not in environments[-1:] else []
        contents = {'train': split_card(run.loader_train.dataset), 'validation': split_card(run.loader_eval.dataset)}
        data = {**run.data, 'contents': contents}
        for name, content in (('args', options), ('data', data), ('environment', environments)):
            with replacing(os.path.join(output_dir, f'{name}.yaml')) as f:
                yaml.safe_dump(content, f, default_flow_style=False, sort_keys=name != 'data')
    except (AssertionError, OSError) as e:
        raise UsageError(f'--output {output}: {e}') from e
    return output_dir


def _environments(output_dir: str) -> list[dict[str, Any]]:
    """Return the environments in which a run has been trained so far."""
    try:
        with open(os.path.join(output_dir, 'environment.yaml')) as f:
            found = yaml.safe_load(f)
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    return found if isinstance(found, list) else []


def _start_wandb(args, options):
    try:
        import wandb
    except ImportError as e:
        raise UsageError("--log-wandb: needs the package wandb (pip install 'timm-vpl[wandb]')") from e
    resume_id = {'id': args.wandb_resume_id, 'resume': 'must'} if args.wandb_resume_id else {}
    wandb.init(
        project=args.wandb_project, name=args.experiment, config=options, tags=args.wandb_tags, **resume_id)


def _log_plan(run):
    args, criterion, lrs = run.args, run.task.criterion, build.learning_rates(run.args)
    for side in run.pair.sides:
        count = sum(parameter.numel() for parameter in run.pair.branch(side).parameters())
        _logger.info(
            f'Branch {side}: {getattr(args, f"model_{side}")}, {count / 1e6:.2f} M parameters, LR {lrs[side]:.3g}, '
            f'images {" x ".join(map(str, run.configs[side]["input_size"]))}')
    if run.pair.affine is not None:
        _logger.info(
            f'Affine layer on side {run.pair.affine_side}: {run.pair.affine.in_features} -> '
            f'{run.pair.affine.out_features}')
    _logger.info(
        f'{args.num_classes} classes, {run.updates_per_epoch} updates an epoch, '
        f'{run.num_epochs} epochs, device {run.device}, {args.world_size} process(es), '
        f'{torch.get_num_threads()} CPU thread(s)')
    negatives = args.batch_size * (args.world_size if getattr(criterion, 'gather', False) else 1)
    if hasattr(criterion, 'gather') and args.grad_accum_steps > 1:
        _logger.info(
            f'Gradient accumulation: the contrastive term sees the {negatives} images of a micro-batch, not the '
            f'{negatives * args.grad_accum_steps} of an update')
    each = checkpoint_bytes(run.task, run.optimizer)
    # History, last, a best for each branch, one being written; recovery checkpoints; milestones.
    files = args.checkpoint_hist + 2 + len(run.pair.sides)
    files += 2 * bool(args.recovery_interval or args.recovery_minutes) + len(args.save_epochs or ())
    free = shutil.disk_usage(run.output_dir).free
    _logger.info(
        f'Checkpoints: about {each / 2**20:.0f} MiB each, at most {files} of them, {files * each / 2**30:.2f} GiB in '
        f'{run.output_dir} ({free / 2**30:.0f} GiB free)')
    if files * each > free:
        _logger.warning(f'--output {run.output_dir}: the disk may become full, --checkpoint-hist keeps fewer')


def save_recovery(run: Run) -> bool:
    """Save within an epoch and return whether that went well, to all processes when it is done."""
    check_finite(run)
    state = run_state(run)
    saved = run.saver is not None and run.saver.save_recovery(run.progress.epoch, run.progress.batch, state)
    run.control.saved()
    return from_first(run.args, saved)


def heed(run: Run, decision: int) -> None:
    """Do what the processes decided.

    Raises:
        RunError: A loss or gradient was not finite.
        Stopped: A signal came; the run is saved.
    """
    saved = False
    if decision >= GIVE_UP:
        check_finite(run)
    elif decision > GO_ON:
        saved = save_recovery(run)
    if decision >= STOP:
        progress = run.progress
        end = 'NOT saved, older checkpoints are kept'
        if saved and run.output_dir:  # of the process that speaks
            torchrun = ' (under torchrun, as before)' if run.args.distributed else ''
            end = f'to go on{torchrun}: {resume_command(run.args, run.output_dir)}'
        raise stop_line(
            decision, f'after epoch {progress.epoch}, batch {progress.batch} of {len(run.loader_train)}; {end}')


def check_finite(run: Run) -> None:
    """Raise RunError in all processes if one has seen a loss or gradient that was not finite."""
    run.finite.settle()
    if run.finite.error is None:
        bad = [name for name, parameter in run.pair.named_parameters() if not parameter.isfinite().all()]
        if bad:  # by a finite gradient that was too large
            run.finite.error = f'epoch {run.progress.epoch}: not finite: {bad[0]} and {len(bad) - 1} other parameters'
    errors = from_all(run.args, run.finite.error)
    if any(errors):
        if run.args.rank:
            raise SystemExit(RunError.exit_status)
        rank, line = max(enumerate(errors), key=lambda error: len(error[1] or ''))  # who saw most
        raise RunError(f'{line} (process {rank}); nothing of it is saved, older checkpoints are as they were')


def fit(run: Run) -> None:
    """Train and validate from where the run is to the end, saving each epoch.

    Raises:
        RunError: A number went bad, or the last epoch could not be saved.
        Stopped: A signal came; the run is saved.
    """
    args, task, saver = run.args, run.task, run.saver
    start_epoch, num_batches = run.progress.epoch, len(run.loader_train)
    if run.scheduler is not None and start_epoch > 0 and not hasattr(run.scheduler, 'lr_scheduler'):
        run.scheduler.step(start_epoch)
        run.scheduler.step_update(_num_updates(run))
    write_summary(run)
    started = time.time()
    end_epoch = run.end_epoch
    if start_epoch >= end_epoch:
        _logger.info(f'Nothing to train: epoch {start_epoch} would come next, the run ends with epoch {end_epoch - 1}')
    for epoch in range(start_epoch, end_epoch):
        task.set_epoch(epoch)
        evaluated = epoch + 1 == end_epoch or (epoch + 1) % args.val_interval == 0
        if run.progress.batch < num_batches:
            decision = train_one_epoch(run)
            if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
                for ema in (False, True)[:1 + (evaluated and _evaluates_ema(run))]:
                    distribute_bn(task.get_eval_model(ema=ema), args.world_size, args.dist_bn == 'reduce')
            # Here, since validation comes next in a run that goes on from this place.
            heed(run, max(decision, SAVE) if args.recovery_interval else decision)
        check_finite(run)
        row = {'epoch': epoch, **epoch_terms(run)}
        trained = time.time()
        eval_metrics = validate(run) if evaluated else {}
        skipped = run.progress.skipped + (skipped_images(run.loader_eval) if evaluated else 0)
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, eval_metrics.get(args.eval_metric))
        row.update((f'eval_{name}', eval_metrics.get(name, '')) for name in run.columns)
        row.update(epoch_costs(run, sum(from_all(args, skipped)), time.time() - trained))
        run.rows.append(row)
        run.progress = Progress(epoch + 1)
        state = run_state(run)
        run.control.saved()
        if saver is None:
            continue
        if row['skipped']:
            _logger.warning(f"Epoch {epoch}: {row['skipped']} images could not be read, others took their places")
        saver.save(
            epoch,
            {**state, 'metrics': dict(eval_metrics)},
            metric=eval_metrics.get(args.eval_metric),
            branch_metrics=_branch_metrics(run, eval_metrics),
            milestone=epoch + 1 in (args.save_epochs or ()),
        )
        if saver.failed and epoch + 1 == end_epoch:
            break  # without its row the run is not finished
        write_summary(run)
        if args.log_wandb:
            import wandb
            wandb.log(row)
    if saver is None:
        return
    _log_result(run, time.time() - started)
    if saver.failed:
        raise RunError(f'--output {run.output_dir}: the last epoch could not be saved, see above')
    run.control.watch()
    if args.export:
        try:
            export_run(run.output_dir)
        except (OSError, RunError, UsageError, ValueError) as e:  # what was trained is kept
            _logger.error(f'Not exported: {e}')


def _num_updates(run: Run) -> int:
    """Return the optimizer updates done so far."""
    in_epoch = math.ceil(run.progress.batch / run.args.grad_accum_steps)
    return run.progress.epoch * run.updates_per_epoch + in_epoch


def train_one_epoch(run: Run) -> int:
    """Train what is left of the present epoch, and keep account of it in `run.progress`.

    Returns:
        What the processes decided after the last update, for the caller to heed.
    """
    args, task, optimizer, loader = run.args, run.task, run.optimizer, run.loader_train
    progress, finite = run.progress, run.finite
    epoch, first_batch = progress.epoch, progress.batch
    task.train()
    clip_limits = {side: getattr(args, f'clip_grad_{side}') for side in run.pair.sides}
    accum_steps = args.grad_accum_steps
    num_batches = len(loader)
    tail = num_batches % accum_steps or accum_steps  # batches in the last update
    num_updates = _num_updates(run)
    progress.lrs = progress.lrs or _learning_rates(optimizer)
    skipped = progress.skipped
    decision = GO_ON
    values: dict[str, torch.Tensor] = {}  # sums over the batches of an update
    data_time, batch_time = AverageMeter(), AverageMeter()
    end = time.time()
    started = end - progress.seconds
    optimizer.zero_grad()
    for batch, input, target, sample_ids in loader.epoch(epoch, first_batch):
        last_batch = batch + 1 == num_batches
        need_update = last_batch or (batch + 1) % accum_steps == 0
        in_update = tail if batch >= num_batches - tail else accum_steps
        data_time.update(time.time() - end)
        task.streams.set_position(epoch, batch)
        if batch % accum_steps == 0:
            values, found = {}, {}
            finite.keep_statistics(run.pair)
        with contextlib.nullcontext() if need_update else task.no_sync():
            for phase, learners in enumerate(task.phases):
                with run.autocast():
                    result = task(input, target, sample_ids, phase=phase)
                run.scaler.scale(result['loss'] / in_update).backward()
                # Values stay on the device: reading one back would make the host wait for it.
                for name, value in result.items():
                    if name.endswith('loss'):
                        values[name] = values.get(name, 0) + value.detach()
                if need_update:
                    found.update(update(run, learners, clip_limits))
        progress.batch, progress.skipped = batch + 1, skipped + loader.skipped
        if need_update:
            num_updates += 1
            finite.record(f'epoch {epoch}, batch {batch}', values, found)
            for name, total in finite.kept(values, in_update).items():
                progress.sums[name] = progress.sums.get(name, 0) + total
            task.update_ema(step=num_updates)
            if run.scheduler is not None:
                run.scheduler.step_update(num_updates=num_updates)
        batch_time.update(time.time() - end)
        end = time.time()
        progress.seconds = end - started
        if not need_update:
            continue
        if run.saver is not None and (last_batch or batch // accum_steps % args.log_interval == 0):
            _log_batch(run, batch, {name: total / in_update for name, total in values.items()}, batch_time, data_time)
            if args.save_images:
                save_images(run, input, batch)
        decision = run.control.decide(GIVE_UP if finite.error else GO_ON)
        if args.recovery_interval and num_updates % args.recovery_interval == 0:
            decision = max(decision, SAVE)
        if decision > GO_ON and not last_batch:
            heed(run, decision)
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    if progress.batch == first_batch:
        raise RunError('data: the training loader gave no batch')
    progress.batch = num_batches  # also where a stream ended early
    return decision


def save_images(run: Run, input: torch.Tensor, batch: int) -> None:
    """Write a batch of images as one; where that fails, say so."""
    try:
        torchvision.utils.save_image(
            input, os.path.join(run.output_dir, f'train-batch-{batch}.jpg'), padding=0, normalize=True)
    except OSError as e:
        _logger.error(f'--save-images: {run.output_dir}: {e.strerror or first_line(e)}')


def epoch_terms(run: Run) -> dict[str, Any]:
    """Return the mean of each loss term over the epoch and the processes, '' where it was off."""
    args, sums = run.args, dict(run.progress.sums)
    batches = sums.pop(KEPT)
    means = torch.stack([total / batches for total in sums.values()])
    if args.distributed:
        torch.distributed.all_reduce(means)
        means /= args.world_size
    terms = dict.fromkeys(['loss', *(term.name for term in run.task.criterion.all_terms)], '')
    terms.update(zip(sums, means.tolist(), strict=True))
    return {f'train_{name}': value for name, value in terms.items()}


def epoch_costs(run: Run, skipped: int, eval_seconds: float) -> dict[str, Any]:
    """Return the further columns of the epoch: learning rates, stage, epochs of the whole schedule, images, costs.

    Args:
        run: The run.
        skipped: Images of the epoch, validation included, that could not be read.
        eval_seconds: Time that its validation took.
    """
    args, progress, criterion = run.args, run.progress, run.task.criterion
    images = len(run.loader_train) * args.batch_size * args.world_size
    return {
        **{f'lr_{side}': lr for side, lr in progress.lrs.items()},
        **({'stage': criterion.schedule.stage(progress.epoch)} if hasattr(criterion, 'stage') else {}),
        'num_epochs': run.num_epochs,
        'processes': args.world_size,
        'images': images,
        'flops': images * run.flops,
        'skipped': skipped,
        'seconds': round(progress.seconds, 3),
        'eval_seconds': round(eval_seconds, 3),
        'images_per_second': round(images / progress.seconds, 2),
    }


def update(run: Run, learners: str, clip_limits: dict[str, float | None]) -> dict[str, torch.Tensor]:
    """Clip the gradients of the branches that learn in this phase, and let the optimizer step with theirs alone.

    Returns:
        By branch a flag (0-d) that is 1 where a gradient was not finite; empty under a GradScaler, which looks itself.
    """
    optimizer = run.optimizer
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group['name'][0] in learners]
    try:
        scaled = run.scaler.is_enabled()
        run.scaler.unscale_(optimizer)
        found = {} if scaled else run.finite.gradients(optimizer.param_groups)
        run.task.clip_gradients(clip_limits, run.args.clip_mode, learners)
        if scaled:
            run.scaler.step(optimizer)
            run.scaler.update()
        else:
            run.finite.step(optimizer, found)
        optimizer.zero_grad()
    finally:
        optimizer.param_groups = groups
    return found


def _learning_rates(optimizer) -> dict[str, float]:
    """Return each branch's present learning rate, that of its head where layers have their own."""
    lrs: dict[str, float] = {}
    for group in optimizer.param_groups:
        side = group['name'][0]
        lrs[side] = max(group['lr'], lrs.get(side, group['lr']))
    return lrs


def _log_batch(run, batch, values, batch_time, data_time):
    epoch = run.progress.epoch
    lrs = _learning_rates(run.optimizer)
    read = torch.stack(list(values.values())).tolist()
    losses = '  '.join(f'{name.removesuffix("_loss")} {value:#.4g}' for name, value in zip(values, read, strict=True))
    rate = run.args.batch_size * run.args.world_size / batch_time.avg
    _logger.info(
        f'Train: {epoch} [{batch:>4d}/{len(run.loader_train)} ({100 * (batch + 1) / len(run.loader_train):>3.0f}%)]  '
        f'{losses}  Time: {batch_time.avg:.3f}s, {rate:>7.2f}/s  '
        f'LR: {" ".join(f"{side} {lr:.3e}" for side, lr in lrs.items())}  Data: {data_time.avg:.3f}s')


def validate(run: Run) -> dict[str, float]:
    """Evaluate the pair, and its EMA, each in one pass over the data.

    Returns:
        Metrics by column name; 'top1' is the mean of the branches, of their EMA where there is one.
    """
    args, task = run.args, run.task
    # Processes that share a stream may have different numbers of batches; they can't decide after each.
    stream = isinstance(run.loader_eval.dataset, IterableDataset)
    kwargs = {
        'sides': run.pair.sides,
        'device': run.device,
        'autocast': run.autocast,
        'distributed': args.distributed,
        'after_batch': run.control.watch if stream else lambda: heed(run, run.control.decide()),
    }
    metrics = evaluate_pair(task.get_eval_model(), run.loader_eval, **kwargs)
    if _evaluates_ema(run):
        ema = evaluate_pair(task.get_eval_model(ema=True), run.loader_eval, **kwargs)
        metrics.update((f'ema_{name}', value) for name, value in ema.items())
    bad = [name for name, value in metrics.items() if 'loss' in name and not math.isfinite(value)]
    if bad:
        _logger.warning(f'Epoch {run.progress.epoch}: not finite: {", ".join(bad)}; it is no best epoch for them')
    branches = _branch_metrics(run, metrics)
    metrics['top1'] = sum(branches.values()) / len(branches)
    if args.rank == 0:
        names = [name for name in run.columns if 'top1' in name and name != 'top1']
        _logger.info('Test: ' + '  '.join(f'{name} {metrics[name]:.3f}' for name in names))
    return metrics


def _evaluates_ema(run):
    return run.task.has_ema() and not run.args.model_ema_force_cpu


def validate_teacher(run: Run) -> None:
    """Evaluate the frozen teacher once, on images prepared its own way, and log what it knows."""
    args, teacher = run.args, run.task.teacher
    dataset = copy.copy(run.loader_eval.dataset)  # a loader gives its data set the transform
    loader = create_eval_loader(args, dataset, teacher.data_config, run.device)
    metrics = evaluate(
        lambda input: {'teacher': teacher.branch(input)[0]}, ['teacher'], loader, run.device, run.autocast,
        args.distributed)['teacher']
    _logger.info(f'Teacher: top1 {metrics["top1"]:.3f}  top5 {metrics["top5"]:.3f}')


def _branch_metrics(run, metrics) -> dict[str, float]:
    """Return each branch's top-1, of its EMA where there is one."""
    prefix = 'ema_' if _evaluates_ema(run) else ''
    return {side: metrics[f'{prefix}top1_{side}'] for side in run.pair.sides} if metrics else {}


def write_summary(run: Run) -> None:
    """Write summary.csv, a row an epoch; where that fails, say so."""
    if run.saver is None or not run.rows:
        return
    path = os.path.join(run.output_dir, SUMMARY)
    try:
        with replacing(path, newline='') as f:
            writer = csv.DictWriter(f, fieldnames=run.rows[-1].keys(), restval='', extrasaction='ignore')
            writer.writeheader()
            writer.writerows(run.rows)
    except OSError as e:
        _logger.error(f'{path}: can not be written ({e.strerror}); the next checkpoint that is saved has its rows too')


def _log_result(run, seconds):
    metrics = next((row for row in reversed(run.rows) if row['eval_top1'] != ''), {})
    _logger.info(f'Trained in {seconds:.0f} s.')
    for side in run.pair.sides:
        best, epoch = run.saver.best_branches[side]
        if best is None:
            continue
        last = ', '.join(
            f'{name} {metrics[column]:.2f} %'
            for name, column in (('top-1', f'eval_top1_{side}'), ('EMA', f'eval_ema_top1_{side}')) if column in metrics)
        _logger.info(
            f'Branch {side} ({getattr(run.args, f"model_{side}")}): {last}; best {best:.2f} % at epoch {epoch}: '
            f'{os.path.join(run.output_dir, f"best_{side}.pth.tar")}')
    if run.saver.best_metric is not None:
        _logger.info(f'*** Best metric: {run.saver.best_metric:.4g} (epoch {run.saver.best_epoch})')
    _logger.info(f'Checkpoints, {SUMMARY} and args.yaml: {run.output_dir}')
