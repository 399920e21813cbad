"""The options of a run: one parser with timm's names, recipes (YAML), and every check of user input that is cheap.

The flow is `parse_args`: build the parser, parse the command line, parse the recipe that it names, let the command
line win, resolve the options of each branch, check. Nothing heavy is imported here, so that `--help` and a mistake in
the command line answer at once.

`python -m timm_vpl.options.options` prints the page `docs/options.md`.
"""
import argparse
import contextlib
import copy
import functools
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..core.methods import METHOD_OPTIONS, METHODS, distill_terms
from ..core.names import DEFAULT_TAU, SAME_CLASS, SIDES, SIMILARITIES
from ..errors import UsageError
from ..text import one_line
from .parsing import (
    ANY_NUMBER,
    BELOW_ONE,
    COUNT,
    INSIDE_0_1,
    NON_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    REPEATS,
    WHOLE,
    KeyValues,
    OptionParser,
    did_you_mean,
    name_or_none,
    option_tokens,
    read_recipe,
    show,
)

__all__ = [
    'build_parser', 'check_shards', 'mixup_active', 'options_markdown', 'parse_args', 'recipe_path', 'recipe_values',
    'resume_command', 'timm_model_names']

_logger = logging.getLogger('timm_vpl')

# timm's kinds of data set that are written KIND/NAME, and those of them that find their data without a folder.
DATASET_KINDS = ('hfds', 'hfids', 'tfds', 'torch', 'wds')
DATASET_KINDS_WITHOUT_FOLDER = ('hfds', 'hfids', 'tfds')

SCHEDULERS = ('cosine', 'tanh', 'step', 'multistep', 'constant', 'poly', 'plateau', 'wsd', 'rsqrt', 'none')
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')

# Options of timm's train script that have no meaning for a pair (`*` ends a prefix): the reason, the alternative.
_KD = ('distillation is a method here', 'use --method distill or deit with --teacher')
_SIZES = ('both branches train at one fixed resolution', 'use --img-size or --input-size')
REFUSED = {
    '--model': ('a pair has two models', 'use --model-a and --model-b'),
    '--task': ('the task is set by the method', 'use --method'),
    '--loss': ('the pair losses are set by the method', 'use --bce-loss to replace cross-entropy'),
    '--kd-*': _KD,
    '--distill-loss-weight': _KD,
    '--task-loss-weight': _KD,
    '--naflex-*': ('branches that share their images need images of one size', 'use --img-size or --input-size'),
    '--train-img-sizes': _SIZES,
    '--train-batch-sizes': _SIZES,
    '--train-size-*': _SIZES,
    '--variable-batch-loss-scale': _SIZES,
    '--train-batches-per-epoch': ('an epoch is one pass over the data', 'use --epochs or --stop-epoch'),
    '--train-steps-per-epoch': ('an epoch is one pass over the data', 'use --epochs or --stop-epoch'),
    '--epoch-repeats': ('an epoch is one pass over the data', 'use more --epochs'),
    '--aug-splits': ('the pair losses compare two branches, not two views', 'use --aa or --aug-repeats'),
    '--jsd-loss': ('the pair losses compare two branches, not the splits of AugMix', 'use the pair losses'),
    '--split-bn': ('it needs --aug-splits, which a pair does not have', 'leave it out'),
    '--torchscript': ('a pair returns more than one tensor', 'use --torchcompile'),
    '--fuser': ('it is for TorchScript', 'use --torchcompile'),
    '--fast-norm': ('the branches keep the exact norm layers of timm', 'use --amp'),
    '--model-dtype': ('the weights stay in float32', 'use --amp --amp-dtype bfloat16'),
    '--device-modules': ('no extra module is loaded for a device', 'use --device'),
    '--synchronize-step': ('the loop never waits for the device between log intervals', 'use --log-interval 1'),
    '--worker-seeding': ('every sample is seeded by its position in the run, whatever the worker', 'use --seed'),
    '--use-multi-epochs-loader': ('the workers live through all epochs anyway', 'leave it out'),
    '--tta': ('each branch is validated on one view of an image', 'leave it out'),
}

_PAPER = 'the paper'

# Options that say how a branch's images are prepared.
INPUT_OPTIONS = ('img_size', 'crop_pct', 'mean', 'std', 'interpolation')

REGISTERED = re.compile(r'@register_model\ndef (\w+)\(')  # a model, in timm's sources


def add_dataset_options(parser: OptionParser) -> None:
    """Add the options that name a data set, for every command that reads one."""
    add = parser.option
    parser.section('Dataset parameters')
    parser.add_argument('data', nargs='?', default=argparse.SUPPRESS, metavar='DIR', help='same as --data-dir')
    parser.presets['data'] = None
    parser.how.add('data')
    add('--data-dir', None, 'folder or .tar of images; of a named data set, where it lies or is cached', metavar='DIR',
        how=True)
    add('--dataset', '', 'KIND/NAME with KIND one of ' + ', '.join(DATASET_KINDS) + '; or digits, which comes with the '
        'package', shown='a folder or .tar', metavar='NAME')
    add('--dataset-download', False, 'allow torch/, tfds/ and hfids/ data sets to be downloaded', how=True)
    add('--class-map', '', 'file that maps class names to indices', metavar='FILENAME')
    add('--input-img-mode', None, 'mode that images are converted to', shown='RGB', metavar='MODE')
    add('--input-key', None, 'key of the images in a data set', metavar='KEY')
    add('--target-key', None, 'key of the labels in a data set', metavar='KEY')
    add('--dataset-trust-remote-code', False, 'allow a Hugging Face data set to run code of its own', how=True)


def build_parser(prog: str = 'train_vpl.py') -> OptionParser:
    """Return the parser with all options, in timm's groups and order.

    `add(flags, default, help)` adds an option, `add_branch` one that each branch can override.
    """
    parser = OptionParser(
        prog=prog,
        usage='%(prog)s [DIR] [-c FILE] --model-a MODEL --model-b MODEL [options]',
        description='Train a CNN (branch a) and a vision transformer (branch b) together: Vision Pair Learning.',
        epilog='An option whose help ends in "also --NAME-a, --NAME-b" sets both branches; these forms set one.',
    )
    add, add_branch = parser.option, parser.branch_option
    add('-c --config', None, 'recipe: a YAML file of options, or the name of one that the package carries (the command '
        'line wins over it)', metavar='FILE', how=True)

    parser.section('Vision Pair Learning parameters')
    add('--model-a', None, 'branch a, in the paper the CNN: a timm name, hf-hub:ID or local-dir:PATH', metavar='MODEL',
        type=name_or_none)
    add('--model-b', None, 'branch b, in the paper the transformer', metavar='MODEL', type=name_or_none)
    methods = '; '.join(f'{name}, {row.description}' for name, row in METHODS.items())
    add('--method', 'vpl', f'how to train: {methods}', choices=list(METHODS))
    add('--x', 20., 'percent of the epochs before the KL term starts (paper: 20)', type=NON_NEGATIVE)
    add('--y', 20., 'percent of the epochs after the contrastive term has ended (paper: 20)', type=NON_NEGATIVE)
    add('--tau', DEFAULT_TAU, 'temperature of the contrastive term (not given in the paper)', type=POSITIVE)
    add('--rho', 1., 'temperature of the KL term (not given in the paper)', type=POSITIVE)
    add('--similarity', 'cosine', 'dot product of two embeddings with (cosine) or without (dot) L2 normalisation '
        '(paper: dot product, normalisation not given)', choices=SIMILARITIES)
    add('--contrastive-to', 'b', 'branch that learns from the contrastive term (paper: b; Table 7, Bi: both)',
        choices=['a', 'b', 'both'])
    add('--kl-to', 'a', 'branch that learns from the KL term (paper: a; Table 7, Bi: both)', choices=['a', 'b', 'both'])
    add('--contrastive-weight', 1., 'weight of the contrastive term (paper: 1)', type=NON_NEGATIVE)
    add('--kl-weight', 1., 'weight of the KL term (paper: 1)', type=NON_NEGATIVE)
    add('--same-class', 'negative', "other images of the anchor's class in the contrastive term (paper: negative)",
        choices=SAME_CLASS)
    add('--affine-side', 'b', 'branch whose embedding the affine layer maps to the width of the other (not given in '
        'the paper)', choices=list(SIDES))
    add('--gather', True, 'take the negatives of all processes, not the own ones only (not given in the paper)')

    parser.section('Parameters of the other methods')
    add('--dml-joint', False, 'deep mutual learning with one update of both branches a batch, not one after the other')
    add('--teacher', None, "frozen teacher of distill and deit: a run's folder or checkpoint, an exported folder, "
        'hf-hub:ID or a timm name', metavar='SOURCE', type=name_or_none)
    add('--teacher-branch', None, 'branch to take, where the teacher was trained in a pair', shown="not the student's "
        'side', choices=list(SIDES))
    add('--distill-terms', None, 'terms of distill', shown='kl for --model-a, contrastive for --model-b, as in VPL',
        choices=['contrastive', 'kl', 'both'])
    add('--distillation-type', 'hard', "what deit's token learns: the teacher's class or its probabilities",
        choices=['hard', 'soft'])
    add('--distillation-alpha', None, "weight of deit's token, 1 - alpha that of the labels", shown='0.5 for hard, '
        '0.1 for soft', type=INSIDE_0_1)
    add('--distillation-tau', 3., "temperature of deit's soft labels", type=POSITIVE)
    add('--drop-path-skip', False, "let cosub run a block only on the images that keep it, where the block's structure "
        'allows')

    add_dataset_options(parser)
    add('--train-split', 'train', 'split to train on', metavar='NAME')
    add('--val-split', 'validation', 'split to validate on', metavar='NAME')
    add('--train-num-samples', None, 'training samples, where the data set does not tell', type=COUNT)
    add('--val-num-samples', None, 'validation samples, where the data set does not tell', type=COUNT)

    parser.section('Model parameters')
    add_branch('--pretrained', False, 'start with the pretrained weights of the model')
    add_branch('--pretrained-path', None, 'file to read the pretrained weights from, head adapted', metavar='PATH')
    add_branch('--initial-checkpoint', '', 'file to read the initial weights from, head as it is', metavar='PATH')
    add_branch('--freeze-depth', 0, 'layer groups, from the input, that keep their weights: the stem is the first, '
               'then stages or blocks', type=WHOLE)
    add('--resume', '', 'continue the run of this checkpoint, or of this folder, from its newest one; auto: the newest '
        'one of --experiment, if it has one', metavar='PATH', how=True)
    add('--no-resume-opt', False, 'do not resume the state of the optimizer', how=True)
    add('--accept-data-change', False, 'let a resumed run go on with other images of the same classes', how=True)
    add('--num-classes', None, 'number of classes', shown="the data set's", type=COUNT)
    add_branch('--gp', None, 'global pooling: fast, avg, max, avgmax, ...', shown="the model's", metavar='POOL')
    add_branch('--img-size', None, 'height and width of the images', shown="the models'", type=COUNT)
    add('--in-chans', None, 'channels of the images', shown='3', type=COUNT)
    add('--input-size', None, 'channels, height, width of the images', shown="the models'", nargs=3, type=COUNT)
    add_branch('--crop-pct', None, 'centre crop of validation images', shown="the models'", type=POSITIVE)
    add_branch('--mean', None, 'mean of the pixels (1 or 1 a channel)', shown="the models'", nargs='+', type=ANY_NUMBER)
    add_branch('--std', None, 'deviation of the pixels (1 or 1 a channel)', shown="the models'", nargs='+',
               type=POSITIVE)
    add_branch('--interpolation', '', 'interpolation of validation images', shown="the models'",
        choices=['', *INTERPOLATIONS], metavar='NAME')
    add('-b --batch-size', 128, 'images a step, of each process', type=COUNT)
    add('-vb --validation-batch-size', None, 'the same in validation', shown='--batch-size', type=COUNT, how=True)
    add_branch('--channels-last', False, 'use the channels-last memory layout')
    add('--grad-accum-steps', 1, 'batches whose gradients are added up for one update', type=COUNT)
    add_branch('--grad-checkpointing', False, 'recompute activations in the backward pass to save memory')
    add_branch('--model-kwargs', {}, 'further arguments of the model', nargs='*', action=KeyValues, metavar='KEY=VALUE')
    add_branch('--head-init-scale', None, 'factor of the initial classifier', type=ANY_NUMBER)
    add_branch('--head-init-bias', None, 'initial bias of the classifier', type=ANY_NUMBER)
    add('--torchcompile', None, 'compile each branch (inductor)', nargs='?', const='inductor', metavar='BACKEND')
    add('--torchcompile-mode', None, 'mode of torch.compile', metavar='MODE')

    parser.section('Device parameters')
    add('--device', None, 'device to train on', shown='cuda, then mps, then cpu', timm='cuda',
        why='a machine without CUDA works without a flag', metavar='DEVICE', how=True)
    add('--amp', False, 'train in mixed precision')
    add('--amp-dtype', 'float16', 'the lower precision', choices=['float16', 'bfloat16'])
    add('--no-ddp-bb', False, 'do not broadcast buffers in each step of a distributed run')
    add('--local-rank --local_rank', 0, argparse.SUPPRESS, type=WHOLE, how=True)

    parser.section('Optimizer parameters')
    add('--opt', 'adamw', 'optimizer', timm='sgd', why=_PAPER, metavar='OPTIMIZER')
    add('--opt-eps', None, 'its epsilon', shown="the optimizer's", type=NON_NEGATIVE)
    add('--opt-betas', None, 'its betas', shown="the optimizer's", nargs='+', type=ANY_NUMBER)
    add('--momentum', 0.9, 'its momentum, if it has one', type=NON_NEGATIVE)
    add_branch('--weight-decay', 0.05, 'weight decay', timm=2e-5, why=_PAPER, type=NON_NEGATIVE)
    add_branch('--clip-grad', None, "clip the branch's gradient, by its own norm", type=POSITIVE)
    add('--clip-mode', 'norm', 'how to clip', choices=['norm', 'value', 'agc'])
    add_branch('--layer-decay', None, 'factor of the LR from layer to layer, downwards', type=POSITIVE)
    add_branch('--layer-decay-min-scale', 0., 'least factor of a layer', type=PROBABILITY)
    add_branch('--layer-decay-no-opt-scale', None, 'factor below which a layer is not trained', type=PROBABILITY)
    add('--opt-kwargs', {}, 'further arguments of the optimizer', nargs='*', action=KeyValues, metavar='KEY=VALUE')
    add('--zero', False, "share the optimizer's state out over the processes, each updates its part of the weights",
        how=True)

    parser.section('Learning rate schedule parameters')
    add('--sched', 'cosine', 'schedule', choices=SCHEDULERS, metavar='SCHEDULER')
    add('--sched-on-updates', False, 'step the schedule with each update, not each epoch')
    add_branch('--lr', None, 'learning rate', shown='from --lr-base', type=POSITIVE)
    add_branch('--lr-base', 0.005, 'learning rate for --lr-base-size images an update', default_b=0.002, timm=0.1,
               why='the paper (0.005 for ResNet-50, 0.002 for ViT-Base); for AdamW', type=POSITIVE)
    add('--lr-base-size', 1600, 'images an update that --lr-base is meant for', timm=256, why='the batch size of the '
        'paper', type=COUNT)
    add('--lr-base-scale', '', 'how the learning rate grows with the images an update', shown='sqrt for adaptive '
        'optimizers, else linear', choices=['', 'linear', 'sqrt'], metavar='{linear,sqrt}')
    add('--lr-noise', None, 'parts of the run where noise is on, off', nargs='+', type=NON_NEGATIVE)
    add('--lr-noise-pct', 0.67, 'limit of the noise', type=NON_NEGATIVE)
    add('--lr-noise-std', 1., 'standard deviation of the noise', type=NON_NEGATIVE)
    add('--lr-cycle-mul', 1., 'factor of the length from cycle to cycle', type=POSITIVE)
    add('--lr-cycle-decay', 0.5, 'factor of the learning rate from cycle to cycle', type=POSITIVE)
    add('--lr-cycle-limit', 1, 'number of cycles', type=COUNT)
    add('--lr-k-decay', 1., 'k-decay of cosine and poly', type=POSITIVE)
    add('--warmup-lr', 1e-5, 'learning rate at the start of the warm-up', type=NON_NEGATIVE)
    add('--min-lr', 0., 'lowest learning rate of the schedule', type=NON_NEGATIVE)
    add('--epochs', 300, 'epochs to train', type=COUNT)
    add('--stop-epoch', None, 'end after so many completed epochs, on the schedule of --epochs', type=COUNT, how=True)
    add('--start-epoch', None, 'first epoch, for a restart by hand', type=WHOLE, how=True)
    add('--decay-milestones', [90, 180, 270], 'epochs of the steps of multistep', nargs='+', type=WHOLE)
    add('--decay-epochs', None, 'epochs from step to step, or of the decay of wsd and rsqrt (below 1: a fraction)',
        shown='90, of wsd and rsqrt 0.2', type=POSITIVE)
    add('--warmup-epochs', 5, 'epochs of warm-up', type=WHOLE)
    add('--warmup-prefix', False, 'add the warm-up to the epochs, do not take it from them')
    add('--cooldown-epochs', 0, 'epochs at the lowest learning rate after the schedule', type=WHOLE)
    add('--patience-epochs', 10, 'epochs without progress before plateau takes a step', type=WHOLE)
    add('--decay-rate --dr', 0.1, 'factor of a step', type=POSITIVE)

    parser.section('Augmentation and regularization parameters')
    add('--no-aug', False, 'no augmentation at all, whatever the other options say')
    add('--train-crop-mode', None, 'random crop of the training images', shown='rrc', choices=['rrc', 'rkrc', 'rkrr'])
    add('--scale', [0.08, 1.], 'area of the random crop', nargs=2, type=POSITIVE)
    add('--ratio', [3 / 4, 4 / 3], 'aspect ratio of the random crop', nargs=2, type=POSITIVE)
    add('--hflip', 0.5, 'probability of a horizontal flip', type=PROBABILITY)
    add('--vflip', 0., 'probability of a vertical flip', type=PROBABILITY)
    add('--color-jitter', 0.4, 'strength of colour jitter (off under AutoAugment)', type=NON_NEGATIVE)
    add('--color-jitter-prob', None, 'probability of colour jitter', shown='always', type=PROBABILITY)
    add('--grayscale-prob', None, 'probability of a grey image', type=PROBABILITY)
    add('--gaussian-blur-prob', None, 'probability of a blurred image', type=PROBABILITY)
    add('--aa', 'v0', "policy: v0, original, rand-m9-mstd0.5-inc1, ...; '' (in a recipe also null) for none",
        timm=None, why='the paper (AutoAugment)', null='', metavar='NAME')
    add('--aug-repeats', 0., 'copies of an image in a batch, each augmented anew', type=REPEATS)
    add('--bce-loss', False, 'binary cross-entropy for both branches')
    add('--bce-sum', False, 'sum the binary cross-entropy over the classes')
    add('--bce-target-thresh', None, 'make soft targets binary at this threshold', type=PROBABILITY)
    add('--bce-pos-weight', None, 'weight of the positive targets', type=POSITIVE)
    add('--reprob', 0.25, 'probability of Random Erasing', timm=0., why='the paper (Random Erasing; the probability is '
        'not given)', type=PROBABILITY)
    add('--remode', 'pixel', 'what Random Erasing writes', choices=['pixel', 'rand', 'const'])
    add('--recount', 1, 'rectangles that Random Erasing erases', type=COUNT)
    add('--resplit', False, 'leave the first part of the batch unerased')
    add('--mixup', 0., 'alpha of mixup, on if > 0', type=NON_NEGATIVE)
    add('--cutmix', 0., 'alpha of cutmix, on if > 0', type=NON_NEGATIVE)
    add('--cutmix-minmax', None, 'ratios of cutmix, in place of alpha', nargs=2, type=PROBABILITY)
    add('--mixup-prob', 1., 'probability of mixup or cutmix', type=PROBABILITY)
    add('--mixup-switch-prob', 0.5, 'probability of cutmix where both are on', type=PROBABILITY)
    add('--mixup-mode', 'batch', 'one mix a batch, a pair of images or an image', choices=['batch', 'pair', 'elem'])
    add('--mixup-off-epoch', 0, 'epoch from which mixup and cutmix are off', shown='never', type=WHOLE)
    add('--smoothing', 0.1, 'label smoothing', type=BELOW_ONE)
    add('--train-interpolation', 'random', 'interpolation of training images', choices=['random', *INTERPOLATIONS],
        metavar='NAME')
    add_branch('--drop', 0., 'dropout rate', type=PROBABILITY)
    add_branch('--drop-connect', None, 'old name of --drop-path', type=PROBABILITY)
    add_branch('--drop-path', None, 'stochastic depth rate', shown="the model's", type=PROBABILITY)
    add_branch('--drop-block', None, 'drop-block rate', shown="the model's", type=PROBABILITY)

    parser.section('Batch norm parameters')
    add_branch('--bn-momentum', None, 'momentum of BatchNorm', shown="the model's", type=PROBABILITY)
    add_branch('--bn-eps', None, 'epsilon of BatchNorm', shown="the model's", type=POSITIVE)
    add('--sync-bn', False, 'synchronise BatchNorm over the processes (on a GPU only)')
    add('--dist-bn', 'reduce', "what a distributed run does to BatchNorm's statistics after an epoch: broadcast, "
        "reduce or ''", choices=['', 'broadcast', 'reduce'], metavar='MODE')

    parser.section('Model exponential moving average parameters')
    add('--model-ema', True, 'keep a moving average of the weights', timm=False, why=_PAPER)
    add('--model-ema-force-cpu', False, 'keep it on the CPU, where it is not evaluated')
    add('--model-ema-decay', 0.9998, 'decay of the average', type=INSIDE_0_1)
    add('--model-ema-warmup', True, 'let the decay grow with the updates', timm=False,
        why='the paper (its decay changes with the iterations)')

    parser.section('Miscellaneous parameters')
    add('--seed', 42, 'random seed', type=WHOLE, how=True)
    add('--deterministic', False, 'let a GPU compute the same bits each time, at some cost', how=True)
    add('--log-interval', 50, 'updates between two log lines', type=COUNT, how=True)
    add('--val-interval', 1, 'epochs between two validations', type=COUNT, how=True)
    add('--recovery-interval', 0, 'updates between two recovery checkpoints', shown='none', type=WHOLE, how=True)
    add('--recovery-minutes', 0., 'minutes between two recovery checkpoints', shown='none', type=NON_NEGATIVE, how=True)
    add('--on-nonfinite', 'stop', 'what to do when a loss or gradient is not finite: end the run, or leave the update '
        'out', choices=['stop', 'skip'], how=True)
    add('--nonfinite-limit', 10, 'updates in a row that --on-nonfinite skip leaves out', type=COUNT, how=True)
    add('--hang-timeout', 1800., 'seconds without an update after which a process prints all its stacks and ends; 0 '
        'for never', type=NON_NEGATIVE, how=True)
    add('--checkpoint-hist', 10, 'checkpoints to keep', type=COUNT, how=True)
    add('--save-epochs', None, 'completed epochs after which to keep a checkpoint', nargs='+', type=COUNT, how=True)
    add('-j --workers', 4, 'processes that load data', type=WHOLE, how=True)
    add('--save-images', False, 'save the first images of each log interval', how=True)
    add('--pin-mem', False, 'pin the memory of the loader', how=True)
    add('--no-prefetcher', False, 'do not use the prefetching loader', how=True)
    add('--output', '', 'folder of all runs', shown='./output/train', metavar='PATH', how=True)
    add('--experiment', '', "name of the run's folder", shown='from the time and the models', metavar='NAME', how=True)
    add('--eval-metric', 'top1', 'what the best checkpoint is best in: top1 (mean of the branches) or a column of the '
        'summary', metavar='METRIC', how=True)
    add('--export', True, 'export each branch, from its best epoch, at the end of the run', how=True)
    add('--log-wandb', False, 'log to Weights & Biases', how=True)
    add('--wandb-project', None, 'name of the project there', metavar='NAME', how=True)
    add('--wandb-tags', [], 'tags of the run there', nargs='+', metavar='TAG', how=True)
    add('--wandb-resume-id', '', 'run to continue there', metavar='ID', how=True)
    return parser


# Recipes


def _recipes() -> dict[str, Path]:
    """Return the recipes that the package carries, by name: in the package (wheel) or beside it (clone)."""
    package = Path(__file__).resolve().parents[1]
    folder = package / 'hparams' if (package / 'hparams').is_dir() else package.parent / 'hparams'
    return {path.stem: path for path in sorted(folder.glob('*.yaml'))}


def recipe_path(name: str) -> Path:
    """Return the file that `--config NAME` means: a path, or the name of a recipe that the package carries.

    Raises:
        UsageError: Neither a file nor a recipe.
    """
    if os.path.isfile(name):
        return Path(name)
    recipes = _recipes()
    stem = os.path.basename(name)
    stem = stem[:-len('.yaml')] if stem.endswith('.yaml') else stem
    if os.path.basename(name) == name and stem in recipes:
        return recipes[stem]
    kind = 'a folder' if os.path.isdir(name) else 'neither a file nor the name of a recipe'
    near = [stem] if stem in recipes else get_close_matches(stem, recipes, n=3, cutoff=0.4) or sorted(recipes)[:5]
    raise UsageError(f"--config {name} is {kind}; recipes: {', '.join(near) or 'none'}")


def _load_recipe(parser: OptionParser, path: Path) -> dict[str, Any]:
    """Return the options that a recipe file gives, by dest."""
    actions = parser.actions()
    given = {}
    for key, value in read_recipe(path).items():
        dest = key.replace('-', '_')
        where = f'{path}: {key}'
        value = parser.nulls.get(dest) if value is None else value
        if value is None:
            continue
        _check_not_refused('--' + key.replace('_', '-'), where)
        if dest == 'config':
            raise UsageError(f'{where}: a recipe can not name another recipe')
        if dest not in actions:
            raise UsageError(f'{where} is not an option{did_you_mean(key, actions)}')
        if dest in given:
            raise UsageError(f'{where} is given twice')
        try:
            tokens = option_tokens(actions[dest], value)
        except UsageError as error:
            raise UsageError(f'{where}: {error}') from None
        given.update(parser.parse(tokens, where))
    return given


# Where a run starts and which files its options came from: not part of what it is.
_NOT_IN_A_RECIPE = (
    'config', 'data', 'local_rank', 'resume', 'no_resume_opt', 'accept_data_change', 'start_epoch', 'wandb_resume_id',
    'output', 'dataset_trust_remote_code')

# Further arguments of a model that say which files timm reads and writes, from which addresses.
_FILES_OF_A_MODEL = ('cache_dir', 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay')


def _check_foreign(path: Path, given: dict[str, Any]) -> None:
    """Raise UsageError where a recipe, which may be somebody else's, decides what only the command line may."""
    if given.get('dataset_trust_remote_code'):
        raise UsageError(f'{path}: dataset_trust_remote_code: a recipe can not allow a data set to run code, only '
                         f'--dataset-trust-remote-code on the command line can')
    output = given.get('output', '')
    if os.path.isabs(output) or '..' in Path(output).parts:
        raise UsageError(f'{path}: output: {output} is not below the current folder; give --output on the command line')
    for dest in ('model_kwargs', *(f'model_kwargs_{side}' for side in SIDES)):
        for key in _FILES_OF_A_MODEL:
            if key in given.get(dest, {}):
                raise UsageError(f'{path}: {dest}: {key} names files, only the command line can give it')


def recipe_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a run as a flat dict that, dumped as YAML, is a recipe of the same run (`args.yaml`)."""
    presets = build_parser().presets
    return {
        dest: value for dest, value in vars(args).items()
        if dest in presets and dest not in _NOT_IN_A_RECIPE and value is not None
    }


# From what was given to what holds


def parse_args(argv: Sequence[str] | None = None, prog: str = 'train_vpl.py') -> argparse.Namespace:
    """Return the options of a run, checked (`read_args`).

    Raises:
        SystemExit: With status 2 after one line on stderr (a machine, not a process), where the input is wrong; with 0
            after `--help`.
    """
    try:
        args, parser, given = read_args(sys.argv[1:] if argv is None else argv, prog)
        if speaks():
            _warn_without_effect(parser, args, given)
        return args
    except UsageError as error:
        if speaks():
            print(f'{prog}: error: {one_line(error)}', file=sys.stderr)
        else:
            time.sleep(2)  # torchrun ends all processes when the first ends; let the one that speaks be it
        raise SystemExit(error.exit_status) from None


def read_args(
        argv: Sequence[str], prog: str = 'train_vpl.py',
) -> tuple[argparse.Namespace, OptionParser, dict[str, Any]]:
    """Return the options of a run, their parser, and what the command line and its recipe gave.

    The names are timm's. For every option that each branch can override, `OPT_a` and `OPT_b` hold what counts and `OPT`
    what was given for both. `data_dir` holds the folder however it was named, `sides` the branches that there are.

    Raises:
        UsageError: The input is wrong.
    """
    parser = build_parser(prog)
    argv = list(argv)
    for token in argv[:argv.index('--')] if '--' in argv else argv:
        _check_not_refused(token.partition('=')[0])
    command_line = name_data_dir(parser.parse(argv))
    given_here = dict(command_line)
    config = command_line.get('config')
    recipe = name_data_dir(_load_recipe(parser, recipe_path(config))) if config else {}
    for dest in parser.branch_options:
        if dest in command_line:  # wins over a branch's own value in the recipe, too
            recipe.pop(f'{dest}_a', None)
            recipe.pop(f'{dest}_b', None)
    folder = command_line.get('resume', recipe.get('resume', ''))
    if os.path.isdir(folder):
        _continue_in(folder, command_line)
    if config:
        _check_foreign(recipe_path(config), {
            dest: value for dest, value in recipe.items() if dest not in command_line})
    given = {**recipe, **command_line}
    args = _resolve(parser, given)
    _check(args)
    args.prog, args.command_line = prog, given_here
    return args, parser, given


def _continue_in(folder: str, command_line: dict[str, Any]) -> None:
    """Make a run go on in a folder, whatever its recipe calls it."""
    for dest, place in zip(('output', 'experiment'), os.path.split(os.path.realpath(folder)), strict=True):
        named = command_line.get(dest, place)
        if (os.path.realpath(named) if dest == 'output' else named) != place:
            raise UsageError(f'--resume {folder}: goes on in that folder, {_flag(dest)} {named} is another')
        command_line[dest] = place


def resume_command(args: argparse.Namespace, folder: str) -> str:
    """Return the command that goes on with a run in its folder: what was given, but for where it starts."""
    actions = build_parser().actions()
    given = {dest: value for dest, value in args.command_line.items()
             if dest not in ('resume', 'no_resume_opt', 'start_epoch', 'output', 'experiment')}
    tokens = [token for dest, value in given.items() for token in option_tokens(actions[dest], _as_text(value))]
    python = ['python'] if args.prog.endswith('.py') else []
    return shlex.join([*python, *args.prog.split(), *tokens, '--resume', folder])


def _as_text(value: Any) -> Any:
    """Return a value as a recipe would hold it."""
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return value if isinstance(value, (bool, dict)) else '' if value is None else str(value)


def speaks() -> bool:
    """Return whether this is the first process on its machine: files may be missing on one machine only."""
    return os.environ.get('LOCAL_RANK', '0') == '0'


def _check_not_refused(flag: str, where: str = '') -> None:
    for name, (reason, alternative) in REFUSED.items():
        if flag == name or (name.endswith('*') and flag.startswith(name[:-1])):
            raise UsageError(f'{where or flag} is not available: {reason}; {alternative}')


def name_data_dir(given: dict[str, Any]) -> dict[str, Any]:
    """Move the positional argument DIR to `data_dir`."""
    data = given.pop('data', None)
    if data is None:
        return given
    if given.get('data_dir', data) != data:
        raise UsageError(f"DIR {data} and --data-dir {given['data_dir']} differ, one is enough")
    return {**given, 'data_dir': data}


def _resolve(parser: OptionParser, given: dict[str, Any]) -> argparse.Namespace:
    """Return all options: what was given, for a branch else what was given for both, else the default."""
    args = argparse.Namespace(**{**parser.presets, **given})
    for dest in parser.branch_options:
        for own in (f'{dest}_{side}' for side in SIDES):
            setattr(args, own, copy.copy(given.get(own, given.get(dest, parser.presets[own]))))
    args.sides = tuple(side for side in SIDES if getattr(args, f'model_{side}'))
    args.prefetcher = not args.no_prefetcher
    args.resume_auto = args.resume == 'auto' or os.path.isdir(args.resume)
    return args


# A run that is continued. An option that is in neither list may change, with a warning.

# What a run is: a change is refused.
RESUME_FIXED = (
    'method', 'dml_joint', 'model_a', 'model_b', 'model_kwargs_a', 'model_kwargs_b', 'freeze_depth_a', 'freeze_depth_b',
    'in_chans', 'teacher', 'teacher_branch', 'distill_terms', 'affine_side',
    'dataset', 'train_split', 'class_map', 'num_classes', 'batch_size', 'grad_accum_steps', 'aug_repeats', 'seed',
    'opt', 'opt_kwargs', 'opt_eps', 'opt_betas', 'momentum', 'weight_decay_a', 'weight_decay_b',
    'layer_decay_a', 'layer_decay_b', 'layer_decay_no_opt_scale_a', 'layer_decay_no_opt_scale_b',
    'epochs', 'model_ema', 'eval_metric',
)

# How and where it runs, not what is learnt.
RESUME_FREE = (
    'data_dir', 'dataset_download', 'workers', 'pin_mem', 'device', 'validation_batch_size', 'log_interval',
    'recovery_interval', 'recovery_minutes', 'on_nonfinite', 'nonfinite_limit', 'hang_timeout', 'checkpoint_hist',
    'save_epochs', 'save_images', 'output', 'experiment', 'export', 'stop_epoch', 'log_wandb', 'wandb_project',
    'wandb_tags', 'pretrained_a', 'pretrained_b', 'pretrained_path_a', 'pretrained_path_b', 'initial_checkpoint_a',
    'initial_checkpoint_b', 'zero',
)


def changed_options(then: dict[str, Any], now: dict[str, Any], sides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what changes between two starts of a run: lines that refuse to go on, and lines that warn.

    Args:
        then: `recipe_values` of the first start.
        now: `recipe_values` of this one.
        sides: The branches that there are.
    """
    parser = build_parser()
    idle = {*parser.branch_options, *(f'{dest}_{side}' for dest in parser.branch_options for side in SIDES
                                      if side not in sides)}
    lines: tuple[list[str], list[str]] = [], []
    for dest in parser.presets:
        # What is left out had its default; 0, '' and off are values.
        before, after = (values.get(dest, parser.presets[dest]) for values in (then, now))
        if dest == 'num_classes' and None in (before, after):
            continue  # taken from the data
        if dest == 'batch_size' or dest in idle or dest in RESUME_FREE or dest in _NOT_IN_A_RECIPE:
            continue  # the batch is judged together with the number of processes
        if before != after:
            spell = show if show(before) != show(after) else repr
            lines[dest not in RESUME_FIXED].append(f'{_flag(dest)} {spell(before)} before, now {spell(after)}')
    return lines


# Checks


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError where options contradict each other or name something that is not there."""
    _check_models(args)
    if args.train_split == args.val_split:
        raise UsageError(f'--train-split and --val-split are both {args.val_split}, which validates on training images')
    check_dataset(args, (args.train_split, args.val_split))
    for dest in ('resume', 'initial_checkpoint_a', 'initial_checkpoint_b', 'pretrained_path_a', 'pretrained_path_b'):
        path = getattr(args, dest)
        if path and not os.path.isfile(path) and not (dest == 'resume' and args.resume_auto):
            raise UsageError(f'{_flag(dest)} {path}: no such file')
    _check_experiment(args.experiment)
    if args.resume == 'auto' and not args.experiment:
        raise UsageError("--resume auto needs --experiment NAME: without it a run's folder has a new name each time")
    for dest in ('scale', 'ratio', 'cutmix_minmax'):
        values = getattr(args, dest)
        if values and values[0] > values[1]:
            raise UsageError(f'{_flag(dest)} {show(values)}: the first is larger than the second')
    # The decimals as written: 33.4 + 66.6 is 100.
    if Fraction(str(args.x)) + Fraction(str(args.y)) > 100:
        raise UsageError(f'--x {args.x:g} and --y {args.y:g} add up to more than 100 percent of the epochs')
    if mixup_active(args) and args.batch_size % 2:
        raise UsageError(f'--batch-size {args.batch_size} is odd, --mixup and --cutmix need an even one')
    if args.input_img_mode not in (None, 'L', 'RGB') and args.aa and not args.no_aug:
        raise UsageError(f"--aa {args.aa}: its operations know images of mode L and RGB, not --input-img-mode "
                         f"{args.input_img_mode}; --aa '' goes without")
    if args.sched == 'plateau' and args.sched_on_updates:
        raise UsageError('--sched plateau follows the validation, it has no --sched-on-updates')
    in_chans = args.input_size[0] if args.input_size else args.in_chans or 3
    for dest in ('mean', 'std', *(f'{name}_{side}' for name in ('mean', 'std') for side in SIDES)):
        values = getattr(args, dest)
        if values and len(values) not in (1, in_chans):
            raise UsageError(
                f'{_flag(dest)} {show(values)} has {len(values)} values, the images have {in_chans} channels')


def _check_experiment(name: str) -> None:
    """Raise UsageError unless a name, which becomes part of a path, is that of a visible folder."""
    if name and (
            not name.isprintable() or re.search(r'[/\\]', name) or name[0] in '.-~' or name != name.strip()
            or len(name.encode()) > 200):
        raise UsageError(f'--experiment {name!r}: expected the name of a folder, not a path: no / or \\, none of . - ~ '
                         f'at its start, at most 200 bytes')


def _check_models(args: argparse.Namespace) -> None:
    models = METHODS[args.method].models
    if len(args.sides) not in models:
        if models == (2,):
            missing = ' and '.join(f'--model-{side}' for side in SIDES if side not in args.sides)
            raise UsageError(f'--method {args.method} needs two models; missing: {missing}')
        given = ' '.join(f"--model-{side} {getattr(args, f'model_{side}')}" for side in args.sides)
        wanted = 'one model' if models == (1,) else 'one or two models'
        raise UsageError(
            f"--method {args.method} needs {wanted}, --model-a or --model-b; given: {given or 'none'}"
            " (--model-b '' drops that of a recipe)")
    for side in args.sides:
        check_model_name(f'--model-{side}', getattr(args, f'model_{side}'))
    _check_method(args)


def _check_method(args: argparse.Namespace) -> None:
    method = METHODS[args.method]
    if method.has_teacher(args) and not args.teacher:
        other = ', or a second model that teaches while it learns' if 2 in method.models else ''
        raise UsageError(
            f"--method {args.method}: needs --teacher (a run's folder, a checkpoint, an exported folder, hf-hub:ID or "
            f'a timm name){other}')
    if args.teacher and not method.has_teacher(args):
        why = 'has two models, the teacher is the partner' if 2 in method.models else 'has no teacher'
        raise UsageError(f'--teacher {args.teacher}: --method {args.method} {why}')
    if args.teacher and not os.path.exists(args.teacher):
        if os.sep in args.teacher and ':' not in args.teacher:
            raise UsageError(f'--teacher {args.teacher}: no such file or folder')
        check_model_name('--teacher', args.teacher)
    if method.distilled and not any(_may_have_token(getattr(args, f'model_{side}')) for side in args.sides):
        given = ' '.join(f'--model-{side} {getattr(args, f"model_{side}")}' for side in args.sides)
        raise UsageError(f'--method {args.method}: {given} {no_token()}')
    if method.uniform_drop_path:
        for side in args.sides:
            rate = getattr(args, f'drop_path_{side}') or getattr(args, f'drop_connect_{side}')
            if not rate:
                raise UsageError(f'--drop-path {rate or 0:g}: --method {args.method} needs a rate above 0, its two '
                                 f'submodels differ in nothing else')
            if rate >= 1:
                raise UsageError(f'--drop-path {rate:g}: --method {args.method} needs a rate below 1')
    if method.updates(vars(args)) > 1:
        if args.grad_accum_steps > 1:
            raise UsageError(
                f'--grad-accum-steps {args.grad_accum_steps}: --method {args.method} updates one branch before the '
                f'other within a batch, 1 is the only value (or --dml-joint)')
        if args.opt.startswith('lookahead'):
            raise UsageError(f'--opt {args.opt}: --method {args.method} updates one branch before the other, which '
                             f'Lookahead would count as two steps; leave it out (or --dml-joint)')


def no_token() -> str:
    """Return the end of a line about a model without a distillation token."""
    families = {name.partition('_')[0]: name for name in sorted(distilled_model_names(), reverse=True)}
    return (f'has no distillation token; timm models that have one: {", ".join(sorted(families.values()))} and others '
            f'of these families')


def _may_have_token(name: str) -> bool:
    """Return whether a model may have a distillation token; of one from elsewhere its configuration will tell."""
    return ':' in name or name.partition('.')[0] in distilled_model_names()


@functools.cache
def distilled_model_names() -> frozenset[str]:
    """Return the timm models that may have a distillation token: those of files with its switch, named so if any is."""
    names: set[str] = set()
    for text in _timm_sources():
        if 'def set_distilled_training' in text:
            found = REGISTERED.findall(text)
            names.update([name for name in found if '_dist' in name] or found)
    return frozenset(names)


def check_model_name(flag: str, name: str) -> None:
    """Raise UsageError unless a model's name is one of timm's, hf-hub:ID or local-dir:FOLDER."""
    source, colon, place = name.partition(':')
    if colon:
        source = source.lower().replace('_', '-')
        if source not in ('hf-hub', 'local-dir') or not place:
            raise UsageError(f'{flag} {name} is not the name of a timm model, hf-hub:ID or local-dir:FOLDER')
        if source == 'local-dir' and not os.path.isdir(place):
            raise UsageError(f'{flag} {name}: no such folder')
    elif '/' in name or '\\' in name:
        raise UsageError(f'{flag} {name} is not the name of a timm model (hf-hub:{name} or local-dir:{name}?)')
    else:
        arch = name.partition('.')[0]
        names = timm_model_names()
        if arch not in names and not _is_renamed(arch):
            raise UsageError(f'{flag} {name}: timm has no model of this name{did_you_mean(arch, names)}')


def _timm_sources() -> Iterator[str]:
    """Yield the text of timm's model files, without importing timm."""
    from importlib.util import find_spec
    spec = find_spec('timm')
    if spec is None:
        raise UsageError('timm is not installed (pip install timm)')
    for path in sorted(Path(spec.submodule_search_locations[0], 'models').glob('*.py')):
        yield path.read_text(encoding='utf-8')


@functools.cache
def timm_model_names() -> frozenset[str]:
    """Return the names of the models that timm registers."""
    return frozenset(name for text in _timm_sources() for name in REGISTERED.findall(text))


def _is_renamed(name: str) -> bool:
    """Return whether timm still takes this as an old name of a model."""
    return any(f"'{name}': '" in text.partition('register_model_deprecations(')[2] for text in _timm_sources())


def check_dataset(args: argparse.Namespace, splits: Sequence[str]) -> None:
    """Raise UsageError where the data set that the options name, or one of its splits, can't be."""
    kind, slash, name = args.dataset.partition('/')
    kind, place = kind.lower(), args.data_dir
    if place and (kind == 'wds' or '://' in place):
        check_shards('--data-dir', place)
    for dest in ('train_split', 'val_split') if kind == 'wds' else ():
        check_shards(_flag(dest), getattr(args, dest, ''), is_split=True)
    if args.class_map and not any(
            os.path.isfile(path) for path in (args.class_map, os.path.join(place or '', args.class_map))):
        raise UsageError(f'--class-map {args.class_map}: no such file')
    if args.dataset == 'digits':
        if place:
            raise UsageError(f'--dataset digits comes with the package, but a folder is given: {place}')
        if not set(splits) <= {'train', 'validation'}:
            raise UsageError(f'split {" or ".join(splits)}: the digits have the splits train and validation')
    elif args.dataset and not (kind in DATASET_KINDS and name):
        kinds = ', '.join(f'{kind}/NAME' for kind in DATASET_KINDS)
        raise UsageError(f'--dataset {args.dataset} is not one of digits, {kinds}; leave it out for a folder or .tar')
    elif kind in DATASET_KINDS_WITHOUT_FOLDER:
        return
    elif not place:
        wanted = f'where {args.dataset} lies' if args.dataset else 'a folder or .tar of images'
        raise UsageError(f'no data: give {wanted} (DIR or --data-dir), or try --dataset digits')
    elif (kind == 'torch' and args.dataset_download) or (kind == 'wds' and '://' in place):
        return
    elif not os.path.exists(place):
        raise UsageError(f'data folder {place} does not exist')
    elif not os.path.isdir(place) and not (not kind and place.endswith('.tar') and os.path.isfile(place)):
        raise UsageError(f"data {place} is not a folder{'' if kind else ' or .tar'}")


# What webdataset may open: a path or an address, of characters that mean nothing to a shell, wherever they stand.
SHARD = re.compile(r'((https?|ftps|sftp|scp|gs|htgs|ais|file)://[\w.-]*(:\d+)?(?=/|$))?[\w.,/+=%-]*')
MAX_SHARDS = 1_000_000  # of a split


def check_shards(where: str, text: str, is_split: bool = False) -> None:
    """Raise UsageError unless webdataset may open what a text names.

    Args:
        where: Who names it, for the message.
        text: Folder or shard; or a split, whose shards can be several: 'x-{00..12}.tar::y-{a,b}.tar|64'.
        is_split: Whether it is a split.
    """
    count = 0
    for name in re.sub(r'\|\d+$', '', text).split('::') if is_split else [text]:
        parts = re.split(r'\{(\d{1,9}\.\.\d{1,9}|[^{}]*,[^{}]*)\}', name) if is_split else [name]
        if not all(map(SHARD.fullmatch, parts)):
            shown = '' if re.search('[@?]', text) else f' {text}'  # it may hold a secret
            raise UsageError(
                f'{where}{shown}: refused, shards are named by letters, digits and _-.,/+=% only; an address begins '
                f'with https://, ftps://, sftp://, scp://, gs://, ais:// or file:// and has no user name, password or '
                f'query (not pipe:, which is run in a shell; not hf://, which shows the token of the Hub)')
        count += math.prod(
            group.count(',') + 1 if ',' in group else abs(int(group.split('..')[0]) - int(group.split('..')[1])) + 1
            for group in parts[1::2])
    if count > MAX_SHARDS:
        raise UsageError(f'{where} {text}: these are {count} shards, more than {MAX_SHARDS}')


def mixup_active(args: argparse.Namespace) -> bool:
    """Return whether mixup or cutmix is on, so that targets are soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _flag(dest: str) -> str:
    return '--' + dest.replace('_', '-')


_CONTRASTIVE = ('tau', 'similarity', 'contrastive_to', 'same_class', 'affine_side', 'gather')
_KL = ('rho', 'kl_to')


def _without_kl(args):
    return args.kl_weight == 0 or ('x' in METHODS[args.method].options and args.x == 100)


def _without_contrastive(args):
    return args.contrastive_weight == 0 or ('y' in METHODS[args.method].options and args.y == 100)

_AUGMENTATION = (
    'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob',
    'gaussian_blur_prob', 'aa', 'reprob', 'remode', 'recount', 'resplit')

def _leaves_out(args, term):
    return 'distill_terms' in METHODS[args.method].options and term not in distill_terms(args)


# Options, the reason why they have no effect, and when.
WITHOUT_EFFECT = (
    (_CONTRASTIVE, 'the contrastive term is off (--contrastive-weight 0 or --y 100)', _without_contrastive),
    (_KL, 'the KL term is off (--kl-weight 0 or --x 100)', _without_kl),
    (('y',), '--contrastive-weight is 0', lambda args: args.contrastive_weight == 0),
    (('x',), '--kl-weight is 0', lambda args: args.kl_weight == 0),
    (('kl_weight', *_KL), '--distill-terms leaves the KL term out', lambda args: _leaves_out(args, 'kl')),
    (('contrastive_weight', *_CONTRASTIVE), '--distill-terms leaves the contrastive term out',
     lambda args: _leaves_out(args, 'contrastive')),
    (('distillation_tau',), '--distillation-type is hard', lambda args: args.distillation_type == 'hard'),
    (('bce_loss',), 'it is the loss of --method cosub anyway', lambda args: METHODS[args.method].bce),
    (('amp_dtype',), '--amp is off', lambda args: not args.amp),
    (('torchcompile_mode',), '--torchcompile is off', lambda args: not args.torchcompile),
    (('model_ema_force_cpu', 'model_ema_decay', 'model_ema_warmup'), '--model-ema is off',
     lambda args: not args.model_ema),
    (('lr_base_a',), '--lr or --lr-a is given', lambda args: args.lr_a is not None),
    (('lr_base_b',), '--lr or --lr-b is given', lambda args: args.lr_b is not None),
    (('lr_base', 'lr_base_size', 'lr_base_scale'), 'the learning rates are given',
     lambda args: all(getattr(args, f'lr_{side}') is not None for side in args.sides)),
    (('lr_noise_pct', 'lr_noise_std'), '--lr-noise is off', lambda args: not args.lr_noise),
    (_AUGMENTATION, '--no-aug turns off all augmentation', lambda args: args.no_aug),
    (('remode', 'recount', 'resplit'), '--reprob is 0', lambda args: args.reprob == 0),
    (('mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch'), '--mixup and --cutmix are off',
     lambda args: not mixup_active(args)),
    (('bce_sum', 'bce_target_thresh', 'bce_pos_weight'), '--bce-loss is off',
     lambda args: not (args.bce_loss or METHODS[args.method].bce)),
    (('wandb_project', 'wandb_tags', 'wandb_resume_id'), '--log-wandb is off', lambda args: not args.log_wandb),
)


def options_without_effect(args: argparse.Namespace) -> set[str]:
    """Return the options that have no effect beside the others, whatever their value."""
    idle: set[str] = set()
    for dests, _, applies in WITHOUT_EFFECT:
        with contextlib.suppress(AttributeError, IndexError, TypeError):  # of options that nobody has checked
            idle.update(dests if applies(args) else ())
    return idle


def _warn_without_effect(parser: OptionParser, args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Log a line for each reason why options that were given, with another value than the default, have no effect."""
    given = {dest for dest, value in given.items() if value != parser.presets[dest]}
    absent = [
        (tuple(f'{dest}_{side}' for dest in parser.branch_options), f'there is no --model-{side}', lambda args: True)
        for side in SIDES if side not in args.sides
    ]
    unread = (
        tuple(dest for dest in METHOD_OPTIONS if dest not in METHODS[args.method].options),
        f'--method {args.method} does not read it', lambda args: True)
    for dests, reason, applies in (unread, *WITHOUT_EFFECT, *absent):
        idle = [dest for dest in dests if dest in given]
        if idle and applies(args):
            _logger.warning(f"{', '.join(map(_flag, idle))}: no effect, {reason}")
            given.difference_update(idle)


# The page docs/options.md


def _table(*rows: Sequence[str]) -> list[str]:
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [header, f"|{'---|' * len(rows[0])}", *body]


def options_markdown() -> str:
    """Return the page of options for the docs: changed defaults, refused options, options of each branch."""
    parser = build_parser()
    lines = [
        '# Options',
        '',
        "<!-- Made by `python -m timm_vpl.options.options > docs/options.md`; change that module, not this page. -->",
        '',
        "The options keep the names and the meaning of timm's train script; `python train_vpl.py --help` lists all.",
        'A recipe (`--config FILE`) is a flat YAML file of the same names, with `_` or `-`; the command line wins.',
        '',
        "## Defaults that differ from timm's",
        '',
        *_table(
            ('option', 'here', 'timm', 'why'),
            *((f'`{flag}`', ours, timm, why) for flag, ours, timm, why in parser.changed),
        ),
        '',
        '## Options of each branch',
        '',
        'Each of these sets both branches; with `-a` or `-b` at its end it sets one (`--lr-a 0.005`), and wins.',
        'Given on the command line, the form for both also wins over what a recipe says of one branch.',
        '',
        *(f'- `{_flag(dest)}`' for dest in parser.branch_options),
        '',
        '## Options of timm that are refused',
        '',
        *_table(
            ('option', 'reason', 'instead'),
            *((f'`{name}`', reason, instead) for name, (reason, instead) in REFUSED.items()),
        ),
        '',
        '## Options of a run that is continued',
        '',
        'A run that goes on from a checkpoint may have other values of these without a word:',
        '',
        ', '.join(f'`{_flag(dest)}`' for dest in RESUME_FREE) + '.',
        '',
        'Other values of these are refused, since it would be another run:',
        '',
        ', '.join(f'`{_flag(dest)}`' for dest in RESUME_FIXED) + '.',
        '',
        'All others may change with a warning.',
    ]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    print(options_markdown(), end='')
