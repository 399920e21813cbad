"""Multi-stage training: which pair terms are on at an epoch, and how much they weigh."""
import math
import warnings
from fractions import Fraction

OVER = ('constant', 'fade', 'ramp')


class Span:
    """The epochs at which a term is on, and the factor of its weight there; other epochs have the factor 0.

    Of E epochs it is on at epoch e while start E <= 100 e < end E, in exact arithmetic. Over its n epochs, k of which
    are done, the factor is 1 ('constant'), 1 - k / n ('fade', as in Bootstrapping ViTs, arXiv 2112.03552) or
    (k + 1) / n ('ramp').

    Args:
        epochs: Number of epochs E that the learning rate scheduler runs.
        start: Percentage of epochs before it.
        end: Percentage of epochs at its end.
        over: 'constant', 'fade' or 'ramp'.

    Raises:
        ValueError: epochs < 1; an invalid percentage; an unknown course.
    """

    def __init__(self, epochs: int, start: float | Fraction = 0, end: float | Fraction = 100, over: str = 'constant'):
        if not math.isfinite(epochs) or epochs != int(epochs) or epochs < 1:
            raise ValueError(f'epochs is {epochs}, expected a whole number of at least 1')
        if over not in OVER:
            raise ValueError(f'over is {over!r}, expected one of {OVER}')
        for name, value in (('start', start), ('end', end)):
            if not 0 <= value <= 100:
                raise ValueError(f'{name} is {value}, expected a percentage from 0 to 100')
        # The decimals as written: 33.3 is 333/10, not the nearest binary fraction.
        self.first, stop = (math.ceil(Fraction(str(value)) * int(epochs) / 100) for value in (start, end))
        self.length = max(0, stop - self.first)
        self.epochs = int(epochs)
        self.over = over

    def __call__(self, epoch: int) -> float:
        """Return the factor at an epoch; epochs past the last count as the last."""
        if epoch < 0:
            raise ValueError(f'epoch is {epoch}, expected 0 or more')
        done = min(epoch, self.epochs - 1) - self.first
        if not 0 <= done < self.length:
            return 0.
        return {'constant': 1., 'fade': 1 - done / self.length, 'ramp': (done + 1) / self.length}[self.over]


class StageSchedule:
    """Which pair terms are on at each epoch (VPL, eq. 7).

    The contrastive term is on in the first (100 - y) % of the epochs, the KL term in the last (100 - x) %: for epoch
    e of E, while 100 e < (100 - y) E and while 100 e >= x E, in exact arithmetic. x = 0 and y = 100 is close
    to distillation from b, x = y = 0 one stage, x = y = 50 hands over once.

    Args:
        epochs: Number of epochs E that the learning rate scheduler runs.
        x: Percentage of epochs before the KL term starts.
        y: Percentage of epochs after the contrastive term has ended.

    Raises:
        ValueError: epochs < 1; x or y negative or not finite; x + y > 100.

    Examples:
        >>> schedule = StageSchedule(epochs=10)
        >>> [schedule.stage(epoch) for epoch in range(10)]
        [1, 1, 2, 2, 2, 2, 2, 2, 3, 3]
        >>> schedule.contrastive(8), schedule.kl(8)
        (False, True)
    """

    def __init__(self, epochs: int, x: float = 20, y: float = 20):
        for name, value in (('x', x), ('y', y)):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f'{name} is {value}, expected a percentage from 0 to 100')
            if 0 < value < 1:
                warnings.warn(f'{name} is {value}: it is a percentage, 20 means a fifth of the epochs', stacklevel=2)
        self.x, self.y = Fraction(str(x)), Fraction(str(y))
        if self.x + self.y > 100:
            raise ValueError(f'x + y is {x} + {y}, expected at most 100')
        self._contrastive, self._kl = Span(epochs, end=100 - self.y), Span(epochs, start=self.x)
        self.epochs = self._kl.epochs

    def contrastive(self, epoch: int) -> bool:
        """Return whether the contrastive term is on; epochs past the last count as the last."""
        return bool(self._contrastive(epoch))

    def kl(self, epoch: int) -> bool:
        """Return whether the KL term is on; epochs past the last count as the last."""
        return bool(self._kl(epoch))

    def stage(self, epoch: int) -> int:
        """Return the stage: 1 contrastive term only, 2 both, 3 KL term only."""
        if not self.kl(epoch):
            return 1
        return 2 if self.contrastive(epoch) else 3

    def __repr__(self) -> str:
        return f'StageSchedule(epochs={self.epochs}, x={float(self.x):g}, y={float(self.y):g})'
