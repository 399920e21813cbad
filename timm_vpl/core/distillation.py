"""Terms by which one network follows another, as pure functions, each under its equation and source.

All take float32 or float64 tensors, and logits z (N, C) of the learner, r (N, C) of the leader. Stop-gradients are the
caller's. A term that needs the class of an image takes it as `classes` (N,); `classes_of` gives it for soft targets.
"""
import torch
import torch.nn.functional as F

_MIN_DEVIATION = 1e-7


def classes_of(target: torch.Tensor) -> torch.Tensor:
    """Return the classes (N,) of labels: of soft targets (N, C) the class with the largest share."""
    return target.argmax(dim=-1) if target.ndim == 2 else target


def standardized(logits: torch.Tensor) -> torch.Tensor:
    """Standardise logits (N, C) over the classes (Logit Standardization, arXiv 2403.01427, eq. 9).

    Z(z)_j = (z_j - mean(z)) / deviation(z), the deviation that of a sample (C - 1), as the authors' code has it
    """
    return (logits - logits.mean(dim=-1, keepdim=True)) / (logits.std(dim=-1, keepdim=True) + _MIN_DEVIATION)


def confidence_weights(logits: torch.Tensor, reference: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """Return the weight (N,) of each image for a term that follows `reference` (AdaptConf, arXiv 2402.03749, eq. 5).

    1 - beta, beta = exp(s / t) / (exp(s / t) + exp(u / t)), s = CE(z, argmax z), u = CE(z, argmax r)

    It is 1/2 where both predict one class and grows with the learner's confidence in another. It has no gradient.

    Args:
        logits: z, of the learner.
        reference: r, of the leader.
        temperature: t.
    """
    log_p = logits.detach().log_softmax(dim=-1)
    own, other = (-log_p.gather(-1, x.argmax(dim=-1, keepdim=True)).squeeze(-1) for x in (log_p, reference))
    return torch.sigmoid((other - own) / temperature)


def kl_divergences(
        logits: torch.Tensor,
        reference: torch.Tensor,
        temperature: float = 1.0,
        t_squared: bool = False,
) -> torch.Tensor:
    """Return KL(softmax(r / T) || softmax(z / T)) of each image (N,), times T^2 if so asked.

    With T^2 it is the distillation of Hinton et al. (arXiv 1503.02531).

    Args:
        logits: z, of the learner.
        reference: r, of the leader.
        temperature: T.
        t_squared: Multiply by T^2.
    """
    log_p, log_q = F.log_softmax(logits / temperature, dim=-1), F.log_softmax(reference / temperature, dim=-1)
    divergences: torch.Tensor = torch.linalg.vecdot(log_q.exp(), log_q - log_p)  # a third faster than F.kl_div
    return divergences * temperature ** 2 if t_squared else divergences


def hard_divergences(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy (N,) of each image with the class that the leader predicts (DeiT, eq. 3)."""
    return F.cross_entropy(logits, reference.argmax(dim=-1), reduction='none')


def dkd(
        logits: torch.Tensor,
        reference: torch.Tensor,
        classes: torch.Tensor,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
) -> torch.Tensor:
    """Return the decoupled distillation loss (N,) of each image (DKD, arXiv 2203.08679, eq. 7).

    T^2 [alpha KL(b(r) || b(z)) + beta KL(o(r) || o(z))], with p = softmax(. / T), b = (p_y, 1 - p_y), and o the
    probabilities of the other classes among themselves

    Args:
        logits: z, of the learner.
        reference: r, of the leader.
        classes: y (N,).
        alpha: Weight of the target class.
        beta: Weight of the other classes.
        temperature: T.
    """
    is_target = _one_hot(classes, logits)
    binary, among = [], []  # logarithms of b and o, of the learner and the leader
    for scores in (logits, reference):
        log_p = F.log_softmax(scores / temperature, dim=-1)
        others = log_p.masked_fill(is_target, -torch.inf).logsumexp(dim=-1, keepdim=True)
        binary.append(torch.cat([log_p.gather(-1, classes[:, None]), others], dim=-1))
        among.append((log_p - others).masked_fill(is_target, 0.))
    of_target = torch.linalg.vecdot(binary[1].exp(), binary[1] - binary[0])
    of_others = torch.linalg.vecdot(among[1].exp(), among[1] - among[0])  # the target class adds nothing
    divergences: torch.Tensor = temperature ** 2 * (alpha * of_target + beta * of_others)
    return divergences


def dist(
        logits: torch.Tensor,
        reference: torch.Tensor,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
) -> torch.Tensor:
    """Correlation of predictions, of an image over classes and of a class over images (DIST, arXiv 2205.10536, eq. 10).

    T^2 [beta (1 - mean_i corr(p[i], q[i])) + gamma (1 - mean_j corr(p[:, j], q[:, j]))], p = softmax(z / T),
    q = softmax(r / T)

    Args:
        logits: z, of the learner.
        reference: r, of the leader.
        beta: Weight of the images' correlations.
        gamma: Weight of the classes' correlations.
        temperature: T.
    """
    p, q = (F.softmax(scores / temperature, dim=-1) for scores in (logits, reference))
    total: torch.Tensor = beta * (1 - _correlation(p, q).mean()) + gamma * (1 - _correlation(p.T, q.T).mean())
    return temperature ** 2 * total


def _one_hot(classes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return where each row's class is, as bools (N, C)."""
    return torch.arange(logits.shape[-1], device=classes.device) == classes[:, None]


def _correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return Pearson's correlation of each row."""
    return F.cosine_similarity(x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True), dim=1)


def ofa(
        logits: torch.Tensor,
        reference: torch.Tensor,
        classes: torch.Tensor,
        exponent: float = 1.0,
        temperature: float = 1.0,
) -> torch.Tensor:
    """Return the loss (N,) of each image that raises the target's share (OFA-KD, arXiv 2310.19444, eq. 7).

    -sum_j [(q_j + y_j)^eps - y_j] log p_j, p = softmax(z / T), q = softmax(r / T), y one-hot

    Args:
        logits: z, of the learner, from its head or from a head at a stage.
        reference: r, of the leader.
        classes: Class of each image (N,).
        exponent: eps, 1 to 1.5 in the paper.
        temperature: T.
    """
    target = _one_hot(classes, logits).to(logits.dtype)
    wanted = (F.softmax(reference / temperature, dim=-1) + target) ** exponent - target
    return -(wanted * F.log_softmax(logits / temperature, dim=-1)).sum(dim=-1)


def embedding_distances(embed: torch.Tensor, reference: torch.Tensor, distance: str = 'mse') -> torch.Tensor:
    """Return the distance (N,) of each image's embedding to the leader's, both (N, d).

    'mse': mean_k (h_k - g_k)^2, as FitNets (arXiv 1412.6550) and timm's FeatureDistillationTask;
    'cosine': 1 - cos(h, g)
    """
    if distance == 'cosine':
        return 1 - F.cosine_similarity(embed, reference, dim=-1)
    return (embed - reference).square().mean(dim=-1)


def map_distances(
        maps: torch.Tensor,
        reference: torch.Tensor,
        norm: str = 'batch',
        grid: str = 'smaller',
) -> torch.Tensor:
    """Return the mean squared distance (N,) of each image's feature map to the leader's.

    The maps (N, d, h, w) and (N, d, H, W) are brought to one grid, and normalised:

    'layer': both by LayerNorm over the channels of a position (Bootstrapping ViTs, arXiv 2112.03552, eq. 3);
    'batch': the leader's by channel, over the images and positions of the batch; 'none': as they are (locality
    guidance, arXiv 2207.10026, eq. 4).

    Args:
        maps: Of the learner, with the leader's width.
        reference: Of the leader.
        norm: 'layer', 'batch' or 'none'.
        grid: 'smaller' or 'larger': the grid to which the other is resized, by mean and bilinearly.
    """
    sizes = [(x.shape[-2], x.shape[-1]) for x in (maps, reference)]
    size = min(sizes) if grid == 'smaller' else max(sizes)
    maps, reference = (
        x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) if grid == 'smaller'
        else F.interpolate(x, size, mode='bilinear') for x in (maps, reference))
    if norm == 'layer':
        maps, reference = (F.layer_norm(x.movedim(1, -1), x.shape[1:2]) for x in (maps, reference))
    elif norm == 'batch':
        channels = reference.transpose(0, 1)
        reference = F.layer_norm(channels, channels.shape[1:]).transpose(0, 1)  # F.batch_norm refuses a single value
    return (maps - reference).square().mean(dim=(1, 2, 3))
