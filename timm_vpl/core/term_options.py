"""The terms by name, each with the options that it takes. Importing this is cheap.

A term is written `NAME,option=value,...`, several values of one option joined by `+`.
"""
import argparse
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from .names import DEFAULT_TAU, SAME_CLASS, SIDES, SIMILARITIES, partner_of
from .option import Inside01, NonNegative, Percent, Positive, option, values_of

if TYPE_CHECKING:
    from .methods import Setting
    from .terms import LogitLoss, TermFunction

_STAGES = ('stage2', 'stage3', 'stage4')


def _check_maps(names: Sequence[str]) -> None:
    if 'embed' in names:
        raise ValueError('features: embed is not a feature map; use the term embed or contrastive')


@dataclass(frozen=True)
class TermOptions:
    """Options of every term."""
    learner: str = option('b', 'branch that learns from it', choices=(*SIDES, 'both'))
    weight: NonNegative = option(1., 'its weight')
    start: Percent = option(0., 'percent of the epochs before it starts')
    end: Percent = option(100., 'percent of the epochs at its end')
    over: str = option('constant', 'schedule of its weight from start to end', choices=('constant', 'fade', 'ramp'))

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ValueError(f'start={self.start:g} is not below end={self.end:g}')


@dataclass(frozen=True)
class FollowOptions(TermOptions):
    """Options of every term by which a branch follows another network.

    Examples:
        >>> FollowOptions(learner='a', leader='average', start=20)
        FollowOptions(learner='a', weight=1.0, start=20, end=100.0, over='constant', leader='average', when='always')
        >>> FollowOptions(weight=0)
        Traceback (most recent call last):
        ValueError: weight=0 would train nothing; leave the term out
    """
    leader: str | None = option(
        None, 'what it follows: a branch, the frozen teacher, or the average of both branches', shown='the partner',
        choices=(*SIDES, 'teacher', 'average'))
    when: str = option(
        'always', 'leader-ahead: only while the leader is more accurate on images that are not trained on',
        choices=('always', 'leader-ahead'))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight:
            raise ValueError('weight=0 would train nothing; leave the term out')
        if self.when != 'always' and self.learner == 'both':
            raise ValueError(f'when={self.when} needs one learner')


@dataclass(frozen=True)
class SharedOptions(FollowOptions):
    """Options of a term that may take a share of the weight of the labels' loss."""
    alpha: Inside01 | None = option(None, "factor of its weight, 1 - alpha that of the labels' loss", shown='none')

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha and (self.learner, self.start, self.end, self.over, self.when) != (
                self.learner[:1], 0, 100, 'constant', 'always'):
            raise ValueError('alpha needs one learner, all epochs and a constant weight')


@dataclass(frozen=True)
class ContrastiveTerm(FollowOptions):
    """Options of the contrastive term."""
    tau: Positive = option(DEFAULT_TAU, 'temperature')
    similarity: str = option('cosine', 'dot product with (cosine) or without (dot) normalisation', choices=SIMILARITIES)
    same_class: str = option('negative', "other images of the anchor's class", choices=SAME_CLASS)
    gather: bool = option(True, 'take the negatives of all processes')


@dataclass(frozen=True)
class LogitTerm(FollowOptions):
    """Options of a term that follows logits, image by image."""
    temperature: Positive = option(1., 'temperature T of the probabilities')
    confidence: bool = option(False, "weigh each image by the learner's confidence (AdaptConf)")


@dataclass(frozen=True)
class KLTerm(LogitTerm, SharedOptions):
    """Options of the KL term."""
    t_squared: bool = option(True, 'multiply by T^2')
    standardize: bool = option(False, 'standardise the logits over the classes')
    hard: bool = option(False, "cross-entropy with the leader's class instead")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hard and (self.learner == 'both' or self.temperature != 1 or self.standardize):
            raise ValueError('hard=true needs one learner and cannot be combined with temperature or standardize')


@dataclass(frozen=True)
class DKDTerm(LogitTerm):
    """Options of the decoupled term."""
    temperature: Positive = option(4., 'temperature T of the probabilities')
    alpha: NonNegative = option(1., 'weight of the target class')
    beta: NonNegative = option(8., 'weight of the other classes')


@dataclass(frozen=True)
class DISTTerm(FollowOptions):
    """Options of the correlation term."""
    temperature: Positive = option(1., 'temperature T of the probabilities')
    beta: NonNegative = option(1., "weight of the images' correlations")
    gamma: NonNegative = option(1., "weight of the classes' correlations")


@dataclass(frozen=True)
class OFATerm(LogitTerm):
    """Options of the term that raises the target."""
    exponent: Positive = option(1., 'power of the raised probabilities')
    features: tuple[str, ...] = option((), 'stages that have a head of their own', shown='none')

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_maps(self.features)


@dataclass(frozen=True)
class TokensTerm(FollowOptions):
    """Options of the term of feature maps."""
    features: tuple[str, ...] = option(_STAGES, "the learner's features: stage1 to stage4, or names of modules")
    leader_features: tuple[str, ...] = option((), "the leader's", shown="as the learner's")
    norm: str = option('batch', "normalisation: batch (the leader's, by channel), layer (both) or none",
                       choices=('batch', 'layer', 'none'))
    grid: str = option('smaller', 'the grid on which they are compared', choices=('smaller', 'larger'))
    projection: bool = option(True, "a trained 1x1 convolution to the leader's width")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_maps((*self.features, *self.leader_features))
        if len(self.leader_features) not in (0, len(self.features)):
            raise ValueError('features and leader_features differ in number')


@dataclass(frozen=True)
class EmbedTerm(FollowOptions):
    """Options of the term of embeddings."""
    distance: str = option('mse', 'distance of the embeddings', choices=('mse', 'cosine'))


@dataclass(frozen=True)
class TokenTerm(SharedOptions):
    """Options of the term of a distillation token."""
    temperature: Positive | None = option(None, 'temperature of soft labels', shown='hard labels')


class TermKind(NamedTuple):
    """A kind of term.

    Args:
        description: What it is, in a few words.
        build: `build(own, setting)` -> function of (PairOutput, target); `own` is an instance of `options`, its leader
            'a', 'b', 'teacher' or 'average', 'teacher' only beside a pair.
        options: Dataclass of its options, a row each (`option`).
        learners: Who may learn from it.
        leaders: Whom it may follow.
        projects: Whether it compares embeddings through the affine layer of the pair.
        distilled: Whether its learner has a distillation token.
        reads_logits: Whether it reads the logits of its leader.

    Examples:
        >>> kind = TERMS['kl']
        >>> kind.description, kind.leaders
        ('KL divergence of predictions (VPL, Hinton)', ('a', 'b', 'teacher', 'average'))
        >>> function = kind.build(kind.options(learner='b', leader='a', temperature=4), None)
        >>> function(PairOutput(torch.zeros(2, 10), torch.zeros(2, 10)), None)
        tensor(0.)
    """
    description: str
    build: 'Callable[[Any, Setting], TermFunction]'
    options: type = FollowOptions
    learners: Sequence[str] = SIDES
    leaders: Sequence[str] = (*SIDES, 'teacher')
    projects: bool = False
    distilled: bool = False
    reads_logits: bool = False


# Each imports what is slow when it is called.


def _ce(own: TermOptions, setting: 'Setting') -> 'TermFunction':
    from .terms import base_term
    return base_term(own.learner, setting.base_loss).function


def _contrastive(own: ContrastiveTerm, setting: 'Setting') -> 'TermFunction':
    from .terms import ContrastiveLoss
    projection = _projection('Linear', own, setting, 'embed', 'embed') if own.leader == 'teacher' else None
    return ContrastiveLoss(
        own.learner, own.tau, own.similarity, own.same_class, own.gather, leader=own.leader, projection=projection)


def _logit_term(own: Any, distances: Callable[..., Any], **kwargs: Any) -> 'LogitLoss':
    from .terms import LogitLoss
    return LogitLoss(
        own.learner, own.leader, distances, own.temperature, confidence=getattr(own, 'confidence', False), **kwargs)


def _kl(own: KLTerm, setting: 'Setting') -> 'TermFunction':
    from . import distillation
    distances = distillation.hard_divergences if own.hard else partial(
        distillation.kl_divergences, temperature=own.temperature, t_squared=own.t_squared)
    return _logit_term(own, distances, standardize=own.standardize)


def _dkd(own: DKDTerm, setting: 'Setting') -> 'TermFunction':
    from .distillation import dkd
    distances = partial(dkd, alpha=own.alpha, beta=own.beta, temperature=own.temperature)
    return _logit_term(own, distances, uses_classes=True)


def _dist(own: DISTTerm, setting: 'Setting') -> 'TermFunction':
    from .distillation import dist
    return _logit_term(
        own, partial(dist, beta=own.beta, gamma=own.gamma, temperature=own.temperature))


def _ofa(own: OFATerm, setting: 'Setting') -> 'TermFunction':
    from torch import nn

    from .distillation import ofa
    from .terms import StageLogitLoss
    term = _logit_term(
        own, partial(ofa, exponent=own.exponent, temperature=own.temperature), uses_classes=True)
    if not own.features:
        return term
    heads = [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, setting.num_classes))
        for width in (setting.width(own.learner, name) for name in own.features)]
    return StageLogitLoss(own.learner, own.features, heads, term)


def _tokens(own: TokensTerm, setting: 'Setting') -> 'TermFunction':
    from .distillation import map_distances
    from .terms import FeatureLoss
    names = list(zip(own.features, own.leader_features or own.features, strict=True))
    for name, led in names if not own.projection else ():
        if (width := setting.width(own.learner, name)) != (other := setting.width(str(own.leader), led)):
            raise ValueError(f'tokens: {name} has {width} channels and {led} of the leader {other}: projection=true')
    projections = [_projection('Conv2d', own, setting, *pair) for pair in names] if own.projection else None
    return FeatureLoss(
        own.learner, str(own.leader), names, projections, partial(map_distances, norm=own.norm, grid=own.grid))


def _embed(own: EmbedTerm, setting: 'Setting') -> 'TermFunction':
    from .distillation import embedding_distances
    from .terms import FeatureLoss
    projection = _projection('Linear', own, setting, 'embed', 'embed')
    return FeatureLoss(
        own.learner, str(own.leader), [('embed', 'embed')], projection and [projection],
        partial(embedding_distances, distance=own.distance))


def _token(own: TokenTerm, setting: 'Setting') -> 'TermFunction':
    from .terms import token_loss
    return token_loss(own.learner, own.temperature, own.leader)


def _projection(kind: str, own: Any, setting: 'Setting', name: str, led: str) -> Any:
    """Return a Linear or a Conv2d (1x1) from the width of the learner's feature to the leader's; no Linear if equal."""
    from torch import nn
    widths = setting.width(own.learner, name), setting.width(own.leader, led)
    if kind == 'Conv2d':
        return nn.Conv2d(*widths, 1)
    return None if widths[0] == widths[1] else nn.Linear(*widths)


_LOGITS = (*SIDES, 'teacher', 'average')

#: The terms by name (`--term NAME,...`). Your own term is one more entry.
TERMS: dict[str, TermKind] = {
    'ce': TermKind("the labels' loss", _ce, TermOptions, (*SIDES, 'both'), ()),
    'contrastive': TermKind(
        'contrast of embeddings (VPL)', _contrastive, ContrastiveTerm, (*SIDES, 'both'), projects=True),
    'kl': TermKind(
        'KL divergence of predictions (VPL, Hinton)', _kl, KLTerm, (*SIDES, 'both'), _LOGITS, reads_logits=True),
    'tokens': TermKind('distance of feature maps (locality guidance, Bootstrapping ViTs)', _tokens, TokensTerm),
    'embed': TermKind('distance of embeddings (FitNets)', _embed, EmbedTerm),
    'dkd': TermKind('decoupled distillation (DKD)', _dkd, DKDTerm, leaders=_LOGITS, reads_logits=True),
    'dist': TermKind('correlation of predictions (DIST)', _dist, DISTTerm, leaders=_LOGITS, reads_logits=True),
    'ofa': TermKind('raised target (OFA-KD)', _ofa, OFATerm, leaders=_LOGITS, reads_logits=True),
    'token': TermKind('distillation token (DeiT)', _token, TokenTerm, distilled=True, reads_logits=True),
}


class Asked(NamedTuple):
    """A term that was asked for."""
    name: str
    own: Any

    @property
    def kind(self) -> TermKind:
        """Its kind."""
        return TERMS[self.name]

    @property
    def learners(self) -> tuple[str, ...]:
        """The branches that learn from it."""
        return SIDES if self.own.learner == 'both' else (self.own.learner,)


def parse_term(text: str) -> Asked:
    """Return the term that a text asks for.

    Raises:
        ValueError: The text is not a valid term.
    """
    name, *pairs = text.split(',')
    if name not in TERMS:
        raise ValueError(f'there is no term {name!r}; expected one of {", ".join(TERMS)}')
    options = TERMS[name].options
    types = typing.get_type_hints(options, include_extras=True)
    rows = {field.name: field.metadata['row'] for field in fields(options)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, spelled = pair.partition('=')
        if not equals or key not in rows:
            raise ValueError(f'{pair!r} is not an option of the term {name}; it has {", ".join(rows)}')
        if key in values:
            raise ValueError(f'{key} is given twice')
        try:
            values[key] = _value(types[key], spelled)
        except (ValueError, argparse.ArgumentTypeError) as e:
            raise ValueError(f'{key}={spelled}: {e}') from None
        if rows[key].choices and values[key] not in rows[key].choices:
            raise ValueError(f'{key}={spelled}: expected one of {", ".join(rows[key].choices)}')
    return Asked(name, options(**values))


def _value(annotation: Any, spelled: str) -> Any:
    kind, nargs = values_of(annotation)
    if nargs:
        if not all(spelled.split('+')):
            raise ValueError('expected at least one, joined by +')
        return tuple(map(kind, spelled.split('+')))
    if kind is not bool:
        return kind(spelled)
    if spelled.lower() not in ('true', 'false'):
        raise ValueError('expected true or false')
    return spelled.lower() == 'true'


def term_text(text: str) -> str:
    """Return a term in canonical form: the options that differ from their defaults, in a fixed order."""
    try:
        name, own = parse_term(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f'{text}: {e}') from None
    given = [(field.name, value) for field in fields(own)
             if (value := getattr(own, field.name)) != field.default or field.name == 'learner']
    return ','.join([name, *(f'{key}={_spell(value)}' for key, value in given)])


def _spell(value: Any) -> str:
    if isinstance(value, tuple):
        return '+'.join(value)
    return str(value).lower() if isinstance(value, bool) else str(value).removesuffix('.0')


TermText = Annotated[str, term_text]


def complete(asked: Sequence[Asked], sides: Sequence[str]) -> list[Asked]:
    """Return the labels' loss of each branch, then the terms as they are built: each with its leader."""
    labels = {side: TermOptions(side) for side in sides}
    for term in asked:
        if term.name == 'ce':
            labels.update((side, replace(term.own, learner=side)) for side in term.learners)
    others: list[Asked] = []
    for name, own in asked:
        if name == 'ce':
            continue
        alpha = own.alpha if isinstance(own, SharedOptions) else None
        if alpha is not None:
            own = replace(own, weight=own.weight * alpha)
            labels[own.learner] = replace(labels[own.learner], weight=labels[own.learner].weight * (1 - alpha))
        # The teacher of a single branch replaces the other branch.
        leader = partner_of(own.learner) if len(sides) == 1 else leader_of(own, sides)
        others.append(Asked(name, replace(own, leader=leader)))
    return [*(Asked('ce', own) for own in labels.values()), *others]


def check_terms(asked: Sequence[Asked], sides: Sequence[str], has_teacher: bool) -> None:
    """Raise ValueError where terms can't be those of these branches.

    Args:
        asked: The terms.
        sides: The branches.
        has_teacher: Whether there is a frozen teacher.
    """
    there = [*sides, *(['teacher'] if has_teacher else []), *(['average'] if len(sides) == 2 else [])]
    if all(term.name == 'ce' for term in asked):
        raise ValueError('needs a term by which a branch follows another network, such as --term kl,learner=b')
    for term in asked:
        try:
            _check_learner(term, sides)
            if term.name != 'ce':
                _check_leader(term, leader_of(term.own, sides), there)
        except ValueError as e:
            raise ValueError(f'{term.name},learner={term.own.learner}: {e}') from None
    trained = {side for term in complete(asked, sides) if _is_always_on(term.own) for side in term.learners}
    if left := sorted({*sides} - trained):
        raise ValueError(f'no term trains branch {left[0]} in all epochs: ce,learner={left[0]} has weight 0 or ends')
    if has_teacher and not any(leader_of(term.own, sides) == 'teacher' for term in asked if term.name != 'ce'):
        raise ValueError('--teacher: no term follows it (leader=teacher)')
    if sum(term.kind.distilled for term in asked) > 1:
        raise ValueError('token: only one branch can learn through its token')
    names = column_names(asked, sides)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f'two terms have the name {twice}; give only one term for each kind, learner and leader')


def _is_always_on(own: TermOptions) -> bool:
    return bool(own.weight) and (own.start, own.end, getattr(own, 'when', 'always')) == (0, 100, 'always')


def _check_learner(term: Asked, sides: Sequence[str]) -> None:
    own, kind = term.own, term.kind
    if own.learner not in kind.learners:
        raise ValueError(f'expected a learner of {", ".join(kind.learners)}')
    if not set(term.learners) <= set(sides):
        raise ValueError(f'there is no --model-{partner_of(sides[0])}')


def _check_leader(term: Asked, leader: str, there: Sequence[str]) -> None:
    own, kind = term.own, term.kind
    if leader not in kind.leaders or leader == own.learner or (own.learner == 'both' and leader not in SIDES):
        raise ValueError(f'its leader is {leader}, expected another of {", ".join(kind.leaders)}')
    if leader not in there:
        lacking = {'teacher': '--teacher', 'average': 'two models'}.get(leader, f'--model-{leader}')
        raise ValueError(f'its leader is {leader}, which needs {lacking}')


def leader_of(own: Any, sides: Sequence[str]) -> str:
    """Return the leader of a term: by default the partner, or the teacher where there is only one branch."""
    if own.leader is not None:
        return str(own.leader)
    return 'teacher' if len(sides) == 1 else 'b' if own.learner == 'both' else partner_of(own.learner)


def column_names(asked: Sequence[Asked], sides: Sequence[str]) -> list[str]:
    """Return the terms' names: TERM_LEARNER_loss; of several alike TERM_LEARNER_LEADER_loss."""
    plain = [f'{name}_{own.learner}' for name, own in asked]
    return [
        f'{name}_{leader_of(term.own, sides)}_loss' if plain.count(name) > 1 and term.name != 'ce' else f'{name}_loss'
        for name, term in zip(plain, asked, strict=True)]
