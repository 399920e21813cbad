"""The options of a run: a class a section, a field an option, with every fact about it in its row.

The names and the meaning are those of timm's train script.
"""
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.methods import METHODS
from ..core.option import (
    ABSENT,
    BelowOne,
    Count,
    CropPct,
    Idle,
    Inside01,
    Name,
    NonNegative,
    Number,
    Policy,
    Positive,
    Probability,
    Repeats,
    Whole,
    option,
)

# timm's kinds of data set that are written KIND/NAME.
DATASET_KINDS = ('hfds', 'hfids', 'tfds', 'torch', 'wds')
SCHEDULERS = ('cosine', 'tanh', 'step', 'multistep', 'constant', 'poly', 'wsd', 'rsqrt', 'none')
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_PAPER = 'the paper'


@dataclass(frozen=True)
class MethodChoice:
    """Method parameters."""
    method: str = option(
        'vpl', 'how to train: ' + '; '.join(f'{name}, {row.description}' for name, row in METHODS.items()),
        choices=METHODS, resume='fixed', timm=ABSENT)


@dataclass(frozen=True)
class Source:
    """Dataset parameters."""
    data: str | None = option(None, 'same as --data-dir', metavar='DIR', positional=True, how=True, recipe=False)
    data_dir: str | None = option(
        None, 'folder or .tar of images; for a named data set, the folder that holds or caches it', metavar='DIR',
        how=True)
    dataset: str = option(
        '', f'KIND/NAME with KIND one of {", ".join(DATASET_KINDS)}; or digits, which comes with the package',
        shown='a folder or .tar', metavar='NAME', resume='fixed')
    dataset_download: bool = option(False, 'allow torch/, tfds/ and hfids/ data sets to be downloaded', how=True)
    class_map: str = option('', 'file that maps class names to indices', metavar='FILENAME', resume='fixed', card=False)
    input_img_mode: str | None = option(None, 'mode that images are converted to', shown='RGB', metavar='MODE')
    input_key: str | None = option(None, 'key of the images in a data set', metavar='KEY')
    target_key: str | None = option(None, 'key of the labels in a data set', metavar='KEY')
    dataset_trust_remote_code: bool = option(
        False, 'allow a Hugging Face data set to run its own code', how=True, recipe=False)


_NO_GATE = Idle('no term has when=leader-ahead', lambda o: 'when=leader-ahead' not in ''.join(getattr(o, 'terms', ())))


@dataclass(frozen=True)
class Data(Source):
    """Dataset parameters."""
    train_split: str = option('train', 'split to train on', metavar='NAME', resume='fixed')
    val_split: str = option('validation', 'split to validate on', metavar='NAME')
    gate_split: str = option(
        '', 'split on which terms with when=leader-ahead compare the branches', shown='a part of --train-split',
        metavar='NAME', resume='fixed', idle=(_NO_GATE,), timm=ABSENT)
    gate_pct: Positive | None = option(
        None, 'percent of the training images that are held out for that comparison, at least 100 images',
        shown='2 where a term needs them, else 0', resume='fixed',
        idle=(Idle('--gate-split is given', lambda o: bool(o.gate_split)),), timm=ABSENT)
    train_num_samples: Count | None = option(None, 'number of training samples, if the data set does not give it')
    val_num_samples: Count | None = option(None, 'number of validation samples, if the data set does not give it')


_NO_BASE = Idle('--lr is given', lambda o: o.lr is not None)


@dataclass(frozen=True)
class Branch:
    """Parameters of each branch: OPTION sets both, OPTION-a and OPTION-b set one."""
    PER_BRANCH: ClassVar[bool] = True
    model: Name = option(
        None, 'timm name, hf-hub:ID or local-dir:PATH; in the paper a CNN (a) and a transformer (b)',
        metavar='MODEL', own_only=True, resume='fixed')
    pretrained: bool = option(False, 'start with the pretrained weights of the model', resume='free')
    pretrained_path: str | None = option(
        None, 'file of pretrained weights; the head is adapted to the classes', metavar='PATH', resume='free',
        card=False)
    initial_checkpoint: str = option(
        '', 'file of initial weights; the head is not adapted', metavar='PATH', resume='free', card=False)
    freeze_depth: Whole = option(
        0, 'number of layer groups to freeze, from the input: first the stem, then stages or blocks',
        resume='fixed', timm=ABSENT)
    gp: str | None = option(None, 'global pooling: fast, avg, max, avgmax, ...', shown="the model's", metavar='POOL')
    img_size: Count | None = option(None, 'height and width of the images', shown="the model's")
    crop_pct: CropPct | None = option(
        None, 'centre crop of validation images, as a fraction', shown="the model's")
    mean: tuple[Number, ...] | None = option(None, 'pixel mean (one value, or one per channel)', shown="the model's")
    std: tuple[Positive, ...] | None = option(
        None, 'standard deviation of the pixels (one value, or one per channel)', shown="the model's")
    interpolation: str = option(
        '', 'interpolation of validation images', shown="the model's", choices=('', *INTERPOLATIONS), metavar='NAME')
    channels_last: bool = option(False, 'use the channels-last memory layout')
    grad_checkpointing: bool = option(False, 'recompute activations in the backward pass to save memory')
    model_kwargs: dict[str, Any] = option({}, 'further arguments of the model', metavar='KEY=VALUE', resume='fixed')
    head_init_scale: Number | None = option(None, 'factor of the initial classifier')
    head_init_bias: Number | None = option(None, 'initial bias of the classifier')
    lr: Positive | None = option(None, 'learning rate', shown='from --lr-base')
    lr_base: Positive = option(
        0.005, 'learning rate at --lr-base-size images per update', default_b=0.002, timm=0.1,
        why='the paper (0.005 for ResNet-50, 0.002 for ViT-Base); for AdamW', idle=(_NO_BASE,))
    weight_decay: NonNegative = option(0.05, 'weight decay', timm=2e-5, why=_PAPER, resume='fixed')
    clip_grad: Positive | None = option(None, "clip the branch's gradient, by its own norm")
    layer_decay: Positive | None = option(
        None, 'factor of the learning rate from each layer to the one below', resume='fixed')
    layer_decay_min_scale: Probability = option(0., 'smallest factor of a layer')
    layer_decay_no_opt_scale: Probability | None = option(
        None, 'factor below which a layer is not trained', resume='fixed')
    drop: Probability = option(0., 'dropout rate')
    drop_connect: Probability | None = option(None, 'old name of --drop-path')
    drop_path: Probability | None = option(None, 'stochastic depth rate', shown="the model's")
    drop_block: Probability | None = option(None, 'drop-block rate', shown="the model's")
    bn_momentum: Probability | None = option(None, 'momentum of BatchNorm', shown="the model's")
    bn_eps: Positive | None = option(None, 'epsilon of BatchNorm', shown="the model's")

    @property
    def starts_trained(self) -> bool:
        """Whether its first weights come from elsewhere."""
        return bool(self.pretrained or self.pretrained_path or self.initial_checkpoint)


@dataclass(frozen=True)
class Input:
    """Input and compilation parameters of both branches."""
    num_classes: Count | None = option(None, 'number of classes', shown="the data set's", resume='fixed', card=False)
    in_chans: Count | None = option(None, 'channels of the images', shown='3', resume='fixed')
    input_size: tuple[Count, Count, Count] | None = option(
        None, 'channels, height, width of the images', shown="the models'")
    torchcompile: str | None = option(None, 'compile each branch (inductor)', const='inductor', metavar='BACKEND')
    torchcompile_mode: str | None = option(
        None, 'mode of torch.compile', metavar='MODE',
        idle=(Idle('--torchcompile is off', lambda o: not o.torchcompile),))

    @property
    def channels(self) -> int:
        """Channels that images are read with."""
        return self.input_size[0] if self.input_size else self.in_chans or 3


@dataclass(frozen=True)
class Loader:
    """Loader parameters."""
    batch_size: Count = option(128, 'images per step and process', '-b', resume='free')  # judged with the processes
    validation_batch_size: Count | None = option(
        None, 'images per step and process in validation', '-vb', shown='--batch-size', how=True)
    workers: Whole = option(4, 'processes that load data', '-j', how=True)
    pin_mem: bool = option(False, 'pin the memory of the loader', how=True)


@dataclass(frozen=True)
class Device:
    """Device parameters."""
    device: str | None = option(
        None, 'device to train on', shown='cuda, then mps, then cpu', timm='cuda',
        why='a machine without CUDA works without a flag', metavar='DEVICE', how=True)
    amp: bool = option(False, 'train in mixed precision')
    amp_dtype: str = option(
        'float16', 'lower-precision type', choices=('float16', 'bfloat16'),
        idle=(Idle('--amp is off', lambda o: not o.amp),))
    no_ddp_bb: bool = option(False, 'do not broadcast buffers in each step of a distributed run')
    local_rank: Whole = option(0, '', '--local_rank', how=True, recipe=False)


@dataclass(frozen=True)
class Optimizer:
    """Optimizer parameters."""
    opt: str = option('adamw', 'optimizer', timm='sgd', why=_PAPER, metavar='OPTIMIZER', resume='fixed')
    opt_eps: NonNegative | None = option(None, 'its epsilon', shown="the optimizer's", resume='fixed')
    opt_betas: tuple[Number, ...] | None = option(None, 'its betas', shown="the optimizer's", resume='fixed')
    momentum: NonNegative = option(0.9, 'its momentum, if it has one', resume='fixed')
    opt_kwargs: dict[str, Any] = option({}, 'further arguments of the optimizer', metavar='KEY=VALUE', resume='fixed')
    clip_mode: str = option('norm', 'how to clip', choices=('norm', 'value', 'agc'))
    grad_accum_steps: Count = option(1, 'batches whose gradients are added up for one update', resume='fixed')


_BASES = Idle('the learning rates are given', lambda o: all(o.branch(side).lr is not None for side in o.sides))
_NO_NOISE = Idle('--lr-noise is off', lambda o: not o.lr_noise)


@dataclass(frozen=True)
class Schedule:
    """Learning rate schedule parameters."""
    sched: str = option('cosine', 'schedule', choices=SCHEDULERS, metavar='SCHEDULER')
    sched_on_updates: bool = option(False, 'step the schedule with each update, not each epoch')
    lr_base_size: Count = option(
        1600, 'images per update for which --lr-base is meant', timm=256, why='the batch size of the paper',
        idle=(_BASES,))
    lr_base_scale: str = option(
        '', 'how the learning rate scales with the images per update',
        shown='sqrt for adaptive optimizers, else linear', choices=('', 'linear', 'sqrt'), metavar='{linear,sqrt}',
        idle=(_BASES,))
    lr_noise: tuple[NonNegative, ...] | None = option(None, 'fractions of the run at which noise starts and ends')
    lr_noise_pct: NonNegative = option(0.67, 'limit of the noise', idle=(_NO_NOISE,))
    lr_noise_std: NonNegative = option(1., 'standard deviation of the noise', idle=(_NO_NOISE,))
    lr_cycle_mul: Positive = option(1., 'factor of the length from cycle to cycle')
    lr_cycle_decay: Positive = option(0.5, 'factor of the learning rate from cycle to cycle')
    lr_cycle_limit: Count = option(1, 'number of cycles')
    lr_k_decay: Positive = option(1., 'k-decay of cosine and poly')
    warmup_lr: NonNegative = option(1e-5, 'learning rate at the start of the warm-up')
    min_lr: NonNegative = option(0., 'lowest learning rate of the schedule')
    epochs: Count = option(300, 'epochs to train', resume='fixed')
    decay_milestones: tuple[Whole, ...] = option((90, 180, 270), 'epochs of the steps of multistep')
    decay_epochs: Positive | None = option(
        None, 'epochs from step to step, or of the decay of wsd and rsqrt (below 1: a fraction)',
        shown='90, of wsd and rsqrt 0.2')
    warmup_epochs: Whole = option(5, 'epochs of warm-up')
    warmup_prefix: bool = option(False, 'add the warm-up to --epochs instead of taking it from them')
    cooldown_epochs: Whole = option(0, 'epochs at the lowest learning rate after the schedule')
    decay_rate: Positive = option(0.1, 'factor of a step', '--dr')


_NO_AUG = Idle('--no-aug turns off all augmentation', lambda o: o.no_aug)
_NO_ERASING = Idle('--reprob is 0', lambda o: o.reprob == 0)
_NO_BCE = Idle('--bce-loss is off', lambda o: not (o.bce_loss or METHODS[o.method].bce))
_NO_MIXUP = Idle('--mixup and --cutmix are off', lambda o: not o.augmentation.mixes)


@dataclass(frozen=True)
class Augmentation:
    """Augmentation and regularization parameters."""
    no_aug: bool = option(False, 'turn off all augmentation, whatever the other options say')
    train_crop_mode: str | None = option(
        None, 'random crop of the training images', shown='rrc', choices=('rrc', 'rkrc', 'rkrr'), idle=(_NO_AUG,))
    scale: tuple[Positive, Positive] = option((0.08, 1.), 'area of the random crop', idle=(_NO_AUG,))
    ratio: tuple[Positive, Positive] = option((3 / 4, 4 / 3), 'aspect ratio of the random crop', idle=(_NO_AUG,))
    hflip: Probability = option(0.5, 'probability of a horizontal flip', idle=(_NO_AUG,))
    vflip: Probability = option(0., 'probability of a vertical flip', idle=(_NO_AUG,))
    color_jitter: NonNegative = option(0.4, 'strength of colour jitter (off under AutoAugment)', idle=(_NO_AUG,))
    color_jitter_prob: Probability | None = option(
        None, 'probability of colour jitter', shown='always', idle=(_NO_AUG,))
    grayscale_prob: Probability | None = option(None, 'probability of a grey image', idle=(_NO_AUG,))
    gaussian_blur_prob: Probability | None = option(None, 'probability of a blurred image', idle=(_NO_AUG,))
    aa: Policy = option(
        'original', "policy: original, v0, rand-m9-mstd0.5-inc1, ...; none (or '', in a recipe also null)", timm=None,
        why='the paper (AutoAugment; this policy is that of the work that it cites)', null='', metavar='NAME',
        idle=(_NO_AUG,))
    aug_repeats: Repeats = option(0., 'copies of each image in a batch, each augmented separately', resume='fixed')
    bce_loss: bool = option(
        False, 'binary cross-entropy for both branches',
        idle=(Idle('--method cosub always uses it', lambda o: METHODS[o.method].bce),))
    bce_sum: bool = option(False, 'sum the binary cross-entropy over the classes', idle=(_NO_BCE,))
    bce_target_thresh: Probability | None = option(None, 'make soft targets binary at this threshold', idle=(_NO_BCE,))
    bce_pos_weight: Positive | None = option(None, 'weight of the positive targets', idle=(_NO_BCE,))
    reprob: Probability = option(
        0.25, 'probability of Random Erasing', timm=0., why='the paper (Random Erasing; the probability is not given)',
        idle=(_NO_AUG,))
    remode: str = option(
        'pixel', 'content of the erased rectangles', choices=('pixel', 'rand', 'const'), idle=(_NO_AUG, _NO_ERASING))
    recount: Count = option(1, 'rectangles that Random Erasing erases', idle=(_NO_AUG, _NO_ERASING))
    resplit: bool = option(False, 'leave the first part of the batch unerased', idle=(_NO_AUG, _NO_ERASING))
    mixup: NonNegative = option(0., 'alpha of mixup, on if > 0')
    cutmix: NonNegative = option(0., 'alpha of cutmix, on if > 0')
    cutmix_minmax: tuple[Probability, Probability] | None = option(None, 'ratios of cutmix, instead of alpha')
    mixup_prob: Probability = option(1., 'probability of mixup or cutmix', idle=(_NO_MIXUP,))
    mixup_switch_prob: Probability = option(0.5, 'probability of cutmix where both are on', idle=(_NO_MIXUP,))
    mixup_mode: str = option(
        'batch', 'one mix per batch, per pair of images or per image', choices=('batch', 'pair', 'elem'),
        idle=(_NO_MIXUP,))
    mixup_off_epoch: Whole = option(0, 'epoch from which mixup and cutmix are off', shown='never', idle=(_NO_MIXUP,))
    smoothing: BelowOne = option(0.1, 'label smoothing')
    class_weights: str | None = option(
        None, "weights of the classes in the labels' loss, not in the terms between networks: balanced, images / "
        "(classes * images of the class), or a file with one number per class, in the order of the classes",
        metavar='FILE', resume='fixed', timm=ABSENT)
    train_interpolation: str = option(
        'random', 'interpolation of training images', choices=('random', *INTERPOLATIONS), metavar='NAME')

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on, so that targets are soft."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class BatchNorm:
    """Batch norm parameters."""
    sync_bn: bool = option(False, 'synchronise BatchNorm over the processes (on a GPU only)')
    dist_bn: str = option(
        'reduce', "what a distributed run does to BatchNorm's statistics after an epoch: broadcast, reduce or ''",
        choices=('', 'broadcast', 'reduce'), metavar='MODE')


_NO_EMA = Idle('--model-ema is off', lambda o: not o.model_ema)


@dataclass(frozen=True)
class EMA:
    """Model exponential moving average parameters."""
    model_ema: bool = option(True, 'keep a moving average of the weights', timm=False, why=_PAPER, resume='fixed')
    model_ema_force_cpu: bool = option(False, 'keep the average on the CPU and do not evaluate it', idle=(_NO_EMA,))
    model_ema_decay: Inside01 = option(0.9998, 'decay of the average', idle=(_NO_EMA,))
    model_ema_warmup: bool = option(
        True, 'let the decay grow with the updates', timm=False,
        why='the paper (its decay changes with the iterations)', idle=(_NO_EMA,))


_NO_WANDB = Idle('--log-wandb is off', lambda o: not o.log_wandb)


@dataclass(frozen=True)
class Output:
    """Output parameters."""
    quiet: bool = option(False, 'print warnings and errors only', how=True, recipe=False, timm=ABSENT)
    no_progress: bool = option(
        False, 'print log lines instead of progress bars on a terminal', how=True, recipe=False, timm=ABSENT)


@dataclass(frozen=True)
class Run(Output):
    """Miscellaneous parameters."""
    config: str | None = option(
        None, 'recipe: a YAML file of options, or the name of a recipe in the package (the command line takes '
        'precedence)', '-c', metavar='FILE', how=True, recipe=False)
    resume: str = option(
        '', 'continue from this checkpoint, or from the newest one in this folder; auto: from the newest one of '
        '--experiment, if any', metavar='PATH', how=True, recipe=False)
    no_resume_opt: bool = option(False, 'do not resume the state of the optimizer', how=True, recipe=False)
    accept_data_change: bool = option(
        False, 'let a resumed run continue with other images of the same classes', how=True, recipe=False, timm=ABSENT)
    start_epoch: Whole | None = option(None, 'first epoch, for a manual restart', how=True, recipe=False)
    stop_epoch: Count | None = option(None, 'stop after this many epochs, on the schedule of --epochs', how=True)
    seed: Whole = option(42, 'random seed', how=True, resume='fixed', card=True)
    deterministic: bool = option(
        False, 'use deterministic algorithms on a GPU, which may be slower', how=True, resume='warned', timm=ABSENT)
    log_interval: Count = option(50, 'updates between two log lines', how=True)
    log_grad_terms: Whole = option(
        0, "updates between two measurements of each term's gradient in each branch", shown='none', how=True,
        timm=ABSENT)
    val_interval: Count = option(1, 'epochs between two validations', how=True, resume='warned')
    recovery_interval: Whole = option(0, 'updates between two recovery checkpoints', shown='none', how=True)
    recovery_minutes: NonNegative = option(
        0., 'minutes between two recovery checkpoints', shown='none', how=True, timm=ABSENT)
    on_nonfinite: str = option(
        'stop', 'what to do when a loss or gradient is not finite: stop the run, or skip the update',
        choices=('stop', 'skip'), how=True, timm=ABSENT)
    nonfinite_limit: Count = option(
        10, 'maximum number of updates in a row that --on-nonfinite skip may skip', how=True, timm=ABSENT)
    hang_timeout: NonNegative = option(
        1800., 'seconds without an update after which a process prints all its stacks and ends; 0 for never', how=True,
        timm=ABSENT)
    checkpoint_hist: Count = option(10, 'checkpoints to keep', how=True)
    save_epochs: tuple[Count, ...] | None = option(None, 'completed epochs after which to keep a checkpoint', how=True)
    save_images: bool = option(False, 'save the first images of each log interval', how=True)
    traceback: bool = option(
        False, 'print the traceback of an error, too; by default it only goes to a file', how=True, timm=ABSENT)
    output: str = option('', 'folder of all runs', shown='output/train', metavar='PATH', how=True, recipe=False)
    experiment: str = option(
        '', "name of the run's folder", shown='from the time and the models', metavar='NAME', how=True)
    eval_metric: str = option(
        'top1', 'metric of the best checkpoint: top1 (mean of the branches) or a column of the summary',
        metavar='METRIC', how=True, resume='fixed')
    export: bool = option(True, 'export each branch, from its best epoch, at the end of the run', how=True, timm=ABSENT)
    curves: bool = option(True, 'draw curves.png after each validation (extra: plot)', how=True, timm=ABSENT)
    log_tensorboard: bool = option(
        False, 'write TensorBoard event files to the folder of the run (extra: tensorboard)', how=True, timm=ABSENT)
    log_wandb: bool = option(False, 'log to Weights & Biases (extra: wandb)', how=True)
    wandb_project: str | None = option(None, 'W&B project', metavar='NAME', how=True, idle=(_NO_WANDB,))
    wandb_tags: tuple[str, ...] = option((), 'W&B tags of the run', metavar='TAG', how=True, idle=(_NO_WANDB,))
    wandb_resume_id: str = option('', 'W&B run to continue', metavar='ID', how=True, recipe=False, idle=(_NO_WANDB,))
