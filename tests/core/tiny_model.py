"""A small model that is not timm's, with what a branch needs."""
import torch
from torch import nn


class TinyModel(nn.Module):
    """A convolution without BatchNorm, pooled, and a classifier."""

    def __init__(self, num_classes=5, width=6, classifier=None):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(3, width, 8, stride=8)
        self.head = nn.Linear(width, num_classes) if classifier is None else classifier

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(torch.tanh(self.stem(x)).mean((2, 3)))
