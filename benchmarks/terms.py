"""What each term adds to a training step: forwards, its own parameters, and bytes kept for the backward pass.

    python benchmarks/terms.py [--model-a resnet18] [--model-b vit_tiny_patch16_224] [--img-size 224] [--batch-size 8]

A term alone to branch b, with its default options, on random images, against the same step without a term.
"""
import argparse

import timm
import torch

from timm_vpl import METHODS, PairTask, PairWrapper
from timm_vpl.core.method_options import PairOptions
from timm_vpl.core.methods import Setting
from timm_vpl.engine.models import feature_width

TERMS = [
    'kl,learner=b,temperature=4', 'kl,learner=b,temperature=4,leader=average', 'kl,learner=b,confidence=true',
    'kl,learner=b,temperature=2,standardize=true', 'dkd,learner=b', 'dist,learner=b', 'ofa,learner=b',
    'ofa,learner=b,features=stage1+stage2+stage3+stage4', 'contrastive,learner=b', 'embed,learner=b',
    'tokens,learner=b',
    'tokens,learner=b,norm=layer', 'tokens,learner=b,grid=larger,norm=none']


def measure(args, terms):
    """Return (forwards of networks, parameters of terms, bytes kept) of a training step."""
    torch.manual_seed(0)
    models = [timm.create_model(name, num_classes=100, **({'img_size': args.img_size} if 'vit' in name else {}))
              for name in (args.model_a, args.model_b)]
    pair = PairWrapper(*models, affine=any(term.startswith('contrastive') for term in terms)).eval()
    configs = {side: {'input_size': (3, args.img_size, args.img_size)} for side in 'ab'}
    setting = Setting('ab', 10, num_classes=100, width=feature_width(pair, None, configs))
    criterion = METHODS['pair'].criterion(PairOptions(terms=tuple(terms)), setting)
    criterion.set_epoch(0)
    task = PairTask(pair, criterion, verbose=False).train()
    known = {id(parameter.untyped_storage()) for parameter in task.parameters()}
    kept, forwards = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for model in models:
        model.register_forward_hook(lambda *_: forwards.append(1))
    images, labels = torch.randn(args.batch_size, 3, args.img_size, args.img_size), torch.arange(args.batch_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task(images, labels)['loss']
    total = sum(kept.values())
    loss.backward()
    return len(forwards), sum(parameter.numel() for parameter in criterion.parameters()), total


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--model-a', default='resnet18')
    parser.add_argument('--model-b', default='vit_tiny_patch16_224')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--batch-size', type=int, default=8)
    args = parser.parse_args()
    plain = measure(args, [])
    print('| term | forwards | parameters | kept for the backward pass |\n|---|---|---|---|')
    for term in TERMS:
        forwards, parameters, kept = measure(args, [term])
        print(f'| `{term}` | {forwards - plain[0]:+d} | {parameters:,} | {100 * (kept / plain[2] - 1):+.2f} % |')


if __name__ == '__main__':
    main()
