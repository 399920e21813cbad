"""The methods: what each computes for a batch, as data that the build reads once. The training loop knows none.

Nothing heavy is imported here: the options and the report read this table too.
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Method(NamedTuple):
    """One way to train."""
    description: str
    models: tuple[int, ...]  # how many models it trains
    criterion: Callable  # criterion(args, epochs, base_loss) -> StagedLoss
    passes: Callable[[Mapping[str, Any]], int]  # forwards for an image, over all networks, by the options
    citation: str = ''


def _vpl(args, epochs, base_loss):
    from .criterion import VPLLoss
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
    from .criterion import StagedLoss, base_term
    return StagedLoss([base_term(side, base_loss) for side in args.sides])


METHODS: dict[str, Method] = {
    'vpl': Method(
        'Vision Pair Learning',
        models=(2,),
        criterion=_vpl,
        passes=lambda options: 2,
        citation='''@inproceedings{tong2022vpl,
  title = {Vision Pair Learning: An Efficient Training Framework for Image Classification},
  author = {Tong, Bei and Yu, Xiaoyuan},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2022}
}''',
    ),
    'solo': Method(
        'one model alone',
        models=(1,),
        criterion=_solo,
        passes=lambda options: 1,
    ),
}
