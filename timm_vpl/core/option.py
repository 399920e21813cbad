"""An option as a row: a field of a dataclass that carries every fact about it. Importing this is cheap."""
import argparse
import math
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Annotated, Any

SAME: Any = object()  # the default is timm's, or that of branch a
ABSENT: Any = object()  # timm has no such option


@dataclass(frozen=True)
class Row:
    """The facts of an option besides its name, type and default.

    Args:
        help: What it does; '' hides it.
        flags: Further spellings on the command line, such as '-b'.
        shown: Text for the default, if not its value.
        timm: timm's default, where ours differs; ABSENT where its train script has no such option.
        why: Why it differs.
        default_b: Default of branch b, where it differs from that of branch a.
        choices: The allowed values.
        metavar: Name of the value in the help.
        const: Value of a flag that is given without one.
        null: What `null` in a recipe means, if not 'not given'.
        repeats: Whether it may be given several times, each for further values.
        positional: Whether it is an argument without a flag.
        own_only: Whether it can be set per branch only, not for both branches at once.
        resume: Whether a resumed run may have another value: 'fixed' is refused, since it changes what is built; 'free'
            is allowed; 'warned' gives a warning. By default a `how` is free and all others are warned.
        how: Whether it concerns how or where a run is done, not what is trained; reports do not compare it.
        recipe: Whether it is part of a run's recipe (`args.yaml`).
        card: Whether a public card may show it, which must not name local files; None for all but a `how`.
        idle: Reasons for which it can have no effect.
    """
    help: str
    flags: tuple[str, ...] = ()
    shown: str = ''
    timm: Any = SAME
    why: str = ''
    default_b: Any = SAME
    choices: Collection[str] | None = None
    metavar: str | None = None
    const: Any = None
    null: str | None = None
    repeats: bool = False
    positional: bool = False
    own_only: bool = False
    resume: str = ''
    how: bool = False
    recipe: bool = True
    card: bool | None = None
    idle: 'tuple[Idle, ...]' = ()


@dataclass(frozen=True)
class Idle:
    """A reason why options have no effect: its text, and `applies(options)`, whether it holds."""
    reason: str
    applies: Callable[[Any], bool]


def option(default: Any, help: str, *flags: str, **facts: Any) -> Any:
    """Return the field of an option; a bool is a flag with a `--no-` form, unless its name begins with `no_`.

    Args:
        default: Its default.
        help: As of `Row`, like all further arguments.
        *flags: Further spellings.
        **facts: The other facts of `Row`.
    """
    row = Row(help, flags, **facts)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={'row': row})
    return field(default=default, metadata={'row': row})


def number(kind: type, wanted: str, valid: Callable[[Any], bool] = lambda value: True) -> Callable[[str], Any]:
    """Return the argparse type of a finite number for which `valid` holds; errors name what is `wanted`."""
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        # NaN fails the comparison, an integer of any size passes it.
        if not (-math.inf < value < math.inf and valid(value)):
            raise argparse.ArgumentTypeError(f'{text!r} is not {wanted}')
        return value
    setattr(parse, 'metavar', 'N' if kind is int else 'X')  # noqa: B010
    return parse


def values_of(annotation: Any) -> tuple[Any, Any]:
    """Return (type, nargs) of a field's annotation for argparse."""
    inner = [each for each in typing.get_args(annotation) if each is not type(None)]
    if typing.get_origin(annotation) is Annotated:
        return annotation.__metadata__[0], None
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return values_of(inner[0])
    if typing.get_origin(annotation) is tuple:
        return values_of(inner[0])[0], '+' if inner[-1] is Ellipsis else len(inner)
    return (str, '*') if typing.get_origin(annotation) is dict else (annotation, None)


Number = Annotated[float, number(float, 'a finite number')]
Positive = Annotated[float, number(float, 'a number > 0', lambda value: value > 0)]
NonNegative = Annotated[float, number(float, 'a number >= 0', lambda value: value >= 0)]
Probability = Annotated[float, number(float, 'a number from 0 to 1', lambda value: 0 <= value <= 1)]
BelowOne = Annotated[float, number(float, 'a number >= 0 and < 1', lambda value: 0 <= value < 1)]
Inside01 = Annotated[float, number(float, 'a number > 0 and < 1', lambda value: 0 < value < 1)]
Percent = Annotated[float, number(float, 'a percentage from 0 to 100', lambda value: 0 <= value <= 100)]
# timm's pretrained models have 0.875 to 1.15.
CropPct = Annotated[float, number(
    float, 'a fraction above 0 and below 2, such as 0.875 for 87.5 percent', lambda value: 0 < value < 2)]
Repeats = Annotated[float, number(float, '0 or a number >= 1', lambda value: value == 0 or value >= 1)]
Count = Annotated[int, number(int, 'a whole number >= 1', lambda value: value >= 1)]
Whole = Annotated[int, number(int, 'a whole number >= 0', lambda value: value >= 0)]
Name = Annotated[str | None, lambda text: text or None]  # of a model, None for an empty one
Policy = Annotated[str, lambda text: '' if text.lower() == 'none' else text]  # of augmentation
