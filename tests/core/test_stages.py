"""StageSchedule against eq. 7 in whole numbers."""
import itertools
import math
import random
import warnings

import pytest
from reference import pair_terms_on

from timm_vpl import StageSchedule


def on(schedule, epoch):
    return schedule.contrastive(epoch), schedule.kl(epoch)


def beside(boundary, epochs):
    """Epochs beside the place (in epochs, may be a fraction) where a term goes on or off."""
    around = range(math.floor(boundary) - 1, math.ceil(boundary) + 2)
    return [epoch for epoch in around if 0 <= epoch < epochs]


def test_boundaries_every_pair_of_percentages():
    rng = random.Random(0)
    for x, y in itertools.product(range(101), repeat=2):
        if x + y > 100:
            continue
        epochs = rng.randint(1, 300)
        schedule = StageSchedule(epochs, x, y)
        for epoch in {0, epochs - 1, epochs + 7, *beside(x * epochs / 100, epochs),
                      *beside((100 - y) * epochs / 100, epochs)}:
            want = pair_terms_on(epoch, epochs, x, y)
            assert on(schedule, epoch) == want, (epochs, x, y, epoch)
            assert schedule.stage(epoch) == {(True, False): 1, (True, True): 2, (False, True): 3}[want]


def test_boundaries_decimals():
    rng = random.Random(0)
    for _ in range(2000):
        digits = rng.choice([1, 2, 3])
        x, y = (round(rng.uniform(1, 50), digits) for _ in range(2))
        # Multiples of 1000 put boundaries of such decimals exactly on an epoch.
        epochs = rng.choice([rng.randint(1, 300), 1000, 10_000, 100_000])
        schedule = StageSchedule(epochs, x, y)
        for epoch in beside(x * epochs / 100, epochs) + beside((100 - y) * epochs / 100, epochs):
            assert on(schedule, epoch) == pair_terms_on(epoch, epochs, x, y), (epochs, x, y, epoch)


def test_paper_default():
    schedule = StageSchedule(300)
    assert [schedule.stage(epoch) for epoch in range(300)] == [1] * 60 + [2] * 180 + [3] * 60


@pytest.mark.parametrize('epochs, x, y, stages', [
    (10, 0, 100, [3] * 12),  # distillation from b
    (10, 100, 0, [1] * 12),  # past the end too, where the bare inequality would turn KL on
    (10, 0, 0, [2] * 12),
    *((epochs, 50, 50, [1] * -(-epochs // 2) + [3] * (epochs // 2)) for epochs in (1, 2, 5, 10, 11, 300)),
])
def test_stages_of_a_run(epochs, x, y, stages):
    schedule = StageSchedule(epochs, x, y)
    assert [schedule.stage(epoch) for epoch in range(len(stages))] == stages


@pytest.mark.parametrize('epochs, x, y, epoch, want', [
    # As binary floats 0.1 is above and 33.3 below the decimal, which moves each of these by an epoch.
    (1000, 0.1, 0, 0, (True, False)),
    (1000, 0.1, 0, 1, (True, True)),
    (1000, 33.3, 66.7, 332, (True, False)),
    (1000, 33.3, 66.7, 333, (False, True)),
    (1000, 1.1, 0, 11, (True, True)),
])
@pytest.mark.filterwarnings('ignore:.*percent')
def test_decimals_as_written(epochs, x, y, epoch, want):
    assert on(StageSchedule(epochs, x, y), epoch) == want


@pytest.mark.parametrize('x, y', [(0.5, 20), (20, 0.2), (1e-3, 0), (0.999, 0)])
def test_fraction_meant_as_percentage_warns(x, y):
    with pytest.warns(UserWarning, match=str(x if x < 1 else y)):
        StageSchedule(10, x, y)


@pytest.mark.parametrize('x, y', [
    (0, 0), (1, 1), (20, 20), (1.5, 98.5), (0.0, 100.0), (33.3, 66.7), (41.9, 58.1), (100, 0)])
def test_percentages_do_not_warn(x, y):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        StageSchedule(10, x, y)


@pytest.mark.parametrize('epochs, x, y, message', [
    (10, 60, 50, r'60 \+ 50'),
    (10, 100, 1, r'100 \+ 1\b'),
    (10, 33.4, 66.7, r'33\.4 \+ 66\.7'),
    (10, -1, 20, 'x is -1'),
    (10, 20, -0.5, r'y is -0\.5'),
    *((10, value, 20, f'x is {value}') for value in (float('nan'), float('inf'), float('-inf'))),
    (0, 20, 20, 'epochs is 0'),
    (-1, 20, 20, 'epochs is -1'),
])
def test_bad_arguments(epochs, x, y, message):
    with pytest.raises(ValueError, match=message):
        StageSchedule(epochs, x, y)


@pytest.mark.parametrize('method', ['contrastive', 'kl', 'stage'])
def test_negative_epoch(method):
    with pytest.raises(ValueError, match='epoch.*-1'):
        getattr(StageSchedule(10, 20, 20), method)(-1)
