"""Vision Pair Learning in Lightning: PairWrapper and VPLLoss in a LightningModule.

    python examples/lightning_loop.py                # real digits, 5 epochs, half a minute on a CPU
    python examples/lightning_loop.py --devices 2    # two processes
"""
import argparse

import lightning
import timm
import torch
from timm.data import ImageDataset, create_transform
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader

from timm_vpl import PairWrapper, VPLLoss
from timm_vpl.data.sources import DigitsReader


class PairModule(lightning.LightningModule):
    def __init__(self, epochs):
        super().__init__()
        self.pair = PairWrapper(
            timm.create_model('test_resnet', num_classes=10),
            timm.create_model('test_vit', num_classes=10, img_size=32, patch_size=8),
        )
        self.criterion = VPLLoss(epochs, x=20, y=20)

    def configure_optimizers(self):
        return create_optimizer_v2(self.pair, 'adamw', lr=2e-3, weight_decay=0.05)

    def on_train_epoch_start(self):
        self.criterion.set_epoch(self.current_epoch)

    def training_step(self, batch, batch_idx):
        images, target = batch
        return self.criterion(self.pair(images), target)

    def validation_step(self, batch, batch_idx):
        images, target = batch
        output = self.pair(images)
        for side, logits in zip('ab', (output.logits_a, output.logits_b), strict=True):
            self.log(f'top1_{side}', 100 * (logits.argmax(1) == target).float().mean(), sync_dist=True)

    def on_train_epoch_end(self):
        top1_a, top1_b = (self.trainer.callback_metrics[f'top1_{side}'] for side in 'ab')
        if self.trainer.is_global_zero:
            print(f'epoch {self.current_epoch}, stage {self.criterion.stage()}: '
                  f'top-1 {top1_a:.1f} % / {top1_b:.1f} %, {self.trainer.world_size} process(es)', flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--devices', type=int, default=1)
    args = parser.parse_args()
    lightning.seed_everything(0)
    torch.set_num_threads(1)
    loaders = [
        DataLoader(
            ImageDataset('', reader=DigitsReader(split), transform=create_transform(
                (3, 32, 32), is_training=split == 'train', scale=(0.8, 1.0), hflip=0.0, color_jitter=0.0)),
            batch_size=32 // args.devices, shuffle=split == 'train')
        for split in ('train', 'validation')
    ]
    trainer = lightning.Trainer(
        max_epochs=args.epochs, devices=args.devices, strategy='ddp' if args.devices > 1 else 'auto',
        num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False)
    trainer.fit(PairModule(args.epochs), *loaders)


if __name__ == '__main__':
    main()
