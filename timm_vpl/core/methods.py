"""The methods: what each computes for a batch, as data that the options, the build and the report read.

The training loop knows none of them. Nothing heavy is imported here.
"""
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .names import SIDES

if TYPE_CHECKING:
    from .criterion import StagedLoss
    from .terms import BaseLoss


class Method(NamedTuple):
    """One way to train.

    Args:
        description: What it is, in a few words.
        models: How many models it trains.
        criterion: `criterion(args, epochs, base_loss)` -> StagedLoss; its terms say who learns what, in which
            optimizer phase, from one view of an image or two.
        passes: Forwards for an image in a training step, over all networks, by the options.
        options: Names of the options, of those that belong to methods, that it reads.
        updates: Optimizer updates a batch, by the options.
        projects: Whether a term compares embeddings, which may need the affine layer, by the options.
        teacher: Whether a frozen network stands in the place of the other branch: 'never', 'always', or 'alone',
            when one model is named.
        distilled: Whether a branch trains a head of its own for what it is taught (DeiT's distillation token).
        uniform_drop_path: Whether every block of a network has the rate --drop-path.
        bce: Whether the labels' loss is binary cross-entropy.
        key: Of its paper, in the package's citations; '' for none.
    """
    description: str
    models: tuple[int, ...]
    criterion: 'Callable[[Any, int, BaseLoss | None], StagedLoss]'
    passes: Callable[[Mapping[str, Any]], int] = lambda options: 2
    options: tuple[str, ...] = ()
    updates: Callable[[Mapping[str, Any]], int] = lambda options: 1
    projects: Callable[[Any], bool] = lambda args: True
    teacher: str = 'never'
    distilled: bool = False
    uniform_drop_path: bool = False
    bce: bool = False
    key: str = ''

    def has_teacher(self, args: Any) -> bool:
        """Return whether these options come with a frozen teacher."""
        return self.teacher == 'always' or (self.teacher == 'alone' and len(args.sides) == 1)

    @property
    def citation(self) -> str:
        """BibTeX of its paper, '' for none."""
        entries = (Path(__file__).parents[1] / 'assets' / 'citations.bib').read_text(encoding='utf-8').split('\n\n')
        return next((entry.strip() for entry in entries if self.key and f'{{{self.key},' in entry), '')


CONTRASTIVE_OPTIONS = ('tau', 'similarity', 'same_class', 'gather')
_VPL_OPTIONS = (
    'x', 'y', 'rho', 'kl_to', 'kl_weight', 'contrastive_to', 'contrastive_weight', *CONTRASTIVE_OPTIONS)
TEACHER_OPTIONS = ('teacher', 'teacher_branch')


def distill_terms(args: Any) -> tuple[str, ...]:
    """Return the pair terms of two-step distillation: those asked for, else what the student's side learns in VPL."""
    terms = args.distill_terms or {'a': 'kl', 'b': 'contrastive'}[args.sides[0]]
    return ('contrastive', 'kl') if terms == 'both' else (terms,)


# Each imports the criterion when it is called, since that is slow.


def _vpl(args: Any, epochs: int, base_loss: 'BaseLoss | None') -> 'StagedLoss':
    from .criterion import VPLLoss
    return VPLLoss(epochs, base_loss=base_loss, **{name: getattr(args, name) for name in _VPL_OPTIONS})


def _solo(args: Any, epochs: int, base_loss: 'BaseLoss | None') -> 'StagedLoss':
    from . import criterion, terms
    return criterion.StagedLoss([terms.base_term(side, base_loss) for side in args.sides])


def _dml(args: Any, epochs: int, base_loss: 'BaseLoss | None') -> 'StagedLoss':
    from . import criterion, terms
    if args.dml_joint:
        return criterion.StagedLoss([
            terms.base_term('a', base_loss),
            terms.base_term('b', base_loss),
            terms.Term('kl_a_loss', terms.kl_loss('both', args.rho), args.kl_weight / 2),
            terms.Term('kl_b_loss', terms.kl_loss('both', args.rho, leader='a'), args.kl_weight / 2),
        ])
    return criterion.StagedLoss([
        terms.base_term('a', base_loss),
        terms.Term('kl_a_loss', terms.kl_loss('a', args.rho), args.kl_weight),
        terms.base_term('b', base_loss)._replace(phase=1),
        terms.Term('kl_b_loss', terms.kl_loss('b', args.rho), args.kl_weight, phase=1),
    ], phases=SIDES)


def _distill(args: Any, epochs: int, base_loss: 'BaseLoss | None') -> 'StagedLoss':
    from . import criterion, terms
    [student] = args.sides
    wanted, learnt = distill_terms(args), [terms.base_term(student, base_loss)]
    if 'contrastive' in wanted:
        contrastive = terms.ContrastiveLoss(student, args.tau, args.similarity, args.same_class, args.gather)
        learnt.append(terms.Term('contrastive_loss', contrastive, args.contrastive_weight))
    if 'kl' in wanted:
        learnt.append(terms.Term('kl_loss', terms.kl_loss(student, args.rho), args.kl_weight))
    return criterion.StagedLoss(learnt)


def _deit(args: Any, epochs: int, base_loss: 'BaseLoss | None') -> 'StagedLoss':
    from . import criterion, terms
    student, hard = args.student, args.distillation_type == 'hard'
    alpha = args.distillation_alpha if args.distillation_alpha is not None else 0.5 if hard else 0.1
    temperature = None if hard else args.distillation_tau
    return criterion.StagedLoss([
        *(terms.base_term(side, base_loss) for side in args.sides if side != student),
        terms.base_term(student, base_loss)._replace(weight=1 - alpha),
        terms.Term(f'distill_{student}_loss', terms.token_loss(student, temperature), alpha),
    ])


def _cosub(args: Any, epochs: int, base_loss: 'BaseLoss | None') -> 'StagedLoss':
    from . import criterion, terms
    return criterion.StagedLoss([
        *(terms.base_term(side, base_loss)._replace(weight=0.25) for side in SIDES),
        *(terms.Term(f'cosub_{side}_loss', terms.submodel_loss(side, args.bce_sum), 0.25) for side in SIDES),
    ], views=2)


METHODS: dict[str, Method] = {
    'vpl': Method(
        'Vision Pair Learning',
        models=(2,),
        criterion=_vpl,
        options=('affine_side', *_VPL_OPTIONS),
        key='tong2022vpl',
    ),
    'solo': Method(
        'one model alone',
        models=(1,),
        criterion=_solo,
        passes=lambda options: 1,
    ),
    'dml': Method(
        'deep mutual learning',
        models=(2,),
        criterion=_dml,
        passes=lambda options: 2 if options.get('dml_joint') else 3,
        options=('rho', 'kl_weight', 'dml_joint'),
        updates=lambda options: 1 if options.get('dml_joint') else 2,
        projects=lambda args: False,
        key='zhang2018dml',
    ),
    'distill': Method(
        'two-step distillation from a frozen teacher, with the terms of Vision Pair Learning',
        models=(1,),
        criterion=_distill,
        options=('distill_terms', 'rho', 'kl_weight', 'contrastive_weight', *CONTRASTIVE_OPTIONS, *TEACHER_OPTIONS),
        projects=lambda args: 'contrastive' in distill_terms(args),
        teacher='always',
    ),
    'deit': Method(
        'distillation through a token, as DeiT',
        models=(1, 2),
        criterion=_deit,
        options=('distillation_type', 'distillation_alpha', 'distillation_tau', *TEACHER_OPTIONS),
        projects=lambda args: False,
        teacher='alone',
        distilled=True,
        key='touvron2021deit',
    ),
    'cosub': Method(
        'cotraining of two submodels of one network',
        models=(1,),
        criterion=_cosub,
        options=('drop_path_skip',),
        uniform_drop_path=True,
        bce=True,
        key='touvron2022cosub',
    ),
}

METHOD_OPTIONS = sorted({name for method in METHODS.values() for name in method.options})
