"""Streams for tests and benchmarks: the same images as shards of webdataset, as Parquet, and as a folder."""
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def parts(items, number):
    """Return the items as so many shards, of unequal size where they must be."""
    return [list(each) for each in np.array_split(np.array(items, dtype=object), number)]


def write_tars(folder: Path, split: str, images: list[tuple[bytes, int]], number: int, told: bool = True) -> None:
    """Write images, encoded, with their labels as shards; `_info.json` names them, if told with their lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    names, lengths = [], []
    for shard, part in enumerate(parts(range(len(images)), number)):
        names.append(f'{split}-{shard}.tar')
        lengths.append(len(part))
        with tarfile.open(folder / names[-1], 'w') as tar:
            for index in part:
                for ending, data in (('png', images[index][0]), ('cls', str(images[index][1]).encode())):
                    member = tarfile.TarInfo(f'{index:06}.{ending}')
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    path = folder / '_info.json'
    info = json.loads(path.read_text()) if path.exists() else {'splits': {}}
    info['splits'][split] = {
        'name': split, 'num_samples': len(images), 'filenames': names, 'shard_lengths': lengths if told else []}
    path.write_text(json.dumps(info))


def write_parquet(folder: Path, split: str, images: list[tuple[bytes, int]], number: int, classes: int) -> None:
    """Write images, encoded, with their labels as Parquet files, with the card of a data set of the Hub."""
    import datasets
    features = datasets.Features({
        'image': datasets.Image(), 'label': datasets.ClassLabel(names=[f'class{i}' for i in range(classes)])})
    (folder / 'data').mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(parts(range(len(images)), number)):
        rows = {'image': [{'bytes': images[i][0], 'path': f'{i}.png'} for i in part],
                'label': [images[i][1] for i in part]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            folder / 'data' / f'{split}-{shard:05}-of-{number:05}.parquet')


def encode(image: Image.Image) -> bytes:
    """Return an image as PNG."""
    stream = io.BytesIO()
    image.save(stream, 'png')
    return stream.getvalue()
