"""Image files, by Pillow."""

from pathlib import Path
from typing import Any

import numpy as np

from retrainscope.checks import reason_of
from retrainscope.exceptions import DataUnavailableError, MissingExtraError

__all__ = ["image_files", "read_image"]


def image_files(folder: Path) -> list[Path]:
    """Return the files in a folder, and in folders in it, that are called as images are; sorted."""
    Image = _pillow()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())


def read_image(path: Path, *, whole: bool = True) -> Any:
    """Read an image, upright and in three colours.

    Parameters
    ----------
    path : path
    whole : bool
        False reads only what tells that it is an image, which is quick.

    Returns
    -------
    PIL.Image.Image

    Raises
    ------
    DataUnavailableError
        If the file cannot be read as an image.
    MissingExtraError
        If Pillow is not installed.
    """
    Image = _pillow()
    try:
        with Image.open(path) as image:
            return _upright_rgb(image) if whole else image
    except Exception as error:  # what Pillow raises for a damaged file is not to be foreseen
        raise DataUnavailableError(f"{path} cannot be read as an image ({reason_of(error)}).") from error


def _upright_rgb(image: Any) -> Any:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.for_package("Pillow", "vision") from error
    return Image
