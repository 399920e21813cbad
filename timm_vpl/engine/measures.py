"""Measurements of a logged update: its gradients, and how far the branches agree."""
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from ..core.pair import PairOutput
from ..core.task import PairTask


def _norm(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Return the norm of gradients taken as one vector; None is zero."""
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())


def _learning(task: PairTask) -> dict[str, list[torch.nn.Parameter]]:
    """Return what each branch trains, without the affine layer and the terms' own layers, which belong to no branch."""
    pair = task.trainable_module
    return {side: [each for each in pair.branch(side).parameters() if each.requires_grad] for side in pair.sides}


def gradient_norms(task: PairTask, sides: str) -> dict[str, torch.Tensor]:
    """Return the norm of each branch's gradient, `grad_norm_SIDE`, of the branches that learn in a phase."""
    return {
        f'grad_norm_{side}': _norm(parameter.grad for parameter in parameters)
        for side, parameters in _learning(task).items() if side in sides}


def term_norms(task: PairTask, result: dict[str, Any], scale: torch.Tensor | float = 1.) -> dict[str, torch.Tensor]:
    """Return the norm of the gradient that each weighted term gives each branch, `grad_TERM_SIDE`.

    It is that of this process's batch. Each term and branch costs a backward pass, in which all processes take part:
    that of gathered embeddings adds up over them.

    Args:
        task: The task.
        result: What it returned for the batch, with its graph.
        scale: Factor that keeps gradients of half precision from vanishing.
    """
    found, learning = {}, _learning(task)
    for term in task.criterion.active_terms():
        value = result.get(term.name)
        if value is None or not value.requires_grad:
            continue
        weighted = value * (task.criterion.weight_of(term) * scale)
        for side, parameters in learning.items():
            gradients = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
            found[f'grad_{term.name.removesuffix("_loss")}_{side}'] = _norm(gradients) / scale
    return found


def likeness(output: PairOutput) -> dict[str, torch.Tensor]:
    """Return the agreement of two branches for each image (N,), as far as the output allows.

    `agreement` is 100 where both predict the same class, else 0, NaN for NaN logits; `alignment` the cosine of the two
    embeddings.
    """
    found = {}
    first, second = output.logits_a, output.logits_b
    if first is not None and second is not None:
        are_numbers = (first.isfinite() & second.isfinite()).all(dim=-1)
        same = 100. * (first.argmax(dim=-1) == second.argmax(dim=-1))
        found['agreement'] = same.masked_fill(~are_numbers, math.nan)
    if output.embed_a is not None and output.embed_b is not None and output.embed_a.shape == output.embed_b.shape:
        found['alignment'] = F.cosine_similarity(output.embed_a.float(), output.embed_b.float(), dim=-1)
    return found
