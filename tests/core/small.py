"""Small models and pairs that the tests of this folder share, their images, and comparisons."""
import timm
import torch
from torch import nn

from timm_vpl import PairWrapper

CPU = torch.device('cpu')
SIZE = 32
NUM_CLASSES = 5
DEIT = 'deit_tiny_distilled_patch16_224'
KWARGS = {
    'test_vit': {'img_size': SIZE, 'depth': 2},
    DEIT: {'img_size': SIZE, 'embed_dim': 48, 'depth': 2, 'num_heads': 3},
}


class TinyModel(nn.Module):
    """Not timm's, with what a branch needs: a convolution without BatchNorm, pooled, and a classifier."""

    def __init__(self, num_classes=NUM_CLASSES, width=6, classifier=None):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(3, width, 8, stride=8)
        self.head = nn.Linear(width, num_classes) if classifier is None else classifier

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(torch.tanh(self.stem(x)).mean((2, 3)))


def shake(model):
    """Move all parameters, so that no layer is at zero and each block (and its dropping) shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_model(name, seed=0, num_classes=NUM_CLASSES, **kwargs):
    """A small timm model in which every parameter shows."""
    torch.manual_seed(seed)
    return shake(timm.create_model(name, num_classes=num_classes, **{**KWARGS.get(name, {}), **kwargs}))


def make_pair(name_a='test_resnet', name_b='test_vit', affine_side='b', seed=1, **kwargs):
    """A pair whose branches do not depend on each other; a name may be None."""
    models = [None if name is None else make_model(name, seed + i, **kwargs) for i, name in enumerate((name_a, name_b))]
    torch.manual_seed(seed + 2)
    return PairWrapper(*models, affine_side=affine_side)


def one_branch(side, model):
    """A pair of one model."""
    return PairWrapper(model, None) if side == 'a' else PairWrapper(None, model)


def images(num_images=4, seed=0, dtype=torch.float32):
    """Random images."""
    return torch.randn(num_images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed, function, *args, **kwargs):
    """Call a function with torch's generator at a seed."""
    torch.manual_seed(seed)
    return function(*args, **kwargs)


def clone_state(state):
    """A copy of named tensors, without their graph."""
    return {key: tensor.detach().clone() for key, tensor in state.items()}


def assert_equal_states(got, want):
    """The same names in the same order, and each tensor to the bit."""
    assert list(got) == list(want)
    assert [key for key in want if not torch.equal(got[key], want[key])] == []


def assert_equal_outputs(got, want):
    """Logits and embeddings of two outputs are equal to the bit."""
    assert all(torch.equal(*both) for both in zip(got[:4], want[:4], strict=True))
