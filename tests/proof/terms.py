"""Each term trains two epochs, goes on from the middle of an epoch to the bit, and is exported; 1 process and 2.

    python tests/proof/terms.py DIR     (DIR: a folder with train and validation, or its splits by --train-split ...)

Tiny networks at 32 pixels; further arguments are those of training, a last one may name the terms. A layer of a term
must have moved.
"""
import shutil
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runs import PAIR, differences, last, torchrun  # noqa: E402

DEIT = ['--model-b', 'deit_tiny_distilled_patch16_224', '--model-kwargs-b', 'embed_dim=48', 'depth=4', 'num_heads=3',
        'patch_size=8']
TERMS = {
    'contrastive': ['contrastive,learner=b'],
    'kl': ['kl,learner=b,temperature=4,standardize=true', 'kl,learner=a,leader=average,when=leader-ahead'],
    'tokens': ['tokens,learner=b,weight=10,over=fade'],
    'embed': ['embed,learner=b'],
    'dkd': ['dkd,learner=b,confidence=true'],
    'dist': ['dist,learner=a'],
    'ofa': ['ofa,learner=b,features=stage2+stage4,exponent=1.2'],
    'token': ['token,learner=b,alpha=0.5'],
}


def main(data, *options):
    only = options[-1].split(',') if options and options[-1].split(',')[0] in TERMS else TERMS
    options = options if only is TERMS else options[:-1]
    for name, terms in ((name, TERMS[name]) for name in only):
        for processes in (1, 2):
            started = time.time()
            with tempfile.TemporaryDirectory() as folder:
                check(Path(folder), name, terms, processes, [data, *options])
            seconds = time.time() - started
            print(f'{name}, {processes} process(es): goes on to the bit, exported, {seconds:.0f} s', flush=True)


def check(folder, name, terms, processes, options):
    argv = [
        *options, '--method', 'pair', *(word for term in terms for word in ('--term', term)), *PAIR,
        *(DEIT if name == 'token' else []), '--img-size', '32', '-b', str(64 // processes), '--epochs', '2',
        '--lr', '0.001', '--warmup-epochs', '0', '--workers', '0', '--recovery-interval', '5', '--device', 'cpu',
        '--experiment', 'run']
    torchrun(processes, *argv, '--output', folder / 'whole')
    whole = folder / 'whole' / 'run'
    part = shutil.copytree(folder / 'whole', folder / 'part') / 'run'
    recovery = sorted(part.glob('recovery-1-*.pth.tar'))[0]
    torchrun(processes, *argv, '--output', folder / 'part', '--resume', recovery)
    assert not differences(whole, part), differences(whole, part)
    state, middle = (last_state.get('criterion', {}) for last_state in (
        last(whole)['task_state'], torch.load(recovery, weights_only=True)['task_state']))
    assert (name in ('tokens', 'ofa', 'embed')) == bool(state)
    for key, value in state.items():
        assert not torch.equal(value, middle[key]), f'{key} has not moved'
    assert not [key for key in last(whole)['state_dict'] if 'function' in key]
    for exported in (whole / 'export').iterdir():
        timm.create_model(f'local-dir:{exported}', pretrained=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
