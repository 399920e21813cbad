#!/usr/bin/env python3
"""Rate of the training loader on shards of webdataset and on Parquet against that on the same images in a folder.

No model is trained: in each round each case reads an epoch of batches, decoded and augmented. Random crop, flip and
normalisation are on. The images are generated JPEGs of 500 x 375, ImageNet's usual size.
"""
import io
import json
import tarfile
from pathlib import Path

import common
from common import create, create_parser, interleave, parse
from data import loader_epochs


def find(folder: Path, split: str, shards: int) -> list[list[tuple[bytes, int]]]:
    """Return the encoded images of a folder and their labels, mixed, as shards."""
    classes = sorted(path.name for path in (folder / split).iterdir())
    paths = sorted((folder / split).rglob('*.jpg'), key=lambda path: int(path.stem))
    images = [(path.read_bytes(), classes.index(path.parent.name)) for path in paths]
    return [images[i::shards] for i in range(shards)]


def write_tars(folder: Path, splits: dict) -> None:
    """Write splits as shards of webdataset."""
    info: dict = {}
    for split, shards in splits.items():
        names = [f'{split}-{i}.tar' for i in range(len(shards))]
        for name, images in zip(names, shards, strict=True):
            with tarfile.open(folder / name, 'w') as tar:
                for index, (image, label) in enumerate(images):
                    for ending, data in (('jpg', image), ('cls', str(label).encode())):
                        member = tarfile.TarInfo(f'{index:06}.{ending}')
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        lengths = [len(images) for images in shards]
        info[split] = {'name': split, 'num_samples': sum(lengths), 'filenames': names, 'shard_lengths': lengths}
    (folder / '_info.json').write_text(json.dumps({'splits': info}))


def write_parquet(folder: Path, splits: dict) -> None:
    """Write splits as Parquet files."""
    from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars
    disable_progress_bars()
    for split, shards in splits.items():
        for i, images in enumerate(shards):
            rows = {'image': [{'bytes': image, 'path': None} for image, _ in images], 'label': [y for _, y in images]}
            features = Features({'image': Image(), 'label': ClassLabel(num_classes=8)})
            Dataset.from_dict(rows, features).to_parquet(folder / f'{split}-{i:05}-of-{len(shards):05}.parquet')


def main(argv=None) -> None:
    """Measure and report."""
    parser = create_parser(__doc__)
    parser.add_argument('--num-images', type=int, help='images of an epoch')
    parser.add_argument('--num-shards', type=int, default=8)
    options = parse(
        parser, argv,
        cpu={'num_images': 1024, 'img_size': 224, 'repeats': 7, 'workers': 1, 'model_a': 'test_resnet'},
        cuda={'num_images': 16384, 'repeats': 5, 'warmup': 1, 'model_a': 'test_resnet', 'model_b': 'test_vit'},
    )
    folder = Path(common.create_folder(options.num_images, 500, 375))
    splits = {split: find(folder, split, min(options.num_shards, 8)) for split in ('train', 'validation')}
    places = {}
    for kind, write in (('wds', write_tars), ('hfids', write_parquet)):
        place = Path(common.scratch())
        write(place, splits)
        places[kind] = ['--dataset', 'wds/x', '--data-dir', place] if kind == 'wds' else [
            '--dataset', f'hfids/{place}', '--train-num-samples', options.num_images, '--val-num-samples', 8]
    report = common.Report('streams', options)

    shared = [
        '--method', 'solo', '--model-a', options.model_a, '--img-size', options.img_size, '--device', options.device,
        '--batch-size', options.batch_size, '--workers', options.workers, '--num-classes', 8, '--validation-batch-size',
        8]
    runs = {
        name: create([str(word) for word in [*place, *shared]])
        for name, place in {'folder': ['--data-dir', folder], **places}.items()}
    images = len(runs['folder'].loader_train) * options.batch_size
    seconds, _ = interleave(
        {name: loader_epochs(run) for name, run in runs.items()}, options.repeats, options.warmup, options.device)
    report.times('epoch of the loader', seconds, images=images)
    report.ratios('epoch of the loader', {
        f'rate of {kind} / rate of the folder': (seconds['folder'], seconds[kind]) for kind in places})
    report.save()


if __name__ == '__main__':
    main()
