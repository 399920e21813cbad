"""Options of timm's train script that a pair does not have."""
from ..errors import UsageError

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


def check_not_refused(flag: str, where: str = '') -> None:
    """Raise UsageError for an option that has no meaning for a pair, with the reason and the alternative."""
    for name, (reason, alternative) in REFUSED.items():
        if flag == name or (name.endswith('*') and flag.startswith(name[:-1])):
            raise UsageError(f'{where or flag} is not available: {reason}; {alternative}')
