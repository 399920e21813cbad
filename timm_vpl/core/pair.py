"""Two networks as one module: each runs once on the same images and gives its logits and its embedding."""
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.optim import auto_group_layers

from .inputs import InputTransform
from .names import SIDES


class PairOutput(NamedTuple):
    """What a pair computes from one batch.

    Shapes: logits (N, C), embeddings (N, d) with one d for both branches. A branch that is absent or an embedding
    that was not asked for is None.
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


class Tap:
    """Keeps what reaches a model's last layers while it is on. It does not hold the model, so both can be copied."""

    def __init__(self):
        self.on = False
        self.inputs: list[torch.Tensor] = []

    def take(self, module, args):
        """Keep the input of a layer, as its forward pre-hook."""
        if self.on:
            self.inputs.append(args[0])


class Branch(nn.Module):
    """One network of a pair as a function of images: (logits, embedding, logits of a second head or None).

    The embedding is 'the input feature of the last fully connected layer' (VPL, 'Two Branches'), (N, d), taken by a
    forward pre-hook on that layer: one forward, no second pass through the head. Where several layers classify
    together (CrossViT, EfficientViM), their sum is one layer on their joined inputs, which are the embedding. Not part
    of any state_dict: it holds the model, the pair owns it.

    Raises:
        ValueError: The model has no classifier whose input could be the embedding.
    """

    def __init__(self, model: nn.Module, side: str):
        super().__init__()
        self.model = model
        self.side = side
        self.memory_format = None  # set to torch.channels_last to convert this branch's input
        self._compiled = None
        self._tap = Tap()
        self.tap_classifier()

    def tap_classifier(self) -> None:
        """Hook the model's last layers, at construction and again after a classifier was replaced."""
        self.heads = classifiers_of(self.model, f'model_{self.side}')
        self.layers = [_last_layer(classifier) for classifier in _first_head(self.model.get_classifier())]
        # CLIP's attention pooling classifies each token and keeps the first.
        self._keeps_first = any(
            getattr(module, 'proj', None) is self.layers[0] and getattr(module, 'pool_type', None) == 'token'
            for module in self.model.modules())
        for layer in self.layers:
            layer.register_forward_pre_hook(self._tap.take)

    @property
    def classifier(self) -> nn.Module:
        """The last fully connected layer, the first of several."""
        return self.layers[0]

    @property
    def embed_dim(self) -> int:
        """Width of the embedding."""
        widths = [getattr(layer, 'in_features', None) or getattr(layer, 'in_channels', None) for layer in self.layers]
        width = sum(widths) if None not in widths else getattr(self.model, 'head_hidden_size', None)
        if width is None:
            raise ValueError(
                f'model_{self.side} ({type(self.model).__name__}): the width of its embedding is not known, its '
                f'classifier ({type(self.classifier).__name__}) has no in_features and the model no head_hidden_size')
        return width

    @property
    def interface(self) -> tuple[int, int | None]:
        """Width of the embedding and number of classes: what a partner has to fit."""
        return self.embed_dim, getattr(self.model, 'num_classes', None)

    def _forward(self, input):
        if self.memory_format is not None:
            input = input.contiguous(memory_format=self.memory_format)
        self._tap.on = True
        try:
            output = self.model(input)
        finally:
            taps, self._tap.inputs, self._tap.on = self._tap.inputs, [], False
        logits, dist_logits = output if isinstance(output, (tuple, list)) else (output, None)
        return logits, self._embedding(taps), dist_logits

    def _embedding(self, taps):
        if len(taps) != len(self.layers):
            raise ValueError(
                f'model_{self.side} ({type(self.model).__name__}): of its {len(self.layers)} last layer(s) {len(taps)} '
                f'ran, the embedding is the input of each; use a model that classifies in each forward')
        embeds = [self._flat(tap) for tap in taps]
        return embeds[0] if len(embeds) == 1 else torch.cat(embeds, dim=1)

    def _flat(self, tap):
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

    def forward(self, input):
        return (self._forward if self._compiled is None else self._compiled)(input)

    def compile(self, **kwargs) -> None:
        """Compile this branch with torch.compile(**kwargs); a deep copy starts uncompiled."""
        # Dynamo limits its cache entries per code object. A code object of its own for each branch keeps two branches
        # with several shapes and modes each below that limit.
        function = type(self)._forward
        own = types.FunctionType(function.__code__.replace(co_name=f'forward_{self.side}'), function.__globals__)
        self._compiled = torch.compile(types.MethodType(own, self), **kwargs)

    def __getstate__(self):
        return {**super().__getstate__(), '_compiled': None}


class PairWrapper(nn.Module):
    """Two image classifiers as one module, by convention a CNN (a) and a vision transformer (b).

    `pair(x)` maps images (N, C, H, W) to a `PairOutput`. A branch's logits are those of the bare model. Where the
    embeddings' widths differ, one affine layer P on `affine_side` maps that side's to the other's width (VPL, 'Two
    Branches'). One of the models may be None (training alone).

    Args:
        model_a: Model with `get_classifier()`, as timm's have it. A model that is assigned later runs in its place.
        model_b: Likewise.
        affine_side: Side of the affine layer, 'a' or 'b' (not given in the paper).
        partner_dim: Width of the embedding of a partner that is not part of the pair, such as a frozen teacher; the
            affine layer is then on the side that there is.
        affine: Whether embeddings are compared; without that there is no affine layer.

    Raises:
        ValueError: No model, different numbers of classes, or a model that has no embedding.
    """

    def __init__(
            self,
            model_a: nn.Module | None,
            model_b: nn.Module | None,
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
        self.affine = None
        self._resting: list[nn.Module] = []  # frozen layers with running statistics
        self.inputs = nn.ModuleDict()  # InputTransform of each side whose images the loader prepares for the other
        # Not submodules: the state_dict holds model_a, model_b and the affine layer, each once.
        self._branches: dict[str, Branch] = {
            side: Branch(model, side) for side, model in (('a', model_a), ('b', model_b)) if model is not None}
        if len(self.sides) == 2:
            classes = [getattr(model, 'num_classes', None) for model in (model_a, model_b)]
            if classes[0] != classes[1]:
                raise ValueError(f'the branches classify {classes[0]} (a) and {classes[1]} (b) classes, expected equal')
            partner_dim = self.parts['a' if affine_side == 'b' else 'b'].embed_dim
        elif partner_dim is not None:
            [self.affine_side] = self.sides
        if affine and partner_dim is not None and self.parts[self.affine_side].embed_dim != partner_dim:
            self.affine = nn.Linear(self.parts[self.affine_side].embed_dim, partner_dim)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ('model_a', 'model_b') and '_branches' in self.__dict__:
            side = name[-1]
            if side not in self._branches:
                raise ValueError(f'{name}: the pair was built without it, build a new PairWrapper')
            branch = Branch(value, side)  # a new one: who wrapped the old one can tell
            branch.memory_format = self._branches[side].memory_format
            if len(self.parts) > 1 and (got := branch.interface) != (want := self._branches[side].interface):
                raise ValueError(
                    f'{name} ({type(value).__name__}) has embeddings of width {got[0]} and {got[1]} classes, the pair '
                    f'was built for {want[0]} and {want[1]}: build a new PairWrapper')
            self._branches[side] = branch
        super().__setattr__(name, value)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What runs, by name: the branches and the affine layer."""
        return self._branches if self.affine is None else {**self._branches, 'affine': self.affine}

    @property
    def sides(self):
        """The branches that are present, ('a', 'b') or one of them."""
        return tuple(side for side in SIDES if side in self._branches)

    def branch(self, side: str) -> nn.Module:
        """Return the model of a side."""
        return self.parts[side].model

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

    def images(self, side: str, input: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a branch's images: from those that the loader gives for all, or its own of those by side."""
        if isinstance(input, dict):
            return input[side]
        return self.inputs[side](input) if side in self.inputs else input

    def run(self, name: str, input: torch.Tensor):
        """Run one part ('a', 'b' or 'affine') on its input."""
        return self.parts[name](input)

    def forward(
            self,
            input: torch.Tensor | dict[str, torch.Tensor],
            project: bool = True,
            run: Callable | None = None,
    ) -> PairOutput:
        """Run both branches on the same images.

        Args:
            input: Images (N, C, H, W); or, by side, the same images prepared for each branch.
            project: Compute the affine side's embedding too (else None): not needed while no term uses it.
            run: Replaces `self.run`, for instance to run each part in its DistributedDataParallel.
        """
        run = run or self.run
        fields = {'logits_a': None, 'logits_b': None}
        for side in self.sides:
            fields[f'logits_{side}'], fields[f'embed_{side}'], fields[f'dist_logits_{side}'] = run(
                side, self.images(side, input))
        if self.affine is not None:
            side = self.affine_side
            embed = fields.pop(f'embed_{side}')
            if project:
                # One call serves both: the rows with and those without a gradient into the branch.
                both = run('affine', torch.cat([embed, embed.detach()]))
                fields[f'embed_{side}'], fields[f'stopped_{side}'] = both.chunk(2)
        return PairOutput(**fields)

    def extra_repr(self):
        return '' if self.affine is None else f'affine_side={self.affine_side!r}'

    # What timm's tools ask of a model. Each answer gives every parameter what it would get in its branch alone.

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the branches."""
        return getattr(self.branch(self.sides[0]), 'num_classes', None)

    @property
    def pretrained_cfg(self) -> dict:
        """Data configuration of the first branch, for timm.data.resolve_data_config."""
        return getattr(self.branch(self.sides[0]), 'pretrained_cfg', {})

    default_cfg = pretrained_cfg

    def get_classifier(self):
        """Return the branches' classifiers."""
        return tuple(self.branch(side).get_classifier() for side in self.sides)

    def reset_classifier(self, num_classes: int, *args, **kwargs) -> None:
        """Replace the classifier of each branch."""
        for side in self.sides:
            self.branch(side).reset_classifier(num_classes, *args, **kwargs)
            self.parts[side].tap_classifier()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing in both branches."""
        for side in self.sides:
            self.branch(side).set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set:
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


def classifiers_of(model: nn.Module, name: str = 'the model') -> list[nn.Module]:
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


def _leaves(classifier) -> list:
    """Return the classifiers in what get_classifier() returns, which may be several, or lists of such."""
    if isinstance(classifier, (tuple, list, nn.ModuleList)):
        return [leaf for item in classifier for leaf in _leaves(item)]
    return [classifier]


def _first_head(classifier) -> list[nn.Module]:
    """Return the classifiers of the first head: that of the class token, where there is one of a distillation token."""
    while isinstance(classifier, (tuple, list)):
        classifier = classifier[0]
    return list(classifier) if isinstance(classifier, nn.ModuleList) else [classifier]


def _last_layer(classifier: nn.Module) -> nn.Module:
    """Return the last fully connected layer of a classifier, or the classifier where none can be told."""
    if hasattr(classifier, 'head_dist'):  # RepViT's, with a second head inside
        classifier = classifier.head
    layers = [module for module in classifier.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return layers[-1] if layers else classifier


def _layers_of(model, coarse):
    """Map a model's parameter names to layer numbers as timm's layer decay does."""
    if hasattr(model, 'group_matcher'):
        return group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    return auto_group_layers(model)
