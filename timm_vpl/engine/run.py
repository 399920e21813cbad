"""The parts of a training run, and how they are built from its options."""
import contextlib
import logging
import math
from collections.abc import Callable, Iterable
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
from ..data.loaders import create_eval_loaders, create_train_loader
from ..data.splits import class_weights, create_split, resolve_classes, withhold
from ..errors import UsageError
from ..options.train import Options
from . import models, optim
from .checkpoint import Saver
from .control import Control
from .evaluate import likenesses, outputs_of
from .resume import Start
from .step import Progress, Update
from .trained import create_teacher

_logger = logging.getLogger('train')


class Run:
    """The parts of a training run, except for collectives and what writes to disk.

    Args:
        options: Options.
        processes: The processes of the run.
        start: Where it starts.

    Raises:
        UsageError: The options are invalid.
    """

    def __init__(self, options: Options, processes: Processes, start: Start):
        self.options, self.processes, self.start = options, processes, start
        # Before the data are read, which may take a while.
        optim.check_optimizer(options.optimizer)
        self.configs = models.resolve_data(options)  # data configuration of each branch
        splits = {'train': options.data.train_split, 'validation': options.data.val_split}
        train, held_out = (
            create_split(
                options.data, split, options.input.channels, options.loader.batch_size, options.run.seed,
                role == 'train')
            for role, split in splits.items())
        num_classes, self.class_names = resolve_classes(options, train, held_out)
        self.data = {  # identity of the images
            role: {'split': splits[role], **data_identity(images, self.class_names)}
            for role, images in (('train', train), ('validation', held_out))}
        data_config = models.loader_config(self.configs)

        teacher = create_teacher(options, data_config, num_classes, self.class_names)
        pair = models.create_pair(options, self.configs, num_classes, processes, teacher)
        models.check_pretrained_classes(options, pair, self.class_names)
        train, gate = _gate_images(options, train)
        asked = options.augmentation.class_weights
        self.class_weights = class_weights(asked, train) if asked else None  # float32, of the base terms
        self.loader_train = create_train_loader(options, train, data_config, num_classes, processes)
        self.loader_eval = create_eval_loaders(options.loader, held_out, self.configs, processes)
        self.updates_per_epoch = math.ceil(len(self.loader_train) / options.optimizer.grad_accum_steps)
        criterion = optim.create_criterion(
            options, optim.schedule_epochs(options, self.updates_per_epoch), processes.device,
            models.student_of(options, {side: pair.branch(side) for side in pair.sides}), num_classes,
            models.feature_width(pair, teacher, self.configs), self.class_weights)
        # Images by which terms with a gate compare the branches.
        gate_configs = {**self.configs, 'teacher': data_config} if teacher else self.configs
        self.loader_gate = create_eval_loaders(
            options.loader, gate, gate_configs, processes) if gate and criterion.gates else None
        if gate and options.data.gate_split:
            self.data['gate'] = {'split': options.data.gate_split, **data_identity(gate, self.class_names)}
        lrs = optim.learning_rates(options, processes.world_size)
        self.optimizer = optim.create_optimizer(options, pair, lrs, criterion)
        self.scheduler, self.num_epochs = optim.create_scheduler(options, self.optimizer, self.updates_per_epoch)
        self.task = _create_task(options, pair, teacher, criterion, processes)
        amp_dtype = torch.float16 if options.device.amp_dtype == 'float16' else torch.bfloat16
        self.autocast: Callable = contextlib.nullcontext if not options.device.amp else partial(
            torch.autocast, processes.device.type, dtype=amp_dtype)
        scaled = options.device.amp and amp_dtype == torch.float16
        self.update = Update(
            self.task,
            self.optimizer,
            len(self.loader_train),
            options.optimizer.grad_accum_steps,
            self.autocast,
            torch.amp.GradScaler(processes.device.type) if scaled else None,
            {side: options.branches[side].clip_grad for side in pair.sides},
            options.optimizer.clip_mode,
            skip=options.run.on_nonfinite == 'skip',
            limit=options.run.nonfinite_limit,
        )
        self.flops = models.training_flops(self.task, self.configs)  # for an image
        self.progress = Progress(start.epoch or 0)
        self.rows: list[dict[str, Any]] = []  # of summary.csv
        self.control = Control()
        self.observers: Iterable[Any] = ()
        self.saver: Saver | None = None  # of the first process
        self.output_dir: str | None = None
        if options.run.eval_metric not in self.columns:
            raise UsageError(f'--eval-metric {options.run.eval_metric}: expected one of {", ".join(self.columns)}')

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
    def columns(self) -> list[str]:
        """Names of the evaluation metrics, as columns and for --eval-metric."""
        names = [f'{metric}_{name}' for name in outputs_of(self.pair.sides) for metric in ('loss', 'top1', 'top5')]
        names += likenesses(self.pair)
        return ['top1', *names, *(f'ema_{name}' for name in names if self.evaluates_ema)]

    @property
    def evaluates_ema(self) -> bool:
        """Whether the EMA is validated."""
        return self.task.has_ema() and not self.options.ema.model_ema_force_cpu

    @property
    def place(self) -> str:
        """Where the run is, for an error."""
        return f'epoch {self.progress.epoch}, batch {self.progress.batch}'

    def notify(self, event: str, *values: Any) -> None:
        """Notify the observers that handle this event."""
        for observer in self.observers if self.saver is not None else ():
            if hasattr(observer, event):
                getattr(observer, event)(self, *values)


def create_run(options: Options, processes: Processes, start: Start | None = None) -> Run:
    """Build a run from its options, to start at the beginning unless `start` differs."""
    return Run(options, processes, start or Start())


def _gate_images(options: Options, train: Split) -> tuple[Split, Split | None]:
    """Return the images to train on, and those by which terms with a gate compare the branches."""
    data, gated = options.data, METHODS[options.method].gated(options.own)
    if gated and data.gate_split:
        if data.gate_split == data.val_split:
            _logger.warning(
                f'--gate-split {data.gate_split} is also --val-split: its labels influence training, so its top-1 is '
                f'not that of unseen images')
        gate = create_split(data, data.gate_split, options.input.channels, flag='--gate-split')
        gate.num_classes = train.num_classes
        return train, gate
    if not gated and data.gate_pct is None:
        return train, None
    return withhold(train, 2. if data.gate_pct is None else data.gate_pct)


def _check_compile(options: Options, device: torch.device, networks: int) -> None:
    """Raise UsageError if torch can't compile so, or if one compiled network would overwrite another's outputs."""
    backend, mode, modes = options.input.torchcompile, options.input.torchcompile_mode, compile_modes()
    graphs = {'--torchcompile': backend == 'cudagraphs', '--torchcompile-mode': modes.get(mode or '', False)}
    for flag, value, known in (
            ('--torchcompile', backend, torch.compiler.list_backends(exclude_tags=())),
            ('--torchcompile-mode', mode, [None, *modes]),
    ):
        if value not in known:
            raise UsageError(f'{flag} {value}: expected one of {", ".join(filter(None, known))}')
        # Each call of a compiled function may overwrite earlier outputs, unless a backward pass is pending.
        if graphs[flag] and device.type == 'cuda' and (networks > 1 or options.optimizer.grad_accum_steps > 1):
            raise UsageError(
                f'{flag} {value}: its CUDA graphs overwrite outputs of one network with those of another, and '
                f'accumulated gradients; use --torchcompile-mode max-autotune-no-cudagraphs')


def _create_task(options, pair, teacher, criterion, processes) -> PairTask:
    device = processes.device
    if len(criterion.phases) > 1 and options.optimizer.grad_accum_steps > 1:
        raise UsageError(f'--grad-accum-steps {options.optimizer.grad_accum_steps}: --method {options.method} has '
                         f'{len(criterion.phases)} optimizer phases per batch; use 1')
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
        _check_compile(options, device, len(pair.sides) + (teacher is not None))
        task.compile(backend=options.input.torchcompile, mode=options.input.torchcompile_mode)
        task.compile_ema(backend=options.input.torchcompile, mode=options.input.torchcompile_mode)
    return task
