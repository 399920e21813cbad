"""The options of the methods, a row each. Importing this is cheap."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .names import DEFAULT_TAU, SAME_CLASS, SIDES, SIMILARITIES
from .option import Idle, Inside01, Name, NonNegative, Positive, option
from .term_options import TERMS, Asked, TermText, parse_term

_LEARNERS = (*SIDES, 'both')


def _off(options: Any, term: str, span: str) -> bool:
    return getattr(options, f'{term}_weight') == 0 or getattr(options, span, None) == 100


def distill_terms(own: Any, sides: Sequence[str]) -> tuple[str, ...]:
    """Return the pair terms of two-step distillation: those asked for, else what the student's side learns in VPL."""
    terms = own.distill_terms or {'a': 'kl', 'b': 'contrastive'}[sides[0]]
    return ('contrastive', 'kl') if terms == 'both' else (terms,)


def _left_out(options: Any, term: str) -> bool:
    return hasattr(options, 'distill_terms') and term not in distill_terms(options, options.sides)


_NO_CONTRASTIVE = (
    Idle('the contrastive term is off (--contrastive-weight 0 or --y 100)', lambda o: _off(o, 'contrastive', 'y')),
    Idle('--distill-terms leaves the contrastive term out', lambda o: _left_out(o, 'contrastive')))
_NO_KL = (
    Idle('the KL term is off (--kl-weight 0 or --x 100)', lambda o: _off(o, 'kl', 'x')),
    Idle('--distill-terms leaves the KL term out', lambda o: _left_out(o, 'kl')))


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""


@dataclass(frozen=True)
class ContrastiveOptions:
    """Options of the contrastive term."""
    tau: Positive = option(
        DEFAULT_TAU, 'temperature of the contrastive term (not given in the paper)', idle=_NO_CONTRASTIVE)
    similarity: str = option(
        'cosine', 'dot product of two embeddings with (cosine) or without (dot) L2 normalisation (paper: dot, its '
        '--tau is not given)', choices=SIMILARITIES, idle=_NO_CONTRASTIVE)
    contrastive_weight: NonNegative = option(1., 'weight of the contrastive term (paper: 1)', idle=_NO_CONTRASTIVE[1:])
    same_class: str = option(
        'negative', "other images of the anchor's class in the contrastive term (paper: negative)",
        choices=SAME_CLASS, idle=_NO_CONTRASTIVE)
    gather: bool = option(
        True, 'take negatives from all processes, not only from its own (not given in the paper)',
        idle=_NO_CONTRASTIVE)


@dataclass(frozen=True)
class KLOptions:
    """Options of the KL term."""
    rho: Positive = option(1., 'temperature of the KL term (not given in the paper)', idle=_NO_KL)
    kl_weight: NonNegative = option(1., 'weight of the KL term (paper: 1)', idle=_NO_KL[1:])


@dataclass(frozen=True)
class VPLOptions(ContrastiveOptions, KLOptions):
    """Options of Vision Pair Learning."""
    x: NonNegative = option(
        20., 'percent of the epochs before the KL term starts (paper: 20)',
        idle=(Idle('--kl-weight is 0', lambda o: o.kl_weight == 0),))
    y: NonNegative = option(
        20., 'percent of the epochs after the contrastive term has ended (paper: 20); 100 needs --x 0',
        idle=(Idle('--contrastive-weight is 0', lambda o: o.contrastive_weight == 0),))
    contrastive_to: str = option(
        'b', 'branch that learns from the contrastive term (paper: b; Table 7, Bi: both)', choices=_LEARNERS,
        idle=_NO_CONTRASTIVE)
    kl_to: str = option(
        'a', 'branch that learns from the KL term (paper: a; Table 7, Bi: both)', choices=_LEARNERS, idle=_NO_KL)
    affine_side: str = option(
        'b', 'branch whose embedding the affine layer maps to the width of the other (not given in the paper)',
        choices=SIDES, resume='fixed', idle=_NO_CONTRASTIVE)


@dataclass(frozen=True)
class DMLOptions(KLOptions):
    """Options of deep mutual learning."""
    dml_joint: bool = option(
        False, 'deep mutual learning with one joint update of both branches per batch, not one after the other',
        resume='fixed')


@dataclass(frozen=True)
class TeacherOptions:
    """Options of a frozen teacher."""
    teacher: Name = option(
        None, "frozen teacher of distill and deit: a run's folder or checkpoint, an exported folder, hf-hub:ID or a "
        'timm name', metavar='SOURCE', resume='fixed', card=False)
    teacher_branch: str | None = option(
        None, 'branch to use if the teacher was trained in a pair', shown="not the student's side", choices=SIDES,
        resume='fixed')


@dataclass(frozen=True)
class DistillOptions(ContrastiveOptions, KLOptions, TeacherOptions):
    """Options of two-step distillation."""
    distill_terms: str | None = option(
        None, 'terms of distill', shown='kl for --model-a, contrastive for --model-b, as in VPL',
        choices=('contrastive', 'kl', 'both'), resume='fixed')


@dataclass(frozen=True)
class DeiTOptions(TeacherOptions):
    """Options of distillation through a token."""
    distillation_type: str = option(
        'hard', "what deit's token learns: the teacher's class or its probabilities", choices=('hard', 'soft'))
    distillation_alpha: Inside01 | None = option(
        None, "weight of deit's token, 1 - alpha that of the labels", shown='0.5 for hard, 0.1 for soft')
    distillation_tau: Positive = option(
        3., "temperature of deit's soft labels",
        idle=(Idle('--distillation-type is hard', lambda o: o.distillation_type == 'hard'),))


@dataclass(frozen=True)
class PairOptions(TeacherOptions):
    """Options of terms by name."""
    terms: tuple[TermText, ...] = option(
        (), 'a term of --method pair, repeated for each: NAME,learner=SIDE,option=value,... with NAME one of '
        f'{", ".join(TERMS)} '
        '(docs/terms.md)', '--term', metavar='TERM', repeats=True, resume='fixed')

    @property
    def asked(self) -> list[Asked]:
        """The terms."""
        return [parse_term(text) for text in self.terms]


@dataclass(frozen=True)
class CosubOptions:
    """Options of cosub."""
    drop_path_skip: bool = option(
        False, "let cosub run a block only on the images that keep it, if the block allows it")
