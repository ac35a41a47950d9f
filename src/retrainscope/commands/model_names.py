"""Models by the names that a command line can give them."""

import difflib
import importlib
import importlib.util
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from retrainscope.checks import reason_of
from retrainscope.exceptions import DataUnavailableError, InvalidDataError, MissingExtraError, UnsupportedModelError

__all__ = ["RANDOM", "NamedModel", "import_library", "load_model"]

RANDOM = "random"
_FORMS = "module:callable, file.py:callable, timm:NAME, torchvision:NAME or hf:NAME"
_OTHER_WEIGHTS = "Give its weights with --weights FILE, or --weights random."
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


@dataclass(frozen=True, eq=False)
class NamedModel:
    """A model, and how it takes images.

    Attributes
    ----------
    model : nn.Module
    image_transform : callable () -> (callable (image) -> sample), optional
        Makes what turns an image of Pillow into a sample; None where the name does not tell.
    """

    model: nn.Module
    image_transform: Callable[[], Callable[[Any], Any]] | None = None


def load_model(name: str, *, weights: str | None = None, seed: int = 0) -> NamedModel:
    """Bring the model that is named so.

    Parameters
    ----------
    name : str
        ``"module:callable"`` or ``"file.py:callable"``, where the callable is called without arguments and may be a
        module already; ``"timm:NAME"``; ``"torchvision:NAME"``; ``"hf:NAME"``, a name or a folder.
    weights : str, optional
        A file with a state dict, or ``"random"`` for a library's model as it is before training. None: a library's
        pretrained weights, which may be downloaded; a callable's model as it comes.
    seed : int
        Of random weights.

    Returns
    -------
    NamedModel

    Raises
    ------
    UnsupportedModelError
        If there is no such model, its code fails, or the weights are of another.
    DataUnavailableError, InvalidDataError
        If weights cannot be fetched or read.
    MissingExtraError
        If the library is not installed.
    """
    kind, _, rest = name.partition(":")
    library = {"timm": _timm, "torchvision": _torchvision, "hf": _hugging_face}.get(kind)
    if library is None and weights == RANDOM:
        raise InvalidDataError(
            "--weights random is for models of timm, torchvision and hf. Let the callable return the model with "
            "random weights instead."
        )
    if not kind or not rest:
        raise UnsupportedModelError(f"The model must be named {_FORMS}. Got {name!r}.")
    state = None if weights in (None, RANDOM) else _read_state(Path(str(weights)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        named = NamedModel(_own_model(name)) if library is None else library(rest, weights is None)
    if state is not None:
        _load_state(named.model, state, f"{weights} is not of {name}")
    return named


def import_library(package: str) -> Any:
    """Import a package that no extra brings, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{package} is needed for this and cannot be imported ({reason_of(error)}). Install it with: pip install "
            f"{package}"
        ) from error


def _own_model(name: str) -> nn.Module:
    """Import a callable and call it."""
    source, _, attribute = name.rpartition(":")
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise UnsupportedModelError(f"There is no file {source}.")
    with _on_path(Path(source).parent if is_file else Path()):
        try:
            module = _run_file(Path(source)) if is_file else importlib.import_module(source)
        except (Exception, SystemExit) as error:
            raise UnsupportedModelError(
                f"{source} cannot be imported ({_text_of(error)}). Models are named {_FORMS}."
            ) from error
        if not hasattr(module, attribute):
            near = difflib.get_close_matches(attribute, vars(module), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnsupportedModelError(f"{source} has no {attribute!r}.{hint}")
        model = getattr(module, attribute)
        if not isinstance(model, nn.Module):
            try:
                model = model()
            except (Exception, SystemExit) as error:
                raise UnsupportedModelError(f"{name} failed ({_text_of(error)}). See where with --debug.") from error
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{name} must return an nn.Module. Got {type(model).__name__} instead.")
    return model


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Let modules be imported from a folder."""
    place = str(folder.resolve())
    sys.path.insert(0, place)
    try:
        yield
    finally:
        with suppress(ValueError):  # the imported code may have taken it away
            sys.path.remove(place)


def _run_file(path: Path) -> ModuleType:
    name = f"_model_of_{path.stem}"  # no other module's, whatever the file is called
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses, for one, look for what they were made in
    spec.loader.exec_module(module)
    return module


def _timm(name: str, pretrained: bool) -> NamedModel:
    timm = import_library("timm")
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    model = _built(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained))

    def transform() -> Any:
        return timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

    return NamedModel(model, transform)


def _torchvision(name: str, pretrained: bool) -> NamedModel:
    models = import_library("torchvision").models
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    best = models.get_model_weights(name).DEFAULT
    model = _built(f"torchvision:{name}", lambda: models.get_model(name, weights=best if pretrained else None))
    return NamedModel(model, best.transforms)


def _hugging_face(name: str, pretrained: bool) -> NamedModel:
    transformers = import_library("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:
        raise DataUnavailableError(
            f"The configuration of hf:{name} cannot be read or fetched ({_text_of(error)})."
        ) from error
    found = [kind for kind in _CLASSIFIERS for built in config.architectures or () if built.endswith(kind)]
    if not found:
        raise UnsupportedModelError(
            f"hf:{name} is no classifier that is known: its architectures are {config.architectures}, and one that "
            f"ends in {' or '.join(_CLASSIFIERS)} is needed. Load it in a function of your own: file.py:callable."
        )
    kind = getattr(transformers, f"AutoModel{found[0]}")

    def build() -> Any:
        return kind.from_pretrained(name, config=config) if pretrained else kind.from_config(config)

    model = _built(f"hf:{name}", build).float()  # some are kept in half precision, in which needs drown

    def transform() -> Any:
        processor = _built(
            f"The image processor of hf:{name}",
            lambda: transformers.AutoImageProcessor.from_pretrained(name),
            "Give the data as arrays in a .npz file, with pixel_values.",
        )
        return lambda image: {"pixel_values": processor(images=image, return_tensors="pt")["pixel_values"][0]}

    return NamedModel(model, transform if found[0] == "ForImageClassification" else None)


def _built(name: str, build: Callable[[], Any], remedy: str = _OTHER_WEIGHTS) -> Any:
    try:
        return build()
    except Exception as error:  # what a library raises without a network, or for a damaged file, is not to be foreseen
        raise DataUnavailableError(f"{name} cannot be loaded or fetched ({_text_of(error)}). {remedy}") from error


def _unknown(library: str, name: str, known: list[str]) -> UnsupportedModelError:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return UnsupportedModelError(f"{library} has no model {name!r}.{hint}")


def _read_state(path: Path) -> Any:
    if not path.is_file():
        raise DataUnavailableError(f"There is no file {path}. Give a file with a state dict, or --weights random.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a file that is none raises is not to be foreseen
        raise InvalidDataError(
            f"{path} holds no state dict that torch.load takes with weights_only=True ({_text_of(error)}). Save "
            "model.state_dict() with torch.save."
        ) from error


def _load_state(model: nn.Module, state: Any, problem: str) -> None:
    try:
        model.load_state_dict(state)
    except Exception as error:
        _, *lines = str(error).splitlines()  # the first says only that there are errors
        what = " ".join(textwrap.shorten(line, 160, placeholder=" ...") for line in lines[:4])
        raise UnsupportedModelError(
            f"{problem} ({what or _text_of(error)}). Save model.state_dict() alone; a network with other classes "
            "than its library's comes from a function of your own: file.py:callable."
        ) from error


def _text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {reason_of(error)}"
