#!/usr/bin/env python3
"""Time of a training step: the pair against its branches alone, the pair terms, mutual learning, skipped drop path.

All cases are blocks of steps of the package's own loop (forward, loss, backward, AdamW, EMA) on one batch that lies
on the device, in turn: A, B, A, B, ... Ratios are of times of one round.

  solo   pair step / (step of a alone + step of b alone)
  terms  stage 2 (contrastive, KL, affine layer) against both weights 0: time, on CUDA peak memory
  dml    deep mutual learning as published (three forwards, two backwards) against the sum of its pieces, and against
         a VPL step; and what it would cost with four forwards
  cosub  drop path 0.5 of a ViT under cosub: blocks skip (--drop-path-skip) against blocks are masked
"""
import gc

import common
import torch
from common import EPOCHS, add, arguments, block, create_fixed, create_parser, interleave, parse


def solo(options, report):
    runs = {
        'pair': create_fixed(arguments(options, 'vpl'), options.steps),
        'solo a': create_fixed(arguments(options, 'solo', 'a'), options.steps),
        'solo b': create_fixed(arguments(options, 'solo', 'b'), options.steps),
    }
    seconds = _measure(options, report, 'solo', {name: block(run) for name, run in runs.items()})
    report.ratios('solo', {'pair / (solo a + solo b)': (seconds['pair'], add(seconds['solo a'], seconds['solo b']))})


def terms(options, report):
    runs = {
        'terms on': create_fixed(arguments(options, 'vpl'), options.steps),
        'terms off': create_fixed(
            arguments(options, 'vpl', 'ab', '--contrastive-weight', 0, '--kl-weight', 0), options.steps),
    }
    for name, run in runs.items():
        print(f'# {name}: {run.task.criterion.describe()}')
    seconds = _measure(options, report, 'terms', {name: block(run) for name, run in runs.items()})
    report.ratios('terms', {'terms on / terms off': (seconds['terms on'], seconds['terms off'])})


def dml(options, report):
    alone = {side: create_fixed(arguments(options, 'solo', side), options.steps) for side in 'ab'}
    cases = {
        'dml': block(create_fixed(arguments(options, 'dml'), options.steps)),
        'vpl': block(create_fixed(arguments(options, 'vpl'), options.steps)),
        'solo a': block(alone['a']),
        'solo b': block(alone['b']),
        'forward a': _forwards(alone['a'], 'a', options.steps),
        'forward b': _forwards(alone['b'], 'b', options.steps),
    }
    seconds = _measure(options, report, 'dml', cases)
    bound = add(seconds['solo a'], seconds['solo b'], seconds['forward a'])
    redone = add(seconds['dml'], seconds['forward b'])
    report.ratios('dml', {
        'dml / (solo a + solo b + forward a)': (seconds['dml'], bound),
        'dml / vpl': (seconds['dml'], seconds['vpl']),
        'four forwards (dml + forward b) / vpl': (redone, seconds['vpl']),
        'four forwards (dml + forward b) / dml': (redone, seconds['dml']),
        'bound / vpl': (bound, seconds['vpl']),
    })


def _forwards(run, side, steps):
    """Return a function that runs a branch's forwards of a block, in training mode and without a graph."""
    @torch.no_grad()
    def forwards():
        run.task.train()
        for _, input, _, _ in run.loader_train.epoch(0):
            with run.autocast():
                run.pair.run(side, run.pair.images(side, input))
    return forwards


def cosub(options, report):
    cases = {}
    for name, extra in (('skipped', ['--drop-path-skip']), ('masked', [])):
        argv = arguments(options, 'cosub', '', '--model-b', options.cosub_model, '--drop-path', 0.5, *extra)
        argv[argv.index('--batch-size') + 1] = str(options.cosub_batch_size or options.batch_size)
        cases[name] = block(create_fixed(argv, options.steps))
    seconds = _measure(options, report, 'cosub', cases, options.cosub_batch_size)
    report.ratios('cosub', {'masked / skipped': (seconds['masked'], seconds['skipped'])})


def _measure(options, report, question, cases, batch_size=None):
    seconds, peaks = interleave(cases, options.repeats, options.warmup, options.device)
    report.times(question, seconds, options.steps, images=batch_size or options.batch_size, peaks=peaks)
    return seconds


QUESTIONS = {'solo': solo, 'terms': terms, 'dml': dml, 'cosub': cosub}


def main(argv=None):
    parser = create_parser(__doc__)
    parser.add_argument('--question', default='all', choices=[*QUESTIONS, 'all'])
    parser.add_argument('--cosub-model', help='the ViT of cosub')
    parser.add_argument('--cosub-batch-size', type=int, help='its batch, of which it sees two views')
    options = parse(
        parser, argv,
        cpu={'cosub_model': 'vit_tiny_patch16_224', 'cosub_batch_size': 32},
        cuda={'cosub_model': 'vit_base_patch16_224'},
    )
    print(f'# stage 2 is epoch {common.STAGE_2} of {EPOCHS}; a block has {options.steps} steps')
    report = common.Report('step', options)
    for name, question in QUESTIONS.items():
        if options.question in (name, 'all'):
            question(options, report)
            gc.collect()
            torch.cuda.empty_cache()
    report.save()


if __name__ == '__main__':
    main()
