"""Vision Pair Learning in a loop with accelerate: PairWrapper and VPLLoss beside what it prepares.

    python examples/accelerate_loop.py                               # real digits, 5 epochs, half a minute on a CPU
    torchrun --nproc-per-node 2 examples/accelerate_loop.py          # two processes
"""
import argparse

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import ImageDataset, create_transform
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader

from timm_vpl import PairWrapper, VPLLoss
from timm_vpl.data.sources import DigitsReader


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--epochs', type=int, default=5)
    args = parser.parse_args()
    # Without a GPU accelerate joins torchrun's processes to a group only if asked to.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    torch.set_num_threads(1)
    train, validation = (
        DataLoader(
            ImageDataset('', reader=DigitsReader(split), transform=create_transform(
                (3, 32, 32), is_training=split == 'train', scale=(0.8, 1.0), hflip=0.0, color_jitter=0.0)),
            batch_size=32 // accelerator.num_processes, shuffle=split == 'train')
        for split in ('train', 'validation')
    )
    pair = PairWrapper(
        timm.create_model('test_resnet', num_classes=10),
        timm.create_model('test_vit', num_classes=10, img_size=32, patch_size=8),
    )
    criterion = VPLLoss(args.epochs, x=20, y=20)
    optimizer = create_optimizer_v2(pair, 'adamw', lr=2e-3, weight_decay=0.05)
    pair, optimizer, train, validation = accelerator.prepare(pair, optimizer, train, validation)

    for epoch in range(args.epochs):
        criterion.set_epoch(epoch)
        pair.train()
        for images, target in train:
            loss = criterion(pair(images), target)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

        pair.eval()
        right = []
        with torch.inference_mode():
            for images, target in validation:
                output = pair(images)
                both = torch.stack([output.logits_a.argmax(1), output.logits_b.argmax(1)], dim=1)
                right.append(accelerator.gather_for_metrics(both == target[:, None]))
        top1_a, top1_b = 100 * torch.cat(right).float().mean(0)
        accelerator.print(
            f'epoch {epoch}, stage {criterion.stage()}: top-1 {top1_a:.1f} % / {top1_b:.1f} %, '
            f'{accelerator.num_processes} process(es)', flush=True)
    accelerator.end_training()


if __name__ == '__main__':
    main()
