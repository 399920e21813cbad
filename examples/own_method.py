"""A term of your own, with an option, a layer that it trains and a feature, then the usual command line.

The term is that of similarity-preserving distillation (Tung and Mori, ICCV 2019, arXiv 1907.09682, eq. 4), here on a
projected feature map and between two networks that train at the same time.

    python examples/own_method.py --config quickstart --method pair --term similarity,learner=b,width=32,weight=100
"""
import sys
from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F

from timm_vpl import TERMS, FollowOptions, TermKind, feature_of
from timm_vpl.cli import train
from timm_vpl.core.option import Count, option


@dataclass(frozen=True)
class SimilarityOptions(FollowOptions):
    """Options of the term besides those of all terms; recipes and messages treat them alike."""
    feature: str = option('stage3', 'feature of both branches')
    width: Count = option(64, 'channels of the projection')


class SimilarityLoss(nn.Module):
    """Mean squared difference of the branches' matrices of similarities (N, N); only the learner gets a gradient."""

    def __init__(self, own, setting):
        super().__init__()
        self.own = own
        self.features = {side: (own.feature,) for side in (own.learner, own.leader)}
        self.projection = nn.Conv2d(setting.width(own.learner, own.feature), own.width, 1)

    def forward(self, output, target):
        learnt = self.projection(feature_of(output, self.own.learner, self.own.feature)).flatten(1)
        led = feature_of(output, self.own.leader, self.own.feature).detach().flatten(1)
        return F.mse_loss(*(F.normalize(x @ x.T) for x in (learnt, led)))


TERMS['similarity'] = TermKind('matrices of similarities (Tung and Mori)', SimilarityLoss, SimilarityOptions)

if __name__ == '__main__':
    sys.exit(train())
