"""Models of every file of timm.models as a branch: values against the bare model, shapes over the whole registry."""
import contextlib
import copy
import re
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn as nn

from timm_vpl import PairWrapper
from timm_vpl.engine.build import size_kwargs

NUM_CLASSES = 10
MODULES = timm.list_modules()  # the files of timm.models that register models

# Models that can't be a branch, with the reason: encoders that return features and were built without a classifier.
NO_CLASSIFIER = r'has no get_classifier\(\), a branch is a timm model or has its methods'
EXCEPTIONS = {
    'deepseek_vit_412m_enc': NO_CLASSIFIER,
    'gemma4_vit_167m_enc': NO_CLASSIFIER,
    'gemma4_vit_570m_enc': NO_CLASSIFIER,
    'mobilenetv5_300m_enc': NO_CLASSIFIER,
    'qwen3_vit_88m_enc': NO_CLASSIFIER,
    'qwen3_vit_306m_enc': NO_CLASSIFIER,
    'qwen3_vit_416m_enc': NO_CLASSIFIER,
}
WORKING = 1340  # at least so many of the models must be able to


class Case(NamedTuple):
    """A small model, its images' size, and what else makes it small."""
    name: str
    size: int = 64
    kwargs: dict = {}


THIN = {'depth': 2, 'embed_dim': 48, 'num_heads': 3}  # a plain transformer of two narrow blocks

# The smallest model of each file of timm.models, larger ones cut down where their arguments allow it.
SMALLEST = {
    'beit': Case('beit_base_patch16_224', 64, THIN),
    'byoanet': Case('eca_botnext26ts_256'),
    'byobnet': Case('test_byobnet'),
    'cait': Case('cait_xxs24_224', 64, {'depth': 2}),
    'coat': Case('coat_tiny'),
    'convit': Case('convit_tiny', 64, {'depth': 2}),
    'convmixer': Case('convmixer_768_32'),
    'convnext': Case('test_convnext'),
    'cpubone': Case('cpubone_nano'),
    'crossvit': Case('crossvit_tiny_240', 240),
    'csatv2': Case('csatv2'),
    'cspnet': Case('cs3darknet_focus_s'),
    'cspnext': Case('cspnext_tiny'),
    'davit': Case('davit_tiny', 64, {'embed_dims': (24, 48, 96, 192)}),
    'deepseek_vit': Case('deepseek_vit_412m', 84, THIN),
    'deit': Case('deit_tiny_patch16_224', 64, {'depth': 2}),
    'densenet': Case('densenet121'),
    'dla': Case('dla46x_c'),
    'dpn': Case('dpn48b'),
    'edgenext': Case('edgenext_xx_small'),
    'efficientformer': Case('efficientformer_l1', 224),
    'efficientformer_v2': Case('efficientformerv2_s0'),
    'efficientnet': Case('test_efficientnet'),
    'efficientvim': Case('efficientvim_m1'),
    'efficientvit_mit': Case('efficientvit_b0'),
    'efficientvit_msra': Case('efficientvit_m0'),
    'eva': Case('eva02_tiny_patch14_224', 56, {'depth': 2}),
    'fasternet': Case('fasternet_t0'),
    'fastvit': Case('fastvit_t8'),
    'focalnet': Case('focalnet_tiny_srf'),
    'gcvit': Case('gcvit_xxtiny'),
    'gemma4_vit': Case('gemma4_vit_167m', 96, {'depth': 2}),
    'ghostnet': Case('ghostnet_050'),
    'hardcorenas': Case('hardcorenas_b'),
    'hgnet': Case('hgnetv2_b0'),
    'hiera': Case('hiera_tiny_224', 64, {'embed_dim': 24}),
    'hieradet_sam2': Case('sam2_hiera_tiny', 64, {'embed_dim': 24}),
    'hrnet': Case('hrnet_w18_small'),
    'iformer': Case('iformer_t'),
    'inception_next': Case('inception_next_atto'),
    'inception_resnet_v2': Case('inception_resnet_v2', 96),
    'inception_v3': Case('inception_v3', 96),
    'inception_v4': Case('inception_v4', 96),
    'lcnetv2': Case('lcnetv2_small'),
    'levit': Case('levit_128s'),
    'lowformer': Case('lowformer_b0'),
    'mambaout': Case('test_mambaout'),
    'maxxvit': Case('test_coatnet'),
    'metaformer': Case('poolformerv2_s12'),
    'mlp_mixer': Case('gmlp_ti16_224'),
    'mobilenetv3': Case('lcnet_035'),
    'mobilenetv5': Case('mobilenetv5_base'),
    'mobilevit': Case('mobilevit_xxs'),
    'mvitv2': Case('mvitv2_tiny'),
    'naflexvit': Case('naflexvit_base_patch16_parfac_gap', 64, THIN),
    'nasnet': Case('nasnetalarge', 96),
    'nest': Case('nest_tiny'),
    'nextvit': Case('nextvit_small'),
    'nfnet': Case('test_nfnet'),
    'pit': Case('pit_ti_224'),
    'pnasnet': Case('pnasnet5large', 96),
    'pvt_v2': Case('pvt_v2_b0'),
    'qwen3_vit': Case('qwen3_vit_88m', 64, {'depth': 2}),
    'rdnet': Case('rdnet_tiny'),
    'regnet': Case('regnetx_002'),
    'repghost': Case('repghostnet_050'),
    'repvit': Case('repvit_m1'),
    'res2net': Case('res2next50'),
    'resnest': Case('resnest14d'),
    'resnet': Case('test_resnet'),
    'resnetv2': Case('resnetv2_18'),
    'rexnet': Case('rexnet_100'),
    'selecsls': Case('selecsls42'),
    'senet': Case('legacy_seresnet18'),
    'sequencer': Case('sequencer2d_s', 56),
    'shvit': Case('shvit_s1'),
    'sknet': Case('skresnet18'),
    'starnet': Case('starnet_s050'),
    'swiftformer': Case('swiftformer_xs'),
    'swin_transformer': Case('swin_tiny_patch4_window7_224', 56, {'embed_dim': 24}),
    'swin_transformer_v2': Case('swinv2_tiny_window8_256', 64, {'embed_dim': 24}),
    'swin_transformer_v2_cr': Case('swinv2_cr_tiny_224', 56, {'embed_dim': 24}),
    'tiny_vit': Case('tiny_vit_5m_224'),
    'tnt': Case('tnt_s_legacy_patch16_224', 64, {'depth': 2}),
    'tresnet': Case('tresnet_m'),
    'twins': Case('twins_svt_small'),
    'vgg': Case('vgg11', 64, {'mlp_ratio': 0.1}),
    'visformer': Case('visformer_tiny'),
    'vision_transformer': Case('test_vit'),
    'vision_transformer_hybrid': Case('vit_tiny_r_s16_p8_224', 64, {'depth': 2}),
    'vision_transformer_relpos': Case('test_vit_relpos'),
    'vision_transformer_sam': Case('samvit_base_patch16_224', 64, THIN | {'global_attn_indexes': (1,)}),
    'vitamin': Case('vitamin_small_224'),
    'volo': Case('volo_d1_224'),
    'vovnet': Case('ese_vovnet19b_slim_dw'),
    'xception': Case('legacy_xception', 96),
    'xception_aligned': Case('xception41p', 96),
    'xcit': Case('xcit_nano_12_p16_224', 64, {'depth': 2}),
}

# More than one head, a head that is more than one layer, other pooling than the file's smallest model.
SPECIAL = [
    Case('caformer_s18'),
    Case('convnextv2_atto'),
    Case('crossvit_9_dagger_240', 240),
    Case('deepseek_vit_412m_align', 84, THIN),
    Case('deit_tiny_distilled_patch16_224', 64, {'depth': 2}),
    Case('efficientvim_m1_dist'),
    Case('levit_conv_128s'),
    Case('mobilenetv3_small_050'),
    Case('naflexvit_base_patch16_map', 64, THIN),
    Case('nf_regnet_b0'),
    Case('pit_ti_distilled_224'),
    Case('qwen3_vit_88m_merge', 64, {'depth': 2}),
    Case('resnet50_clip', 64, {'img_size': 64}),
    Case('resnet50_clip_gap'),
    Case('test_byobnet', 64, {'global_pool': 'catavgmax'}),
    Case('test_maxvit'),
    Case('test_vit', 64, {'global_pool': 'avg'}),
    Case('test_vit', 64, {'global_pool': 'map'}),
    Case('test_vit4'),
]

LARGER = [Case('halonet_h1', 256), Case('efficientvit_b1'), Case('vit_tiny_patch16_224', 224), Case('resnet18', 224)]
SLOW = {  # the smallest models that take longest
    'convmixer', 'inception_resnet_v2', 'inception_v3', 'inception_v4', 'mobilenetv5', 'nasnet', 'nextvit', 'pnasnet',
    'rdnet', 'res2net', 'selecsls', 'tresnet', 'xception', 'xception_aligned'}


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
        (logits, embed, dist_logits), drawn_in_pair = seeded(pair.run, 'a', x)
        assert want.shape == (2, NUM_CLASSES) and torch.isfinite(want).all() and want.std() > 0
        assert torch.equal(logits, want) and dist_logits is None and torch.equal(drawn, drawn_in_pair)
        assert embed.shape == (2, branch.embed_dim) and embed.std() > 0
        with first_head_alone(bare) as changed, first_head_alone(branch.model):
            if changed:
                want, _ = seeded(bare, x)
                (logits, embed, dist_logits), _ = seeded(pair.run, 'a', x)
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
    assert branch._tap.inputs == [] and not branch._tap.on


def slow_params(modules):
    return [pytest.param(module, marks=pytest.mark.slow) if module in SLOW else module for module in modules]


def name_of(case):
    return '-'.join([case.name, *map(str, case.kwargs.values())])


@pytest.mark.parametrize('module', slow_params(MODULES))
def test_values(module):
    check_values(case_of(module))


@pytest.mark.parametrize('case', SPECIAL, ids=name_of)
def test_values_of_special_heads(case):
    if not timm.is_model(case.name):
        pytest.skip(f'this timm has no {case.name}')
    check_values(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    'case', [*(case for case in SMALLEST.values() if case.kwargs), *LARGER], ids=lambda case: case.name)
def test_values_of_whole_models(case):
    if not timm.is_model(case.name):
        pytest.skip(f'this timm has no {case.name}')
    check_values(Case(case.name, case.size))


# the whole registry, on no device: shapes


def on_meta(name):
    """Run a model of the registry as a branch on images of its own size; return the shapes and what they should be."""
    with torch.device('meta'), torch.no_grad():
        model = timm.create_model(name, num_classes=NUM_CLASSES)
        pair = PairWrapper(model, None).eval()
        size = model.pretrained_cfg.get('input_size', (3, 224, 224))
        logits, embed, _ = pair.run('a', torch.zeros(2, *size))
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


def test_almost_all_models_can_be_a_branch():
    # With test_registry, which holds the others to work.
    names = timm.list_models()
    assert len(set(names) - set(EXCEPTIONS)) >= WORKING
    assert sum(len(timm.list_models(module=module)) for module in MODULES) == len(names)
    for name in set(EXCEPTIONS) & set(names):
        with torch.device('meta'):
            model = timm.create_model(name, num_classes=NUM_CLASSES)
        with pytest.raises(ValueError, match=EXCEPTIONS[name]):
            PairWrapper(model, None)
