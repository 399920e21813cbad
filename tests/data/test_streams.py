"""Streams: distributed over the workers of all processes, counted, shuffled; unreadable samples, published layouts."""
import itertools
import random
import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loading import CONFIG, CPU, options, refusal
from PIL import Image
from processes import run_ranks
from runs import NOISE, PAIR, SMALL, differences, rows, torchrun

from timm_vpl.core.processes import Processes
from timm_vpl.data import images as images_module
from timm_vpl.data.images import StreamImages
from timm_vpl.data.loaders import create_eval_loader, create_train_loader
from timm_vpl.data.order import part_of, shuffled
from timm_vpl.data.sources import SOURCES, Source
from timm_vpl.data.splits import create_split
from timm_vpl.engine.evaluate import evaluate
from timm_vpl.errors import RunError, UsageError

pytest.importorskip('webdataset', minversion='1.0', reason='the extra wds is not installed')
pytest.importorskip('datasets', reason='datasets is not installed')
from streams import encode, write_parquet, write_tars  # noqa: E402

NUMBER = 61  # a prime: no number of workers or shards divides it
KINDS = ('wds', 'hfids')


def picture(label):
    return encode(Image.fromarray(np.full((8, 8, 3), label, dtype=np.uint8)))


def write(kind, folder, images, shards, *splits):
    """Write images as splits, and return the options that read them."""
    for split in splits:
        if kind == 'wds':
            write_tars(folder, split, images, shards)
        else:
            write_parquet(folder, split, images, shards, NUMBER)
    place = ['--dataset', 'wds/x', '--data-dir', folder] if kind == 'wds' else ['--dataset', f'hfids/{folder}']
    return [*place, '--num-classes', NUMBER, *(
        word for name in ('train', 'val') for word in (f'--{name}-num-samples', len(images)))]


@pytest.fixture(scope='module')
def streams(tmp_path_factory):
    """The options of each kind and number of shards; a label tells an image."""
    images = [(picture(label), label) for label in range(NUMBER)]
    return {
        (kind, shards): write(kind, tmp_path_factory.mktemp('stream') / kind, images, shards, 'train', 'validation')
        for kind in KINDS for shards in (1, 4, 7)}


def open_stream(argv, split='train'):
    asked = options(*argv)
    images = create_split(asked.data, split, 3, 8, is_training=split == 'train')
    images.num_classes = NUMBER
    return images


def labels(images, monkeypatch, workers, rank, world, *of_training):
    """What each worker of a process reads, as if it were one."""
    images.distribute(workers, Processes(CPU, rank, world), *of_training)
    read = []
    for worker in range(max(1, workers)):
        info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
        monkeypatch.setattr(images_module, 'get_worker_info', lambda info=info: info)
        read.append([label for _, label, *_ in images])
    return read


# Counts


STREAMS = [('wds', 1), ('wds', 4), ('wds', 7), ('hfids', 4), *(
    pytest.param('hfids', shards, marks=pytest.mark.slow) for shards in (1, 7))]
GRID = [*itertools.product((1, 2, 3), (0, 1, 2, 4))]  # processes, workers


@pytest.mark.parametrize('kind, shards', STREAMS)
def test_each_image_is_validated_once(streams, monkeypatch, kind, shards):
    images = open_stream(streams[kind, shards], 'validation')
    for world, workers in GRID:
        read = [label for rank in range(world) for part in labels(images, monkeypatch, workers, rank, world)
                for label in part]
        assert sorted(read) == [*range(NUMBER)], (world, workers)


@pytest.mark.parametrize('kind, shards', STREAMS)
def test_an_epoch_of_training_has_as_many_images_on_each_process(streams, monkeypatch, kind, shards):
    images = open_stream(streams[kind, shards])
    for world, workers in GRID:
        batches = NUMBER // (4 * world)
        read = [labels(images, monkeypatch, workers, rank, world, 0, batches, 4) for rank in range(world)]
        for parts in read:  # torch takes whole batches in turn
            assert [len(part) / 4 for part in parts] == [len(range(i, batches, len(parts))) for i in range(len(parts))]
        seen = Counter(label for parts in read for part in parts for label in part)
        assert max(seen.values()) <= 2 and len(seen) >= 4 * batches * world - max(1, workers * world // 2), (
            world, workers, seen)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('workers', [0, 2])
def test_epochs_of_a_loader(streams, monkeypatch, kind, workers):
    argv = [*streams[kind, 4], '-j', workers]
    read, loader = [], create_train_loader(options(*argv), open_stream(argv), CONFIG, NUMBER, Processes(CPU))
    for epoch in (0, 1, 0):
        batches = [target.tolist() for _, _, target, _ in loader.epoch(epoch)]
        assert len(batches) == len(loader) == 7 and loader.skipped == 0
        read.append(batches)
    assert read[0] == read[2] != read[1] and read[0][0] != sorted(read[0][0])
    assert re.match(r', while worker 0 reads \S', loader.images.being_read())
    held = create_eval_loader(options(*argv).loader, open_stream(argv, 'validation'), CONFIG, Processes(CPU))
    for _ in range(2):
        assert sorted(label for _, target in held for label in target.tolist()) == [*range(NUMBER)]
    parts = labels(open_stream(argv), monkeypatch, workers, 0, 1, 42, 7, 8)
    assert [sum(read[0][i::len(parts)], []) for i in range(len(parts))] == parts


def count(argv, processes):
    """Evaluate a stream; return its images and how often the processes decided."""
    loader = create_eval_loader(options(*argv).loader, open_stream(argv, 'validation'), CONFIG, processes)
    calls, chance = [], torch.zeros(1, NUMBER)
    try:
        found = evaluate(
            lambda images: {'a': chance.expand(len(images), -1)}, ['a'], loader, CPU,
            distributed=processes.distributed, after_batch=lambda: calls.append(1))
    except RunError as e:
        return str(e)
    return found['a']['images'], len(calls)


def count_cases(streams, rank, world):
    processes = Processes(CPU, rank, world)
    return [
        count([*streams[kind, shards], '-vb', 7, '-j', workers, '--val-num-samples', told], processes)
        for kind, shards, workers, told in (('wds', 1, 2, 61), ('hfids', 4, 0, 61), ('wds', 7, 1, 60))]


def test_counts_of_real_processes(streams, tmp_path):
    assert run_ranks(tmp_path, 3, partial(count_cases, streams)) == 3 * [[(NUMBER, 3), (NUMBER, 3), (
        'data: the stream has 61 images, not 60; give --val-num-samples 61, unless a line above names a shard '
        'that could not be read')]]


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shards', [1, 4, 7])
@pytest.mark.parametrize('world', [1, 2, 3])
def test_counts_of_real_workers(streams, kind, shards, world):
    for workers in (0, 1, 2, 4):
        argv, seen = [*streams[kind, shards], '-j', workers], []
        for rank in range(world):
            processes = Processes(CPU, rank, world)
            loader = create_train_loader(options(*argv), open_stream(argv), CONFIG, NUMBER, processes)
            assert [len(target) for _, _, target, _ in loader.epoch(1)] == [8] * (NUMBER // (8 * world))
            loader = create_eval_loader(options(*argv).loader, open_stream(argv, 'validation'), CONFIG, processes)
            seen += [label for _, target in loader for label in target.tolist()]
        assert sorted(seen) == [*range(NUMBER)]


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_run_of_two_processes(streams, tmp_path, kind):
    """Its epochs are as long as those of a folder, and another run ends as it does."""
    argv = [*PAIR, *SMALL, *NOISE, *streams[kind, 4], '--workers', '2', '--mixup', '0.2', '--experiment', 'run']
    for name in ('one', 'two'):
        torchrun(2, *argv, '--output', tmp_path / name)
    assert [(row['images'], row['skipped']) for row in rows(tmp_path / 'one' / 'run')] == [('48', '0')] * 2
    assert not differences(*(tmp_path / name / 'run' for name in ('one', 'two')))


LAYOUTS = [(1281167, 1024, 256), (1281167, 1282, 256), (50000, 64, 0), (50000, 50, 0)]  # images, shards, batch size


@pytest.mark.parametrize('world, few', [(8, True), pytest.param(128, False, marks=pytest.mark.slow)])
@pytest.mark.parametrize('number, shards, batch_size', LAYOUTS)
def test_layouts_of_imagenet(number, shards, batch_size, world, few):
    """12 workers a process, counted without images: each once, and of an epoch of training none twice."""
    lengths = [len(part) for part in np.array_split(np.arange(number), shards)]
    units, workers = (number // (batch_size * world), 12) if batch_size else (12, 12)
    for known in (lengths, [1] * shards):
        seen, read = [np.zeros(length, dtype=int) for length in lengths], 0
        ends = [rank * units + len(range(units)) * worker // workers for rank in range(world)
                for worker in range(workers)] + [world * units]
        for first, last in itertools.pairwise(ends):
            size = 0
            for piece in part_of(first, last, world * units, known):
                held = piece.holds(np.arange(lengths[piece.shard]))
                seen[piece.shard] += held
                size, read = size + held.sum(), read + len(held)
            assert size >= (last - first) * batch_size
        assert all((each == 1).all() for each in seen)
        assert read / number < 1.1 + 2 * world * workers / shards


def test_dealing_of_unequal_shards():
    lengths = [1, 1000, 3, 400, 2, 2000]
    pieces = [part_of(part, part + 1, 10, lengths) for part in range(10)]
    sizes = [sum(piece.holds(np.arange(lengths[piece.shard])).sum() for piece in each) for each in pieces]
    assert sum(sizes) == sum(lengths) and max(sizes) - min(sizes) < 8
    assert part_of(3, 3, 10, lengths) == []


def test_shuffled():
    for size in (1, 2, 10, 100, 1000):
        assert sorted(shuffled(range(100), size, random.Random(0))) == [*range(100)]
    once, again = (list(shuffled(range(100), 40, random.Random(seed))) for seed in (0, 1))
    assert once != again and max(value - place for place, value in enumerate(once)) <= 40


# What goes wrong


@pytest.mark.parametrize('kind', KINDS)
def test_images_that_can_not_be_read(tmp_path, caplog, kind):
    images = [(picture(label), label) for label in range(20)]
    for broken in (3, 11, 19):
        images[broken] = (b'no image', broken)
    argv = [*write(kind, tmp_path / 'x', images, 2, 'train', 'validation'), '-j', 0]
    assert count(argv, Processes(CPU)) == (17, 3)
    assert [record.getMessage() for record in caplog.records if 'Skipped' in record.getMessage()] == [
        f'Skipped sample {place}: not an image that Pillow can read'
        for place in (['3 of validation-0.tar', '1 of validation-1.tar', '9 of validation-1.tar'] if kind == 'wds' else
                      ['3 of shard 0', '1 of shard 1', '9 of shard 1'])]
    loader = create_train_loader(options(*argv), open_stream(argv), CONFIG, NUMBER, Processes(CPU))
    assert [len(target) for _, _, target, _ in loader.epoch(0)] == [8, 8] and loader.skipped in (2, 3)
    argv = write(kind, tmp_path / 'y', [(b'no image', label) for label in range(20)], 1, 'train')
    assert refusal(open_stream(argv)) == (
        f'data: Failed to load 10 consecutive samples, the last sample 9 of '
        f'{"train-0.tar" if kind == "wds" else "shard 0"}: not an image that Pillow can read')


@pytest.mark.parametrize('kind', KINDS)
def test_labels_and_columns(streams, kind):
    images = open_stream(streams[kind, 4], 'validation')
    images.num_classes = 4
    place = '4 of validation-0.tar' if kind == 'wds' else '4 of shard 0'
    assert refusal(images) == f'data: sample {place} has the label 4, not one of the 4 classes, 0 to 3'
    argv = [*streams[kind, 4], '--target-key', 'x']
    assert refusal(open_stream(argv)) == (
        'data: Failed to load 10 consecutive samples, the last sample 9 of train-0.tar: '
        "Target key(s) ['x'] require a json sidecar, sample '000009' has none."
        if kind == 'wds' else "data: sample 0 of shard 0: 'x' is not a column of the data, or not in --class-map")


@pytest.mark.parametrize('argv, message', [
    (['-b', 62], '--batch-size 62: 1 batch(es) of that size are more than the 61 training images'),
    (['--train-split', 'none'], ': split \'none\' could not be read: '),
])
@pytest.mark.parametrize('kind', KINDS)
def test_what_is_refused(streams, kind, argv, message):
    argv = [*streams[kind, 4], *argv]
    with pytest.raises(UsageError) as refused:
        images = create_split(options(*argv).data, options(*argv).data.train_split, 3, is_training=True)
        create_train_loader(options(*argv), images, CONFIG, NUMBER, Processes(CPU))
    assert message in str(refused.value)


def test_a_worker_without_images(tmp_path):
    argv = write('wds', tmp_path, [(picture(label), label) for label in range(4)], 1, 'train')
    images = open_stream([*argv, '--train-num-samples', 64])
    assert len(images) == 64
    images.distribute(0, Processes(CPU, 15, 16), 0, 4, 1)
    assert refusal(images) == (
        'data: a worker has no images in its part of the 1 shards; use fewer --workers')


class Given:
    """A reader that distributes its own images, as that of tfds/ does."""
    num_samples, class_to_idx = 16, {}

    def set_epoch(self, epoch):
        self.start = epoch

    def set_loader_cfg(self, num_workers):
        self.num_workers = num_workers

    def __iter__(self):
        labels = itertools.islice(itertools.cycle(range(4)), self.start, None)
        return ((torch.zeros(3, 4, 4, dtype=torch.uint8), label) for label in labels)


def test_a_stream_without_shards():
    images = StreamImages(Given(), Source(SOURCES['tfds'].open, is_stream=True))
    images.num_classes = 3
    loader = create_train_loader(options('.'), images, CONFIG, 4, Processes(CPU))
    loader.images.transform = None
    assert len(loader) == 2
    assert refusal(loader.epoch(0)) == (
        'data: a sample of the stream has the label 3, not one of the 3 classes, 0 to 2')
    loader.images.num_classes = images.num_classes = 4
    assert [target.tolist() for _, _, target, _ in loader.epoch(1)] == [[1, 2, 3, 0] * 2] * 2
    images.distribute(3, Processes(CPU, 1, 2))
    assert len([*images]) == 8 and images.reader.num_workers == 3  # without what makes shares equal
    with pytest.raises(UsageError, match='--workers 0: this kind of --dataset needs a worker'):
        images.distribute(0, Processes(CPU, 1, 2))
