"""The terms of the pair losses as pure functions, each under its equation, and the gather of embeddings.

All take float32 or float64 tensors. Stop-gradients are the caller's: a term trains whatever it gets undetached.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .distillation import kl_divergences

# An embedding shorter than this has no direction: its similarity to all others is 0, without a gradient.
_MIN_NORM = 1e-4


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with class indices or soft targets (VPL, eq. 1 and 2).

    L_CE = -1/N sum_i sum_j y_ij log softmax(z_i)_j

    Args:
        logits: z (N, C).
        target: Class indices (N,) or distributions y (N, C).

    Raises:
        ValueError: The target has another shape.
    """
    expected = logits.shape if target.is_floating_point() else logits.shape[:1]
    if target.shape != expected:
        raise ValueError(f'target has shape {tuple(target.shape)} and type {target.dtype}, expected class indices '
                         f'{tuple(logits.shape[:1])} or distributions {tuple(logits.shape)}')
    return F.cross_entropy(logits, target.to(logits.dtype) if target.is_floating_point() else target)


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy whose classes have weights, as a base loss: the mean over the images, also of hard labels.

    L = -1/N sum_i sum_j w_j y_ij log softmax(z_i)_j,  y smoothed: (1 - s) y_ij + s / C

    torch's CrossEntropyLoss with `weight` divides by N for soft targets, but by the sum of w for class indices: then
    the mean over processes would not be the loss of the whole batch.

    Args:
        weight: w (C,).
        smoothing: s.
    """

    def __init__(self, weight: torch.Tensor, smoothing: float = 0.):
        super().__init__()
        self.register_buffer('weight', weight)
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            logits,
            target.to(logits.dtype) if target.is_floating_point() else target,
            self.get_buffer('weight').to(logits.dtype),
            reduction='none',
            label_smoothing=self.smoothing,
        ).mean()


def kl_divergence(logits: torch.Tensor, reference: torch.Tensor, rho: float = 1.0) -> torch.Tensor:
    """KL divergence of a branch's prediction from its partner's (VPL, eq. 6), without a factor rho^2.

    L_KL = 1/N sum_i KL(softmax(r_i / rho) || softmax(z_i / rho))

    Args:
        logits: z (N, C), of the branch that follows.
        reference: r (N, C), of the branch that leads.
        rho: Temperature.
    """
    return kl_divergences(logits, reference, rho).mean()


def contrastive(
        embed_a: torch.Tensor,
        embed_b: torch.Tensor,
        tau: float,
        similarity: str = 'cosine',
        same_class: str = 'negative',
        classes: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        gather_rows: int | None = None,
) -> torch.Tensor:
    """Contrastive loss between the two branches' embeddings of the same images (VPL, eq. 3 to 5).

    P(a_i, b_i) = exp(s(a_i, b_i) / tau) / [sum_j exp(s(a_i, b_j) / tau) + sum_{k != i} exp(s(a_i, a_k) / tau)]
    L_CL = -1/2N sum_i [log P(a_i, b_i) + log P(b_i, a_i)]

    Beyond the paper: other images of the anchor's class may be left out of the denominator (same_class 'ignore') or
    count as further positives ('positive': the mean of -log P over the anchor's positives); copies of one image are
    never each other's negatives.

    Args:
        embed_a: Embeddings (N, d) of branch a.
        embed_b: Embeddings (N, d) of branch b.
        tau: Temperature.
        similarity: s: 'cosine', the dot product of L2-normalised embeddings, or 'dot', the plain one.
        same_class: What other images of the anchor's class are: 'negative', 'ignore' or 'positive'.
        classes: Class indices (N,), unless same_class is 'negative'.
        sample_ids: (N,) int64, equal for copies of one image; None if there are none.
        gather_rows: Take the negatives of all processes, each of which gathers so many rows: its N images, then
            padding. The mean over processes of the loss is then the loss of the concatenated batch, and averaged
            gradients are its gradients, whatever the N of each.
    """
    if similarity == 'cosine':
        embed_a, embed_b = _normalize(embed_a), _normalize(embed_b)
    if same_class == 'negative':
        classes = None
    all_a, all_b, all_classes, all_ids, first, padding, share = embed_a, embed_b, classes, sample_ids, 0, None, 0.5
    if gather_rows is not None:
        all_a, all_b, counts = _Gather.apply(embed_a, embed_b, gather_rows)
        all_classes, all_ids = (
            x if x is None else _gather(F.pad(x, (0, gather_rows - len(x)))) for x in (classes, sample_ids))
        first = dist.get_rank() * gather_rows
        padding = (torch.arange(gather_rows, device=counts.device) >= counts[:, None]).flatten()
        share = len(embed_a) * len(counts) / (2 * counts.sum())  # half of it, times the processes: 0.5 in even batches

    # own[i, j]: column j is anchor i itself; dropped: neither negative nor positive; positive: besides the partner
    own = torch.arange(len(all_a), device=embed_a.device) == (
        torch.arange(len(embed_a), device=embed_a.device) + first)[:, None]
    dropped, positive = padding, None
    if classes is not None:
        same = (classes[:, None] == all_classes) & ~own
        if same_class == 'positive':
            positive = same if padding is None else same & ~padding
        else:
            dropped = same if padding is None else same | padding
    if sample_ids is not None:
        copies = (sample_ids[:, None] == all_ids) & ~own
        if positive is not None:
            copies = copies & ~positive
        dropped = copies if dropped is None else dropped | copies

    def direction(anchor: torch.Tensor, partner: torch.Tensor, own_branch: torch.Tensor) -> torch.Tensor:
        anchor = anchor / tau
        scores = torch.cat([  # N x 2M, M rows of all processes
            anchor @ partner.T if dropped is None else (anchor @ partner.T).masked_fill(dropped, -torch.inf),
            (anchor @ own_branch.T).masked_fill(own if dropped is None else own | dropped, -torch.inf),
        ], dim=1)
        if positive is None:
            return F.cross_entropy(scores, torch.arange(first, first + len(anchor), device=anchor.device))
        chosen = torch.cat([positive | own, positive], dim=1)
        log_p = F.log_softmax(scores, dim=1).masked_fill(~chosen, 0.)
        return -(log_p.sum(dim=1) / chosen.sum(dim=1)).mean()

    loss: torch.Tensor = share * (direction(embed_a, all_b, all_a) + direction(embed_b, all_a, all_b))
    return loss


def _normalize(embed: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(embed, dim=-1, keepdim=True)
    return embed / torch.where(norm > _MIN_NORM, norm, torch.inf)


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate the rows of all processes, without a gradient."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """Concatenate the rows of all processes, each padded to `rows`, and count what is not padding in each.

    Two tensors (N, d) and N travel in one collective. Backward sums over processes what each owes this one's rows. With
    DDP's mean over processes this is the exact gradient.
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
        first = dist.get_rank() * rows
        ctx.rows = slice(first, first + len(a))
        own = F.pad(torch.cat([a, b], dim=1), (0, 0, 0, rows + 1 - len(a)))
        own[rows] = len(a)  # as a row of its own the count leaves the rows aligned
        parts = _gather(own).unflatten(0, (-1, rows + 1))
        counts = parts[:, rows, 0]
        ctx.mark_non_differentiable(counts)
        return *parts[:, :rows].flatten(0, 1).tensor_split([a.shape[1]], dim=1), counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = [i for i in range(2) if ctx.needs_input_grad[i]]
        total = torch.cat([grads[i] for i in wanted], dim=1)
        dist.all_reduce(total)
        parts = iter(total[ctx.rows].chunk(len(wanted), dim=1))
        return *(next(parts) if i in wanted else None for i in range(2)), None


class _InGraph(torch.autograd.Function):
    """Return the loss unchanged and give the other tensors a gradient of zeros.

    For a single DistributedDataParallel around the whole pair, which needs every parameter in the graph of every
    step. Unlike a product with 0, this can't turn an infinite embedding into a NaN loss.
    """

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *unused: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*unused)
        return loss.clone()  # not a view: loops divide a loss in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (grad, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors))


def keep_in_graph(loss: torch.Tensor, *unused: torch.Tensor | None) -> torch.Tensor:
    """Return the loss with `unused` tensors in its graph, at a gradient of zeros."""
    kept = [tensor for tensor in unused if tensor is not None and tensor.requires_grad]
    return _InGraph.apply(loss, *kept) if kept else loss
