#!/usr/bin/env python3
"""Training that waits for its data: decode and augmentation alone, then whole epochs of the pair against a and b alone.

The pair decodes and augments an image once for two models, so where the loader is the bottleneck its epoch costs about
half of the two that a and b alone cost together. AutoAugment (timm's v0), random crop, flip and random erasing are on.
The images are a folder (--data-dir) or generated JPEGs of 500 x 375, ImageNet's usual size.

Rounds: loader alone, pair, a alone, b alone, ... An epoch of one number has the same images and augmentations in all.
'step alone' is the time of the same steps on a batch that lies on the device: where it is above the loader's time,
data is not the bottleneck and the ratio says nothing about it.
"""
import itertools
import statistics

import common
from common import PRECISIONS, add, arguments, block, create, create_fixed, create_parser, interleave, parse


def data_arguments(options, method: str, sides: str, workers: int) -> list[str]:
    """Return the command line of a run that reads the folder."""
    argv = [
        '--data-dir', options.data_dir, '--method', method, '--device', options.device, '--epochs', common.EPOCHS,
        '--batch-size', options.batch_size, '--img-size', options.img_size, '--num-classes', options.num_classes,
        '--workers', workers, '--aa', options.aa, *PRECISIONS[options.precision],
    ]
    for side in sides:
        argv += [f'--model-{side}', getattr(options, f'model_{side}')]
    argv += ['--pin-mem'] if options.pin_mem else []
    argv += ['--channels-last-a'] if options.channels_last_a and 'a' in sides else []
    argv += ['--torchcompile', options.torchcompile] if options.torchcompile else []
    return [str(item) for item in argv]


def loader_epochs(run):
    """Return a function that reads an epoch of a run's batches and does nothing with them."""
    epochs = itertools.count()

    def read():
        for _ in run.loader_train.epoch(next(epochs)):
            pass
    return read


def training_epochs(run):
    """Return a function that trains the next epoch, its terms those of stage 2."""
    epochs = itertools.count()
    return lambda: block(run, next(epochs))()


def main(argv=None):
    parser = create_parser(__doc__)
    extra = parser.add_argument
    extra('--data-dir', help='folder with train and validation; by default generated', metavar='DIR')
    extra('--num-images', type=int, help='images of the generated folder')
    extra('--image-width', type=int, default=500)
    extra('--image-height', type=int, default=375)
    extra('--aa', default='v0', help='augmentation policy')
    extra('--pin-mem', action='store_true', help='pin the memory of the loader')
    extra('--rate-workers', type=int, nargs='*', default=[], help='further numbers of workers for the loader alone')
    options = parse(
        parser, argv,
        cpu={'model_a': 'test_efficientnet', 'num_images': 512, 'img_size': 32, 'repeats': 5, 'workers': 1},
        cuda={'num_images': 4096, 'repeats': 3, 'warmup': 1, 'workers': 2},
    )
    if not options.data_dir:
        options.data_dir = common.create_folder(options.num_images, options.image_width, options.image_height)
    report = common.Report('data', options)

    runs = {
        'pair': create(data_arguments(options, 'vpl', 'ab', options.workers)),
        'solo a': create(data_arguments(options, 'solo', 'a', options.workers)),
        'solo b': create(data_arguments(options, 'solo', 'b', options.workers)),
    }
    steps = len(runs['pair'].loader_train)
    images = steps * options.batch_size
    print(f'# an epoch has {steps} steps, {images} images')

    rates = {
        f'{workers} workers': loader_epochs(create(data_arguments(options, 'solo', 'a', workers)))
        for workers in [options.workers, *options.rate_workers]}
    seconds, _ = interleave(rates, options.repeats, options.warmup, options.device)
    report.times('loader alone', seconds, images=images)
    loader_ms = statistics.median(next(iter(seconds.values()))) / steps * 1e3

    alone = {
        name: block(create_fixed(arguments(options, method, sides), options.steps))
        for name, method, sides in (('pair', 'vpl', 'ab'), ('solo a', 'solo', 'a'), ('solo b', 'solo', 'b'))}
    seconds, _ = interleave(alone, 3, 1, options.device)
    step_ms = {name: statistics.median(values) / options.steps * 1e3 for name, values in seconds.items()}
    report.table('step alone', ['case', 'ms a step', 'ms a batch of the loader', 'bottleneck'], [
        [name, f'{value:.1f}', f'{loader_ms:.1f}', 'data' if loader_ms > value else 'compute']
        for name, value in step_ms.items()])

    seconds, _ = interleave(
        {name: training_epochs(run) for name, run in runs.items()},
        options.repeats, options.warmup, options.device)
    report.times('epoch', seconds, images=images)
    report.ratios('epoch', {'pair / (solo a + solo b)': (seconds['pair'], add(seconds['solo a'], seconds['solo b']))})
    report.save()


if __name__ == '__main__':
    main()
