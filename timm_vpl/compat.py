"""What is not public in timm or torch, or mends them: the versions it was checked with, and what to do if it goes."""
# Data
import timm.data.auto_augment
from PIL import Image, ImageOps
from timm.data.dataset_factory import _search_split as search_split  # timm 1.0.31; if it goes: copy its 20 lines

__all__ = ['guard_posterize', 'search_split']


def guard_posterize() -> None:
    """Let timm's posterize take 0 bits: a black image.

    timm 1.0.31 with Pillow 13, which refuses 0 bits. If timm does not ask for them any more: remove this.
    """
    operations = timm.data.auto_augment.NAME_TO_OP
    for name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
        operations[name] = _posterize


def _posterize(img: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    if bits_to_keep >= 8:
        return img
    if bits_to_keep < 1:
        return Image.new(img.mode, img.size)
    return ImageOps.posterize(img, bits_to_keep)
