"""One model, or two side by side, on the same images, for `predict` and `inspect`."""
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..bars import set_output
from ..core.names import SIDES
from ..core.processes import Processes
from ..engine.device import init_device
from ..engine.evaluate import ensemble
from ..engine.trained import TrainedModel, load_trained
from ..errors import UsageError
from ..options.commands import Forward
from .validate import create_forward, model_classes, prepare


def start_alone(options: Forward) -> Processes:
    """Start a command that runs in one process."""
    set_output(options.quiet, options.no_progress)
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UsageError('this command runs in one process; start it without torchrun')
    return init_device(options.device, options.workers)


def load_sides(options: Forward, sources: Sequence[str]) -> dict[str, TrainedModel]:
    """Load one model or two, ready for their images: of two 'a' and 'b', of one its side, or ''.

    Args:
        options: Options.
        sources: Their sources: a pair, or two models; a branch has averaged weights if these were evaluated.

    Raises:
        UsageError: They are more than two, or differ in channels or number of classes.
    """
    found = [prepare(trained, options) for source in sources for trained in load_trained(source)]
    if len(found) == 1:
        return {found[0].side or '': found[0]}
    if len(found) > 2:
        raise UsageError(
            f'{" ".join(sources)}: contain {len(found)} models; name a pair, or two models (of a pair: its '
            f'export/NAME)')
    numbers = {
        'channels': [trained.data_config['input_size'][0] for trained in found],
        'classes': [trained.model.num_classes for trained in found]}
    for what, (first, second) in numbers.items():
        if first != second:
            raise UsageError(f'{found[1].source}: has {second} {what}, {found[0].source} has {first}')
    return dict(zip(SIDES, found, strict=True))


def _class_order(models: dict[str, TrainedModel], names: dict[int, str], classes: Sequence[str]) -> list[int] | None:
    """Return the second model's index of each class of the first; None where they are the same."""
    first, second = models.values()
    if first.class_names == second.class_names:
        return None
    indices = model_classes(second)
    if not second.class_names and not indices.keys() >= set(classes):
        indices = {name: index for index, name in enumerate(classes)}
    order = [indices.get(names.get(index, ''), -1) for index in range(first.model.num_classes)]
    if -1 in order:
        name = names.get(order.index(-1), order.index(-1))
        raise UsageError(f'{second.source}: does not have the class {name!r} of {first.source}')
    return order


def forward_together(
        options: Forward, models: dict[str, TrainedModel], device: Any, names: dict[int, str],
        classes: Sequence[str] | None = None,
) -> tuple[Callable, Callable]:
    """Return a forward pass, which gives the logits of each model and of two their average ('ens'), and its autocast.

    Args:
        options: Options.
        models: One model or two, by side; they are moved.
        device: Where the batches are: images [N, C, H, W], or those of each side.
        names: Classes of the first by its indices, which are those of all logits.
        classes: Those of the data, whose indices are used by a model without class names.

    Raises:
        UsageError: Two models have different classes.
    """
    order = _class_order(models, names, classes or ()) if len(models) > 1 else None
    forward, autocast = create_forward(options, models, device)

    def together(input):
        logits = {side: output.float() for side, output in forward(input).items()}
        if order is not None:
            logits['b'] = logits['b'][:, order]
        if len(logits) > 1:
            logits['ens'] = ensemble(*logits.values())
        return logits

    return together, autocast
