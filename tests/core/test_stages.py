"""Spans of epochs and VPL's stages, against their inequalities in exact numbers."""
import itertools
import math
import random
import warnings
from fractions import Fraction

import pytest
from reference import pair_terms_on

from timm_vpl import StageSchedule
from timm_vpl.core.stages import Span


def test_span():
    percents = [0, 100, 20, 50, 33.3, 99.9, 0.5, Fraction(200, 3), 62.5]
    for epochs, start, end in itertools.product([1, 2, 3, 7, 10, 300, 1000], percents, percents):
        first, stop = (Fraction(str(value)) * epochs / 100 for value in (start, end))
        on = [epoch for epoch in range(epochs) if first <= epoch < stop]
        for over in ('constant', 'fade', 'ramp'):
            span = Span(epochs, start, end, over)
            for epoch in {0, 1, epochs // 2, epochs - 1, *on[:2], *on[-2:]} & set(range(epochs)):
                done = Fraction(on.index(epoch), len(on)) if epoch in on else 0
                want = {'constant': 1, 'fade': 1 - done, 'ramp': done + Fraction(1, len(on) or 1)}[over]
                assert span(epoch) == pytest.approx(float(want) * (epoch in on), abs=1e-12), (epochs, start, end, over)
            assert span(epochs) == span(epochs + 9) == span(epochs - 1)
    for bad in ({'epochs': 0}, {'epochs': 2.5}, {'over': 'up'}, {'start': -1}, {'end': 101}, {'end': math.nan}):
        with pytest.raises(ValueError, match=f'^{next(iter(bad))} is'):
            Span(**{'epochs': 4, **bad})


def beside(boundary, epochs):
    """Epochs beside the place (in epochs, may be a fraction) where a term goes on or off."""
    around = range(math.floor(boundary) - 1, math.ceil(boundary) + 2)
    return {epoch for epoch in around if 0 <= epoch < epochs}


@pytest.mark.parametrize('digits', range(4))
def test_stages_are_those_of_the_paper(digits):
    # Multiples of 1000 put boundaries of such decimals exactly on an epoch: as binary floats some are beside it.
    rng = random.Random(digits)
    pairs = itertools.product(range(101), repeat=2) if not digits else (
        (round(rng.uniform(1, 50), digits), round(rng.uniform(1, 50), digits)) for _ in range(700))
    for x, y in pairs:
        if x + y > 100:
            continue
        epochs = rng.choice([rng.randint(1, 300), rng.choice([1000, 10_000, 100_000]) if digits else 300])
        schedule = StageSchedule(epochs, x, y)
        for epoch in {0, epochs - 1, epochs + 7} | beside(x * epochs / 100, epochs) | beside(
                (100 - y) * epochs / 100, epochs):
            want = pair_terms_on(epoch, epochs, x, y)
            assert (schedule.contrastive(epoch), schedule.kl(epoch)) == want, (epochs, x, y, epoch)
            assert schedule.stage(epoch) == {(True, False): 1, (True, True): 2, (False, True): 3}[want]


def test_paper_default():
    schedule = StageSchedule(300)
    assert [schedule.stage(epoch) for epoch in range(300)] == [1] * 60 + [2] * 180 + [3] * 60


@pytest.mark.parametrize('x, y', [(0.5, 20), (20, 0.2), (1e-3, 0), (0.999, 0)])
def test_fraction_meant_as_percentage_warns(x, y):
    with pytest.warns(UserWarning, match=str(x if x < 1 else y)):
        StageSchedule(10, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for others in ((0, 0), (1, 1), (1.5, 98.5), (0.0, 100.0), (41.9, 58.1)):
            StageSchedule(10, *others)


@pytest.mark.parametrize('epochs, x, y, message', [
    (10, 60, 50, r'60 \+ 50'), (10, 100, 1, r'100 \+ 1\b'), (10, 33.4, 66.7, r'33\.4 \+ 66\.7'),
    (10, -1, 20, 'x is -1'), (10, 20, -0.5, r'y is -0\.5'), (0, 20, 20, 'epochs is 0'), (-1, 20, 20, 'epochs is -1'),
    *((10, value, 20, f'x is {value}') for value in (math.nan, math.inf, -math.inf))])
def test_bad_arguments(epochs, x, y, message):
    with pytest.raises(ValueError, match=message):
        StageSchedule(epochs, x, y)


@pytest.mark.parametrize('method', ['contrastive', 'kl', 'stage'])
def test_negative_epoch(method):
    with pytest.raises(ValueError, match='epoch.*-1'):
        getattr(StageSchedule(10, 20, 20), method)(-1)
