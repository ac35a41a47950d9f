"""The models of torchvision and timm, with random weights, and images for them."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Inputs = Tensor | dict[str, Tensor]

N_LABELS = 4
N_FIRST = 8  # samples of the first run
SMALL_SIZES = (64, 96, 128)  # tried before a model's own size, to save time
TIMM_LIST = Path(__file__).with_name("timm.txt")
TIMM_PER_MODULE, TIMM_MOST_PARAMETERS = 5, 30e6  # but one of each family in any case


@dataclass(frozen=True)
class Specimen:
    """A model, a source of random samples for it, and the module whose output stands for discrete inputs."""

    model: nn.Module
    samples: Callable[[int, Generator], Inputs]
    input_layer: str | None = None


def run_once(specimen: Specimen) -> None:
    """Bring a model to where it could be after training, and run it in evaluation mode.

    Some set up hooks or tables of their own when they first run. Batch normalisation learns its statistics there:
    else a deep random network puts out zeros. So it does where weights are zero to begin with.
    """
    model, inputs = specimen.model.eval(), specimen.samples(N_FIRST, Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and not parameter.any():
            nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    try:
        with torch.no_grad():
            model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum


def torchvision_names() -> list[str]:
    """Return every classifier of torchvision, but the quantised ones."""
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def build_torchvision(name: str) -> Specimen:
    """Build a classifier of torchvision for the smallest images that it takes."""
    import torchvision

    settings: dict[str, Any] = {"num_classes": N_LABELS}
    if name in ("inception_v3", "googlenet"):
        settings["init_weights"] = False  # takes minutes, and only for training
    model = torchvision.models.get_model(name, weights=None, **settings)
    return _with_images(model, 3, (*SMALL_SIZES, 224, 299))


def timm_names() -> list[str]:
    """Return the models in timm.txt, which `choose_timm` wrote."""
    return TIMM_LIST.read_text().split()


def choose_timm() -> list[str]:
    """Return from each module of timm the smallest model of every family, then the smallest ones left.

    To count all parameters takes minutes.
    """
    import timm

    return [name for module in timm.list_modules() for name in _smallest(timm.list_models(module=module))]


def _smallest(names: Iterable[str]) -> Iterator[str]:
    """Yield the smallest of each family, and small ones of what is left until they are enough."""
    sizes = {name: _size(name) for name in names}
    ordered = sorted(sizes, key=lambda name: (sizes[name], name))
    chosen = {*{_family(name): name for name in reversed(ordered)}.values()}
    left = [name for name in ordered if name not in chosen and sizes[name] < TIMM_MOST_PARAMETERS]
    chosen |= {*left[: max(0, TIMM_PER_MODULE - len(chosen))]}
    yield from (name for name in ordered if name in chosen)


def _family(name: str) -> str:
    """Return the word that a name starts with: resnext of resnext50_32x4d."""
    found = re.match("[a-z]+", re.sub("^(tf|test|legacy)_", "", name))
    return found[0] if found else name


def _size(name: str) -> int:
    """Count the parameters without making them."""
    import timm

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, num_classes=N_LABELS).parameters())


def build_timm(name: str) -> Specimen:
    """Build a classifier of timm for images of its own size, or smaller ones if it takes any."""
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=N_LABELS)
    channels, *sides = model.default_cfg["input_size"]
    sizes = () if model.default_cfg.get("fixed_input_size") else SMALL_SIZES
    return _with_images(model, channels, (*(size for size in sizes if size < sides[0]), sides[0]))


def _with_images(model: nn.Module, channels: int, sizes: tuple[int, ...]) -> Specimen:
    """Give a model images of the first of these sizes that it takes."""
    for size in sizes:
        specimen = Specimen(model, lambda n, generator, s=size: torch.randn(n, channels, s, s, generator=generator))
        try:
            run_once(specimen)
        except (RuntimeError, ValueError, AssertionError):
            if size == sizes[-1]:
                raise
        else:
            return specimen
    raise AssertionError("no sizes")


if __name__ == "__main__":
    TIMM_LIST.write_text("\n".join(choose_timm()) + "\n")
