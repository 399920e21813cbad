"""Evaluation: one pass over the data for all models, or branches, that share their images."""
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit

from ..core.pair import PairOutput
from ..core.task import PairTask
from ..data.images import StreamImages
from ..errors import RunError
from .measures import likeness

PAD = -1  # in a tensor of sets of labels


class RealLabelsEvaluator(ClassificationEvaluator):
    """Accumulate top-k accuracy where an image has a set of right labels; images with none are left out."""

    @torch.no_grad()
    def update(self, output, target):
        """Count a batch of logits (N, classes); `target` (n <= N, labels) are sets padded with -1 of the first n."""
        top = output[:len(target)].topk(min(5, output.shape[-1]), dim=-1).indices
        right = (top[:, :, None] == target[:, None, :]).any(dim=-1)  # (n, 5)
        labelled = (target != PAD).any(dim=-1)
        self.counts += torch.stack([labelled.sum(), right[:, 0].sum(), right.any(dim=-1).sum()])


class Tally:
    """All figures of one output: loss and top-k; optionally by sets of labels, by classes and by images.

    Args:
        device: Where the outputs are.
        max_samples: Images of this process; the rest is padding.
        real_labels: Count by sets of labels.
        per_class: Number of classes, to count each by itself.
        per_image: Keep the prediction of each image.
    """

    def __init__(
            self, device, max_samples: int | None, real_labels: bool, per_class: int | None, per_image: bool = False):
        self.plain = ClassificationEvaluator(device, max_samples=max_samples)
        self.real = RealLabelsEvaluator(device) if real_labels else None
        # Images of each class, and those of them whose top prediction is right.
        self.classes = None if per_class is None else torch.zeros(per_class, 2, dtype=torch.int64, device=device)
        # Label, prediction and its probability, a batch each.
        self.predictions: list[tuple] | None = [] if per_image else None

    def update(self, output: torch.Tensor, target: torch.Tensor, real_labels: torch.Tensor | None) -> None:
        """Count a batch of logits (N, classes) and class indices (N,)."""
        before = self.plain.num_samples
        self.plain.update(output, target)
        if self.real is not None:
            self.real.update(output, real_labels)
        target = target[:self.plain.num_samples - before]
        if self.predictions is not None:
            confidence, prediction = output[:len(target)].float().softmax(dim=-1).max(dim=-1)
            self.predictions.append((target, prediction, confidence))
        if self.classes is not None:
            right = output[:len(target)].argmax(dim=-1) == target
            self.classes.index_add_(0, target, torch.stack([torch.ones_like(target), right.long()], dim=1))

    def compute(self, distributed: bool) -> dict[str, Any]:
        """Return the figures, of all processes together."""
        if distributed:
            counted = [self.plain.loss_sum, self.plain.counts, self.real and self.real.counts, self.classes]
            for tensor in counted:
                if tensor is not None:
                    torch.distributed.all_reduce(tensor)
        figures: dict[str, Any] = {'images': int(self.plain.counts[0]), **self.plain.summary()}
        if self.real is not None:
            real = self.real.summary()
            figures.update(real_images=int(self.real.counts[0]), real_top1=real['top1'], real_top5=real['top5'])
        if not math.isfinite(figures['loss']):
            figures.update((metric, math.nan) for metric in tuple(figures) if 'top' in metric)
        elif self.classes is not None:
            figures['classes'] = self.classes.cpu()
        if self.predictions:
            figures['predictions'] = tuple(torch.cat(part).cpu() for part in zip(*self.predictions, strict=True))
        return figures


class Mean:
    """The mean of a number per image."""

    def __init__(self, device):
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.sum = torch.zeros(2, dtype=dtype, device=device)  # and how many

    def update(self, values: torch.Tensor) -> None:
        """Add the numbers (N,) of a batch."""
        self.sum[0] += values.to(self.sum).sum()
        self.sum[1] += len(values)

    def compute(self, distributed: bool) -> dict[str, Any]:
        """Return the figures, of all processes together."""
        if distributed:
            torch.distributed.all_reduce(self.sum)
        return {'mean': (self.sum[0] / self.sum[1]).item()}


@torch.no_grad()  # not inference mode: a model may cache tensors here that it needs in training
def evaluate(
        forward: Callable[[torch.Tensor], dict[Hashable, torch.Tensor]],
        names: Sequence[Hashable],
        loader,
        device: torch.device,
        autocast: Callable = nullcontext,
        distributed: bool = False,
        real_labels: torch.Tensor | None = None,
        per_class: int | None = None,
        per_image: bool = False,
        means: Sequence[Hashable] = (),
        awaited: Callable[[Any], Iterable] = iter,
        after_batch: Callable[[], None] | None = None,
) -> dict[Hashable, dict[str, Any]]:
    """Count what several models, or several outputs of one, get right in one pass over the data.

    Args:
        forward: Returns the logits [N, classes] of each name for a batch of the loader, images [N, C, H, W].
        names: The names.
        loader: timm's validation loader, of batches on the device.
        device: Where the models are.
        autocast: Context of the forward passes.
        distributed: Sum the counts of all processes; samples that pad a process's share are left out.
        real_labels: Sets of labels [images, labels] of the whole data set in its order, padded with -1.
        per_class: Number of classes, to count each by itself.
        per_image: Keep the prediction of each name for each image of this process.
        means: Names of further numbers (N,) that `forward` returns, of which the 'mean' is taken.
        awaited: Yields the batches of the loader.
        after_batch: Called after each batch; as often as the loader is long, on each of the processes, though their
            shares of a stream may have more batches or fewer.

    Returns:
        By name 'images', 'loss', 'top1' and 'top5' (percent); with `real_labels` also 'real_images', 'real_top1' and
        'real_top5'; with `per_class` also 'classes' (classes, 2), images and right ones; with `per_image` also
        'predictions': label, prediction and its probability (images,) each. NaN logits predict nothing: where the loss
        is not finite, all accuracies are NaN, and there are no 'classes'.
    """
    if real_labels is not None:
        if distributed:  # the images of a process, as timm's sampler assigns them
            real_labels = real_labels[torch.distributed.get_rank()::torch.distributed.get_world_size()]
        real_labels = real_labels.to(device)
    limit = evaluation_sample_limit(loader)
    tallies = {name: Tally(device, limit, real_labels is not None, per_class, per_image) for name in names}
    averages = {name: Mean(device) for name in means}
    seen, calls = 0, 0 if after_batch is None else len(loader)
    for input, target in awaited(loader):
        with autocast():
            logits = forward(input)
        labels = None if real_labels is None else real_labels[seen:seen + len(target)]
        for name, tally in tallies.items():
            tally.update(logits[name], target, labels)
        for name, average in averages.items():
            average.update(logits[name][:len(target) if limit is None else max(0, limit - seen)])
        seen += len(target)
        if after_batch is not None and calls:
            after_batch()
            calls -= 1
    for _ in range(calls):
        after_batch()  # type: ignore[misc]
    results = {name: tally.compute(distributed) for name, tally in tallies.items()}
    results.update((name, average.compute(distributed)) for name, average in averages.items())
    if isinstance(loader.dataset, StreamImages):
        _check_count(results[names[0]]['images'], loader.dataset, device, distributed)
    return results


def _check_count(images: int, dataset: StreamImages, device: torch.device, distributed: bool) -> None:
    """Raise RunError where the processes have not seen as many images of a stream as it has."""
    left_out = dataset.replaced.sum().to(device)
    if distributed:
        torch.distributed.all_reduce(left_out)
    found = images + int(left_out)
    if len(dataset) not in (0, found):
        raise RunError(
            f'data: the stream has {found} images, not {len(dataset)}; give --val-num-samples {found}, unless a line '
            f'above names a shard that could not be read')


def outputs_of(sides: Sequence[str]) -> list[str]:
    """Return the names of a pair's outputs: its branches, and of two their 'ens'."""
    return [*sides, 'ens'] if len(sides) > 1 else list(sides)


def gate_accuracies(
        task: PairTask, loader, device, autocast: Callable, distributed: bool, awaited: Callable[..., Iterable] = iter,
) -> dict[str, float]:
    """Return the top-1 (percent) of all outputs that the gates of a task's terms compare; arguments as above."""
    pair, teacher, names = task.trainable_module, task.teacher, sorted(task.criterion.gates)

    def forward(input):
        logits = pair_logits(pair, pair.sides, input)
        if 'ens' in logits:
            logits['average'] = logits.pop('ens')
        if teacher is not None and teacher.side in names:
            images = input['teacher'] if isinstance(input, dict) else input
            logits[teacher.side] = teacher(images)[f'logits_{teacher.side}'].float()
        return logits

    pair.eval()
    results = evaluate(forward, names, loader, device, autocast, distributed, awaited=awaited)
    return {name: results[name]['top1'] for name in names}


def likenesses(pair) -> list[str]:
    """Return the names of what the branches of a pair have in common, as `pair_figures` gives it."""
    return ['agreement', *['alignment'] * (pair.affine is not None)] if len(pair.sides) > 1 else []


def pair_figures(model: Any, sides: Sequence[str], project: bool, input: Any) -> dict[Hashable, torch.Tensor]:
    """Return the logits of `pair_logits`, and what the branches have in common (`likeness`)."""
    output = model(input, project=project)
    figures = _logits(output, sides)
    figures.update(likeness(output))
    return figures


def pair_logits(model: Any, sides: Sequence[str], input: Any) -> dict[Hashable, torch.Tensor]:
    """Return the logits [N, classes] of each branch of a pair, and of two branches' averaged probabilities ('ens')."""
    return _logits(model(input, project=False), sides)


def _logits(output: PairOutput, sides: Sequence[str]) -> dict[Hashable, torch.Tensor]:
    logits: dict[Hashable, torch.Tensor] = {side: getattr(output, f'logits_{side}').float() for side in sides}
    if len(sides) > 1:
        logits['ens'] = ensemble(*logits.values())
    return logits


def ensemble(*logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the averaged probabilities [N, classes]: as logits they give these probabilities again.

    Args:
        *logits: Logits [N, classes] of each model.
    """
    return torch.stack([each.log_softmax(dim=-1) for each in logits]).logsumexp(dim=0) - math.log(len(logits))
