"""Vision Pair Learning for timm: train a CNN and a vision transformer together, keep two plain timm models."""
import importlib
from typing import TYPE_CHECKING

__version__ = '0.1.0'

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

if TYPE_CHECKING:  # what a checker of types sees of them
    from .core.criterion import StagedLoss as StagedLoss
    from .core.criterion import VPLLoss as VPLLoss
    from .core.methods import METHODS as METHODS
    from .core.methods import Method as Method
    from .core.pair import PairOutput as PairOutput
    from .core.pair import PairWrapper as PairWrapper
    from .core.stages import StageSchedule as StageSchedule
    from .core.task import PairTask as PairTask
    from .core.teacher import Teacher as Teacher
    from .core.term_options import TERMS as TERMS
    from .core.term_options import FollowOptions as FollowOptions
    from .core.term_options import TermKind as TermKind
    from .core.terms import ContrastiveLoss as ContrastiveLoss
    from .core.terms import Term as Term
    from .core.terms import base_term as base_term
    from .core.terms import feature_of as feature_of
    from .core.terms import kl_loss as kl_loss


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_HOMES[name]}', __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
