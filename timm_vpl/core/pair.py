"""Two networks as one module: each runs once on the same images and gives its logits and its embedding."""
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch.utils.hooks import RemovableHandle

from ..compat import compile_apart
from .features import EMBED, as_map, find_module
from .inputs import InputTransform
from .names import SIDES, partner_of

Model: TypeAlias = Any  # an nn.Module with the methods of timm's models, which nn.Module's type does not know
Images: TypeAlias = torch.Tensor | dict[str, torch.Tensor]  # (N, C, H, W); or by side, one batch prepared for each
Features: TypeAlias = dict[str, torch.Tensor] | None
BranchOutput: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Features]


class PairOutput(NamedTuple):
    """What a pair computes from one batch.

    Shapes: logits (N, C), embeddings (N, d) with one d for both branches. A branch that is absent or an embedding
    that was not asked for is None.

    Examples:
        >>> output = PairOutput(logits_a=torch.zeros(2, 10), logits_b=torch.zeros(2, 10))
        >>> output.logits_b.shape, output.embed_b
        (torch.Size([2, 10]), None)
    """
    logits_a: torch.Tensor | None
    logits_b: torch.Tensor | None
    embed_a: torch.Tensor | None = None
    embed_b: torch.Tensor | None = None
    dist_logits_a: torch.Tensor | None = None  # second head of a branch that has one, in distilled training
    dist_logits_b: torch.Tensor | None = None
    stopped_a: torch.Tensor | None = None  # embed_a as P(stop_gradient(h_a)), where the affine layer P is on side a
    stopped_b: torch.Tensor | None = None
    sample_ids: torch.Tensor | None = None  # (N,) int64, equal for copies of one image (repeated augmentation)
    features_a: Features = None  # those that were asked for (`PairWrapper.tap`), maps (N, d, h, w)
    features_b: Features = None
    logits_teacher: torch.Tensor | None = None  # of a frozen teacher beside a pair
    embed_teacher: torch.Tensor | None = None
    features_teacher: Features = None


class Tap:
    """Records inputs and outputs of a model's layers while it is on; it does not hold the model."""

    def __init__(self) -> None:
        self.on = False
        self.kept: list[Any] = []
        self.version = 0  # of the last output, which changes with an in-place operation

    def take(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Keep the input of a layer, as its forward pre-hook."""
        if self.on:
            self.kept.append(args[0])

    def take_output(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        """Keep the output of a layer, as its forward hook."""
        if self.on:
            self.kept.append(output)
            self.version = _version(output)

    def release(self) -> list[Any]:
        """Return what was kept, and turn off."""
        kept, self.kept, self.on = self.kept, [], False
        return kept


def _version(output: Any) -> int:
    """Return how often a tensor was changed in place, 0 where torch does not know."""
    if torch.compiler.is_compiling() or not isinstance(output, torch.Tensor) or output.is_inference():
        return 0
    return output._version


class Branch(nn.Module):
    """One network of a pair as a function of images: (logits, embedding, logits of a second head or None, features).

    The embedding is 'the input feature of the last fully connected layer' (VPL, 'Two Branches'), (N, d), taken by a
    forward pre-hook on that layer: one forward, no second pass through the head. Where several layers classify
    together (CrossViT, EfficientViM), their sum is one layer on their joined inputs, which are the embedding. Not part
    of any state_dict: it holds the model, the pair owns it.

    Raises:
        ValueError: The model has no classifier whose input could be the embedding.
    """

    def __init__(self, model: Model, side: str, teaches: bool = False):
        super().__init__()
        self.model = model
        self.side = side
        self.layers: list[nn.Module] = []
        self._teaches = teaches  # so that it may have no classifier
        self.memory_format: torch.memory_format | None = None  # torch.channels_last converts this branch's input
        self._tap = Tap()
        self._features: dict[str, Tap] = {}  # of the features that are asked for
        self._handles: list[RemovableHandle] = []
        self._compiled: dict[str, Any] | None = None  # what it was compiled with
        self.tap_classifier()

    def tap_classifier(self) -> None:
        """Hook the model's last layers, at construction and again after a classifier was replaced."""
        if self._teaches and not self.classifies:
            return
        self.heads = classifiers_of(self.model, f'model_{self.side}')
        self.layers = [_last_layer(classifier) for classifier in _first_head(self.model.get_classifier())]
        # CLIP's attention pooling classifies each token and keeps the first.
        self._keeps_first = any(
            getattr(module, 'proj', None) is self.layers[0] and getattr(module, 'pool_type', None) == 'token'
            for module in self.model.modules())
        for layer in self.layers:
            layer.register_forward_pre_hook(self._tap.take)

    def tap(self, names: Sequence[str]) -> None:
        """Let each forward give these features and no others: 'stage1' to 'stage4', 'embed', or names of modules.

        Raises:
            ValueError: The model has no such feature.
        """
        if tuple(self._features) == tuple(names):
            return
        modules = {name: find_module(self.model, name, f'model_{self.side}') for name in names if name != EMBED}
        for handle in self._handles:
            handle.remove()
        self._features = {name: Tap() for name in names}
        self._handles = [
            module.register_forward_hook(self._features[name].take_output) for name, module in modules.items()]
        if self._compiled is not None:
            self.compile(**self._compiled)  # torch.compile does not notice new or removed hooks

    @property
    def classifies(self) -> bool:
        """Whether the model has a classifier, as timm's have it."""
        return hasattr(self.model, 'get_classifier') and getattr(self.model, 'num_classes', None) != 0

    @property
    def classifier(self) -> nn.Module:
        """The last fully connected layer, the first of several."""
        return self.layers[0]

    @property
    def embed_dim(self) -> int:
        """Width of the embedding."""
        widths: list[Any] = [
            getattr(layer, 'in_features', None) or getattr(layer, 'in_channels', None) for layer in self.layers]
        width: int | None = sum(widths) if widths and all(widths) else getattr(self.model, 'head_hidden_size', None)
        if width is None:
            raise ValueError(
                f'model_{self.side} ({type(self.model).__name__}): the width of its embedding is not known, its '
                f'classifier has no in_features and the model no head_hidden_size')
        return width

    @property
    def interface(self) -> tuple[int, int | None]:
        """Width of the embedding and number of classes: what a partner has to fit."""
        return self.embed_dim, getattr(self.model, 'num_classes', None)

    def _embedding(self, taps: list[torch.Tensor]) -> torch.Tensor:
        if len(taps) != len(self.layers):
            raise ValueError(
                f'model_{self.side} ({type(self.model).__name__}): {len(taps)} of its {len(self.layers)} last layer(s) '
                f'ran, but the embedding is the input of all of them; use a model that runs them in each forward')
        embeds = [self._flat(tap) for tap in taps]
        return embeds[0] if len(embeds) == 1 else torch.cat(embeds, dim=1)

    def _flat(self, tap: torch.Tensor) -> torch.Tensor:
        """Return the input of a last layer as (N, d)."""
        if tap.ndim == 4 and tap.shape[-2:] == (1, 1):
            return tap.flatten(1)  # a convolution of pooled features
        if tap.ndim == 3 and self._keeps_first:
            return tap[:, 0]
        if tap.ndim != 2:
            raise ValueError(
                f'model_{self.side} ({type(self.model).__name__}): its last layer got an input of shape '
                f'{tuple(tap.shape)}, an embedding is (N, d); use a model that pools before it classifies')
        return tap

    def forward(self, input: torch.Tensor) -> BranchOutput:
        if self.memory_format is not None:
            input = input.contiguous(memory_format=self.memory_format)
        taps = [self._tap, *self._features.values()]
        for tap in taps:
            tap.on = True
        try:
            output = self.model(input)
        finally:
            inputs, *outputs = [tap.release() for tap in taps]
        logits, dist_logits = output if isinstance(output, (tuple, list)) else (output, None)
        embed: torch.Tensor | None = None
        if self.layers:
            embed = self._embedding(inputs)
        elif hasattr(self.model, 'get_classifier'):
            logits, embed = None, logits
        for name, tap, kept in zip(self._features, taps[1:], outputs, strict=True):
            if kept and _version(kept[-1]) != tap.version:
                raise ValueError(
                    f'model_{self.side}: the layer after {name!r} changes its output in place; name that layer instead')
        features: dict[str, Any] = {
            name: embed if name == EMBED else as_map(self.model, name, kept, (input.shape[-2], input.shape[-1]))
            for name, kept in zip(self._features, outputs, strict=True)}
        return logits, embed, dist_logits, features or None

    def compile(self, **kwargs: Any) -> None:
        """Compile this branch with torch.compile(**kwargs); a copy starts uncompiled."""
        self._compiled = kwargs
        compile_apart(self, f'forward_{self.side}', **kwargs)


class PairWrapper(nn.Module):
    """Two image classifiers as one module, by convention a CNN (a) and a vision transformer (b).

    `pair(x)` maps images (N, C, H, W) to a `PairOutput`. A branch's logits are those of the bare model. Where the
    embeddings' widths differ, one affine layer P on `affine_side` maps that side's to the other's width (VPL, 'Two
    Branches'). One of the models may be None (training alone).

    Args:
        model_a: Model with `get_classifier()`, as timm's have it. A model that is assigned later replaces it.
        model_b: Likewise.
        affine_side: Side of the affine layer, 'a' or 'b' (not given in the paper).
        partner_dim: Width of the embedding of a partner that is not part of the pair, such as a frozen teacher; the
            affine layer is then on the side of the only branch.
        affine: Whether embeddings are compared; without that there is no affine layer.

    Raises:
        ValueError: No model, different numbers of classes, or a model that has no embedding.

    Examples:
        >>> pair = PairWrapper(timm.create_model('test_resnet'), timm.create_model('test_vit', img_size=64))
        >>> output = pair(torch.randn(2, 3, 64, 64))
        >>> output.logits_b.shape, output.embed_a.shape == output.embed_b.shape
        (torch.Size([2, 1000]), True)
        >>> pair.affine, pair.sides
        (Linear(in_features=64, out_features=96, bias=True), ('a', 'b'))
    """

    def __init__(
            self,
            model_a: Model | None,
            model_b: Model | None,
            affine_side: str = 'b',
            partner_dim: int | None = None,
            affine: bool = True,
    ):
        super().__init__()
        if affine_side not in SIDES:
            raise ValueError(f"affine_side is {affine_side!r}, expected 'a' or 'b'")
        if model_a is None and model_b is None:
            raise ValueError('a pair needs at least one model, model_a and model_b are both None')
        self.model_a = model_a
        self.model_b = model_b
        self.affine_side = affine_side
        self.affine: nn.Linear | None = None
        self._resting: list[nn.Module] = []  # frozen layers with running statistics
        self.inputs = nn.ModuleDict()  # InputTransform of each side whose images the loader prepares for the other
        # Not submodules: the state_dict holds model_a, model_b and the affine layer, each once.
        self._branches: dict[str, Branch] = {
            side: Branch(model, side) for side, model in (('a', model_a), ('b', model_b)) if model is not None}
        if len(self.sides) == 2:
            classes = [getattr(model, 'num_classes', None) for model in (model_a, model_b)]
            if classes[0] != classes[1]:
                raise ValueError(f'the branches classify {classes[0]} (a) and {classes[1]} (b) classes, expected equal')
            partner_dim = self._branches[partner_of(affine_side)].embed_dim
        elif partner_dim is not None:
            [self.affine_side] = self.sides
        if affine and partner_dim is not None and self._branches[self.affine_side].embed_dim != partner_dim:
            self.affine = nn.Linear(self._branches[self.affine_side].embed_dim, partner_dim)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ('model_a', 'model_b') and '_branches' in self.__dict__:
            side = name[-1]
            if side not in self._branches:
                raise ValueError(f'{name}: the pair was built without it, build a new PairWrapper')
            branch = Branch(value, side)  # a new object, so that those who wrapped the old one notice
            branch.memory_format = self._branches[side].memory_format
            if len(self.parts) > 1 and (got := branch.interface) != (want := self._branches[side].interface):
                raise ValueError(
                    f'{name} ({type(value).__name__}) has embeddings of width {got[0]} and {got[1]} classes, the pair '
                    f'was built for {want[0]} and {want[1]}: build a new PairWrapper')
            self._branches[side] = branch
        super().__setattr__(name, value)

    @property
    def parts(self) -> dict[str, Any]:
        """What runs, by name: the branches and the affine layer."""
        return {**self._branches, **({} if self.affine is None else {'affine': self.affine})}

    @property
    def sides(self) -> tuple[str, ...]:
        """The branches that are present, ('a', 'b') or one of them."""
        return tuple(side for side in SIDES if side in self._branches)

    def branch(self, side: str) -> Model:
        """Return the model of a side."""
        return self._branches[side].model

    def freeze(self, side: str, depth: int) -> None:
        """Freeze a branch's first layers, with the running statistics of their BatchNorm.

        Args:
            side: 'a' or 'b'.
            depth: Number of layer groups, as timm's `group_matcher(coarse=True)` counts them from the input: the stem
                is the first, then the stages or blocks.

        Raises:
            ValueError: The model has fewer groups before its head.
        """
        model = self.branch(side)
        try:
            layers = _layers_of(model, coarse=True)
        except AssertionError as e:
            raise ValueError(f'model_{side} ({type(model).__name__}) has no coarse layer groups: {e}') from e
        last = max(layers.values())
        if not 0 <= depth <= last:
            raise ValueError(
                f'{depth} layer groups: model_{side} ({type(model).__name__}) has {last} before its head')
        for name, parameter in model.named_parameters():
            if layers.get(name, last) < depth:
                parameter.requires_grad_(False)
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if getattr(module, 'running_var', None) is not None and own and not any(p.requires_grad for p in own):
                self._resting.append(module.eval())

    def train(self, mode: bool = True) -> 'PairWrapper':
        """Set training mode; frozen layers keep their running statistics in it."""
        super().train(mode)
        for module in self._resting:
            module.eval()
        return self

    def set_inputs(self, source: dict[str, Any], targets: dict[str, dict[str, Any]]) -> None:
        """Let each branch have images of its own size and statistics.

        Args:
            source: timm's data configuration of the images that come.
            targets: Data configuration of each branch, by side.
        """
        self.inputs = nn.ModuleDict({
            side: transform for side in self.sides if (transform := InputTransform(source, targets[side]))})

    def images(self, side: str, input: Images) -> torch.Tensor:
        """Return a branch's images: from those that the loader gives for all, or its own of those by side."""
        if isinstance(input, dict):
            return input[side]
        if side not in self.inputs:
            return input
        prepared: torch.Tensor = self.inputs[side](input)
        return prepared

    def alone(self, side: str) -> nn.Sequential:
        """Return one branch as a model of the pair's images, for a loop that validates one: logits come first."""
        return nn.Sequential(*(part[side] for part in (self.inputs, self.parts) if side in part))

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing. timm's script accumulates without reducing (`PairTask.no_sync`) if the model has this method."""
        return contextlib.nullcontext()

    def run(self, name: str, input: torch.Tensor) -> Any:
        """Run one part ('a', 'b' or 'affine') on its input."""
        return self.parts[name](input)

    def forward(
            self,
            input: Images,
            project: bool = True,
            run: Callable[[str, torch.Tensor], Any] | None = None,
    ) -> PairOutput:
        """Run both branches on the same images.

        Args:
            input: Images (N, C, H, W); or, by side, the same images prepared for each branch.
            project: Compute the affine side's embedding too (else None): not needed while no term uses it.
            run: Replaces `self.run`, for instance to run each part in its DistributedDataParallel.
        """
        run = run or self.run
        fields: dict[str, Any] = {'logits_a': None, 'logits_b': None}
        for side in self.sides:
            output = run(side, self.images(side, input))
            fields.update(zip(
                (f'logits_{side}', f'embed_{side}', f'dist_logits_{side}', f'features_{side}'), output, strict=True))
        if self.affine is not None:
            side = self.affine_side
            embed = fields.pop(f'embed_{side}')
            if project:
                # One call serves both: the rows with and those without a gradient into the branch.
                both = run('affine', torch.cat([embed, embed.detach()]))
                fields[f'embed_{side}'], fields[f'stopped_{side}'] = both.chunk(2)
        return PairOutput(**fields)

    def tap(self, features: Mapping[str, Sequence[str]]) -> None:
        """Let each forward give these features of each side, and no others (`Branch.tap`).

        Raises:
            ValueError: A model has no such feature.
        """
        for side in self.sides:
            self._branches[side].tap(features.get(side, ()))

    def compile(self, **kwargs: Any) -> None:
        """Compile each branch with torch.compile, which gets these arguments."""
        for side in self.sides:
            self._branches[side].compile(**kwargs)

    def extra_repr(self) -> str:
        return '' if self.affine is None else f'affine_side={self.affine_side!r}'

    # The methods that timm's tools call. Each parameter gets what it would get in its branch alone.

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the branches."""
        return getattr(self.branch(self.sides[0]), 'num_classes', None)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Data configuration of the first branch, for timm.data.resolve_data_config."""
        return getattr(self.branch(self.sides[0]), 'pretrained_cfg', {})

    default_cfg = pretrained_cfg

    def get_classifier(self) -> tuple[Any, ...]:
        """Return the branches' classifiers."""
        return tuple(self.branch(side).get_classifier() for side in self.sides)

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Replace the classifier of each branch."""
        for side in self.sides:
            self.branch(side).reset_classifier(num_classes, *args, **kwargs)
            self._branches[side].tap_classifier()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing in both branches."""
        for side in self.sides:
            self.branch(side).set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return the names (or patterns) of the parameters that the branches exempt from weight decay."""
        return {
            f'model_{side}.{name}'
            for side in self.sides
            for name in getattr(self.branch(side), 'no_weight_decay', set)()
        }

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from parameter names to layer numbers, the branches aligned at their heads.

        timm scales a layer's learning rate by layer_decay ** (distance from the last layer), so branches of different
        depth keep their own scales only when their last layers have the same number.
        """
        layers = {side: _layers_of(self.branch(side), coarse) for side in self.sides}
        last = max(max(layer_map.values()) for layer_map in layers.values())
        numbers = {}
        for side, layer_map in layers.items():
            shift = last - max(layer_map.values())
            numbers.update({f'model_{side}.{name}': shift + layer for name, layer in layer_map.items()})
        return lambda name: numbers.get(name, last)


def classifiers_of(model: Model, name: str = 'the model') -> list[nn.Module]:
    """Return the classifiers of a model, one for each of its heads.

    Raises:
        ValueError: It has none.
    """
    name = f'{name} ({type(model).__name__})'
    if not hasattr(model, 'get_classifier'):
        raise ValueError(f'{name}: has no get_classifier(), a branch is a timm model or has its methods')
    classifiers = _leaves(model.get_classifier())
    if not isinstance(classifiers[0], nn.Module) or isinstance(classifiers[0], nn.Identity):
        raise ValueError(f'{name}: has no classifier (num_classes=0?), a branch needs one')
    return classifiers


def _leaves(classifier: Any) -> list[nn.Module]:
    """Return the classifiers in what get_classifier() returns, which may be several, or lists of such."""
    if isinstance(classifier, (tuple, list, nn.ModuleList)):
        return [leaf for item in classifier for leaf in _leaves(item)]
    return [classifier]


def _first_head(classifier: Any) -> list[nn.Module]:
    """Return the classifiers of the first head: that of the class token, where there is one of a distillation token."""
    while isinstance(classifier, (tuple, list)):
        classifier = classifier[0]
    return list(classifier) if isinstance(classifier, nn.ModuleList) else [classifier]


def _last_layer(classifier: Model) -> nn.Module:
    """Return the last fully connected layer of a classifier, or the classifier if none is found."""
    if hasattr(classifier, 'head_dist'):  # RepViT's, with a second head inside
        classifier = classifier.head
    layers = [module for module in classifier.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return layers[-1] if layers else classifier


def _layers_of(model: Model, coarse: bool) -> dict[str, int]:
    """Map a model's parameter names to layer numbers as timm's layer decay does."""
    layers: dict[str, int] = (
        group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        if hasattr(model, 'group_matcher') else auto_group_layers(model))
    return layers
