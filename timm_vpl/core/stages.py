"""Multi-stage training: which pair terms are on at an epoch."""
import math
import warnings
from fractions import Fraction


class StageSchedule:
    """Which pair terms are on at each epoch (VPL, eq. 7).

    The contrastive term is on in the first (100 - y) % of the epochs, the KL term in the last (100 - x) %: for epoch
    e of E, while 100 e < (100 - y) E and while 100 e >= x E, in exact arithmetic. y = 100 is distillation from b,
    x = y = 0 one stage, x = y = 50 hands over once.

    Args:
        epochs: Number of epochs E that the learning rate scheduler runs.
        x: Percentage of epochs before the KL term starts.
        y: Percentage of epochs after the contrastive term has ended.

    Raises:
        ValueError: epochs < 1; x or y negative or not finite; x + y > 100.
    """

    def __init__(self, epochs: int, x: float = 20, y: float = 20):
        if not math.isfinite(epochs) or epochs != int(epochs) or epochs < 1:
            raise ValueError(f'epochs is {epochs}, expected a whole number of at least 1')
        for name, value in (('x', x), ('y', y)):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f'{name} is {value}, expected a percentage from 0 to 100')
            if 0 < value < 1:
                warnings.warn(f'{name} is {value}: it is a percentage, 20 means a fifth of the epochs', stacklevel=2)
        # The decimals as written: 33.3 is 333/10, not the nearest binary fraction.
        self.x, self.y = Fraction(str(x)), Fraction(str(y))
        if self.x + self.y > 100:
            raise ValueError(f'x + y is {x} + {y}, expected at most 100')
        self.epochs = int(epochs)

    def _clamp(self, epoch: int) -> int:
        if epoch < 0:
            raise ValueError(f'epoch is {epoch}, expected 0 or more')
        return min(epoch, self.epochs - 1)

    def contrastive(self, epoch: int) -> bool:
        """Return whether the contrastive term is on; epochs past the last count as the last."""
        return 100 * self._clamp(epoch) < (100 - self.y) * self.epochs

    def kl(self, epoch: int) -> bool:
        """Return whether the KL term is on; epochs past the last count as the last."""
        return 100 * self._clamp(epoch) >= self.x * self.epochs

    def stage(self, epoch: int) -> int:
        """Return the stage: 1 contrastive term only, 2 both, 3 KL term only."""
        if not self.kl(epoch):
            return 1
        return 2 if self.contrastive(epoch) else 3

    def __repr__(self) -> str:
        return f'StageSchedule(epochs={self.epochs}, x={float(self.x):g}, y={float(self.y):g})'
