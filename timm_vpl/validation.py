"""Validation: one pass over the data for all branches."""
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit

from .data import read


@torch.inference_mode()
def evaluate(
        model: torch.nn.Module,
        loader,
        sides: Sequence[str],
        device: torch.device,
        autocast: Callable = nullcontext,
        distributed: bool = False,
) -> 'OrderedDict[str, float]':
    """Return loss, top1 and top5 (percent) of each branch and of two branches' averaged probabilities ('ens').

    Args:
        model: A pair, or the EMA of one.
        loader: timm's validation loader.
        sides: The branches of the pair.
        device: Where the model is.
        autocast: Context of the forward passes.
        distributed: Sum the counts of all processes; samples that pad a process's share are left out.
    """
    names = [*sides, 'ens'] if len(sides) > 1 else list(sides)
    limit = evaluation_sample_limit(loader)
    evaluators = {name: ClassificationEvaluator(device, max_samples=limit) for name in names}
    model.eval()
    for input, target in read(loader):
        input, target = input.to(device), target.to(device)
        with autocast():
            output = model(input, project=False)
        logits = {side: getattr(output, f'logits_{side}').float() for side in sides}
        if 'ens' in evaluators:
            # Logarithms of the averaged probabilities: as logits they give these probabilities again.
            log_p = torch.stack([logits[side].log_softmax(dim=-1) for side in sides])
            logits['ens'] = log_p.logsumexp(dim=0) - math.log(len(sides))
        for name, evaluator in evaluators.items():
            evaluator.update(logits[name], target)
    metrics = OrderedDict()
    for name, evaluator in evaluators.items():
        for metric, value in evaluator.compute(distributed=distributed).items():
            metrics[f'{metric}_{name}'] = value
    return metrics
