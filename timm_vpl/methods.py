"""The methods: what each computes for a batch, as data that the build reads once. The training loop knows none."""
from collections.abc import Callable
from typing import NamedTuple

from .criterion import StagedLoss, VPLLoss, base_term


class Method(NamedTuple):
    """One way to train: `criterion(args, epochs, base_loss)` -> StagedLoss."""
    description: str
    criterion: Callable[[object, int, Callable | None], StagedLoss]


def _vpl(args, epochs, base_loss):
    return VPLLoss(
        epochs,
        x=args.x,
        y=args.y,
        tau=args.tau,
        rho=args.rho,
        similarity=args.similarity,
        contrastive_to=args.contrastive_to,
        kl_to=args.kl_to,
        contrastive_weight=args.contrastive_weight,
        kl_weight=args.kl_weight,
        same_class=args.same_class,
        base_loss=base_loss,
        gather=args.gather,
    )


def _solo(args, epochs, base_loss):
    return StagedLoss([base_term(side, base_loss) for side in args.sides])


METHODS: dict[str, Method] = {
    'vpl': Method('Vision Pair Learning, AAAI 2022', _vpl),
    'solo': Method('one model alone, on the same pipeline', _solo),
}
