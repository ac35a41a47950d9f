"""The paper's VGG-19 experiment: photographs rebuilt from trained and from random weights, layer by layer."""

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from retrainscope.checks import check_device, check_number
from retrainscope.descent import Descent
from retrainscope.plotting import save_figure
from retrainscope.report import Picture, Section, check_extras, write_report
from retrainscope.saving import write_text
from retrainscope.studies.depth import (
    Measures,
    contrast_table,
    image_quality,
    measure_network,
    measures_table,
    plot_contrasts,
    plot_pictures,
)
from retrainscope.studies.keeping import kept_folder, reading
from retrainscope.studies.vgg19.loading import (
    IMAGENET,
    load_images,
    named_convolutions,
    random_network,
    trained_network,
)
from retrainscope.tables import Table

__all__ = ["DEFAULT_LAYERS", "Settings", "Study", "run_study", "tables", "write_study"]

DEFAULT_LAYERS = ("1", "2", "3", "4", "8", "12", "16")
TRAINED, RANDOM = "trained", "random"
_SHOWN = 6  # images with a figure of their own


@dataclass(frozen=True)
class Settings:
    """What makes two runs of the study comparable.

    Attributes
    ----------
    weights : str
        ``"imagenet"``, ``"random"``, or the hash of the file.
    layers : tuple of str
        Names in torchvision's VGG-19.
    images : str
        Hash of the pixels.
    descent : dict
    seed : int
    retrainscope, torch, torchvision : str
        Versions.
    """

    weights: str
    layers: tuple[str, ...]
    images: str
    descent: dict[str, str]
    seed: int
    retrainscope: str
    torch: str
    torchvision: str


@dataclass(frozen=True, eq=False)
class Study:
    """What was rebuilt, by kind of weights: one `Measures` for each initialisation."""

    settings: Settings
    kinds: dict[str, list[Measures]]
    layers: tuple[str, ...]
    image_names: tuple[str, ...]
    images: Tensor
    seconds: float


def run_study(
    *,
    weights: str = IMAGENET,
    images: Sequence[str | Path] = (),
    layers: Sequence[str] = DEFAULT_LAYERS,
    size: int = 224,
    n_inits: int = 3,
    descent: Descent | None = None,
    seed: int = 0,
    device: str | None = None,
    out: str | Path | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = print,
) -> Study:
    """Invert VGG-19 with trained and with random weights; with a folder, finished networks are kept there.

    Parameters
    ----------
    weights : str
        ``"imagenet"``: torchvision's, downloaded if need be; ``"random"``: no trained network; else a file with a
        state dict of torchvision's VGG-19.
    images : sequence of path
        Files, or folders of files; none: the two photographs of scikit-learn.
    layers : sequence of str
        Numbers of convolutions, from 1 to 16, or names such as ``"features.34"``.
    size : int
        Images are scaled and cut to so many pixels squared.
    n_inits : int
        Random initialisations, as torchvision makes them.
    descent : Descent, optional
        None: L-BFGS, 200 passes.
    seed : int
        The first seed of the random weights, and that of the starts.
    device : str, optional
    out : path, optional
    progress : bool or None
        None shows bars on a terminal only.
    say : callable (str) -> None
        Told what happens next.

    Returns
    -------
    Study

    Raises
    ------
    MissingExtraError
        If torchvision, scikit-image or Pillow is not installed.
    DataUnavailableError
        If an image or the weights cannot be read or fetched.
    InvalidDataError
        If an image is too small, or the file holds the weights of another network.
    LayerNotFoundError
        If VGG-19 has no such layer.
    OutputError
        If the folder cannot be written or holds a run with other settings.
    """
    descent = Descent(max_iter=200) if descent is None else descent
    check_number("n_inits", n_inits, whole=True)
    if device is not None:
        check_device(device)
    named = named_convolutions(layers)
    image_names, pixels = load_images(images, size)
    image_quality(np.zeros((8, 8, 3)), np.ones((8, 8, 3)))  # is scikit-image there?
    trained = None if weights == RANDOM else trained_network(weights)
    settings = Settings(
        weights=weights if weights in (RANDOM, IMAGENET) else _hash(Path(weights).read_bytes()),
        layers=tuple(named.values()),
        images=_hash(pixels.numpy().tobytes()),
        descent={name: str(value) for name, value in asdict(descent).items()},
        seed=seed,
        retrainscope=importlib.metadata.version("retrainscope"),
        torch=importlib.metadata.version("torch"),
        torchvision=importlib.metadata.version("torchvision"),
    )
    kept = None
    if out is not None:
        check_extras()
        kept = kept_folder(out, settings, "networks")
    jobs: list[tuple[str, str, Callable[[], nn.Module]]] = []
    if trained is not None:
        jobs.append((TRAINED, TRAINED, lambda: trained))
    jobs += [(RANDOM, f"{RANDOM}-{s}", partial(random_network, s)) for s in range(seed, seed + n_inits)]
    start = time.perf_counter()
    kinds: dict[str, list[Measures]] = {kind: [] for kind, _, _ in jobs}
    for number, (kind, name, build) in enumerate(jobs, start=1):
        path = None if kept is None else kept / f"{name}.npz"
        if path is not None and path.exists():
            say(f"[{number} of {len(jobs)}] {name} weights: kept from an earlier run")
            with reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                measures = Measures(**{**arrays, "n_diverged": int(arrays["n_diverged"])})
        else:
            say(f"[{number} of {len(jobs)}] {name} weights: {len(pixels)} images from {len(named)} layers")
            measures = measure_network(
                build(), pixels, settings.layers, descent=descent, seed=seed, device=device, progress=progress
            )
            if path is not None:
                _write(path, measures)
        kinds[kind].append(measures)
    return Study(settings, kinds, tuple(named), image_names, pixels, time.perf_counter() - start)


def tables(study: Study) -> list[Table]:
    """Return the tables: what each network reached, and, with trained weights, how random ones differ."""
    made = [measures_table(study.kinds, study.layers, title="How well the images are rebuilt")]
    if TRAINED in study.kinds:
        title = "Random weights against trained ones"
        made.append(contrast_table(study.kinds[TRAINED][0], study.kinds[RANDOM], study.layers, title=title))
    return made


def write_study(study: Study, out: str | Path) -> Path:
    """Write ``report.html``, ``vgg19.json`` and every figure as PNG and SVG; return the report's path.

    Parameters
    ----------
    study : Study
    out : path
        A folder that is there.
    """
    out = Path(out)
    parts = _sections(study)
    for part in parts:
        for picture in part.pictures:
            save_figure(picture.figure, out, picture.name)
    names = ("retrainscope", "torch", "torchvision", "scikit-image", "numpy")
    versions = {**{name: importlib.metadata.version(name) for name in names}, "python": platform.python_version()}
    document = {
        "settings": asdict(study.settings),
        "versions": versions,
        "images": study.image_names,
        "layers": study.layers,
        "networks": {
            kind: [
                {
                    field.name: np.asarray(getattr(measures, field.name)).tolist()
                    for field in fields(Measures)
                    if field.name != "pictures"
                }
                for measures in networks
            ]
            for kind, networks in study.kinds.items()
        },
    }
    write_text(out / "vgg19.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    footer = ", ".join(f"{name} {version}" for name, version in versions.items())
    return write_report(
        out / "report.html",
        "What do the layers of VGG-19 tell of an image?",
        parts,
        footer=f"Made by: retrainscope vgg19. {footer}. Computing took {study.seconds / 60:.1f} minutes in this run.",
    )


def _write(path: Path, measures: Measures) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez_compressed(file, **{field.name: getattr(measures, field.name) for field in fields(Measures)})
    part.replace(path)  # a network whose file is there is finished


def _sections(study: Study) -> list[Section]:
    made = tables(study)
    first = {kind: networks[0] for kind, networks in study.kinds.items()}
    names = list(study.image_names)
    n_diverged = sum(measures.n_diverged for networks in study.kinds.values() for measures in networks)
    descent = study.settings.descent
    sections = [
        Section(
            "What was done",
            [
                f"Each image is rebuilt from what a layer of VGG-19 makes of it, by {descent['max_iter']} steps of "
                f"descent on the input ({descent['optimizer']}) from random pixels. Layers are numbered by "
                "convolution, and taken before the ReLU.",
                f"Weights: {_weights_in_words(study)}. Images: {', '.join(names)}, {study.images.shape[-1]} pixels "
                "squared.",
                f"{n_diverged or 'No'} inversion{'' if n_diverged == 1 else 's'} diverged.",
            ],
            made[:1],
        )
    ]
    if TRAINED in study.kinds:
        random = {RANDOM: study.kinds[RANDOM]}
        figure = plot_contrasts(random, study.kinds[TRAINED][0], study.layers)
        sections.append(
            Section(
                "Trained beside random",
                [
                    "The paper says that the two look the same in layers 1-3, and that at layer 16 random weights give "
                    "a very bad picture. Others found that random weights invert better (arXiv 1606.04801)."
                ],
                made[1:],
                [Picture("contrasts", "How much larger the errors of random weights are, by depth.", figure)],
            )
        )
    shown = [
        Picture(
            f"image-{place + 1}",
            f"{name}, and what is rebuilt from each layer; of random weights the first initialisation.",
            plot_pictures(study.images[place], first, study.layers, place=place),
        )
        for place, name in enumerate(names[:_SHOWN])
    ]
    left_out = f" The first {_SHOWN} of {len(names)} images are shown." if len(names) > _SHOWN else ""
    sections.append(
        Section("The pictures", [f"From the input on the left to the top on the right.{left_out}"], (), shown)
    )
    return sections


def _weights_in_words(study: Study) -> str:
    n = len(study.kinds[RANDOM])
    random = f"{n} random initialisation{'' if n == 1 else 's'} (torchvision's: Kaiming)"
    source = "ImageNet" if study.settings.weights == IMAGENET else "a file"
    return f"trained ones from {source}, and {random}" if TRAINED in study.kinds else random


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
