"""Differences paired by seed: mean, interval, sign-flip test. Pure Python, exact."""
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev

SIGN_FLIP_SEEDS = range(6, 33)  # below, no p under 0.05 is possible; above, the sums are too many


@dataclass(frozen=True)
class Difference:
    """The differences of paired runs.

    Attributes:
        n: Number of pairs.
        mean: Mean of the differences.
        low: Lower end of the t interval of the mean; None of one pair.
        high: Upper end.
        p: Two-sided p of the sign-flip test, for the numbers of seeds in SIGN_FLIP_SEEDS.
    """
    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def __str__(self):
        interval = '' if self.low is None else f' [{self.low:+.2f}, {self.high:+.2f}]'
        return f'{self.mean:+.2f}{interval} ({self.n}{"" if self.p is None else f", p {self.p:.3f}"})'


def paired_difference(differences: Sequence[float], level: float = 0.95) -> Difference:
    """Return the mean of paired differences with its t interval.

    Args:
        differences: One number a pair, at least one.
        level: Confidence of the interval.
    """
    n, mean = len(differences), fmean(differences)
    if n == 1:
        return Difference(n, mean)
    half = t_quantile(level, n - 1) * stdev(differences) / math.sqrt(n)
    return Difference(n, mean, mean - half, mean + half, sign_flip_p(differences) if n in SIGN_FLIP_SEEDS else None)


def t_quantile(level: float, df: int) -> float:
    """Return t for which Student's t with `df` degrees of freedom lies in (-t, t) with probability `level`."""
    low, high = 0., 1.
    while _t_probability(high, df) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, df) < level else (low, middle)
    return high


def _t_probability(t: float, df: int) -> float:
    """Return the probability of (-t, t), by the finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(df))
    cos, odd = math.cos(theta), df % 2
    term = cos if odd else 1.
    total = term if df > 1 else 0.
    for k in range(2 + odd, df - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the share of all choices of signs whose sum is at least as far from 0 as the sum of the differences."""
    bound = max(0., abs(math.fsum(differences)) - 1e-9 * math.fsum(map(abs, differences)))
    half = len(differences) // 2
    left, right = ([math.fsum(sign * x for sign, x in zip(signs, part, strict=True))
                    for signs in product((1, -1), repeat=len(part))]
                   for part in (differences[:half], differences[half:]))
    right.sort()
    inside = sum(bisect_left(right, bound - x) - bisect_left(right, -bound - x) for x in left)
    return 1 - inside / 2 ** len(differences)
