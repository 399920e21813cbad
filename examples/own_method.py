"""A method of one's own beside those of the package: one term, one entry in the table, then the usual command line.

The term is that of similarity-preserving distillation (Tung and Mori, ICCV 2019, arXiv 1907.09682, eq. 4), here between
two networks that train at the same time: the transformer follows which images of a batch the CNN finds alike.

    python examples/own_method.py --config quickstart --method similarity
"""
import sys
from dataclasses import dataclass

import torch.nn.functional as F

from timm_vpl import METHODS, Method, StagedLoss, StageSchedule, Term, base_term
from timm_vpl.cli import train
from timm_vpl.core.option import NonNegative, option


def similarity_loss(output, target):
    """Mean squared difference of the branches' matrices of similarities (N, N); only branch b learns."""
    def similarities(embed):
        return F.normalize(embed @ embed.T)
    return F.mse_loss(similarities(output.embed_b), similarities(output.embed_a.detach()))


similarity_loss.uses_embeddings = True  # so that the pair computes them


@dataclass(frozen=True)
class Options:
    """Options of the method: in the help, in recipes, and checked like all others."""
    y: NonNegative = option(20., 'percent of the epochs after the term has ended')
    similarity_weight: NonNegative = option(100., 'weight of the term')


def criterion(own, setting):
    """Both branches learn from the labels, b in the first (100 - y) % of the epochs also from a."""
    schedule = StageSchedule(setting.epochs, y=own.y)
    return StagedLoss([
        base_term('a', setting.base_loss),
        base_term('b', setting.base_loss),
        Term('similarity_loss', similarity_loss, own.similarity_weight, schedule.contrastive),
    ])


METHODS['similarity'] = Method(
    'similarity-preserving distillation between two networks that train together',
    models=(2,),
    criterion=criterion,
    options=Options,
    projects=lambda own, sides: False,  # matrices of the images compare without an affine layer
)

if __name__ == '__main__':
    sys.exit(train())
