#!/usr/bin/env python3
"""Time of a whole epoch of the package's loop against a plain loop of timm's parts, and host synchronisations on CUDA.

Both loops train one model alone with the same settings: timm's loader, AdamW, cosine schedule, EMA, log lines. The
plain loop is written as timm's train script is: ClassificationTask, and one `.item()` of the loss a step for its meter.
Epochs alternate: ours, plain, ours, plain, ...

On CUDA the package's loop then runs under `torch.cuda.set_sync_debug_mode('error')` from the second step to the last
of an epoch, without log lines: once on a batch that lies on the device, once with the real loader.
"""
import contextlib
import logging
import time

import common
import timm
import torch
from common import PRECISIONS, block, create, create_fixed, create_parser, interleave, parse
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import AverageMeter, NativeScaler

from timm_vpl.data.data import create_split
from timm_vpl.engine import build

_logger = logging.getLogger('plain')


def solo_arguments(options) -> list[str]:
    """Return the command line of the package's run."""
    data = ['--data-dir', options.data_dir] if options.data_dir else ['--dataset', 'digits']
    argv = [
        *data, '--method', 'solo', '--model-a', options.model, '--device', options.device, '--epochs', common.EPOCHS,
        '--batch-size', options.batch_size, '--img-size', options.img_size, '--num-classes', options.num_classes,
        '--workers', options.workers, '--aa', options.aa, *PRECISIONS[options.precision],
    ]
    argv += ['--pin-mem'] if options.pin_mem else []
    argv += ['--channels-last-a'] if options.channels_last_a else []
    argv += ['--torchcompile', options.torchcompile] if options.torchcompile else []
    return [str(item) for item in argv]


class Plain:
    """A run of timm's parts with the settings of one of the package's."""

    def __init__(self, run):
        args, side = run.args, 'a'
        self.args, self.device, self.num_epoch = args, run.device, 0
        config = build.loader_config(build.resolve_data(args))
        size = build.size_kwargs(build.pretrained_cfg_of(args.model_a, '--model-a'), config['input_size'])
        model = timm.create_model(args.model_a, num_classes=args.num_classes, **size)
        model.load_state_dict(run.pair.branch(side).state_dict())
        memory_format = torch.channels_last if args.channels_last_a else torch.contiguous_format
        model.to(self.device, memory_format=memory_format)
        self.memory_format = memory_format
        self.optimizer = create_optimizer_v2(
            model, opt=args.opt, lr=build.learning_rates(args)[side], weight_decay=args.weight_decay_a,
            fused=run.optimizer.defaults.get('fused'))
        if args.data_dir:
            dataset = create_dataset('', root=args.data_dir, split=args.train_split, is_training=True)
        else:
            dataset = create_split(args, args.train_split, is_training=True)  # timm's ImageDataset of the digits
        self.loader = create_loader(
            dataset,
            input_size=config['input_size'],
            batch_size=args.batch_size,
            is_training=True,
            re_prob=args.reprob,
            re_mode=args.remode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation=args.train_interpolation,
            mean=config['mean'],
            std=config['std'],
            num_workers=args.workers,
            pin_memory=args.pin_mem,
            device=self.device,
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(args), updates_per_epoch=len(self.loader))
        self.task = ClassificationTask(
            model, criterion_kwargs={'smoothing': args.smoothing}, device=self.device, verbose=False)
        self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.torchcompile:
            self.task.compile(backend=args.torchcompile)
        self.autocast = run.autocast
        self.scaler = NativeScaler(device=self.device.type) if run.scaler.is_enabled() else None

    def epoch(self):
        """Train one epoch."""
        task, optimizer = self.task, self.optimizer
        task.train()
        num_updates = self.num_epoch * len(self.loader)
        losses, data_time, update_time = AverageMeter(), AverageMeter(), AverageMeter()
        end = time.time()
        optimizer.zero_grad()
        for batch, (input, target) in enumerate(self.loader):
            input = input.contiguous(memory_format=self.memory_format)
            data_time.update(time.time() - end)
            with self.autocast():
                loss = task(input, target)['loss']
            if self.scaler is not None:
                self.scaler(loss, optimizer)
            else:
                loss.backward()
                optimizer.step()
            losses.update(loss.item(), len(input))
            num_updates += 1
            optimizer.zero_grad()
            task.update_ema(step=num_updates)
            update_time.update(time.time() - end)
            end = time.time()
            if batch % self.args.log_interval == 0:
                lr = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
                _logger.info(
                    f'Train: {self.num_epoch} [{batch:>4d}/{len(self.loader)}]  Loss: {losses.val:#.3g} '
                    f'({losses.avg:#.3g})  Time: {update_time.val:.3f}s  LR: {lr:.3e}  Data: {data_time.val:.3f}s')
            self.scheduler.step_update(num_updates=num_updates, metric=losses.avg)
        self.num_epoch += 1


class Guarded:
    """A run's loader under which the body of a step may not wait for the device, from the second step on."""

    def __init__(self, loader):
        self.loader = loader
        self.num_guarded = 0

    @property
    def skipped(self):
        return self.loader.skipped

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch, first_batch=0):
        with contextlib.closing(self.loader.epoch(epoch, first_batch)) as batches:
            for i, batch in enumerate(batches):
                if i == 1:
                    torch.cuda.set_sync_debug_mode('error')
                self.num_guarded += i > 0
                yield batch
        torch.cuda.set_sync_debug_mode('default')


def check_syncs(options, argv, report):
    """Report whether the package's loop waits for the device within an epoch."""
    rows = []
    steps = max(options.steps, 3)
    for name, run in (
            ('batch on the device', create_fixed(argv, steps, 0)),
            ('a pair with all terms', create_fixed(common.arguments(options, 'vpl'), steps)),
            ('deep mutual learning', create_fixed(common.arguments(options, 'dml'), steps)),
            ('--on-nonfinite skip', create_fixed(
                common.arguments(options, 'vpl', 'ab', '--on-nonfinite', 'skip'), steps)),
            ('real loader', create(argv, 0)),
    ):
        block(run, 0)()
        run.loader_train = loader = Guarded(run.loader_train)
        try:
            block(run, 0)()
            found = 'none'
        except RuntimeError as e:
            found = str(e).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode('default')
        rows.append([name, loader.num_guarded, found])
    report.table('host synchronisations', ['data', 'steps watched', 'found'], rows)


def main(argv=None):
    parser = create_parser(__doc__)
    add = parser.add_argument
    add('--model', help='the model that is trained; by default that of branch a')
    add('--data-dir', help='folder of images; by default the digits, on CUDA a generated folder', metavar='DIR')
    add('--num-images', type=int, help='images of the generated folder')
    add('--aa', default='', help='augmentation policy of both loops')
    add('--pin-mem', action='store_true', help='pin the memory of the loader')
    options = parse(parser, argv, cpu={'repeats': 7}, cuda={'repeats': 7, 'num_images': 8192, 'workers': 12})
    options.model = options.model or options.model_a
    if not options.data_dir and options.num_images:
        options.data_dir = common.create_folder(options.num_images, 256, 256)
    report = common.Report('loop', options)
    argv = solo_arguments(options)

    run = create(argv, 0)
    run.saver = object()  # that of the first process: it writes log lines
    plain = Plain(run)
    steps = len(run.loader_train)
    print(f'# {options.model}, {steps} steps an epoch (ours), {len(plain.loader)} (plain)')
    epochs = iter(range(10 ** 6))
    seconds, peaks = interleave(
        {'ours': lambda: block(run, next(epochs))(), 'plain timm': plain.epoch},
        options.repeats, options.warmup, options.device)
    report.times('epoch', seconds, images=steps * options.batch_size, peaks=peaks)
    report.ratios('epoch', {'ours / plain timm': (seconds['ours'], seconds['plain timm'])})
    if torch.device(options.device).type == 'cuda':
        check_syncs(options, argv, report)
    report.save()


if __name__ == '__main__':
    main()
