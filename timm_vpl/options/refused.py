"""Options of timm's train script that a pair does not have."""
from fnmatch import fnmatchcase
from typing import Any

from ..errors import UsageError
from .parser import literal

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
    '--patience-epochs': ('no schedule here waits for a plateau', 'use --sched cosine or step'),
    '--aug-splits': ('the pair losses compare two branches, not two views', 'use --aa or --aug-repeats'),
    '--jsd-loss': ('the pair losses compare two branches, not the splits of AugMix', 'use the pair losses'),
    '--split-bn': ('it needs --aug-splits, which a pair does not have', 'leave it out'),
    '--torchscript': ('a pair returns more than one tensor', 'use --torchcompile'),
    '--fuser': ('it is for TorchScript', 'use --torchcompile'),
    '--fast-norm': ('the branches keep the exact norm layers of timm', 'use --amp'),
    '--model-dtype': ('the weights stay in float32', 'use --amp --amp-dtype bfloat16'),
    '--device-modules': ('no extra module is loaded for a device', 'use --device'),
    '--synchronize-step': ('the loop never waits for the device between log intervals', 'use --log-interval 1'),
    '--no-prefetcher': ('both branches get their images from one prefetcher', 'leave it out'),
    '--worker-seeding': ('every sample is seeded by its position in the run, whatever the worker', 'use --seed'),
    '--use-multi-epochs-loader': ('the workers live through all epochs anyway', 'leave it out'),
    '--tta': ('each branch is validated on one view of an image', 'leave it out'),
}
# What timm's script writes of these where they do nothing, if not null, false, 0 or ''.
_INERT = {
    'kd_distill_type': 'logit', 'kd_loss_type': 'kl', 'kd_temperature': '4.0', 'kd_token_distill_type': 'soft',
    'naflex_loss_scale': 'linear', 'naflex_max_seq_len': '576',
    'naflex_train_seq_lens': ['128', '256', '576', '784', '1024'], 'patience_epochs': '10',
    'train_size_random_mix': '0.1', 'train_size_schedule': 'constant', 'train_size_schedule_spread': '0.65',
    'variable_batch_loss_scale': 'none', 'worker_seeding': 'all'}


def refusal_of(flag: str) -> tuple[str, str] | None:
    """Return why a pair does not have an option of timm's script, and what to use instead; None of any other option."""
    return next((advice for name, advice in REFUSED.items() if fnmatchcase(flag, name)), None)


def check_not_refused(flag: str, where: str = '') -> None:
    """Raise UsageError for an option that has no meaning for a pair, with the reason and the alternative."""
    advice = refusal_of(flag)
    if advice:
        raise UsageError(f'{where or flag} is not available: {advice[0]}; {advice[1]}')


def is_inert(dest: str, value: Any) -> bool:
    """Return whether timm's script does nothing for such an option where its `args.yaml` has this value."""
    known = _INERT.get(dest)
    if isinstance(value, list):
        return value == known
    value = literal(value) if isinstance(value, str) else value
    return not value or (isinstance(known, str) and value == literal(known))
