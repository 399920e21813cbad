"""Multi-stage training: which pair terms are on at an epoch, and the hook that follows a run through its stages."""
import logging
import math
import warnings
from fractions import Fraction

_logger = logging.getLogger(__name__)


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

    def __repr__(self):
        return f'StageSchedule(epochs={self.epochs}, x={float(self.x):g}, y={float(self.y):g})'


class StageHook:
    """Keep a criterion in the stage of the run, by epochs or by the number of optimizer updates done.

    Args:
        criterion: Has `set_epoch(epoch)` and `describe()`; a change of what the latter says is logged.
        updates_per_epoch: Optimizer updates in an epoch; None: `update` has no effect.
        verbose: Log the changes.
    """

    def __init__(self, criterion, updates_per_epoch: int | None = None, verbose: bool = True):
        if updates_per_epoch is not None and updates_per_epoch < 1:
            raise ValueError(f'updates_per_epoch is {updates_per_epoch}, expected at least 1')
        self.criterion = criterion
        self.updates_per_epoch = updates_per_epoch
        self.verbose = verbose
        self.epoch = None
        self.update(0)

    def set_epoch(self, epoch: int) -> None:
        """Enter an epoch, counted from 0."""
        before, known = self.criterion.describe(), self.epoch is not None
        self.epoch = epoch
        self.criterion.set_epoch(epoch)
        if self.verbose and known and self.criterion.describe() != before:
            _logger.info(f'Epoch {epoch}: {self.criterion.describe()}')

    def update(self, num_updates: int) -> None:
        """Enter the epoch that comes after so many updates."""
        if self.updates_per_epoch is not None and num_updates // self.updates_per_epoch != self.epoch:
            self.set_epoch(num_updates // self.updates_per_epoch)
