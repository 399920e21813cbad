"""Vision Pair Learning for timm: train a CNN and a vision transformer together, keep two plain timm models."""
import importlib

__version__ = '0.1.0.dev0'

# Imported on first use, so that `timm-vpl --help` does not wait for torch.
_HOMES = {
    'PairOutput': 'core.pair',
    'PairWrapper': 'core.pair',
    'StageSchedule': 'core.stages',
    'ContrastiveLoss': 'core.terms',
    'StagedLoss': 'core.criterion',
    'Term': 'core.terms',
    'VPLLoss': 'core.criterion',
    'base_term': 'core.terms',
    'feature_of': 'core.terms',
    'kl_loss': 'core.terms',
    'FollowOptions': 'core.term_options',
    'TERMS': 'core.term_options',
    'TermKind': 'core.term_options',
    'METHODS': 'core.methods',
    'Method': 'core.methods',
    'PairTask': 'core.task',
    'Teacher': 'core.teacher',
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_HOMES[name]}', __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
