"""VPL's loss and stages, and the other methods' terms, as plain loops straight from the papers: slow, float64."""
from fractions import Fraction

import torch


def log_softmax(row):
    """Log-probabilities of one image's logits, as a list."""
    shift = max(row.tolist())
    exponents = [z - shift for z in row.unbind()]
    log_z = torch.log(sum(torch.exp(z) for z in exponents))
    return [z - log_z for z in exponents]


def soft_targets(target, num_classes, smoothing=0.):
    """Targets as rows of probabilities: class indices smoothed as by timm, soft targets as they are."""
    if target.ndim == 2:
        return target.tolist()
    return [[smoothing / num_classes + (1 - smoothing) * (c == label) for c in range(num_classes)]
            for label in target.tolist()]


def ce(logits, target, smoothing=0., weights=None):
    """Eq. 1-2: cross-entropy; each class may have a weight."""
    weights = [1.] * logits.shape[1] if weights is None else weights
    total = 0.
    for row, label in zip(logits.unbind(), soft_targets(target, logits.shape[1], smoothing), strict=True):
        for w, y, log_p in zip(weights, label, log_softmax(row), strict=True):
            total = total - w * y * log_p
    return total / len(logits)


def binary_ce(logits, target, smoothing=0., weights=None):
    """Mean binary cross-entropy over images and classes, each of which may have a weight."""
    weights = [1.] * logits.shape[1] if weights is None else weights
    total = 0.
    for row, label in zip(logits.unbind(), soft_targets(target, logits.shape[1], smoothing), strict=True):
        for w, y, z in zip(weights, label, row.unbind(), strict=True):
            p = 1 / (1 + torch.exp(-z))
            total = total - w * (y * torch.log(p) + (1 - y) * torch.log(1 - p))
    return total / logits.numel()


def normalized(u):
    """The vector divided by its L2 norm; a zero vector stays zero and has no gradient."""
    return u / torch.sqrt((u * u).sum()) if u.any() else u.detach()


def class_of(target, i):
    """Class of image i: its index, or the arg max of its soft target."""
    if target.ndim == 1:
        return int(target[i])
    row = target[i].tolist()
    return row.index(max(row))


def contrastive(embed_a, embed_b, tau, similarity, same_class='negative', classes=None, ids=None):
    """Eq. 3-5: each anchor finds its partner among N partner embeddings and the N-1 others of its own branch."""
    num_images = len(embed_a)
    a, b = list(embed_a.unbind()), list(embed_b.unbind())
    if similarity == 'cosine':
        a, b = [normalized(u) for u in a], [normalized(u) for u in b]
    total = 0.
    for own, partner in ((a, b), (b, a)):
        for i in range(num_images):
            positives = []
            z = 0.
            for side in (partner, own):
                for j in range(num_images):
                    if side is own and j == i:
                        continue
                    is_positive = side is partner and j == i
                    if j != i:
                        copy = ids is not None and int(ids[i]) == int(ids[j])
                        alike = same_class != 'negative' and class_of(classes, i) == class_of(classes, j)
                        if same_class == 'positive' and alike:
                            is_positive = True
                        elif copy or (same_class == 'ignore' and alike):
                            continue
                    exp_s = torch.exp((own[i] * side[j]).sum() / tau)
                    z = z + exp_s
                    if is_positive:
                        positives.append(exp_s)
            total = total - sum(torch.log(exp_s / z) for exp_s in positives) / len(positives)
    return total / (2 * num_images)


def kl(logits_p, logits_q, rho):
    """Eq. 6: batch mean of KL(softmax(logits_p / rho) || softmax(logits_q / rho))."""
    total = 0.
    for row_p, row_q in zip(logits_p.unbind(), logits_q.unbind(), strict=True):
        for log_p, log_q in zip(log_softmax(row_p / rho), log_softmax(row_q / rho), strict=True):
            total = total + torch.exp(log_p) * (log_p - log_q)
    return total / len(logits_p)


def pair_contrastive(output, target, tau, similarity='cosine', contrastive_to='b', same_class='negative'):
    """Eq. 3-5 with the gradient restricted to the branch contrastive_to (and to an affine layer)."""
    embed_a, embed_b = output.embed_a, output.embed_b
    if contrastive_to == 'b':
        embed_a = embed_a.detach() if output.stopped_a is None else output.stopped_a
    if contrastive_to == 'a':
        embed_b = embed_b.detach() if output.stopped_b is None else output.stopped_b
    return contrastive(embed_a, embed_b, tau, similarity, same_class, target, output.sample_ids)


def pair_kl(output, rho=1., kl_to='a'):
    """Eq. 6 with the gradient restricted to the branch kl_to."""
    if kl_to == 'a':
        return kl(output.logits_b.detach(), output.logits_a, rho)
    if kl_to == 'b':
        return kl(output.logits_a.detach(), output.logits_b, rho)
    return kl(output.logits_b, output.logits_a, rho)


def pair_terms(
        output, target, tau, rho=1., similarity='cosine', contrastive_to='b', kl_to='a', contrastive_weight=1.,
        kl_weight=1., same_class='negative'):
    """All terms of the middle stage and their weighted sum, by the names that VPLLoss.terms uses."""
    terms = {
        'ce_a_loss': ce(output.logits_a, target),
        'ce_b_loss': ce(output.logits_b, target),
        'contrastive_loss': pair_contrastive(output, target, tau, similarity, contrastive_to, same_class),
        'kl_loss': pair_kl(output, rho, kl_to),
    }
    terms['loss'] = (terms['ce_a_loss'] + terms['ce_b_loss'] + contrastive_weight * terms['contrastive_loss']
                     + kl_weight * terms['kl_loss'])
    return terms


def token_hard(dist_logits, teacher_logits):
    """DeiT: cross-entropy of the token's logits and the teacher's class."""
    classes = torch.tensor([row.index(max(row)) for row in teacher_logits.tolist()])
    return ce(dist_logits, classes)


def token_soft(dist_logits, teacher_logits, temperature):
    """DeiT: T^2 KL(softmax(z_teacher / T) || softmax(z_token / T)), the mean over images."""
    return temperature ** 2 * kl(teacher_logits.detach(), dist_logits, temperature)


def submodel(logits, other_logits, sum_classes=False):
    """cosub: B(o, stop_gradient(sigmoid(o_other)))."""
    loss = binary_ce(logits, 1 / (1 + torch.exp(-other_logits.detach())))
    return loss * logits.shape[1] if sum_classes else loss


def pair_terms_on(epoch, epochs, x, y):
    """Eq. 7: whether (contrastive, KL) are on; x and y are the decimals as written."""
    x, y = (Fraction(str(v)) if isinstance(v, float) else v for v in (x, y))
    epoch = min(epoch, epochs - 1)
    return 100 * epoch < (100 - y) * epochs, 100 * epoch >= x * epochs
