"""The parts of a training run, and how they are built from its options."""
import contextlib
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..compat import compile_modes
from ..core.methods import METHODS
from ..core.processes import Processes
from ..core.seeding import BranchStreams
from ..core.task import PairTask
from ..data.identity import data_identity
from ..data.images import Split
from ..data.loaders import TrainLoader, create_eval_loaders, create_train_loader
from ..data.splits import create_split, resolve_classes, withhold
from ..errors import UsageError
from ..options.train import Options
from . import models, optim
from .checkpoint import Saver
from .control import Control
from .resume import Start
from .step import Progress, Update
from .trained import create_teacher

_logger = logging.getLogger('train')


@dataclass
class Run:
    """The parts of a training run."""
    options: Options
    processes: Processes
    start: Start
    task: PairTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    num_epochs: int
    autocast: Callable
    update: Update
    loader_train: TrainLoader
    loader_eval: Any
    loader_gate: Any  # images by which terms with a gate compare the branches, None for none
    updates_per_epoch: int
    columns: list[str]  # of the evaluation metrics
    configs: dict[str, dict]  # data configuration of each branch
    class_names: list[str] | None
    data: dict[str, dict]  # identity of the training and the validation images
    flops: int  # of training, for an image
    progress: Progress
    rows: list[dict[str, Any]] = field(default_factory=list)  # of summary.csv
    control: Control = field(default_factory=Control)
    observers: Iterable[Any] = ()
    saver: Saver | None = None  # of the first process
    output_dir: str | None = None  # likewise

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.processes.device

    @property
    def pair(self):
        """The pair that is trained."""
        return self.task.get_trainable_module()

    @property
    def end_epoch(self) -> int:
        """Completed epochs at the end of this start."""
        return min(self.num_epochs, self.options.run.stop_epoch or self.num_epochs)

    @property
    def num_updates(self) -> int:
        """Optimizer updates done so far."""
        in_epoch = math.ceil(self.progress.batch / self.options.optimizer.grad_accum_steps)
        return self.progress.epoch * self.updates_per_epoch + in_epoch

    @property
    def evaluates_ema(self) -> bool:
        """Whether the EMA is validated."""
        return self.task.has_ema() and not self.options.ema.model_ema_force_cpu

    @property
    def place(self) -> str:
        """Where the run is, for an error."""
        process = f'process {self.processes.rank}, ' if self.processes.distributed else ''
        return f'{process}epoch {self.progress.epoch}, batch {self.progress.batch}'

    @property
    def statistics(self) -> list[torch.Tensor]:
        """Running statistics of BatchNorm, of the pair and its EMA: what processes do not have in common."""
        ema = self.task.get_trainable_module(ema=True)
        return [
            buffer for module in (self.pair, *([] if ema is None else [ema.module]))
            for name, buffer in module.named_buffers() if 'running_mean' in name or 'running_var' in name]

    def tell(self, event: str, *values: Any) -> None:
        """Tell the observers that know this event of it."""
        for observer in self.observers if self.saver is not None else ():
            if hasattr(observer, event):
                getattr(observer, event)(self, *values)


def create_run(options: Options, processes: Processes, start: Start | None = None) -> Run:
    """Build everything that a run needs, but for what the processes do together and what writes to disk.

    Args:
        options: Options.
        processes: The processes of the run.
        start: Where it begins; None at the beginning.
    """
    start = start or Start()
    splits = {'train': options.data.train_split, 'validation': options.data.val_split}
    train, held_out = (
        create_split(
            options.data, split, options.input.channels, options.loader.batch_size, options.run.seed, role == 'train')
        for role, split in splits.items())
    num_classes, class_names = resolve_classes(options, train, held_out)
    data = {
        role: {'split': splits[role], **data_identity(images, class_names)}
        for role, images in (('train', train), ('validation', held_out))}
    configs = models.resolve_data(options)
    data_config = models.loader_config(configs)

    teacher = create_teacher(options, data_config, num_classes, class_names)
    pair = models.create_pair(options, configs, num_classes, processes, teacher)
    models.check_pretrained_classes(options, pair, class_names)
    train, gate = _gate_images(options, train)
    loader_train = create_train_loader(options, train, data_config, num_classes, processes)
    loader_eval = create_eval_loaders(options.loader, held_out, configs, processes)
    updates_per_epoch = math.ceil(len(loader_train) / options.optimizer.grad_accum_steps)
    criterion = optim.create_criterion(
        options, optim.schedule_epochs(options, updates_per_epoch), processes.device,
        models.student_of(options, {side: pair.branch(side) for side in pair.sides}), num_classes,
        models.feature_width(pair, teacher, configs))
    optimizer = optim.create_optimizer(options, pair, optim.learning_rates(options, processes.world_size), criterion)
    scheduler, num_epochs = optim.create_scheduler(options, optimizer, updates_per_epoch)
    task = _create_task(options, pair, teacher, criterion, processes)
    amp_dtype = torch.float16 if options.device.amp_dtype == 'float16' else torch.bfloat16
    autocast = contextlib.nullcontext if not options.device.amp else partial(
        torch.autocast, processes.device.type, dtype=amp_dtype)
    run = Run(
        options=options,
        processes=processes,
        start=start,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        num_epochs=num_epochs,
        autocast=autocast,
        update=Update(
            task,
            optimizer,
            len(loader_train),
            options.optimizer.grad_accum_steps,
            autocast,
            torch.amp.GradScaler(processes.device.type) if options.device.amp and amp_dtype == torch.float16 else None,
            {side: options.branches[side].clip_grad for side in pair.sides},
            options.optimizer.clip_mode,
            skip=options.run.on_nonfinite == 'skip',
            limit=options.run.nonfinite_limit,
        ),
        loader_train=loader_train,
        loader_eval=loader_eval,
        loader_gate=create_eval_loaders(options.loader, gate, configs, processes) if gate and criterion.gates else None,
        updates_per_epoch=updates_per_epoch,
        columns=_eval_columns(pair.sides, ema=options.ema.model_ema and not options.ema.model_ema_force_cpu),
        configs=configs,
        class_names=class_names,
        data=data,
        flops=models.training_flops(task, configs),
        progress=Progress(start.epoch or 0),
    )
    if options.run.eval_metric not in run.columns:
        raise UsageError(f'--eval-metric {options.run.eval_metric}: expected one of {", ".join(run.columns)}')
    return run


def _gate_images(options: Options, train: Split) -> tuple[Split, Split | None]:
    """Return the images to train on, and those by which terms with a gate compare the branches."""
    data, gated = options.data, METHODS[options.method].gated(options.own)
    if gated and data.gate_split:
        gate = create_split(data, data.gate_split, options.input.channels, flag='--gate-split')
        gate.num_classes = train.num_classes
        return train, gate
    if not gated and data.gate_pct is None:
        return train, None
    return withhold(train, 2. if data.gate_pct is None else data.gate_pct)


def _create_task(options, pair, teacher, criterion, processes) -> PairTask:
    device = processes.device
    if len(criterion.phases) > 1 and options.optimizer.grad_accum_steps > 1:
        raise UsageError(f'--grad-accum-steps {options.optimizer.grad_accum_steps}: --method {options.method} has '
                         f'{len(criterion.phases)} optimizer phases a batch, 1 is the only value')
    task = PairTask(
        pair,
        criterion,
        streams=BranchStreams(options.run.seed, processes.rank, device),
        teacher=teacher,
        device=device,
        verbose=processes.rank == 0,
    )
    if options.ema.model_ema:
        task.setup_ema(
            decay=options.ema.model_ema_decay,
            use_warmup=options.ema.model_ema_warmup,
            device=torch.device('cpu') if options.ema.model_ema_force_cpu else None,
        )
    if options.input.torchcompile:
        for flag, value, known in (
                ('--torchcompile', options.input.torchcompile, torch.compiler.list_backends(exclude_tags=())),
                ('--torchcompile-mode', options.input.torchcompile_mode, [None, *compile_modes()]),
        ):
            if value not in known:
                raise UsageError(f'{flag} {value}: expected one of {", ".join(filter(None, known))}')
        task.compile(backend=options.input.torchcompile, mode=options.input.torchcompile_mode)
        task.compile_ema(backend=options.input.torchcompile, mode=options.input.torchcompile_mode)
    return task


def _eval_columns(sides, ema: bool) -> list[str]:
    """Return the names of the evaluation metrics, as columns and for --eval-metric."""
    names = [*sides, 'ens'] if len(sides) > 1 else list(sides)
    columns = [f'{metric}_{name}' for name in names for metric in ('loss', 'top1', 'top5')]
    return ['top1', *columns, *(f'ema_{column}' for column in columns if ema)]
