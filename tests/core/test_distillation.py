"""The terms of distillation against plain loops over images and classes, from the equations, in float64."""
import math

import pytest
import torch
from reference import log_softmax

from timm_vpl.core import distillation

SHAPES = [(1, 2), (2, 3), (5, 4), (3, 7)]


def probabilities(row, temperature=1.):
    return [torch.exp(log_p) for log_p in log_softmax(row / temperature)]


def arg_max(row):
    values = row.tolist()
    return values.index(max(values))


def mean(values):
    return sum(values) / len(values)


def standardized(row):
    deviation = torch.sqrt(sum((z - mean(row)) ** 2 for z in row) / (len(row) - 1))
    return torch.stack([(z - mean(row)) / (deviation + 1e-7) for z in row])


def kl(row, other, temperature=1., t_squared=False):
    divergence = sum(
        torch.exp(log_q) * (log_q - log_p)
        for log_p, log_q in zip(log_softmax(row / temperature), log_softmax(other / temperature), strict=True))
    return divergence * (temperature ** 2 if t_squared else 1)


def hard(row, other):
    return -log_softmax(row)[arg_max(other)]


def dkd(row, other, y, alpha=1., beta=8., temperature=4.):
    p, q = probabilities(row, temperature), probabilities(other, temperature)
    of_target = sum(b * torch.log(b / a) for a, b in ((p[y], q[y]), (1 - p[y], 1 - q[y])))
    rest = [j for j in range(len(row)) if j != y]
    of_others = sum(
        q[j] / (1 - q[y]) * torch.log(q[j] / (1 - q[y]) / (p[j] / (1 - p[y]))) for j in rest)
    return temperature ** 2 * (alpha * of_target + beta * of_others)


def ofa(row, other, y, exponent=1., temperature=1.):
    log_p, q = log_softmax(row / temperature), probabilities(other, temperature)
    one_hot = [float(j == y) for j in range(len(row))]
    return -sum(((q[j] + one_hot[j]) ** exponent - one_hot[j]) * log_p[j] for j in range(len(row)))


def correlation(x, y):
    x, y = [u - mean(x) for u in x], [v - mean(y) for v in y]
    return sum(u * v for u, v in zip(x, y, strict=True)) / torch.sqrt(sum(u * u for u in x) * sum(v * v for v in y))


def dist(logits, reference, beta=1., gamma=1., temperature=1.):
    p, q = ([probabilities(row, temperature) for row in each] for each in (logits, reference))
    images = mean([correlation(a, b) for a, b in zip(p, q, strict=True)])
    classes = mean([correlation(a, b) for a, b in zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)])
    return temperature ** 2 * (beta * (1 - images) + gamma * (1 - classes))


def confidence(row, other, temperature=0.5):
    log_p = log_softmax(row.detach())
    s, u = -log_p[arg_max(row)], -log_p[arg_max(other)]
    beta = torch.exp(s / temperature) / (torch.exp(s / temperature) + torch.exp(u / temperature))
    return 1 - beta


def embedding(row, other, distance='mse'):
    if distance == 'mse':
        return mean([(h - g) ** 2 for h, g in zip(row, other, strict=True)])
    norms = torch.sqrt(sum(h * h for h in row)) * torch.sqrt(sum(g * g for g in other))
    return 1 - sum(h * g for h, g in zip(row, other, strict=True)) / norms


def by_image(one):
    """A function of (image, image, class) as one of the batch."""
    def batch(logits, reference, *classes, **options):
        return torch.stack([
            one(row, other, *(int(each[i]) for each in classes), **options)
            for i, (row, other) in enumerate(zip(logits, reference, strict=True))])
    return batch


# (function, its loop, options, whether it takes classes)
CASES = [
    *((distillation.kl_divergences, by_image(kl), {'temperature': t, 't_squared': squared}, False)
      for t in (0.5, 1., 4.) for squared in (False, True)),
    (distillation.hard_divergences, by_image(hard), {}, False),
    (distillation.dkd, by_image(dkd), {}, True),
    (distillation.dkd, by_image(dkd), {'alpha': 0.3, 'beta': 2., 'temperature': 1.}, True),
    (distillation.dkd, by_image(dkd), {'alpha': 0., 'beta': 1., 'temperature': 2.}, True),
    (distillation.dkd, by_image(dkd), {'alpha': 1., 'beta': 0., 'temperature': 2.}, True),
    (distillation.ofa, by_image(ofa), {}, True),
    (distillation.ofa, by_image(ofa), {'exponent': 1.4, 'temperature': 2.}, True),
    (distillation.dist, dist, {}, False),
    (distillation.dist, dist, {'beta': 2., 'gamma': 0.5, 'temperature': 4.}, False),
    (distillation.embedding_distances, by_image(embedding), {'distance': 'mse'}, False),
    (distillation.embedding_distances, by_image(embedding), {'distance': 'cosine'}, False),
]
ALL = pytest.mark.parametrize('function, loop, options, with_classes', CASES, ids=lambda value: (
    value.__name__ if callable(value) else None if not isinstance(value, dict) else str(value)))


def draw(shape, seed=0, scale=2., dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
            for _ in range(2)]


def with_gradients(function, *tensors, **options):
    """Value, and gradient of a weighted sum by each tensor that has one."""
    value = function(*tensors, **options)
    weights = torch.linspace(1., 2., value.numel(), dtype=value.dtype).view_as(value)
    return value.detach(), *torch.autograd.grad(
        (weights * value).sum(), [x for x in tensors if x.requires_grad], allow_unused=True)


def assert_same(got, want, **tolerances):
    for each, wanted in zip(got, want, strict=True):
        assert (each is None) == (wanted is None)
        if each is not None:
            torch.testing.assert_close(each, wanted, **{'rtol': 1e-9, 'atol': 1e-11, **tolerances})


@ALL
def test_value_and_gradients(function, loop, options, with_classes):
    for seed, shape in enumerate(SHAPES):
        if function is distillation.dist and shape == (1, 2):
            continue  # a class over one image has no correlation
        inputs = draw(shape, seed)
        soft = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)
        for target in (soft.argmax(dim=1), soft):
            classes = [distillation.classes_of(target)] if with_classes else []
            assert_same(with_gradients(function, *inputs, *classes, **options),
                        with_gradients(loop, *inputs, *classes, **options))


@ALL
@pytest.mark.parametrize('num_images', [1, 4])
@pytest.mark.parametrize('kind', ['extreme', 'opposite', 'identical', 'constant'])
def test_finite(function, loop, options, with_classes, num_images, kind):
    signs = torch.tensor([[1., -1., -1.], [-1., -1., 1.], [1., 1., -1.], [-1., 1., -1.]])[:num_images]
    logits, reference = {
        'extreme': (100 * signs, 100 * signs.roll(1, dims=1)),
        'opposite': (100 * signs, -100 * signs),
        'identical': (signs.cumsum(dim=1), signs.cumsum(dim=1)),
        'constant': (torch.ones(num_images, 3), torch.ones(num_images, 3)),
    }[kind]
    logits.requires_grad_()
    classes = [torch.arange(num_images) % 3] if with_classes else []
    value, gradient = with_gradients(function, logits, reference, *classes, **options)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert value.min() >= -1e-5
    follows = function not in (distillation.hard_divergences, distillation.ofa)
    if kind == 'identical' and follows and (function is not distillation.dist or num_images > 1):
        assert value.abs().max() < 1e-5 and gradient.abs().max() < 1e-5


def test_standardized():
    for seed, shape in enumerate([(1, 2), (4, 5)]):
        logits, _ = draw(shape, seed)
        assert_same(with_gradients(distillation.standardized, logits),
                    with_gradients(lambda z: torch.stack([standardized(row) for row in z]), logits))
        scaled = distillation.standardized(5 * logits + 3)
        torch.testing.assert_close(scaled, distillation.standardized(logits), rtol=1e-5, atol=1e-6)
    for extreme in (torch.tensor([[100., -100., -100.]]), torch.ones(1, 3)):
        extreme.requires_grad_()
        assert all(each.isfinite().all() for each in with_gradients(distillation.standardized, extreme))


def test_confidence_weights():
    for temperature in (0.5, 2.):
        logits, reference = draw((6, 4))
        got = distillation.confidence_weights(logits, reference, temperature)
        want = torch.stack([confidence(*rows, temperature) for rows in zip(logits, reference, strict=True)])
        assert_same([got], [want.detach()])
        assert not got.requires_grad
        assert (got[logits.argmax(dim=1) == reference.argmax(dim=1)] == 0.5).all() and (got >= 0.5).all()
    extreme = torch.tensor([[100., -100.]])
    assert distillation.confidence_weights(extreme, -extreme).isfinite().all()


def test_classes_of():
    soft = torch.tensor([[.2, .5, .3], [.6, .2, .2]])
    assert distillation.classes_of(soft).tolist() == [1, 0]
    assert distillation.classes_of(torch.tensor([2, 0])).tolist() == [2, 0]


# Feature maps

def layer_norm(values):
    deviation = torch.sqrt(mean([(v - mean(values)) ** 2 for v in values]) + 1e-5)
    return [(v - mean(values)) / deviation for v in values]


def bins(size, out):
    """The places that each of `out` pooled places covers, of `size`."""
    return [range(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def pooled(plane, size):
    """Means over the bins of one channel (h, w)."""
    return [[mean([plane[y, x] for y in rows for x in columns]) for columns in bins(plane.shape[1], size[1])]
            for rows in bins(plane.shape[0], size[0])]


def stretched(plane, size):
    """One channel (h, w) at the centres of a larger grid, bilinearly, the border repeated."""
    def places(old, new):
        found = []
        for i in range(new):
            place = min(max((i + 0.5) * old / new - 0.5, 0.), old - 1.)
            low = min(math.floor(place), old - 1)
            found.append((low, min(low + 1, old - 1), place - low))
        return found
    return [[
        (1 - v) * ((1 - u) * plane[top, left] + u * plane[top, right])
        + v * ((1 - u) * plane[bottom, left] + u * plane[bottom, right])
        for left, right, u in places(plane.shape[1], size[1])] for top, bottom, v in places(plane.shape[0], size[0])]


def map_distances(maps, reference, norm='batch', grid='smaller'):
    sizes = [tuple(maps.shape[2:]), tuple(reference.shape[2:])]
    size = (min if grid == 'smaller' else max)(sizes, key=math.prod)
    resize = pooled if grid == 'smaller' else stretched
    both = [[[resize(plane, size) for plane in image] for image in each] for each in (maps, reference)]  # by n, d, y, x
    places = [(y, x) for y in range(size[0]) for x in range(size[1])]
    images, channels = range(len(maps)), range(maps.shape[1])
    if norm == 'batch':
        led = both[1]
        for k in channels:
            values = iter(layer_norm([led[i][k][y][x] for i in images for y, x in places]))
            for i in images:
                led[i][k] = [[next(values) for _ in range(size[1])] for _ in range(size[0])]
    distances = []
    for i in images:
        total = 0.
        for y, x in places:
            own, followed = ([each[i][k][y][x] for k in channels] for each in both)
            if norm == 'layer':
                own, followed = layer_norm(own), layer_norm(followed)
            total = total + sum((u - v) ** 2 for u, v in zip(own, followed, strict=True))
        distances.append(total / (len(places) * len(channels)))
    return torch.stack(distances)


@pytest.mark.parametrize('grid', ['smaller', 'larger'])
@pytest.mark.parametrize('norm', ['batch', 'layer', 'none'])
def test_map_distances(norm, grid):
    sizes = [((2, 2), (2, 2)), ((2, 3), (4, 6)), ((3, 3), (2, 2)), ((4, 2), (2, 1)), ((4, 4), (3, 3))]
    for seed, (size, led) in enumerate(sizes):
        maps, _ = draw((2, 3, *size), seed)
        _, reference = draw((2, 3, *led), seed + 100)
        assert_same(with_gradients(distillation.map_distances, maps, reference, norm=norm, grid=grid),
                    with_gradients(map_distances, maps, reference, norm=norm, grid=grid), rtol=1e-8)
    for size in ((2, 2), (1, 1)):
        one = torch.full((1, 3, *size), 100., requires_grad=True)
        value, gradient = with_gradients(distillation.map_distances, one, one.detach() * 2, norm=norm, grid=grid)
        assert value.isfinite().all() and gradient.isfinite().all()
