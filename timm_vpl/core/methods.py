"""The methods: what each computes for a batch, as data that the options, the build and the report read.

The training loop knows none of them. Nothing heavy is imported here.
"""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .names import SIDES


class Method(NamedTuple):
    """One way to train.

    Args:
        description: What it is, in a few words.
        models: How many models it trains.
        criterion: `criterion(args, epochs, base_loss)` -> StagedLoss; its terms say who learns what, in which
            optimizer phase, from one view of an image or two.
        passes: Forwards for an image in a training step, over all networks, by the options.
        options: Names of the options, of those that belong to methods, that it reads.
        updates: Optimizer updates a batch, by the options.
        projects: Whether a term compares embeddings, which may need the affine layer, by the options.
        teacher: Whether a frozen network stands in the place of the other branch: 'never', 'always', or 'alone',
            when one model is named.
        distilled: Whether a branch trains a head of its own for what it is taught (DeiT's distillation token).
        uniform_drop_path: Whether every block of a network has the rate --drop-path.
        bce: Whether the labels' loss is binary cross-entropy.
        citation: BibTeX of its paper.
    """
    description: str
    models: tuple[int, ...]
    criterion: Callable
    passes: Callable[[Mapping[str, Any]], int]
    options: tuple[str, ...] = ()
    updates: Callable[[Mapping[str, Any]], int] = lambda options: 1
    projects: Callable[[Any], bool] = lambda args: True
    teacher: str = 'never'
    distilled: bool = False
    uniform_drop_path: bool = False
    bce: bool = False
    citation: str = ''

    def has_teacher(self, args) -> bool:
        """Return whether these options come with a frozen teacher."""
        return self.teacher == 'always' or (self.teacher == 'alone' and len(args.sides) == 1)


CONTRASTIVE_OPTIONS = ('tau', 'similarity', 'same_class', 'gather')
TEACHER_OPTIONS = ('teacher', 'teacher_branch')


def partner_of(side: str) -> str:
    """Return the other side."""
    return SIDES[side == SIDES[0]]


def distill_terms(args) -> tuple[str, ...]:
    """Return the pair terms of two-step distillation: those asked for, else what the student's side learns in VPL."""
    terms = args.distill_terms or {'a': 'kl', 'b': 'contrastive'}[args.sides[0]]
    return ('contrastive', 'kl') if terms == 'both' else (terms,)


# Each imports the criterion when it is called, since that is slow.


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


def _dml(args, epochs, base_loss):
    from .criterion import StagedLoss, Term, base_term, kl_loss
    if args.dml_joint:
        return StagedLoss([
            base_term('a', base_loss),
            base_term('b', base_loss),
            Term('kl_a_loss', kl_loss('both', args.rho), args.kl_weight / 2),
            Term('kl_b_loss', kl_loss('both', args.rho, leader='a'), args.kl_weight / 2),
        ])
    return StagedLoss([
        base_term('a', base_loss),
        Term('kl_a_loss', kl_loss('a', args.rho), args.kl_weight),
        base_term('b', base_loss)._replace(phase=1),
        Term('kl_b_loss', kl_loss('b', args.rho), args.kl_weight, phase=1),
    ], phases=SIDES)


def _distill(args, epochs, base_loss):
    from .criterion import ContrastiveLoss, StagedLoss, Term, base_term, kl_loss
    [student] = args.sides
    pair_terms = {
        'contrastive': lambda: Term(
            'contrastive_loss',
            ContrastiveLoss(student, args.tau, args.similarity, args.same_class, args.gather),
            args.contrastive_weight,
        ),
        'kl': lambda: Term('kl_loss', kl_loss(student, args.rho), args.kl_weight),
    }
    return StagedLoss([base_term(student, base_loss), *(pair_terms[name]() for name in distill_terms(args))])


def _deit(args, epochs, base_loss):
    from .criterion import StagedLoss, Term, base_term, token_loss
    student, hard = args.student, args.distillation_type == 'hard'
    alpha = args.distillation_alpha if args.distillation_alpha is not None else 0.5 if hard else 0.1
    temperature = None if hard else args.distillation_tau
    return StagedLoss([
        *(base_term(side, base_loss) for side in args.sides if side != student),
        base_term(student, base_loss)._replace(weight=1 - alpha),
        Term(f'distill_{student}_loss', token_loss(student, temperature), alpha),
    ])


def _cosub(args, epochs, base_loss):
    from .criterion import StagedLoss, Term, base_term, submodel_loss
    return StagedLoss([
        *(base_term(side, base_loss)._replace(weight=0.25) for side in SIDES),
        *(Term(f'cosub_{side}_loss', submodel_loss(side, args.bce_sum), 0.25) for side in SIDES),
    ], views=2)


METHODS: dict[str, Method] = {
    'vpl': Method(
        'Vision Pair Learning',
        models=(2,),
        criterion=_vpl,
        passes=lambda options: 2,
        options=('x', 'y', 'rho', 'kl_to', 'kl_weight', 'contrastive_to', 'contrastive_weight', 'affine_side',
                 *CONTRASTIVE_OPTIONS),
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
    'dml': Method(
        'deep mutual learning',
        models=(2,),
        criterion=_dml,
        passes=lambda options: 2 if options.get('dml_joint') else 3,
        options=('rho', 'kl_weight', 'dml_joint'),
        updates=lambda options: 1 if options.get('dml_joint') else 2,
        projects=lambda args: False,
        citation='''@inproceedings{zhang2018dml,
  title = {Deep Mutual Learning},
  author = {Zhang, Ying and Xiang, Tao and Hospedales, Timothy M. and Lu, Huchuan},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2018}
}''',
    ),
    'distill': Method(
        'two-step distillation from a frozen teacher, with the terms of Vision Pair Learning',
        models=(1,),
        criterion=_distill,
        passes=lambda options: 2,
        options=('distill_terms', 'rho', 'kl_weight', 'contrastive_weight', *CONTRASTIVE_OPTIONS, *TEACHER_OPTIONS),
        projects=lambda args: 'contrastive' in distill_terms(args),
        teacher='always',
    ),
    'deit': Method(
        'distillation through a token, as DeiT',
        models=(1, 2),
        criterion=_deit,
        passes=lambda options: 2,
        options=('distillation_type', 'distillation_alpha', 'distillation_tau', *TEACHER_OPTIONS),
        projects=lambda args: False,
        teacher='alone',
        distilled=True,
        citation='''@inproceedings{touvron2021deit,
  title = {Training data-efficient image transformers and distillation through attention},
  author = {Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and Massa, Francisco and Sablayrolles, Alexandre and
            J{\\'e}gou, Herv{\\'e}},
  booktitle = {International Conference on Machine Learning},
  year = {2021}
}''',
    ),
    'cosub': Method(
        'cotraining of two submodels of one network',
        models=(1,),
        criterion=_cosub,
        passes=lambda options: 2,
        options=('drop_path_skip',),
        uniform_drop_path=True,
        bce=True,
        citation='''@article{touvron2022cosub,
  title = {Co-training 2^L Submodels for Visual Recognition},
  author = {Touvron, Hugo and Cord, Matthieu and Oquab, Maxime and Bojanowski, Piotr and Verbeek, Jakob and
            J{\\'e}gou, Herv{\\'e}},
  journal = {arXiv preprint arXiv:2212.04884},
  year = {2022}
}''',
    ),
}

METHOD_OPTIONS = sorted({name for method in METHODS.values() for name in method.options})
