"""Run the MNIST study for several seeds, keep what is finished, and write the report."""

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrainscope.data import load_mnist
from retrainscope.plotting import save_figure
from retrainscope.report import check_extras, write_report
from retrainscope.saving import load_json, save_json, to_plain, write_text
from retrainscope.studies.keeping import kept_folder, reading
from retrainscope.studies.mnist.experiments import Pictures, Progress, SeedResult, run_seed
from retrainscope.studies.mnist.paper import CLAIMS, status
from retrainscope.studies.mnist.sections import sections

__all__ = ["Settings", "Study", "run_study", "write_study"]

_BUDGETS, _FULL_BUDGETS = (20, 200), (20, 200, 2000)


@dataclass(frozen=True)
class Settings:
    """What makes two runs of the study comparable.

    Attributes
    ----------
    full : bool
        Whether all of MNIST is used, or the bundled sample.
    budgets : tuple of int
        Samples a digit in the sweep.
    retrainscope, torch : str
        Versions.
    """

    full: bool
    budgets: tuple[int, ...]
    retrainscope: str
    torch: str


@dataclass(frozen=True, eq=False)
class Study:
    """The results of all seeds, and the pictures of the first."""

    settings: Settings
    results: list[SeedResult]
    pictures: Pictures


def run_study(
    *,
    seeds: Sequence[int],
    full: bool = False,
    mnist_folder: str | Path | None = None,
    out: str | Path | None = None,
    progress: bool | None = None,
    say: Progress = print,
) -> Study:
    """Run the study once for each seed; with a folder, finished seeds are kept there and not run again.

    Parameters
    ----------
    seeds : sequence of int
    full : bool
        Use all of MNIST instead of the bundled sample.
    mnist_folder : path, optional
        With `full`: where the IDX files lie; None fetches from OpenML.
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
    DataUnavailableError
        If the images cannot be read or fetched.
    OutputError
        If the folder cannot be written or holds a run with other settings.
    """
    settings = Settings(
        full=full,
        budgets=_FULL_BUDGETS if full else _BUDGETS,
        retrainscope=importlib.metadata.version("retrainscope"),
        torch=importlib.metadata.version("torch"),
    )
    kept = None
    if out is not None:
        check_extras()
        kept = _Kept(Path(out), settings)
    mnist = load_mnist(full=full, folder=mnist_folder if full else None)
    results: list[SeedResult] = []
    pictures = None
    for number, seed in enumerate(seeds, start=1):
        found = kept.read(seed) if kept else None
        if found is None:
            found = run_seed(
                mnist,
                seed,
                budgets=settings.budgets,
                progress=progress,
                say=lambda what, n=number, s=seed: say(f"[{n} of {len(seeds)}, seed {s}] {what}"),  # type: ignore[misc]
            )
            if kept:
                kept.write(*found)
        else:
            say(f"[{number} of {len(seeds)}, seed {seed}] kept from an earlier run")
        results.append(found[0])
        pictures = found[1] if pictures is None else pictures
    assert pictures is not None
    return Study(settings, results, pictures)


def write_study(study: Study, out: str | Path) -> Path:
    """Write ``report.html``, ``study.json`` and every figure as PNG and SVG; return the report's path.

    Parameters
    ----------
    study : Study
    out : path
        A folder that is there.
    """
    out = Path(out)
    settings = study.settings
    which = (
        "All of MNIST." if settings.full else "The bundled sample of MNIST: 600 training and 200 test images a digit."
    )
    parts = sections(study.results, study.pictures, data=which)
    for part in parts:
        for picture in part.pictures:
            save_figure(picture.figure, out, picture.name)
    versions = {
        **{name: importlib.metadata.version(name) for name in ("retrainscope", "torch", "numpy", "scikit-learn")},
        "python": platform.python_version(),
    }
    document = {
        "settings": asdict(settings),
        "versions": versions,
        "claims": [
            {
                "experiment": claim.experiment,
                "quote": claim.quote,
                "criterion": claim.criterion,
                "values": [claim.value(result) for result in study.results],
                "result": status(claim, study.results)[0],
            }
            for claim in CLAIMS
        ],
        "seeds": [to_plain(result) for result in study.results],
    }
    write_text(out / "study.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    footer = ", ".join(f"{name} {version}" for name, version in versions.items())
    seconds = sum(sum(result.seconds.values()) for result in study.results)
    return write_report(
        out / "report.html",
        "Which layers must be retrained? The MNIST study",
        parts,
        footer=f"Made by: retrainscope mnist. {footer}. Computing took {seconds / 60:.1f} minutes.",
    )


class _Kept:
    """Finished seeds in a folder."""

    def __init__(self, out: Path, settings: Settings) -> None:
        self.folder = kept_folder(out, settings, "seeds")

    def read(self, seed: int) -> tuple[SeedResult, Pictures] | None:
        result_path, pictures_path = self._paths(seed)
        if not result_path.exists() or not pictures_path.exists():
            return None
        with reading(result_path):
            with pictures_path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                pictures = _unpack(dict(arrays))
            return load_json(SeedResult, result_path), pictures

    def write(self, result: SeedResult, pictures: Pictures) -> None:
        result_path, pictures_path = self._paths(result.seed)
        arrays: dict[str, Any] = _pack(pictures)
        np.savez_compressed(pictures_path, **arrays)
        save_json(result, result_path)  # last: a seed without it is not finished

    def _paths(self, seed: int) -> tuple[Path, Path]:
        return self.folder / f"seed-{seed}.json", self.folder / f"seed-{seed}.npz"


def _pack(pictures: Pictures) -> dict[str, NDArray[Any]]:
    parts = {"map_labels": pictures.map_labels, "originals": pictures.originals}
    for kind in ("maps", "rows", "losses"):
        parts |= {f"{kind}/{name}": array for name, array in getattr(pictures, kind).items()}
    return parts


def _unpack(parts: dict[str, NDArray[Any]]) -> Pictures:
    def of_kind(kind: str) -> dict[str, NDArray[Any]]:
        return {name.partition("/")[2]: array for name, array in parts.items() if name.startswith(f"{kind}/")}

    return Pictures(parts["map_labels"], of_kind("maps"), parts["originals"], of_kind("rows"), of_kind("losses"))
