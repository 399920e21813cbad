"""Models of every file of timm.models as a branch: values against the bare model, shapes over the whole registry."""
import contextlib
import copy
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn as nn
import yaml

from timm_vpl import PairWrapper
from timm_vpl.engine.models import size_kwargs

NUM_CLASSES = 10
MODULES = timm.list_modules()  # the files of timm.models that register models

# Models that can't be a branch, with the reason: encoders that return features and were built without a classifier.
NO_CLASSIFIER = r'has no get_classifier\(\), a branch is a timm model or has its methods'
EXCEPTIONS = dict.fromkeys([
    'deepseek_vit_412m_enc', 'gemma4_vit_167m_enc', 'gemma4_vit_570m_enc', 'mobilenetv5_300m_enc', 'qwen3_vit_88m_enc',
    'qwen3_vit_306m_enc', 'qwen3_vit_416m_enc'], NO_CLASSIFIER)


class Case(NamedTuple):
    """A small model, its images' size, and what else makes it small."""
    name: str
    size: int = 64
    kwargs: dict = {}


TABLES = yaml.safe_load(Path(__file__).with_name('registry.yaml').read_text())
SMALLEST = {module: Case(*row) for module, row in TABLES['smallest'].items()}
SPECIAL = [Case(*row) for row in TABLES['special']]


def case_of(module):
    """The small model of a file: from the table; of a file that is new to it, the one with the fewest weights."""
    case = SMALLEST.get(module)
    names = [name for name in timm.list_models(module=module) if name not in EXCEPTIONS]
    if case is None or case.name not in names:
        with torch.device('meta'):
            name = min(names, key=lambda name: sum(p.numel() for p in timm.create_model(name).parameters()))
        case = Case(name, timm.get_pretrained_cfg(name).input_size[-1])
    return case


def create(case):
    """The model, with dropout and stochastic depth where it takes them, and nothing in its head or scales at zero."""
    cfg = timm.get_pretrained_cfg(case.name).to_dict()
    kwargs = {**size_kwargs(cfg, (3, case.size, case.size)), **case.kwargs}
    torch.manual_seed(0)
    for rates in ({'drop_rate': 0.2, 'drop_path_rate': 0.2}, {'drop_rate': 0.2}, {}):
        try:
            model = timm.create_model(case.name, num_classes=NUM_CLASSES, **kwargs, **rates)
            break
        except TypeError as e:
            if not re.search('unexpected keyword argument.*drop', str(e)):
                raise
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or NUM_CLASSES in parameter.shape:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def seeded(function, *args):
    """Run with a fresh generator; return the result and the generator's state after it."""
    torch.manual_seed(2)
    return function(*args), torch.get_rng_state()


def has_distillation_head(model):
    return any('_dist.' in name for name, _ in model.named_parameters())


@contextlib.contextmanager
def first_head_alone(model):
    """Let a model of several heads give their logits one by one, in training; yield whether it did not before."""
    auxiliary = getattr(model, 'aux_head', None)  # VOLO's: adds the best of each class over the patches
    if auxiliary is not None:
        model.aux_head = None
        yield True
        model.aux_head = auxiliary
    elif has_distillation_head(model):
        model.set_distilled_training(True)
        yield True
        model.set_distilled_training(False)
    else:
        yield False


def from_embedding(branch, embed):
    """Logits of the first head, from the embedding: of its last layer, or of several their mean or weighted sum."""
    widths = [getattr(layer, 'in_features', None) or layer.in_channels for layer in branch.layers]
    outputs = [
        layer(part[:, :, None, None]).flatten(1) if isinstance(layer, nn.Conv2d) else layer(part)
        for layer, part in zip(branch.layers, embed.split(widths, dim=1), strict=True)]
    if len(outputs) == 1:
        return outputs[0]
    weights = getattr(branch.model, 'weights', None)  # EfficientViM's; CrossViT has the mean
    weights = torch.ones(len(outputs)) / len(outputs) if weights is None else weights.softmax(dim=-1)
    return sum(weight * output for weight, output in zip(weights, outputs, strict=True))


@torch.no_grad()
def check_values(case):
    """Compare a branch with the bare model, in evaluation and in training."""
    bare = create(case)
    pair = PairWrapper(copy.deepcopy(bare), None)
    branch = pair.parts['a']
    x = torch.randn(2, 3, case.size, case.size, generator=torch.Generator().manual_seed(1))
    for mode in (False, True):
        bare.train(mode)
        pair.train(mode)
        want, drawn = seeded(bare, x)
        (logits, embed, dist_logits, _), drawn_in_pair = seeded(pair.run, 'a', x)
        assert want.shape == (2, NUM_CLASSES) and torch.isfinite(want).all() and want.std() > 0
        assert torch.equal(logits, want) and dist_logits is None and torch.equal(drawn, drawn_in_pair)
        assert embed.shape == (2, branch.embed_dim) and embed.std() > 0
        with first_head_alone(bare) as changed, first_head_alone(branch.model):
            if changed:
                want, _ = seeded(bare, x)
                (logits, embed, dist_logits, _), _ = seeded(pair.run, 'a', x)
            if isinstance(want, tuple):
                assert torch.equal(dist_logits, want[1])
                want = want[0]
            elif has_distillation_head(bare):
                assert not mode  # in evaluation always the mean of two heads
                continue
            assert torch.equal(logits, want)
            if len(branch.layers) == 1 and not branch._keeps_first:
                assert torch.equal(from_embedding(branch, embed), logits)
            else:  # another order of additions
                torch.testing.assert_close(from_embedding(branch, embed), logits, rtol=1e-4, atol=1e-4)
    for (key, value), other in zip(bare.state_dict().items(), branch.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), key  # BatchNorm's statistics moved as in the bare model
    assert branch._tap.kept == [] and not branch._tap.on


def name_of(case):
    return '-'.join([case.name, *map(str, case.kwargs.values())])


def marks(name):
    return [pytest.mark.slow] if name in TABLES['slow'] else []


@pytest.mark.parametrize('module', [pytest.param(module, marks=marks(module)) for module in MODULES])
def test_values(module):
    check_values(case_of(module))


@pytest.mark.parametrize('case', [pytest.param(case, id=name_of(case), marks=marks(case.name)) for case in SPECIAL])
def test_values_of_special_heads(case):
    if not timm.is_model(case.name):
        pytest.skip(f'this timm has no {case.name}')
    check_values(case)


# the whole registry, on no device: shapes


def on_meta(name):
    """Run a model of the registry as a branch on images of its own size; return the shapes and what they should be."""
    with torch.device('meta'), torch.no_grad():
        model = timm.create_model(name, num_classes=NUM_CLASSES)
        pair = PairWrapper(model, None).eval()
        size = model.pretrained_cfg.get('input_size', (3, 224, 224))
        logits, embed, *_ = pair.run('a', torch.zeros(2, *size))
    return (logits.shape, embed.shape), ((2, NUM_CLASSES), (2, pair.parts['a'].embed_dim))


@pytest.mark.slow
@pytest.mark.parametrize('module', MODULES)
def test_registry(module):
    failed = {}
    for name in timm.list_models(module=module):
        try:
            got, want = on_meta(name)
        except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
            failed[name] = f'{type(e).__name__}: {e}'
            continue
        assert got == want, name
    assert set(failed) == {name for name in EXCEPTIONS if name in timm.list_models(module=module)}, failed
    for name, message in failed.items():
        assert re.search(EXCEPTIONS[name], message), (name, message)
