"""What the VGG-19 study takes: the network with its weights, the names of its layers, and images."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrainscope.checks import check_number, reason_of
from retrainscope.exceptions import (
    DataUnavailableError,
    InvalidDataError,
    LayerNotFoundError,
    MissingExtraError,
    UnsupportedModelError,
)

__all__ = ["IMAGENET", "LEAST_SIZE", "load_images", "named_convolutions", "random_network", "trained_network"]

IMAGENET = "imagenet"
LEAST_SIZE = 32  # five times halved, one pixel is left
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights want them


def named_convolutions(layers: Sequence[str]) -> dict[str, str]:
    """Turn numbers of convolutions, or names of layers, into names by what they are called in the report.

    Raises
    ------
    LayerNotFoundError
        If there is no such layer, or none is named.
    """
    with torch.device("meta"):  # only its shape is wanted
        modules = _vgg19().get_submodule("features").named_children()
    kinds = {f"features.{name}": module for name, module in modules}
    convolutions = [name for name, module in kinds.items() if isinstance(module, nn.Conv2d)]
    found = {}
    for layer in layers:
        if layer.isdecimal():
            if not 1 <= int(layer) <= len(convolutions):
                raise LayerNotFoundError(f"VGG-19 has the convolutions 1 to {len(convolutions)}. Got {layer}.")
            found[f"conv{int(layer)}"] = convolutions[int(layer) - 1]
        elif layer in kinds:
            found[layer] = layer
        else:
            raise LayerNotFoundError.for_name(layer, kinds, what="convolution number or layer")
    if not found:
        raise LayerNotFoundError("No layer was named. Give numbers from 1 to 16, or names.")
    return found


def load_images(paths: Sequence[str | Path], size: int) -> tuple[tuple[str, ...], Tensor]:
    """Read images, scale the shorter side to `size` pixels and cut the middle.

    Parameters
    ----------
    paths : sequence of path
        Files, or folders of files; none: the two photographs of scikit-learn.
    size : int

    Returns
    -------
    (tuple of n str, Tensor of shape (n, 3, size, size))
        Names, and values in [0, 1].

    Raises
    ------
    DataUnavailableError
        If a file cannot be read as an image, or a folder holds none.
    InvalidDataError
        If an image is smaller than `size`, or `size` smaller than what the network takes.
    """
    check_number("size", size, whole=True)
    if size < LEAST_SIZE:
        raise InvalidDataError(f"VGG-19 takes images of {LEAST_SIZE} pixels and more. Got {size}.")
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.for_package("Pillow", "vision") from error
    if not paths:
        from sklearn.datasets import load_sample_image

        opened = {name: Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")}
    else:
        opened = {}
        readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        for path in _image_files(paths, readable):
            try:
                with Image.open(path) as file:
                    opened[str(path)] = _upright_rgb(file)
            except Exception as error:  # what Pillow raises for a damaged file is not to be foreseen
                raise DataUnavailableError(f"{path} cannot be read as an image ({reason_of(error)}).") from error
    tensors = []
    for name, image in opened.items():
        if min(image.size) < size:
            least = min(image.size)
            smaller = f", or a smaller size (--size {least})" if least >= LEAST_SIZE else ""
            raise InvalidDataError(
                f"{name} has {image.width} x {image.height} pixels, and {size} x {size} are needed. Give a larger "
                f"image{smaller}."
            )
        scale = size / min(image.size)
        width, height = (max(size, round(extent * scale)) for extent in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        cut = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
        tensors.append(torch.from_numpy(np.array(cut)).movedim(-1, 0).float() / 255)
    return tuple(Path(name).name for name in opened), torch.stack(tensors)


def _upright_rgb(image: Any) -> Any:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def _image_files(paths: Sequence[str | Path], suffixes: set[str]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
        if not inside:
            raise DataUnavailableError(f"The folder {path} holds no images. Name files, or another folder.")
        files += inside
    return files


class _Normalise(nn.Module):
    """Brings pixels in [0, 1] to what the weights were trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.tensor(_MEAN)[:, None, None])
        self.std = nn.Buffer(torch.tensor(_STD)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Return x less the mean, over the standard deviation."""
        return (x - self.mean) / self.std


def random_network(seed: int) -> nn.Module:
    """Build the convolutions of VGG-19 with random weights, as torchvision draws them; takes pixels in [0, 1]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _stack(_vgg19())


def trained_network(weights: str) -> nn.Module:
    """Build the convolutions of VGG-19 with trained weights; takes pixels in [0, 1].

    Parameters
    ----------
    weights : str
        ``"imagenet"`` for torchvision's, or a file with a state dict of torchvision's VGG-19.

    Raises
    ------
    DataUnavailableError
        If the weights cannot be read or fetched.
    InvalidDataError
        If the file holds no state dict.
    UnsupportedModelError
        If it is of another network; missing and unexpected parameters are named.
    """
    with torch.device("meta"):
        network = _vgg19()
    state = _imagenet_state() if weights == IMAGENET else _state_dict(Path(weights))
    _check_state(network.state_dict(), state, weights)
    network.load_state_dict(state, assign=True)
    return _stack(network)


def _vgg19() -> nn.Module:
    try:
        from torchvision.models import vgg19
    except ImportError as error:
        raise MissingExtraError.for_package("torchvision", "vision") from error
    network: nn.Module = vgg19(weights=None)
    return network


def _stack(network: nn.Module) -> nn.Module:
    """Leave the classifier away, and let the network take pixels in [0, 1]."""
    return nn.Sequential(OrderedDict(normalise=_Normalise(), features=network.get_submodule("features"))).eval()


def _imagenet_state() -> dict[str, Tensor]:
    from torchvision.models import VGG19_Weights

    found = VGG19_Weights.IMAGENET1K_V1
    try:
        state: dict[str, Tensor] = found.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise DataUnavailableError(
            f"The weights cannot be fetched, or what was fetched is damaged ({reason_of(error)}). Fetch {found.url} "
            "elsewhere and give the file as weights (--weights FILE)."
        ) from error
    return state


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataUnavailableError(f"There is no file {path}. Give a file, 'imagenet' or 'random' as weights.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a file that is none raises is not to be foreseen
        raise InvalidDataError(
            f"{path} holds no state dict that torch.load takes with weights_only=True ({reason_of(error)}). Save "
            "model.state_dict() with torch.save."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        keys = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else ""
        held = f"the keys {keys}" if keys else f"a {type(state).__name__}"
        raise InvalidDataError(
            f"{path} holds no state dict, which maps names to tensors, but {held}. Save model.state_dict() alone."
        )
    return state


def _check_state(wanted: dict[str, Tensor], got: dict[str, Tensor], source: str) -> None:
    shapes = [
        f"{name} is {tuple(got[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in got and got[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in got],
        "unexpected": [str(name) for name in got if name not in wanted],
        "of another shape": shapes,
    }
    said = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in problems.items()
        if names
    ]
    if said:
        raise UnsupportedModelError(f"{source} is not of torchvision's VGG-19. Parameters {'; '.join(said)}.")
