"""The images of the advice benchmark, and what is done to them. Nothing is downloaded.

``digits`` are the handwritten digits that come with the package; ``letters`` are rendered from the fonts that come
with matplotlib, turned, moved and scaled at random. Both are brought to shape (n, 1, 16, 16), in [0, 1].
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from retrainscope.data import load_mnist

__all__ = ["CHANGES", "DATA", "GROUP", "HALVES"]

Pair = tuple[Tensor, Tensor]
_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif"),
    *("DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmmi10", "cmti10"),
)
# The first eight are learnt, the others are new. In both halves some enclose an area and some do not.
LETTERS = "ABCDEGHKOPRLMQSW"
_ENCLOSING = "ABDOPRQ"


@cache
def digits() -> tuple[Pair, Pair]:
    """Return 600 images a digit to learn from, and 200 to test on, with their labels."""
    mnist = load_mnist()
    train, test = (
        avg_pool2d(pad(torch.from_numpy(images), (2, 2, 2, 2)), 2) for images in (mnist.train_images, mnist.test_images)
    )
    return (train, torch.from_numpy(mnist.train_labels)), (test, torch.from_numpy(mnist.test_labels))


@cache
def letters() -> tuple[Pair, Pair]:
    """Return 600 images a letter to learn from, and 150 to test on, with their labels from 0 to 15."""
    return _letters(600, seed=1), _letters(150, seed=2)


def _letters(n: int, seed: int) -> Pair:
    rng = np.random.default_rng(seed)
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", 44) for name in _FONTS]
    images, labels = [], []
    for place, letter in enumerate(LETTERS):
        for _ in range(n):
            canvas = Image.new("L", (84, 84))
            font = fonts[rng.integers(len(fonts))]
            ImageDraw.Draw(canvas).text((42, 42), letter, fill=255, font=font, anchor="mm")
            angle, scale = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(0.9, 1.3)
            shift = rng.uniform(-8, 8, size=2)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
            offset = 42 - turn @ (42 + shift)
            moved = canvas.transform(
                (84, 84), Image.Transform.AFFINE, (*turn[0], offset[0], *turn[1], offset[1]), Image.Resampling.BILINEAR
            )
            images.append(np.asarray(moved.resize((16, 16), Image.Resampling.BOX), dtype=np.float32) / 255)
            labels.append(place)
    noisy = np.stack(images) + 0.04 * rng.standard_normal((len(images), 16, 16), dtype=np.float32)
    order = rng.permutation(len(images))
    return torch.from_numpy(noisy.clip(0, 1)[order, None]), torch.tensor(labels)[order]


def _blurred(images: Tensor, _generator: torch.Generator) -> Tensor:
    line = torch.exp(-0.5 * (torch.arange(-5, 6) / 1.3) ** 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    return conv2d(images, kernel[None, None], padding=5)


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images + 0.4 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "inverted": lambda images, _: 1 - images,
    "rotated": lambda images, _: images.rot90(1, (2, 3)),
    "blurred": _blurred,
    "noisy": _noisy,
    "faint": lambda images, _: 0.3 * images + 0.35,
}
DATA = {"digits": digits, "letters": letters}
# Which classes are learnt, and which are new.
HALVES = {"digits": (tuple(range(5)), tuple(range(5, 10))), "letters": (tuple(range(8)), tuple(range(8, 16)))}
# For the task whose features change: two groups, learnt on some classes and asked of others.
GROUP: dict[str, Callable[[int], int]] = {
    "digits": lambda digit: digit % 2,
    "letters": lambda place: int(LETTERS[place] in _ENCLOSING),
}
