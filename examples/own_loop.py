"""Vision Pair Learning in a training loop of your own: PairWrapper and VPLLoss beside plain torch and timm.

    python examples/own_loop.py                            # real digits, 5 epochs, half a minute on a CPU
    torchrun --nproc-per-node 2 examples/own_loop.py       # two processes
"""
import argparse
import os

import timm
import torch
import torch.distributed as dist
from timm.data import ImageDataset, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch.nn.parallel import DistributedDataParallel

from timm_vpl import PairWrapper, VPLLoss
from timm_vpl.data.sources import DigitsReader


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--epochs', type=int, default=5)
    args = parser.parse_args()
    distributed = dist.is_torchelastic_launched()  # by torchrun
    if distributed:
        dist.init_process_group()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    random_seed(0, rank)  # of torch, numpy and random: timm's augmentations draw from all three
    torch.set_num_threads(1)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else 'cpu')

    loaders = {
        split: create_loader(
            ImageDataset('', reader=DigitsReader(split)), input_size=(3, 32, 32), batch_size=32 // processes,
            is_training=split == 'train', scale=(0.8, 1.0), hflip=0.0, color_jitter=0.0, num_workers=0, device=device,
            distributed=distributed)
        for split in ('train', 'validation')
    }
    pair = PairWrapper(
        timm.create_model('test_resnet', num_classes=10),
        timm.create_model('test_vit', num_classes=10, img_size=32, patch_size=8),
    ).to(device)
    criterion = VPLLoss(args.epochs, x=20, y=20)
    optimizer = create_optimizer_v2(pair, 'adamw', lr=2e-3, weight_decay=0.05)
    model = DistributedDataParallel(pair) if distributed else pair

    for epoch in range(args.epochs):
        criterion.set_epoch(epoch)
        model.train()
        if distributed:
            loaders['train'].sampler.set_epoch(epoch)
        for images, target in loaders['train']:
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        pair.eval()
        correct = torch.zeros(2, device=device)
        with torch.inference_mode():
            for images, target in loaders['validation']:
                output = pair(images)
                correct += torch.stack([
                    (logits.argmax(1) == target).sum() for logits in (output.logits_a, output.logits_b)])
        if distributed:
            dist.all_reduce(correct)
        top1_a, top1_b = (100 * correct / len(loaders['validation'].dataset)).tolist()
        if rank == 0:
            print(f'epoch {epoch}, stage {criterion.stage()}: top-1 {top1_a:.1f} % / {top1_b:.1f} %, '
                  f'{processes} process(es)')


if __name__ == '__main__':
    main()
