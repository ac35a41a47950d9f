"""The photographs of the advice benchmark: small grey patches of what is on them, a texture or an object a class.

The photographs are those that scikit-image and scikit-learn have inside their packages; nothing is downloaded. Each
region is divided into cells, and each cell belongs to one role alone, so that no two roles share a pixel. A patch is a
random square of one cell, flipped at random, with a brightness and contrast of its own, and brought to 64 by 64 pixels
of three equal channels: shape (n, 3, 64, 64), in [0, 1]. Colour and brightness would give many classes away.

    python benchmarks/advice/photographs.py [--sheet FILE]

counts cells and patches of every class, and checks that no two roles and no two classes share a pixel.
"""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

__all__ = ["CHANGES", "KNOWN", "NOVEL", "ROLES", "cells", "patches"]

Pair = tuple[Tensor, Tensor]


class Region(NamedTuple):
    """A part of a photograph, by its rows and columns."""

    photograph: str
    top: int
    bottom: int
    left: int
    right: int


class Box(NamedTuple):
    """A square of a photograph."""

    top: int
    left: int
    side: int


KNOWN = {
    "brick": Region("brick", 0, 512, 0, 512),
    "grass": Region("grass", 0, 512, 0, 512),
    "gravel": Region("gravel", 0, 512, 0, 512),
    "tissue": Region("immunohistochemistry", 0, 512, 0, 512),
    "coins": Region("coins", 20, 303, 20, 384),
    "fur": Region("chelsea", 0, 300, 30, 340),
    "print": Region("page", 40, 191, 0, 384),
    "moon": Region("moon", 0, 512, 0, 512),
}
NOVEL = {
    "writing": Region("text", 0, 172, 0, 448),
    "lawn": Region("camera", 300, 512, 200, 512),
    "leaves": Region("china", 330, 427, 0, 640),
    "pagoda": Region("china", 60, 320, 110, 310),
    "petals": Region("flower", 90, 330, 160, 410),
    "machine": Region("motorcycle", 180, 460, 160, 680),
    "cloth": Region("astronaut", 220, 512, 20, 300),
    "wood": Region("coffee", 150, 400, 440, 600),
}
ROLES = {"fit": 120, "known": 120, "unknown": 120, "test": 80}  # patches of each class
SIZE = 64
_CELL, _SMALLEST = 32, 22  # pixels of the photograph: the side of a cell, and the least of a patch
_FLATTEST = 0.03  # standard deviation of grey; a cell of less shows nothing


@cache
def patches(role: str) -> Pair:
    """Return patches of all classes for one role, with labels: places among the known classes, then the novel ones."""
    images = []
    for place, region in enumerate((*KNOWN.values(), *NOVEL.values())):
        rng = np.random.default_rng([place, [*ROLES].index(role)])
        images += [_patch(region.photograph, box, rng) for box in _boxes(region, role)]
    labels = torch.arange(len(KNOWN) + len(NOVEL)).repeat_interleave(ROLES[role])
    return torch.stack(images).expand(-1, 3, -1, -1).contiguous(), labels


def cells(role: str) -> Tensor:
    """Return the number of the cell that each patch of a role is cut from."""
    numbers, first = [], 0
    for region in (*KNOWN.values(), *NOVEL.values()):
        n_cells = len(_cells(region)[role])
        numbers += [first + number % n_cells for number in range(ROLES[role])]
        first += n_cells
    return torch.tensor(numbers)


def _patch(photograph: str, box: Box, rng: np.random.Generator) -> Tensor:
    """Cut a square out and bring it to size; nothing outside of it is looked at."""
    image = torch.from_numpy(_grey(photograph)[box.top : box.top + box.side, box.left : box.left + box.side].copy())
    image = interpolate(image[None, None], size=(SIZE, SIZE), mode="bicubic")[0]
    image = image.flip([axis for axis in (1, 2) if rng.random() < 0.5])
    contrast, brightness = rng.uniform(0.5, 1.2), rng.uniform(0.35, 0.65)
    return (brightness + contrast * (image - image.mean())).clamp(0, 1)


def _boxes(region: Region, role: str) -> list[Box]:
    """Draw the squares of a role, equally many in each of its cells."""
    cells = _cells(region)[role]
    rng = np.random.default_rng([*region[1:], [*ROLES].index(role)])
    boxes = []
    for number in range(ROLES[role]):
        top, left = cells[number % len(cells)]
        side = int(rng.integers(_SMALLEST, _CELL, endpoint=True))
        down, right = rng.integers(_CELL - side, size=2, endpoint=True)
        boxes.append(Box(top + int(down), left + int(right), side))
    return boxes


@cache
def _cells(region: Region) -> dict[str, list[tuple[int, int]]]:
    """Deal the cells of a region that show something to the roles."""
    grey = _grey(region.photograph)
    cells = [
        (top, left)
        for top in range(region.top, region.bottom - _CELL + 1, _CELL)
        for left in range(region.left, region.right - _CELL + 1, _CELL)
        if grey[top : top + _CELL, left : left + _CELL].std() > _FLATTEST
    ]
    order = np.random.default_rng([*region[1:]]).permutation(len(cells))
    return {role: [cells[place] for place in order[start :: len(ROLES)]] for start, role in enumerate(ROLES)}


@cache
def _grey(photograph: str) -> NDArray[np.float32]:
    """Return a photograph in grey, in [0, 1]."""
    import skimage.data  # here, so that the tasks can be listed where it is not installed

    if photograph in ("china", "flower"):
        image = load_sample_image(f"{photograph}.jpg")
    elif photograph == "motorcycle":
        image = skimage.data.stereo_motorcycle()[0]
    else:
        image = getattr(skimage.data, photograph)()
    image = np.asarray(image, dtype=np.float32) / 255
    return image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _blurred(images: Tensor, _generator: torch.Generator) -> Tensor:
    line = torch.exp(-0.5 * (torch.arange(-9, 10) / 3) ** 2)
    kernel = (torch.outer(line, line) / line.sum() ** 2).expand(3, 1, -1, -1)
    # The edge is continued: a dark frame would be a change of its own.
    return conv2d(pad(images, (9,) * 4, mode="replicate"), kernel, groups=3)


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images + 0.05 * torch.randn(images[:, :1].shape, generator=generator)).clamp(0, 1)


CHANGES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "inverted": lambda images, _: 1 - images,
    "blurred": _blurred,
    "noisy": _noisy,
}


def _check() -> None:
    """Count the patches of each class, and paint all squares: every pixel has one class and one role at most."""
    owners: dict[str, NDArray[np.int64]] = {}
    print(f"{'':10}{'cells':>6}" + "".join(f"{role:>9}" for role in ROLES))
    for place, (name, region) in enumerate((KNOWN | NOVEL).items()):
        painted = owners.setdefault(region.photograph, np.full(_grey(region.photograph).shape, -1))
        for number, role in enumerate(ROLES):
            mark = place * len(ROLES) + number
            for box in _boxes(region, role):
                square = painted[box.top : box.top + box.side, box.left : box.left + box.side]
                assert square.shape == (box.side, box.side), f"{name}: a square leaves the photograph"
                assert ((square == -1) | (square == mark)).all(), f"{name}: {role} takes the pixels of others"
                square[:] = mark
        counts = [int((patches(role)[1] == place).sum()) for role in ROLES]
        assert counts == [*ROLES.values()]
        n_cells = sum(map(len, _cells(region).values()))
        print(f"{name:10}{n_cells:6}" + "".join(f"{count:9}" for count in counts))
    for role in ROLES:
        X, _ = patches(role)
        assert X.shape[1:] == (3, SIZE, SIZE)
        assert X.min() >= 0
        assert X.max() <= 1
    print("No two roles and no two classes share a pixel.")


def _sheet(path: Path) -> None:
    """Draw the first test patches of each class, and of the first three what the changes make of them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    X, y = patches("test")
    names, generator = [*KNOWN, *NOVEL], torch.Generator().manual_seed(0)
    figure, axes = plt.subplots(len(names), 12, figsize=(12, len(names)))
    for place, row in enumerate(axes):
        mine = X[y == place][:9]
        shown = [*mine, *(change(mine[:1], generator)[0] for change in CHANGES.values())]
        for axis, image in zip(row, shown, strict=True):
            axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(names[place])
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw a few patches of every class")
    args = parser.parse_args()
    _check()
    if args.sheet:
        _sheet(args.sheet)
