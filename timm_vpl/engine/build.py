"""From options to the parts of a run: models, pair, optimizer, criterion, task."""
import logging
import math
import re
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import convert_sync_batchnorm
from timm.loss import create_classification_loss
from timm.models import get_pretrained_cfg
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_class,
    optimizer_kwargs,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..core.criterion import StagedLoss
from ..core.methods import METHODS, partner_of
from ..core.pair import PairWrapper, classifiers_of
from ..core.seeding import seed_all
from ..core.stochastic_depth import set_uniform_drop_path
from ..core.task import PairTask
from ..core.teacher import Teacher
from ..data.data import names_of
from ..errors import RunError, UsageError
from ..options.options import INPUT_OPTIONS, mixup_active, no_token
from .trained import create_named, load_trained
from .zero import ShardedOptimizer

_logger = logging.getLogger(__name__)

UNSHARDABLE = ('Kron', 'Lookahead')  # one generator for all parameters; weights of its own


def resolve_data(args) -> dict[str, dict[str, Any]]:
    """Return timm's data configuration of each branch, by side: its input size, statistics, interpolation and crop.

    They are those of the pretrained model, else ImageNet's, unless the options say otherwise: a branch does not depend
    on its partner.
    """
    configs = {}
    for side in args.sides:
        cfg = pretrained_cfg_of(getattr(args, f'model_{side}'), f'--model-{side}')
        if not _is_pretrained(args, side):
            cfg = {key: cfg[key] for key in ('input_size',) if key in cfg}
        given = {key: getattr(args, f'{key}_{side}') for key in INPUT_OPTIONS}
        config = resolve_data_config(
            {**given, 'in_chans': args.in_chans, 'input_size': args.input_size}, pretrained_cfg=cfg)
        if not args.input_size:
            in_chans = args.in_chans or 3  # as the images are read
            if not args.in_chans and cfg.get('input_size', (3,))[0] != in_chans:
                raise UsageError(
                    f'--model-{side} {getattr(args, f"model_{side}")} takes images of {cfg["input_size"][0]} '
                    f'channel(s); --in-chans {cfg["input_size"][0]} reads them so')
            config['input_size'] = (in_chans, *config['input_size'][1:])
        for key in ('mean', 'std'):
            config[key] = tuple(adapt_to_chs(config[key], config['input_size'][0]))
        configs[side] = config
    return configs


def loader_config(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the configuration of the images that the branches share: that of the branch with the larger images."""
    return max(configs.values(), key=lambda config: math.prod(config['input_size']))


def _is_pretrained(args, side):
    return bool(
        getattr(args, f'pretrained_{side}')
        or getattr(args, f'pretrained_path_{side}')
        or getattr(args, f'initial_checkpoint_{side}'))


def pretrained_cfg_of(name: str, flag: str) -> dict[str, Any]:
    """Return timm's pretrained configuration of a model, {} where it has none; `flag` named the model."""
    if ':' in name:  # a source such as hf-hub: or local-dir: brings its own configuration
        with torch.device('meta'):
            return create_named(name, f'{flag} {name}').pretrained_cfg
    cfg = get_pretrained_cfg(name)
    return cfg.to_dict() if cfg else {}


def size_kwargs(cfg: dict[str, Any], input_size) -> dict[str, Any]:
    """Return the argument that builds a model for images of this size, where its architecture depends on the size."""
    height, width = input_size[-2:]
    if not cfg.get('fixed_input_size') or tuple(cfg['input_size'][-2:]) == (height, width):
        return {}
    return {'img_size': height if height == width else (height, width)}


def create_branch(args, side: str, data_config: dict[str, Any]) -> nn.Module:
    """Create a branch's model with timm, its weights drawn from a stream of their own.

    Raises:
        UsageError: timm can't build the model with these options.
    """
    def option(name):
        return getattr(args, f'{name}_{side}')

    name = option('model')
    kwargs = {
        'pretrained': option('pretrained') or bool(option('pretrained_path')),
        'in_chans': data_config['input_size'][0],
        'num_classes': args.num_classes,
        'drop_rate': option('drop'),
        'drop_path_rate': option('drop_path') if option('drop_path') is not None else option('drop_connect'),
        'drop_block_rate': option('drop_block'),
        'global_pool': option('gp'),
        'bn_momentum': option('bn_momentum'),
        'bn_eps': option('bn_eps'),
        'checkpoint_path': option('initial_checkpoint') or None,
    }
    if option('pretrained_path'):
        # As in timm's script: a file's weights, whatever its number of classes.
        kwargs['pretrained_cfg_overlay'] = {'file': option('pretrained_path'), 'num_classes': -1}
    kwargs.update(size_kwargs(pretrained_cfg_of(name, f'--model-{side}'), data_config['input_size']))
    kwargs.update(option('model_kwargs') or {})
    uniform = METHODS[args.method].uniform_drop_path
    rate = kwargs.pop('drop_path_rate') if uniform else None
    seed_all(args.seed, 'init', side)
    model = create_named(name, f'--model-{side} {name}', **kwargs)
    try:
        _initialize_head(model, option('head_init_scale'), option('head_init_bias'))
    except ValueError as e:  # no classifier, as where a config.json asks for features
        raise UsageError(f'--model-{side} {name}: {e}') from e
    if uniform:
        try:
            set_uniform_drop_path(model, rate, skip=args.drop_path_skip)
        except ValueError as e:
            raise UsageError(f'--model-{side} {name}: --method {args.method} can not train it: {e}') from e
    if option('grad_checkpointing'):
        model.set_grad_checkpointing(enable=True)
    return model


@torch.no_grad()
def _initialize_head(model, scale, bias):
    for layer in (module for head in classifiers_of(model) for module in head.modules() if hasattr(module, 'weight')):
        if scale is not None:
            for parameter in layer.parameters(recurse=False):
                parameter.mul_(scale)
        if bias is not None and layer.bias is not None:
            nn.init.constant_(layer.bias, bias)


def create_teacher(args, data_config: dict[str, Any], class_names: list[str] | None) -> Teacher | None:
    """Create the frozen teacher of a method that has one, in the place of the branch that the pair has not.

    Args:
        args: Options.
        data_config: Data configuration of the images that the student gets.
        class_names: Names of the classes in the data, if they are known.

    Raises:
        UsageError: The teacher can't be read, is several, or knows other classes.
    """
    if not METHODS[args.method].has_teacher(args):
        return None
    [student] = args.sides
    side = partner_of(student)
    try:
        found = load_trained(args.teacher, side=args.teacher_branch)
    except (RunError, UsageError) as e:
        raise type(e)(f'--teacher: {e}') from e
    if len(found) > 1:
        found = [branch for branch in found if branch.side == side]
    [trained] = found
    if args.teacher_branch and trained.side is None:
        _logger.warning('--teacher-branch: no effect, the teacher is one model')
    name = f'--teacher {args.teacher}: {trained.label}'
    for what, known, there in (
            ('classes', trained.model.num_classes, args.num_classes),
            ('channels', trained.data_config['input_size'][0], data_config['input_size'][0]),
    ):
        if known != there:
            raise UsageError(f'{name} knows {known} {what}, the data has {there}')
    names = trained.class_names or ()
    names = names_of(names) if isinstance(names, dict) else names
    for i, (known, there) in enumerate(zip(names, class_names or (), strict=False)):
        if known != there:
            raise UsageError(f'{name} knows other classes, class {i} is {known!r} to it and {there!r} in the data')
    try:
        teacher = Teacher(trained.model, side, trained.data_config, data_config)
        with torch.no_grad():
            teacher(torch.zeros(1, *data_config['input_size']))
    except (AssertionError, IndexError, RuntimeError, ValueError) as e:
        raise UsageError(f'--teacher {args.teacher}: {trained.label} can not teach: {str(e).splitlines()[0]}') from e
    _logger.info(f'Teacher: {trained.label} of {trained.source}')
    return teacher


def create_pair(
        args,
        configs: dict[str, dict[str, Any]],
        device: torch.device,
        teacher: Teacher | None = None,
) -> PairWrapper:
    """Create the pair on its device, ready to train.

    Args:
        args: Options.
        configs: Data configuration of each branch.
        device: Where the pair will be.
        teacher: Frozen teacher of a method that has one.

    Raises:
        UsageError: A model can't be built or can't be a branch, or BatchNorm would see one image.
    """
    sync_bn = args.sync_bn and args.distributed
    if args.sync_bn and device.type != 'cuda':
        raise UsageError(f'--sync-bn: torch has it on CUDA devices only, this is {device.type}')
    if args.sync_bn and not args.distributed:
        _logger.warning('--sync-bn: no effect with one process')
    models = {side: create_branch(args, side, configs[side]) for side in args.sides}
    for side, model in models.items():
        batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        if batch_norm and args.batch_size == 1 and not sync_bn:
            raise UsageError(f'--batch-size 1: --model-{side} {getattr(args, f"model_{side}")} has BatchNorm, which '
                             f'needs at least 2 images a process')
    if METHODS[args.method].distilled:
        _set_distilled(args, models)
    seed_all(args.seed, 'init', 'affine')
    try:
        pair = PairWrapper(
            models.get('a'),
            models.get('b'),
            affine_side=args.affine_side,
            partner_dim=None if teacher is None else teacher.embed_dim,
            affine=METHODS[args.method].projects(args),
        )
    except ValueError as e:
        raise UsageError(str(e)) from e
    if sync_bn:
        for side in pair.sides:
            convert_sync_batchnorm(pair.branch(side))  # timm's, which keeps the activation of its own layers
    for side in pair.sides:
        _freeze(args, pair, side)
    pair.set_inputs(loader_config(configs), configs)
    _try_forward(args, pair, configs)
    for side, model in models.items():
        if getattr(args, f'channels_last_{side}'):
            model.to(memory_format=torch.channels_last)
            pair.parts[side].memory_format = torch.channels_last
    pair.to(device)
    if len(models) == 2 and _has_attention(models['a']) and not _has_attention(models['b']):
        _logger.warning(
            f'--model-a {args.model_a} has attention and --model-b {args.model_b} has not: the paper has the CNN as a '
            f'and the transformer as b, here their roles are swapped')
    return pair


def check_pretrained_classes(args, pair: PairWrapper, class_names: list[str] | None) -> None:
    """Warn where a pretrained branch keeps a classifier of as many other classes."""
    for side in pair.sides if class_names else ():
        names = pair.branch(side).pretrained_cfg.get('label_names') if _is_pretrained(args, side) else None
        names = names_of(names) if isinstance(names, dict) else list(names or ())
        if len(names) == len(class_names) and names != class_names:
            i = next(i for i, pair in enumerate(zip(names, class_names, strict=True)) if pair[0] != pair[1])
            _logger.warning(
                f'--model-{side} {getattr(args, f"model_{side}")}: its classifier knows other classes, class {i} is '
                f'{names[i]!r} to it and {class_names[i]!r} in the data; training begins with it all the same')


def _freeze(args, pair, side):
    depth = getattr(args, f'freeze_depth_{side}')
    if depth:
        if not _is_pretrained(args, side):
            _logger.warning(f'--freeze-depth-{side} {depth}: freezes layers that were never trained (no --pretrained)')
        try:
            pair.freeze(side, depth)
        except ValueError as e:
            raise UsageError(f'--freeze-depth-{side}: {e}') from e


def _set_distilled(args, models):
    """Choose the branch that has a distillation token as the student, b where both have, and switch its heads."""
    able = [side for side, model in models.items() if hasattr(model, 'set_distilled_training')]
    if not able:
        names = ', '.join(f'--model-{side} {getattr(args, f"model_{side}")}' for side in models)
        raise UsageError(f'--method {args.method}: {names} {no_token()}')
    args.student = able[-1]
    models[args.student].set_distilled_training(True)


@torch.no_grad()
def _try_forward(args, pair, configs):
    """Run each branch once on a blank image, so that a model that can't take the input is named before the run."""
    pair.eval()
    for side in pair.sides:
        input_size = configs[side]['input_size']
        try:
            pair.run(side, torch.zeros(1, *input_size))
        except (AssertionError, IndexError, RuntimeError, ValueError) as e:
            raise UsageError(
                f'--model-{side} {getattr(args, f"model_{side}")}: can not take images of size {tuple(input_size)}: '
                f'{(str(e).strip() or type(e).__name__).splitlines()[0]}') from e


def training_flops(task: PairTask, configs: dict[str, dict[str, Any]]) -> int:
    """Return the floating-point operations that training takes for an image, as torch counts them.

    Forward and backward of each branch that learns, with what gradient checkpointing computes again; the further
    forward of a branch that is asked again after its update; the forward of a frozen teacher. Pair terms, optimizer and
    what skipping stochastic depth saves are not counted.

    Args:
        task: The task, not yet distributed.
        configs: Data configuration of each branch.
    """
    pair, refreshed = task.trainable_module, ''.join(task.phases[:-1])
    training = pair.training
    total = 0
    for side in pair.sides:
        forward, both = _count_flops(pair.branch(side).eval(), configs[side]['input_size'])
        total += task.criterion.views * both + forward * refreshed.count(side)
    pair.train(training)
    if task.teacher is not None:
        total += _count_flops(task.teacher.branch.model, task.teacher.data_config['input_size'])[0]
    return total


def _count_flops(model: nn.Module, input_size: tuple[int, ...]) -> tuple[int, int]:
    """Return the operations of one image's forward pass, and of forward and backward."""
    device = next(model.parameters()).device
    # The counter knows attention by its matrix products, not by every fused kernel.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(torch.zeros(1, *input_size, device=device))
        forward = counter.get_total_flops()
        outputs = output if isinstance(output, (tuple, list)) else [output]
        learning = [x.sum() for x in outputs if x.requires_grad]
        if learning:
            sum(learning).backward()
    model.zero_grad(set_to_none=True)
    return forward, counter.get_total_flops()


def _has_attention(model) -> bool:
    """Return whether a model mixes positions by attention, by the names that timm's modules have."""
    return any(re.search('attn|attention|xca|gpsa', type(module).__name__, re.IGNORECASE) for module in model.modules())


def learning_rates(args) -> dict[str, float]:
    """Return each branch's learning rate: as given, or its base scaled to the global batch by timm's rule."""
    global_batch = args.batch_size * args.world_size * args.grad_accum_steps
    ratio = global_batch / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(name in args.opt.lower() for name in ('ada', 'lamb')) else 'linear')
    if scale == 'sqrt':
        ratio = ratio ** 0.5
    return {
        side: lr if (lr := getattr(args, f'lr_{side}')) is not None else getattr(args, f'lr_base_{side}') * ratio
        for side in args.sides
    }


def param_groups(args, pair: PairWrapper, lrs: dict[str, float]) -> list[dict[str, Any]]:
    """Return the optimizer's groups, named by branch, each branch's as timm makes them for the model alone.

    The affine layer has the learning rate and weight decay of branch b, or of the only one.
    """
    opt_kwargs = args.opt_kwargs or {}
    fallback = {key: opt_kwargs[key] for key in ('fallback_list', 'fallback_no_weight_decay') if key in opt_kwargs}
    groups = []
    for side in pair.sides:
        model = pair.branch(side)
        kwargs = {
            'weight_decay': getattr(args, f'weight_decay_{side}'),
            'no_weight_decay_list': getattr(model, 'no_weight_decay', set)(),
            **fallback,
        }
        layer_decay = getattr(args, f'layer_decay_{side}')
        if layer_decay is None:
            branch_groups = param_groups_weight_decay(model, **kwargs)
        else:
            branch_groups = param_groups_layer_decay(
                model,
                layer_decay=layer_decay,
                min_scale=getattr(args, f'layer_decay_min_scale_{side}') or 0.,
                no_opt_scale=getattr(args, f'layer_decay_no_opt_scale_{side}'),
                **kwargs,
            )
        if side == pair.sides[-1] and pair.affine is not None:
            branch_groups += param_groups_weight_decay(pair.affine, weight_decay=kwargs['weight_decay'])
        groups += [{**group, 'lr': lrs[side], 'name': f'{side}.{i}'} for i, group in enumerate(branch_groups)]
    return groups


def create_optimizer(args, pair: PairWrapper, lrs: dict[str, float]) -> torch.optim.Optimizer:
    """Create the one optimizer of both branches.

    Raises:
        UsageError: An optimizer that timm does not know, or options that it does not take.
    """
    kwargs = optimizer_kwargs(args)
    for key in ('lr', 'weight_decay', 'layer_decay', 'layer_decay_min_scale', 'layer_decay_no_opt_scale'):
        kwargs.pop(key, None)
    if _has_fused(args.opt) and not {'foreach', 'capturable', 'differentiable'} & set(args.opt_kwargs or {}):
        kwargs['fused'] = True  # one kernel for all parameters, on a CPU too
    kwargs.update({
        key: value for key, value in (args.opt_kwargs or {}).items() if not key.startswith('fallback_')})
    create = partial(create_optimizer_v2, lr=max(lrs.values()), **kwargs)
    try:
        optimizer = create(param_groups(args, pair, lrs))
    except (AssertionError, TypeError, ValueError) as e:
        raise UsageError(f'--opt {args.opt}: {e}') from e
    if getattr(optimizer, 'is_second_order', False):
        raise UsageError(f'--opt {args.opt}: not available, fused attention and the gather have no second derivative')
    clips = [key for key in ('max_grad_norm', 'grad_clip_norm') if optimizer.defaults.get(key)]
    if clips and len(pair.sides) > 1 and METHODS[args.method].updates(vars(args)) == 1:
        _logger.warning(
            f'--opt {args.opt} clips gradients by one norm over both branches ({clips[0]}='
            f'{optimizer.defaults[clips[0]]}), which couples them; --opt-kwargs {clips[0]}=None and --clip-grad clip '
            f'each branch by its own norm')
    if args.zero and not args.distributed:
        _logger.warning('--zero: no effect with one process')
    elif args.zero:
        if clips or type(optimizer).__name__ in UNSHARDABLE:
            raise UsageError(f'--opt {args.opt}: --zero can not share it out, its update of a parameter depends on '
                             f'others{f" (--opt-kwargs {clips[0]}=None does without)" if clips else ""}')
        optimizer = ShardedOptimizer(optimizer, create)
    return optimizer


def _has_fused(name: str) -> bool:
    """Return whether an optimizer is one of torch's that has a fused implementation on every device."""
    try:
        optimizer_class = get_optimizer_class(name.removeprefix('lookahead_'), bind_defaults=False)
    except ValueError:
        return False
    return optimizer_class in (torch.optim.Adam, torch.optim.AdamW)


def create_scheduler(args, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """Create the learning rate scheduler and return it (None for --sched none) with the epochs that it runs.

    Raises:
        UsageError: Options that timm's scheduler does not take.
    """
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    except (AssertionError, ValueError) as e:
        raise UsageError(f'--sched {args.sched}: {e}') from e
    if scheduler is None:
        for group in optimizer.param_groups:  # timm leaves the scale of a layer to the scheduler
            group['lr'] *= group.get('lr_scale', 1.)
    return scheduler, num_epochs


def create_criterion(args, epochs: int, device: torch.device) -> StagedLoss:
    """Create the criterion of --method, on timm's classification loss.

    Args:
        epochs: Number of epochs that the learning rate scheduler runs.
        device: Where the loss is computed.
    """
    base_loss = None
    if args.bce_loss or METHODS[args.method].bce:
        base_loss = create_classification_loss(
            'bce',
            smoothing=args.smoothing,
            soft_targets=mixup_active(args),
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    elif args.smoothing and not mixup_active(args):
        base_loss = create_classification_loss('ce', smoothing=args.smoothing)
    if base_loss is not None:
        base_loss.to(device)  # its class weights
    return METHODS[args.method].criterion(args, epochs, base_loss)
