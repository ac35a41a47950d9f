"""``retrainscope recommend``: advice on a model and data that are named on the command line."""

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrainscope.advice import Recommendation
from retrainscope.base import LayerEstimator
from retrainscope.checks import check_device, reason_of
from retrainscope.commands.data_paths import load_data
from retrainscope.commands.model_names import load_model
from retrainscope.decoding import LayerDecoderProbe
from retrainscope.exceptions import (
    DataUnavailableError,
    InvalidDataError,
    MissingExtraError,
    OutputError,
    RetrainscopeError,
    UnsupportedModelError,
)
from retrainscope.inversion import GradientInverter
from retrainscope.recommendation import recommend_layers
from retrainscope.report import check_extras
from retrainscope.saving import write_text
from retrainscope.spread import ActivationSpread
from retrainscope.tangent import TangentProbe

__all__ = ["ESTIMATORS", "run"]

ESTIMATORS: dict[str, type[LayerEstimator]] = {
    "spread": ActivationSpread,
    "tangent": TangentProbe,
    "probe": LayerDecoderProbe,
    "inverter": GradientInverter,
}
_JSON, _PAGE = "advice.json", "advice.html"


def run(options: argparse.Namespace) -> int:
    """Advise, write what is asked for, and print the advice.

    Parameters
    ----------
    options : Namespace
        As the command's parser makes it.

    Returns
    -------
    int
        The exit status: 0, or 130 if interrupted.

    Raises
    ------
    RetrainscopeError
        If the command is used badly, or the model or the data cannot be measured.
    """
    try:
        with redirect_stdout(sys.stderr):  # what the model's own code prints is not the result
            with_page = _checked(options)
            advice = _advice(options)
            document = _document(advice)
        _print(document.rstrip("\n") if options.format == "json" else str(advice))
        if options.out is not None:  # after it is printed, so that it is not lost where it cannot be written
            _write(advice, document, options, with_page)
    except KeyboardInterrupt:
        kept = "nothing is written" if options.checkpoint is None else f"what is finished is in {options.checkpoint}"
        print(f"retrainscope: interrupted; {kept}.", file=sys.stderr)
        return 130
    except RetrainscopeError:
        if options.debug:
            traceback.print_exc()
        raise
    return 0


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # which may lack the letters of a layer's name
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _checked(options: argparse.Namespace) -> bool:
    """Refuse what can be refused before any work; tell whether a page can be written."""
    for name in options.estimators or ():
        if name not in ESTIMATORS:
            raise InvalidDataError(f"--estimators takes {', '.join(ESTIMATORS)}. Got {name!r}.")
    for name in ("budget", "groups", "trial"):
        if options.estimators and getattr(options, name):
            raise InvalidDataError(f"--{name} is for the forecast. Leave it out, or leave --estimators out.")
    if options.trial_steps is not None and not options.trial:
        raise InvalidDataError("--trial-steps is for --trial, which was not given. Give both or neither.")
    if options.device is not None:
        check_device(options.device)
    for name in ("known", "unknown"):
        path = getattr(options, name)
        if not path.exists():
            raise DataUnavailableError(f"There is no file or folder {path} (--{name}).")
    if options.out is None:
        return False
    _check_out(options.out, options.force)
    try:
        check_extras()
    except MissingExtraError as error:
        _say(options, f"There will be no {_PAGE}: {error}")
        return False
    return True


def _check_out(out: Path, force: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror}). Name another folder.") from error
    there = [name for name in (_JSON, _PAGE) if (out / name).exists()]
    if there and not force:
        raise OutputError(f"{out} has {' and '.join(there)} already. Name another folder, or give --force.")


def _advice(options: argparse.Namespace) -> Recommendation:
    _say(options, f"Loading {options.model}")
    named = load_model(options.model, weights=options.weights, seed=options.seed)
    transform = named.image_transform
    if options.image_size is not None:
        if transform is not None:
            raise InvalidDataError(f"--image-size is for models of your own; {options.model} tells its size. Leave it.")
        transform = partial(_square, options.image_size)
    known, unknown = (
        load_data(
            path, name, image_transform=transform, samples=options.samples, seed=options.seed, groups=options.groups
        )
        for name, path in (("known", options.known), ("unknown", options.unknown))
    )
    if options.groups is not None and unknown.groups is None:
        raise InvalidDataError(
            f"{options.unknown} has no array or column {options.groups!r} (--groups). It must tell of each sample "
            "what it is a part of; folders of images have none."
        )
    given: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("layers", "head", "input_layer", "batch_size", "device")
        if getattr(options, name) is not None
    }
    given |= {"random_state": options.seed, "progress": False if options.quiet else None}
    if options.estimators:
        chosen = [ESTIMATORS[name](named.model, **given) for name in dict.fromkeys(options.estimators)]
        given = {"estimators": chosen}
    if options.trial:
        given["trial"] = {} if options.trial_steps is None else {"steps": options.trial_steps}
    _say(options, "Measuring")
    try:
        return recommend_layers(
            named.model,
            known.data,
            unknown.data,
            threshold=options.threshold,
            budget=options.budget,
            groups=unknown.groups,
            checkpoint=options.checkpoint,
            **given,
        )
    except RetrainscopeError:
        raise
    except Exception as error:  # the model's own code runs here
        raise UnsupportedModelError(
            f"The model fails on the data ({type(error).__name__}: {reason_of(error)}). See where with --debug."
        ) from error


def _square(size: int) -> Callable[[Any], Tensor]:
    """Return what scales an image's shorter side, cuts the middle, and brings the values to [0, 1]."""

    def transform(image: Any) -> Tensor:
        from PIL import ImageOps

        cut = ImageOps.fit(image, (size, size))
        return torch.from_numpy(np.array(cut)).movedim(-1, 0).float() / 255

    return transform


def _document(advice: Recommendation) -> str:
    """Return what `Recommendation.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _JSON
        advice.save(path)
        return path.read_text(encoding="utf-8")


def _write(advice: Recommendation, document: str, options: argparse.Namespace, with_page: bool) -> None:
    file, page = options.out / _JSON, options.out / _PAGE
    try:
        write_text(file, document)
        page.unlink(missing_ok=True)  # an older one must not stand beside this advice
        if with_page:
            advice.report(page, title=f"Advice for {options.model}")
    except OSError as error:
        raise OutputError(
            f"{options.out} cannot be written ({error.strerror or error}). Name another folder."
        ) from error
    _say(options, f"Written: {' and '.join(str(path) for path in (file, page) if path.exists())}")


def _say(options: argparse.Namespace, what: str) -> None:
    if not options.quiet:
        print(what, file=sys.stderr, flush=True)
