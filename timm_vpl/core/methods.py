"""The methods: what each computes for a batch, as data that the options, the build and the report read.

The training loop does not depend on them. Nothing heavy is imported here.
"""
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .method_options import (
    CosubOptions,
    DeiTOptions,
    DistillOptions,
    DMLOptions,
    NoOptions,
    PairOptions,
    VPLOptions,
    distill_terms,
)
from .names import SIDES
from .stages import Span
from .term_options import check_terms, column_names, complete, leader_of

if TYPE_CHECKING:
    from .criterion import StagedLoss
    from .terms import BaseLoss


class Setting(NamedTuple):
    """What a method's criterion is made for.

    Args:
        sides: The branches.
        epochs: Epochs that the learning rate scheduler runs.
        base_loss: base_loss(logits, target) of the labels, by default cross-entropy.
        student: The branch that has a distillation token.
        sum_classes: Whether binary cross-entropy is summed over the classes.
        num_classes: Number of classes.
        width: `width(side, feature)` -> its channels; the side may be 'teacher'.
    """
    sides: Sequence[str]
    epochs: int
    base_loss: 'BaseLoss | None' = None
    student: str | None = None
    sum_classes: bool = False
    num_classes: int = 0
    width: Callable[[str, str], int] = lambda side, feature: 0


class Method(NamedTuple):
    """One way to train.

    Args:
        description: What it is, in a few words.
        models: How many models it trains.
        criterion: `criterion(own, setting)` -> StagedLoss, `own` an instance of `options`; its terms say who learns
            what, in which optimizer phase, from one view of an image or two.
        passes: Forwards for an image in a training step, over all networks, by the options and the branches.
        options: Dataclass of its own options, a row each (`option`).
        updates: Optimizer updates a batch, by the options.
        projects: Whether a term compares embeddings, which may need the affine layer, by the options.
        teacher: Whether a frozen network teaches: 'never', 'always', 'alone', when one model is named, or 'asked', when
            --teacher is given. It replaces the other branch, or teaches two.
        distilled: Branches of which one trains a separate head for the teacher's labels (DeiT's distillation token), by
            the options; the last that has such a head.
        uniform_drop_path: Whether every block of a network has the rate --drop-path.
        bce: Whether the labels' loss is binary cross-entropy.
        key: Of its paper, in the package's citations; '' for none.
        follows_teacher: Whether a term reads the teacher's logits, by the options and the branches, so that it needs
            the same classes.
        gated: Whether a term has a gate, by the options: images are held out from training for it.
        check: `check(own, sides)` raises ValueError where its options contradict each other.

    Examples:
        >>> from timm_vpl.core.methods import Setting
        >>> vpl = METHODS['vpl']
        >>> vpl.description, vpl.models
        ('Vision Pair Learning', (2,))
        >>> criterion = vpl.criterion(vpl.options(x=0, y=0), Setting(sides=('a', 'b'), epochs=10))
        >>> criterion.describe()
        'stage 2, terms 1 x ce_a_loss, 1 x ce_b_loss, 1 x contrastive_loss, 1 x kl_loss'
    """
    description: str
    models: tuple[int, ...]
    criterion: 'Callable[[Any, Setting], StagedLoss]'
    passes: Callable[[Any, Sequence[str]], int] = lambda own, sides: 2
    options: type = NoOptions
    updates: Callable[[Any], int] = lambda own: 1
    projects: Callable[[Any, Sequence[str]], bool] = lambda own, sides: False
    teacher: str = 'never'
    distilled: Callable[[Any], Sequence[str]] = lambda own: ()
    uniform_drop_path: bool = False
    bce: bool = False
    key: str = ''
    follows_teacher: Callable[[Any, Sequence[str]], bool] = lambda own, sides: True
    gated: Callable[[Any], bool] = lambda own: False
    check: Callable[[Any, Sequence[str]], None] = lambda own, sides: None

    def has_teacher(self, own: Any, sides: Sequence[str]) -> bool:
        """Return whether a frozen teacher comes with these branches."""
        if self.teacher == 'asked':
            return bool(own.teacher)
        return self.teacher == 'always' or (self.teacher == 'alone' and len(sides) == 1)

    @property
    def citation(self) -> str:
        """BibTeX of its paper, '' for none."""
        entries = (Path(__file__).parents[1] / 'assets' / 'citations.bib').read_text(encoding='utf-8').split('\n\n')
        return next((entry.strip() for entry in entries if self.key and f'{{{self.key},' in entry), '')


# Each imports the criterion when it is called, since that is slow.


def _vpl(own: VPLOptions, setting: Setting) -> 'StagedLoss':
    from .criterion import VPLLoss
    values = asdict(own)
    values.pop('affine_side')
    return VPLLoss(setting.epochs, base_loss=setting.base_loss, **values)


def _solo(own: NoOptions, setting: Setting) -> 'StagedLoss':
    from . import criterion, terms
    return criterion.StagedLoss([terms.base_term(side, setting.base_loss) for side in setting.sides])


def _dml(own: DMLOptions, setting: Setting) -> 'StagedLoss':
    from . import criterion, terms
    base_a, base_b = (terms.base_term(side, setting.base_loss) for side in SIDES)
    if own.dml_joint:
        return criterion.StagedLoss([
            base_a,
            base_b,
            terms.Term('kl_a_loss', terms.kl_loss('both', own.rho), own.kl_weight / 2),
            terms.Term('kl_b_loss', terms.kl_loss('both', own.rho, leader='a'), own.kl_weight / 2),
        ])
    return criterion.StagedLoss([
        base_a,
        terms.Term('kl_a_loss', terms.kl_loss('a', own.rho), own.kl_weight),
        base_b._replace(phase=1),
        terms.Term('kl_b_loss', terms.kl_loss('b', own.rho), own.kl_weight, phase=1),
    ], phases=SIDES)


def _distill(own: DistillOptions, setting: Setting) -> 'StagedLoss':
    from . import criterion, terms
    [student] = setting.sides
    wanted, learnt = distill_terms(own, setting.sides), [terms.base_term(student, setting.base_loss)]
    if 'contrastive' in wanted:
        contrastive = terms.ContrastiveLoss(student, own.tau, own.similarity, own.same_class, own.gather)
        learnt.append(terms.Term('contrastive_loss', contrastive, own.contrastive_weight))
    if 'kl' in wanted:
        learnt.append(terms.Term('kl_loss', terms.kl_loss(student, own.rho), own.kl_weight))
    return criterion.StagedLoss(learnt)


def _deit(own: DeiTOptions, setting: Setting) -> 'StagedLoss':
    from . import criterion, terms
    student, hard = setting.student or setting.sides[-1], own.distillation_type == 'hard'
    alpha = own.distillation_alpha if own.distillation_alpha is not None else 0.5 if hard else 0.1
    temperature = None if hard else own.distillation_tau
    return criterion.StagedLoss([
        *(terms.base_term(side, setting.base_loss) for side in setting.sides if side != student),
        terms.base_term(student, setting.base_loss)._replace(weight=1 - alpha),
        terms.Term(f'distill_{student}_loss', terms.token_loss(student, temperature), alpha),
    ])


def _cosub(own: CosubOptions, setting: Setting) -> 'StagedLoss':
    from . import criterion, terms
    return criterion.StagedLoss([
        *(terms.base_term(side, setting.base_loss)._replace(weight=0.25) for side in SIDES),
        *(terms.Term(f'cosub_{side}_loss', terms.submodel_loss(side, setting.sum_classes), 0.25) for side in SIDES),
    ], views=2)


def _pair(own: PairOptions, setting: Setting) -> 'StagedLoss':
    from . import criterion, terms
    asked = complete(own.asked, setting.sides)
    for name, term in asked:
        if not Span(setting.epochs, term.start, term.end).length:
            raise ValueError(f'{name},learner={term.learner}: none of {setting.epochs} epochs is between start='
                             f'{term.start:g} and end={term.end:g}')
    return criterion.StagedLoss([
        terms.Term(
            name,
            term.kind.build(term.own, setting),
            term.own.weight,
            Span(setting.epochs, term.own.start, term.own.end, term.own.over),
            learner=term.own.learner,
            gate=(term.own.learner, term.own.leader) if getattr(term.own, 'when', 'always') != 'always' else None,
        )
        for name, term in zip(column_names(asked, setting.sides), asked, strict=True)])


#: The methods by name (`--method NAME`). Your own method is one more entry.
METHODS: dict[str, Method] = {
    'vpl': Method(
        'Vision Pair Learning',
        models=(2,),
        criterion=_vpl,
        options=VPLOptions,
        projects=lambda own, sides: True,
        key='tong2022vpl',
    ),
    'solo': Method(
        'one model alone',
        models=(1,),
        criterion=_solo,
        passes=lambda own, sides: 1,
    ),
    'dml': Method(
        'deep mutual learning',
        models=(2,),
        criterion=_dml,
        passes=lambda own, sides: 2 if own.dml_joint else 3,
        options=DMLOptions,
        updates=lambda own: 1 if own.dml_joint else 2,
        key='zhang2018dml',
    ),
    'pair': Method(
        'terms by name, in any direction',
        models=(1, 2),
        criterion=_pair,
        passes=lambda own, sides: len(sides) + bool(own.teacher),
        options=PairOptions,
        projects=lambda own, sides: any(
            term.kind.projects and (len(sides) == 1 or term.own.leader != 'teacher') for term in own.asked),
        teacher='asked',
        distilled=lambda own: [term.own.learner for term in own.asked if term.kind.distilled],
        follows_teacher=lambda own, sides: any(
            leader_of(term.own, sides) == 'teacher' and (term.kind.reads_logits or term.own.when != 'always')
            for term in own.asked if term.name != 'ce'),
        gated=lambda own: any(getattr(term.own, 'when', 'always') != 'always' for term in own.asked),
        check=lambda own, sides: check_terms(own.asked, sides, bool(own.teacher)),
    ),
    'distill': Method(
        'two-step distillation from a frozen teacher, with the terms of Vision Pair Learning',
        models=(1,),
        criterion=_distill,
        options=DistillOptions,
        projects=lambda own, sides: 'contrastive' in distill_terms(own, sides),
        teacher='always',
    ),
    'deit': Method(
        'distillation through a token, as DeiT',
        models=(1, 2),
        criterion=_deit,
        options=DeiTOptions,
        teacher='alone',
        distilled=lambda own: SIDES,
        key='touvron2021deit',
    ),
    'cosub': Method(
        'cotraining of two submodels of one network',
        models=(1,),
        criterion=_cosub,
        options=CosubOptions,
        uniform_drop_path=True,
        bce=True,
        key='touvron2022cosub',
    ),
}
