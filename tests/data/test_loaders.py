"""Loaders, with real files and real workers: order and draws, what is counted, workers that die."""
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import CONFIG, CPU, eval_loader, options, refusal, split, train_loader
from timm.data import FastCollateMixup, ImageDataset, create_loader
from torch.utils.data import Dataset

from timm_vpl.core.processes import Processes
from timm_vpl.core.seeding import seed_all
from timm_vpl.data.loaders import create_eval_loader, create_eval_loaders
from timm_vpl.data.order import SampleDraw, SeededDataset, SeededErasing, SeededSampler
from timm_vpl.data.splits import split_card
from timm_vpl.engine.boundary import as_line

# Order and draws


def global_batches(world_size, batch_size, epoch=3, **kwargs):
    samplers = [
        SeededSampler(50, batch_size, seed=1, rank=rank, world_size=world_size, **kwargs)
        for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    places = [list(sampler) for sampler in samplers]
    assert {len(share) for share in places} == {len(samplers[0])}
    steps = len(samplers[0]) // batch_size
    return [
        sorted(place for share in places for place in share[step * batch_size:(step + 1) * batch_size])
        for step in range(steps)]


class Draws(Dataset):
    """What is drawn where an image would be."""

    def __getitem__(self, index):
        return float(torch.rand(())), index


def test_draws_are_those_of_a_place():
    dataset = SeededDataset(Draws(), seed=1)
    drawn = {(epoch, position): dataset[SampleDraw(epoch, position, 5)][0] for epoch in (0, 1) for position in (0, 1)}
    assert len(set(drawn.values())) == 4 and dataset[SampleDraw(1, 0, 6)][0] == drawn[1, 0]
    assert SeededDataset(Draws(), seed=2)[SampleDraw(0, 0, 5)][0] not in drawn.values()

    def erased(epoch, batch, count, rank=0):
        erasing = SeededErasing(lambda input: float(torch.rand(())), 1, rank, torch.device('cpu'))
        erasing.position = (epoch, batch)
        return [erasing(None) for _ in range(count)]
    whole = erased(0, 0, 3)
    assert erased(0, 1, 2) == whole[1:]
    assert len({*whole, *erased(1, 0, 3), *erased(0, 0, 3, rank=1)}) == 9


def test_mixup_ends_with_its_epoch(digits_folder):
    loader = train_loader(
        digits_folder, '--mixup', '0.8', '--smoothing', '0', '--mixup-off-epoch', '1')
    hard = {epoch: [bool((target.max(dim=1).values == 1).all()) for _, _, target, _ in loader.epoch(epoch)]
            for epoch in (0, 1)}
    assert not all(hard[0]) and all(hard[1])


def test_a_global_batch_is_the_same_for_any_number_of_processes():
    assert global_batches(1, 12) == global_batches(2, 6) == global_batches(3, 4) == global_batches(4, 3)
    indices, other = (
        [place.index for batch in global_batches(2, 6, epoch=epoch) for place in batch] for epoch in (3, 4))
    assert indices != other
    assert len(set(indices)) == len(indices) == 48  # whole batches of the 50, none twice


def test_repeated_augmentation_copies_lie_together_and_draw_differently():
    for batch in global_batches(2, 6, repeats=3):
        indices = [place.index for place in sorted(batch, key=lambda place: place.position)]
        assert all(len(set(indices[i:i + 3])) == 1 for i in range(0, 12, 3))
        assert len({place.position for place in batch}) == 12
    sampler = SeededSampler(50, 6, seed=1, repeats=1.5)
    places = list(sampler)
    assert sampler.sample_ids(2).tolist() == [place.index for place in places[12:18]]
    assert max(np.bincount([place.index for place in places])) == 2


def test_an_epoch_entered_later_goes_on_where_it_would_be():
    sampler = SeededSampler(50, 6, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, first_batch=3)
    assert list(sampler) == whole[18:] and len(sampler) == 48


AUGMENTATION = {
    'plain': (['--reprob', '0'], {'auto_augment': 'original', 'interpolation': 'random'}),
    'none': (['--no-aug', '--reprob', '0.5'], {'no_aug': True, 're_prob': 0.5, 'interpolation': 'bilinear'}),
    'all': (
        ['--aa', 'rand-m5-n1', '--reprob', '0.5', '--remode', 'pixel', '--recount', '2', '--resplit', '--vflip', '0.3',
         '--scale', '0.3', '0.9', '--ratio', '0.5', '2', '--train-crop-mode', 'rkrc', '--color-jitter-prob', '0.4',
         '--grayscale-prob', '0.3', '--gaussian-blur-prob', '0.3', '--train-interpolation', 'bicubic', '--mixup',
         '0.8', '--cutmix', '1', '--smoothing', '0.1'],
        {'auto_augment': 'rand-m5-n1', 're_prob': 0.5, 're_mode': 'pixel', 're_count': 2, 're_split': True,
         'vflip': 0.3, 'scale': (0.3, 0.9), 'ratio': (0.5, 2), 'train_crop_mode': 'rkrc', 'color_jitter_prob': 0.4,
         'grayscale_prob': 0.3, 'gaussian_blur_prob': 0.3, 'interpolation': 'bicubic', 'collate_fn': FastCollateMixup(
             mixup_alpha=0.8, cutmix_alpha=1., label_smoothing=0.1, num_classes=4)}),
}


@pytest.mark.parametrize('case', AUGMENTATION)
def test_batches_are_timms_drawn_at_their_places(digits_folder, case):
    argv, kwargs = AUGMENTATION[case]
    loader = train_loader(digits_folder, '--seed', 5, *argv)
    config = {key: CONFIG[key] for key in ('input_size', 'mean', 'std')}
    timms = create_loader(
        ImageDataset(str(digits_folder / 'train')), batch_size=8, is_training=True, num_workers=0, device=CPU,
        **config, **kwargs)
    loader.order.set_epoch(1)
    places = list(loader.order)
    for batch, input, target, ids in loader.epoch(1):
        samples = []
        for place in places[8 * batch:8 * batch + 8]:
            seed_all(5, 'sample', 1, place.position)
            samples.append(timms.dataset[place.index])
        seed_all(5, 'batch', 1, 8 * batch)
        images, wanted = timms.loader.collate_fn(samples)
        images = images.float().sub_(timms.mean).div_(timms.std)
        if timms.random_erasing is not None:
            seed_all(5, 'erase', 1, batch, 0)
            images = timms.random_erasing(images)
        assert torch.equal(input, images) and torch.equal(target, wanted) and ids is None
    assert batch == 4


# Images that are replaced


def run_epochs(loader, *starts):
    batches, counts = [], []
    for epoch, first_batch in starts:
        for _, input, target, _ in loader.epoch(epoch, first_batch):
            batches.append((input, target))
            counts.append(loader.skipped)
    return batches, counts


def test_skipped_images_are_counted_by_batch_and_draw_for_their_place(folder):
    # 3 broken files of 40, and the same set with the next files' content in their place
    whole, broken = shutil.copytree(folder, folder.parent / 'whole'), (17, 5, 4)
    names = split(folder).reader.filenames()
    for index in broken:
        (folder / 'train' / names[index]).write_bytes(b'')
        shutil.copy(whole / 'train' / names[index + 1], whole / 'train' / names[index])
    argv = ['--aa', 'rand-m5-n1', '--reprob', '0.5', '--mixup', '0.2']
    starts = [(0, 0), (1, 0), (1, 3)]
    expected, none = run_epochs(train_loader(whole, *argv), *starts)
    assert set(none) == {0}
    for workers in (0, 2):
        loader = train_loader(folder, *argv, '-j', workers)
        counts = []
        for epoch, first_batch in starts:
            loader.order.set_epoch(epoch)
            per_batch = [len(set(broken) & set(loader.order.sample_ids(batch).tolist())) for batch in range(5)]
            counts += itertools.accumulate(per_batch[first_batch:])
        batches, found = run_epochs(loader, *starts)
        assert found == counts and counts[4] == counts[9] == 3
        assert all(torch.equal(a, b) for one, other in zip(batches, expected, strict=True)
                   for a, b in zip(one, other, strict=True))
    assert split_card(loader.images) == split_card(split(folder))


@pytest.mark.parametrize('workers', [0, 2])
def test_validation_counts_what_a_pass_skips(folder, workers):
    bad = folder / 'validation' / 'class1' / '0000.png'
    bad.write_bytes(b'')
    loader = eval_loader(folder, '-j', workers)
    pair = create_eval_loaders(
        options(folder, '-j', workers).loader, loader.dataset,
        {'a': CONFIG, 'b': {**CONFIG, 'interpolation': 'bicubic'}}, Processes(CPU))
    for each in (loader, pair, loader):
        assert sum(len(target) for _, target in each) == 18 and int(each.dataset.replaced.sum()) == 1
    shutil.copy(next((folder / 'train').rglob('*.png')), bad)
    assert len(list(loader)) == 3 and not loader.dataset.replaced.any()


def test_no_worker_is_started_without_a_batch_for_it(folder):
    assert [eval_loader(folder, '-j', given).loader.num_workers for given in (0, 2, 8)] == [0, 2, 3]


@pytest.mark.parametrize('workers', [0, 2])
def test_what_ends_a_run_is_one_line(folder, workers):
    dataset = split(folder, name='validation')
    dataset.num_classes = 3
    first = next(name for name in dataset.reader.filenames() if name.startswith('class3'))
    assert refusal(create_eval_loader(options('.', '-j', workers).loader, dataset, CONFIG, Processes(CPU))) == (
        f'data: {first} (index {dataset.reader.filenames().index(first)}) has the label 3, '
        'not one of the 3 classes, 0 to 2')
    for path in (folder / 'train').rglob('*.png'):
        path.write_bytes(b'none')
    message = refusal(train_loader(folder, '-j', workers).epoch(0))
    assert message.startswith('data: Failed to load 10 consecutive samples, the last class')
    assert '.png (index ' in message and message.endswith('not an image that Pillow can read')


# Workers


@pytest.fixture
def loader(digits_folder):
    return train_loader(digits_folder, '-j', 2)


@pytest.mark.parametrize(('number', 'message'), [
    (signal.SIGKILL, 'is killed by signal: Killed. (probably out of memory'),
    (signal.SIGBUS, 'is killed by signal: Bus error.'),
])
def test_a_worker_that_dies_is_reported(loader, number, message):
    batches = loader.epoch(0)
    next(batches)
    with pytest.raises(RuntimeError) as caught:  # torch raises it at any place of the main process
        os.kill(multiprocessing.active_children()[0].pid, number)
        time.sleep(5)
    assert message in str(as_line(caught.value))


def test_a_worker_that_dies_while_it_is_awaited(loader):
    batches = loader.epoch(0)
    next(batches)
    pid = multiprocessing.active_children()[0].pid
    os.kill(pid, signal.SIGSTOP)
    with subprocess.Popen(['sh', '-c', f'sleep 0.3; kill -KILL {pid}']):
        # Where torch's own exception falls into a destructor, Python drops it: the lost connection is left.
        assert 'use fewer --workers' in refusal(itertools.chain(batches, loader.epoch(1)))


def test_workers_outlive_signals_that_are_not_for_them(digits_folder):
    early = [threading.Thread(target=time.sleep, args=(60,), daemon=True)]  # in a worker, before it is set up
    os.register_at_fork(after_in_child=lambda: early and early.pop().start())
    loader = train_loader(digits_folder, '-j', 2, '--reprob', '0.5')
    batches = loader.epoch(0)
    next(batches), next(batches)  # one of each worker
    early.clear()
    workers = loader.loader._iterator._workers  # not those of other tests' loaders
    for name in ('INT', 'TERM', 'USR1'):
        subprocess.run(['kill', f'-{name}', *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.3)
    assert len(list(batches)) == 3 and len(list(loader.epoch(1))) == 5
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    workers[0].terminate()  # by the main process
    workers[0].join(3)
    assert workers[0].exitcode == 0
    del loader, batches  # the other at once: it is in no cycle of references
    assert not workers[1].is_alive()


EXIT = """
import os, signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
from loading import eval_loader, train_loader
for end in ('return', 'error'):
    pid = os.fork()
    if pid == 0:
        break
    print(end, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
os.setsid()
loaders = [train_loader(sys.argv[1], '-j', '2'), eval_loader(sys.argv[1], '-j', '2')]
batches = [loaders[0].epoch(0), iter(loaders[1])]
for each in batches:
    next(each)
for name in ('INT', 'TERM', 'USR1'):
    subprocess.run(['kill', f'-{name}', '--', f'-{os.getpgrp()}'], check=True)
print(sum(len(list(each)) for each in batches), flush=True)
next(loaders[0].epoch(1))
if end == 'error':
    raise ValueError('ends with workers at work')
"""


@pytest.mark.slow
def test_a_process_with_workers_ends(digits_folder):
    environ = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    result = subprocess.run(
        [sys.executable, '-c', EXIT, str(digits_folder)], env=environ, capture_output=True, text=True, timeout=150)
    assert result.stdout == '6\nreturn 0\n6\nerror 1\n', result.stderr
    assert 'DataLoader worker' not in result.stderr
