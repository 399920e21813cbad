"""Training: build the parts, then train and validate epoch by epoch, and save."""
import contextlib
import copy
import csv
import logging
import math
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import torch
import torchvision
import yaml
from timm.models import safe_model_name
from timm.utils import AverageMeter, distribute_bn, get_outdir, setup_default_logging
from timm.utils.summary import trim_summary

from . import build
from .checkpoint import PairCheckpointSaver, checkpoint_bytes, read_checkpoint
from .data import (
    TrainLoader,
    create_eval_loader,
    create_eval_loaders,
    create_split,
    create_train_loader,
    resolve_classes,
)
from .device import agreement, init_device
from .errors import RunError, UsageError
from .export import export_run
from .options import recipe_values
from .seeding import BranchStreams
from .task import PairTask
from .trained import branch_config
from .validation import evaluate, evaluate_pair

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
    saver: PairCheckpointSaver | None = None
    output_dir: str | None = None

    @property
    def pair(self):
        """The pair that is trained."""
        return self.task.get_trainable_module()


def train(args) -> None:
    """Train as the options say; they come from `options.parse_args`."""
    if not logging.getLogger().handlers:
        setup_default_logging()
    options = recipe_values(args)  # as given, before device and data fill in what was not
    device = init_device(args)
    if args.rank:
        logging.getLogger().setLevel(logging.ERROR)
    try:
        with agreement(args):
            checkpoint = find_checkpoint(args)
            run = create_run(args, device, options)
            start_epoch = resume(run, checkpoint) if checkpoint else 0
        if args.distributed:
            run.task.prepare_distributed(
                device_ids=[args.local_rank] if device.type == 'cuda' else None,
                broadcast_buffers=not args.no_ddp_bb,
            )
        fit(run, start_epoch if args.start_epoch is None else args.start_epoch)
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()


def create_run(args, device: torch.device, options: dict[str, Any]) -> Run:
    """Build everything that a run needs.

    Args:
        args: Options, completed by `init_device`.
        device: Device of this process.
        options: Options as given, which the run's folder and checkpoints keep.
    """
    dataset_train = create_split(args, args.train_split, is_training=True)
    dataset_eval = create_split(args, args.val_split, is_training=False)
    class_names = resolve_classes(args, dataset_train, dataset_eval)
    configs = build.resolve_data(args)
    data_config = build.loader_config(configs)

    teacher = build.create_teacher(args, data_config, class_names)
    pair = build.create_pair(args, configs, device, teacher)
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
    )
    if args.eval_metric not in run.columns:
        raise UsageError(f'--eval-metric {args.eval_metric}: expected one of {", ".join(run.columns)}')
    if args.rank == 0:
        run.output_dir = _create_output_dir(args, data_config, options)
        run.saver = PairCheckpointSaver(
            task,
            optimizer,
            {**options, 'num_classes': args.num_classes, 'class_names': class_names, 'data_config': data_config},
            {side: branch_config(pair.branch(side), configs[side], class_names) for side in pair.sides},
            amp_scaler=run.scaler if run.scaler.is_enabled() else None,
            checkpoint_dir=run.output_dir,
            recovery_dir=run.output_dir,
            decreasing='loss' in args.eval_metric,
            max_history=args.checkpoint_hist,
        )
        _log_plan(run, configs, lrs)
        if args.log_wandb:
            _start_wandb(args, options)
    return run


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


def _create_output_dir(args, data_config, options) -> str:
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'),
        args.method,
        *(safe_model_name(getattr(args, f'model_{side}')) for side in args.sides),
        str(data_config['input_size'][-1]),
    ])
    output = args.output or OUTPUT
    try:
        # A run of the same name is continued with --resume, never written over.
        output_dir = get_outdir(output, name, inc=not args.resume)
        if args.resume and not args.experiment:
            _logger.info(f'New folder {output_dir}: --output and --experiment continue in the old one')
        with open(os.path.join(output_dir, 'args.yaml'), 'w') as f:
            yaml.safe_dump(options, f, default_flow_style=False)
    except (AssertionError, OSError) as e:
        raise UsageError(f'--output {output}: {e}') from e
    return output_dir


def _start_wandb(args, options):
    try:
        import wandb
    except ImportError as e:
        raise UsageError("--log-wandb: needs the package wandb (pip install 'timm-vpl[wandb]')") from e
    resume_id = {'id': args.wandb_resume_id, 'resume': 'must'} if args.wandb_resume_id else {}
    wandb.init(
        project=args.wandb_project, name=args.experiment, config=options, tags=args.wandb_tags, **resume_id)


def _log_plan(run, configs, lrs):
    args, criterion = run.args, run.task.criterion
    for side in run.pair.sides:
        count = sum(parameter.numel() for parameter in run.pair.branch(side).parameters())
        _logger.info(
            f'Branch {side}: {getattr(args, f"model_{side}")}, {count / 1e6:.2f} M parameters, LR {lrs[side]:.3g}, '
            f'images {" x ".join(map(str, configs[side]["input_size"]))}')
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
    files += 2 * bool(args.recovery_interval) + len(args.save_epochs or ())
    _logger.info(
        f'Checkpoints: about {each / 2**20:.0f} MiB each, at most {files} of them, {files * each / 2**30:.2f} GiB in '
        f'{run.output_dir} ({shutil.disk_usage(run.output_dir).free / 2**30:.0f} GiB free)')


def find_checkpoint(args) -> dict[str, Any] | None:
    """Return the checkpoint of --resume; None where there is none to resume.

    Raises:
        RunError: The checkpoint can't be read, or lacks what a run needs to go on.
    """
    if args.resume == 'auto':
        last = os.path.join(args.output or OUTPUT, args.experiment, 'last.pth.tar')
        args.resume = last if os.path.exists(last) else ''
        _logger.info(f'--resume auto: {last}' if args.resume else f'--resume auto: no {last} yet, a fresh start')
    if not args.resume:
        return None
    checkpoint = read_checkpoint(args.resume)
    missing = [key for key, needed in (
        ('epoch', args.start_epoch is None), ('optimizer', not args.no_resume_opt)) if needed and key not in checkpoint]
    if missing:
        raise RunError(
            f'--resume {args.resume}: holds weights, but no {" and no ".join(missing)}; --no-resume-opt and '
            f'--start-epoch N go on without')
    return checkpoint


def resume(run: Run, checkpoint: dict[str, Any]) -> int:
    """Restore a run from a checkpoint and return the epoch to start with.

    Raises:
        RunError: The checkpoint is one of other models.
    """
    args, task = run.args, run.task
    try:
        task.load_checkpoint_state(checkpoint['state_dict'], task_state=checkpoint.get('task_state'))
        if task.has_ema():
            task.load_checkpoint_state(checkpoint.get('state_dict_ema', checkpoint['state_dict']), ema=True)
        if not args.no_resume_opt:
            run.optimizer.load_state_dict(checkpoint['optimizer'])
            if run.scaler.is_enabled() and 'amp_scaler' in checkpoint:
                run.scaler.load_state_dict(checkpoint['amp_scaler'])
    except (KeyError, RuntimeError, ValueError) as e:
        raise RunError(f'--resume {args.resume}: does not fit this pair ({str(e).splitlines()[0]})') from e
    epoch = checkpoint.get('epoch', -1)
    _logger.info(f'Resumed {args.resume}, the checkpoint of epoch {epoch}')
    same_folder = run.saver and os.path.dirname(os.path.abspath(args.resume)) == os.path.abspath(run.output_dir)
    if same_folder and 'saver' in checkpoint:
        run.saver.load_state_dict(checkpoint['saver'])
    return epoch + 1


def fit(run: Run, start_epoch: int = 0) -> None:
    """Train and validate from `start_epoch` to the end, saving each epoch."""
    args, task, saver = run.args, run.task, run.saver
    if run.scheduler is not None and start_epoch > 0:
        run.scheduler.step(start_epoch)
        run.scheduler.step_update(start_epoch * run.updates_per_epoch)
    if saver is not None:
        trim_summary(os.path.join(run.output_dir, SUMMARY), start_epoch)
    if task.teacher is not None and start_epoch == 0:
        validate_teacher(run)
    metrics: dict[str, float] = {}
    started = time.time()
    end_epoch = min(run.num_epochs, args.stop_epoch or run.num_epochs)
    if start_epoch >= end_epoch:
        _logger.info(f'Nothing to train: epoch {start_epoch} would come next, the run ends with epoch {end_epoch - 1}')
    for epoch in range(start_epoch, end_epoch):
        task.set_epoch(epoch)
        train_metrics = train_one_epoch(run, epoch)
        if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
            distribute_bn(run.pair, args.world_size, args.dist_bn == 'reduce')
        evaluated = epoch + 1 == end_epoch or (epoch + 1) % args.val_interval == 0
        eval_metrics = validate(run) if evaluated else {}
        if run.scheduler is not None:
            run.scheduler.step(epoch + 1, eval_metrics.get(args.eval_metric))
        if saver is None:
            continue
        row = OrderedDict(epoch=epoch, **{f'train_{key}': value for key, value in train_metrics.pop('terms').items()})
        row.update((f'eval_{name}', eval_metrics.get(name, '')) for name in run.columns)
        row.update(train_metrics)
        _append_row(os.path.join(run.output_dir, SUMMARY), row)
        if args.log_wandb:
            import wandb
            wandb.log(row)
        metrics = eval_metrics or metrics
        saver.save(
            epoch,
            metric=eval_metrics.get(args.eval_metric),
            branch_metrics=_branch_metrics(run, eval_metrics),
            metrics=dict(eval_metrics),
        )
        if args.save_epochs and epoch + 1 in args.save_epochs:
            saver.save_milestone(epoch + 1)
    if saver is not None:
        _log_result(run, metrics, time.time() - started)
        if args.export and any(epoch is not None for _, epoch in saver.best_branches.values()):
            try:
                export_run(run.output_dir)
            except (RunError, UsageError) as e:  # what was trained is kept
                _logger.error(f'Not exported: {e}')


def train_one_epoch(run: Run, epoch: int) -> dict[str, Any]:
    """Train one epoch.

    Returns:
        Dictionary with 'terms' (mean of each loss term over the epoch and the processes, '' where off), the learning
        rates, the stage, the epochs of the whole schedule, 'processes', 'images' of all of them, 'seconds' and
        'images_per_second'.
    """
    args, task, optimizer, loader = run.args, run.task, run.optimizer, run.loader_train
    task.train()
    clip_limits = {side: getattr(args, f'clip_grad_{side}') for side in run.pair.sides}
    accum_steps = args.grad_accum_steps
    num_batches = len(loader)
    tail = num_batches % accum_steps or accum_steps  # batches in the last update
    num_updates = epoch * run.updates_per_epoch
    lrs = _learning_rates(optimizer)
    sums: dict[str, torch.Tensor] = {}
    data_time, batch_time = AverageMeter(), AverageMeter()
    started = end = time.time()
    optimizer.zero_grad()
    for batch, input, target, sample_ids in loader.epoch(epoch):
        last_batch = batch + 1 == num_batches
        need_update = last_batch or (batch + 1) % accum_steps == 0
        in_update = tail if batch >= num_batches - tail else accum_steps
        data_time.update(time.time() - end)
        task.streams.set_position(epoch, batch)
        values: dict[str, torch.Tensor] = {}
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
                    update(run, learners, clip_limits)
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value
        if need_update:
            num_updates += 1
            task.update_ema(step=num_updates)
            if run.scheduler is not None:
                run.scheduler.step_update(num_updates=num_updates)
        batch_time.update(time.time() - end)
        end = time.time()
        if run.saver is not None:
            if last_batch or batch % args.log_interval == 0:
                _log_batch(run, epoch, batch, values, batch_time, data_time)
                if args.save_images:
                    torchvision.utils.save_image(
                        input, os.path.join(run.output_dir, f'train-batch-{batch}.jpg'), padding=0, normalize=True)
            if args.recovery_interval and (last_batch or (batch + 1) % args.recovery_interval == 0):
                run.saver.save_recovery(epoch, batch_idx=batch)
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    if not sums:
        raise RunError('data: the training loader gave no batch')

    seconds = time.time() - started
    means = torch.stack([total / num_batches for total in sums.values()])
    if args.distributed:
        torch.distributed.all_reduce(means)
        means /= args.world_size
    terms = dict.fromkeys(['loss', *(term.name for term in task.criterion.all_terms)], '')
    terms.update(zip(sums, means.tolist(), strict=True))
    row = {'terms': terms, **{f'lr_{side}': lr for side, lr in lrs.items()}}
    if hasattr(task.criterion, 'stage'):
        row['stage'] = task.criterion.schedule.stage(epoch)
    images = num_batches * args.batch_size * args.world_size
    return {
        **row,
        'num_epochs': run.num_epochs,
        'processes': args.world_size,
        'images': images,
        'seconds': round(seconds, 3),
        'images_per_second': round(images / seconds, 2),
    }


def update(run: Run, learners: str, clip_limits: dict[str, float | None]) -> None:
    """Clip the gradients of the branches that learn in this phase, and let the optimizer step with theirs alone."""
    optimizer = run.optimizer
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group['name'][0] in learners]
    try:
        run.scaler.unscale_(optimizer)
        run.task.clip_gradients(clip_limits, run.args.clip_mode, learners)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
    finally:
        optimizer.param_groups = groups


def _learning_rates(optimizer) -> dict[str, float]:
    """Return each branch's present learning rate, that of its head where layers have their own."""
    lrs: dict[str, float] = {}
    for group in optimizer.param_groups:
        side = group['name'][0]
        lrs[side] = max(group['lr'], lrs.get(side, group['lr']))
    return lrs


def _log_batch(run, epoch, batch, values, batch_time, data_time):
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
    kwargs = {
        'sides': run.pair.sides, 'device': run.device, 'autocast': run.autocast, 'distributed': args.distributed}
    metrics = evaluate_pair(task.get_eval_model(), run.loader_eval, **kwargs)
    if task.has_ema() and not args.model_ema_force_cpu:
        if args.distributed and args.dist_bn in ('broadcast', 'reduce'):
            distribute_bn(task.get_eval_model(ema=True), args.world_size, args.dist_bn == 'reduce')
        ema = evaluate_pair(task.get_eval_model(ema=True), run.loader_eval, **kwargs)
        metrics.update((f'ema_{name}', value) for name, value in ema.items())
    branches = _branch_metrics(run, metrics)
    metrics['top1'] = sum(branches.values()) / len(branches)
    if args.rank == 0:
        names = [name for name in run.columns if 'top1' in name and name != 'top1']
        _logger.info('Test: ' + '  '.join(f'{name} {metrics[name]:.3f}' for name in names))
    return metrics


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
    prefix = 'ema_' if 'ema_top1_' + run.pair.sides[0] in run.columns else ''
    return {side: metrics[f'{prefix}top1_{side}'] for side in run.pair.sides} if metrics else {}


def _append_row(path, row):
    """Append a row to a CSV file, with a header if it is new."""
    new = not os.path.exists(path) or os.path.getsize(path) == 0
    with open(path, 'a', newline='') as f:
        writer = csv.DictWriter(f, fieldnames=row.keys())
        if new:
            writer.writeheader()
        writer.writerow(row)


def _log_result(run, metrics, seconds):
    _logger.info(f'Trained in {seconds:.0f} s.')
    for side in run.pair.sides:
        best, epoch = run.saver.best_branches[side]
        if best is None:
            continue
        last = ', '.join(
            f'{name} {metrics[column]:.2f} %'
            for name, column in (('top-1', f'top1_{side}'), ('EMA', f'ema_top1_{side}')) if column in metrics)
        _logger.info(
            f'Branch {side} ({getattr(run.args, f"model_{side}")}): {last}; best {best:.2f} % at epoch {epoch}: '
            f'{os.path.join(run.output_dir, f"best_{side}.pth.tar")}')
    if run.saver.best_metric is not None:
        _logger.info(f'*** Best metric: {run.saver.best_metric:.4g} (epoch {run.saver.best_epoch})')
    _logger.info(f'Checkpoints, {SUMMARY} and args.yaml: {run.output_dir}')
