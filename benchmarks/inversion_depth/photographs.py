"""Photographs that scikit-learn and scikit-image carry: those reported on, and others to choose settings with."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

REPORTED = ("china", "flower", "astronaut", "chelsea", "coffee", "rocket")
OTHERS = ("motorcycle", "retina", "hubble_deep_field", "immunohistochemistry")


def photographs(names: tuple[str, ...], size: int) -> Tensor:
    """Return photographs cut to a square and scaled, of shape (n, 3, size, size), values in [0, 1]."""
    return torch.cat([_square(_load(name), size) for name in names])


def _load(name: str) -> np.ndarray:
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    import skimage.data

    return skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()


def _square(photograph: np.ndarray, size: int) -> Tensor:
    image = torch.from_numpy(np.array(photograph)).movedim(-1, 0)[None].float() / 255
    side = min(image.shape[-2:])
    top, left = ((extent - side) // 2 for extent in image.shape[-2:])
    image = image[..., top : top + side, left : left + side]
    return interpolate(image, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
