"""Make the data of the study from a folder of images: small training sets, a development split, the test split.

    python benchmarks/study/subset.py SOURCE DEST --train 2000 --dev 5000 --seeds 1 2 3

SOURCE holds `train` and `test` (--test-split), each with a folder a class. DEST gets a folder a seed:

    DEST/seed-1/train   --train images, the same number of each class, drawn anew for each seed; of several numbers
                        train-N each
    DEST/seed-1/dev     --dev training images that are in no seed's `train`, the same for all seeds (0: none)
    DEST/seed-1/test    all test images

The files are hard links where the file system allows it, else copies. With --size they are copies whose shorter side
has that many pixels (bicubic, PNG). The draw depends on the numbers, the seed and the names of the files alone, so that
the same command gives the same data on another machine.
"""
import argparse
import os
import random
import shutil
import sys
from pathlib import Path

from PIL import Image

DEV_SEED = 'dev'  # of the one draw that all seeds share


def split_names(source: Path) -> dict[str, list[str]]:
    """Return the names of the images by class, both in order."""
    return {
        folder.name: sorted(path.name for path in folder.iterdir() if path.is_file())
        for folder in sorted(source.iterdir()) if folder.is_dir()
    }


def draw(names: dict[str, list[str]], count: int, seed: str) -> dict[str, list[str]]:
    """Return `count` of the images, the same number of each class.

    Raises:
        ValueError: The number can't be shared out over the classes, or a class has too few images.
    """
    each, rest = divmod(count, len(names))
    if rest:
        raise ValueError(f'{count} images are not the same number for each of {len(names)} classes')
    for name, images in names.items():
        if len(images) < each:
            raise ValueError(f'class {name} has {len(images)} images left, {each} are needed')
    return {name: sorted(random.Random(f'{seed}/{name}').sample(images, each)) for name, images in names.items()}


def place(source: Path, target: Path, names: dict[str, list[str]], size: int | None = None) -> None:
    """Link the named images of a split to another folder, or write them smaller, whole or not at all."""
    if target.exists():
        raise FileExistsError(f'{target} exists')
    partial = target.with_name(target.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    for name, images in names.items():
        (partial / name).mkdir(parents=True)
        for image in images:
            if size:
                resize(source / name / image, partial / name / f'{Path(image).stem}.png', size)
                continue
            try:
                os.link(source / name / image, partial / name / image)
            except OSError:
                shutil.copyfile(source / name / image, partial / name / image)
    partial.rename(target)


def resize(source: Path, target: Path, size: int) -> None:
    """Write an image in RGB, its shorter side `size` pixels long."""
    with Image.open(source) as image:
        scale = size / min(image.size)
        image.convert('RGB').resize(
            tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC).save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path)
    parser.add_argument('dest', type=Path)
    parser.add_argument('--train', type=int, nargs='+', required=True, help='training images')
    parser.add_argument('--dev', type=int, required=True, help='images of the development split')
    parser.add_argument('--seeds', type=int, nargs='+', required=True)
    parser.add_argument('--size', type=int, help='shorter side in pixels (default: the files as they are)')
    parser.add_argument('--test-split', default='test', help="the source's folder of test images")
    args = parser.parse_args()
    try:
        names = split_names(args.source / 'train')
        test = split_names(args.source / args.test_split)
        dev = draw(names, args.dev, DEV_SEED)
        rest = {name: sorted(set(images) - set(dev[name])) for name, images in names.items()}
        for seed in args.seeds:
            folder = args.dest / f'seed-{seed}'
            for count in args.train:
                split = 'train' if len(args.train) == 1 else f'train-{count}'
                place(args.source / 'train', folder / split, draw(rest, count, str(seed)), args.size)
            if args.dev:
                place(args.source / 'train', folder / 'dev', dev, args.size)
            place(args.source / args.test_split, folder / 'test', test, args.size)
            print(f'{folder}: {" and ".join(map(str, args.train))} training, {args.dev} development, '
                  f'{sum(map(len, test.values()))} test images of {len(names)} classes')
    except (ValueError, OSError) as error:
        sys.exit(f'subset.py: error: {error}')


if __name__ == '__main__':
    main()
