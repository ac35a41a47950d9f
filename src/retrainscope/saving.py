"""Results as versioned JSON: nothing but plain data is written, and nothing is ever unpickled."""

import dataclasses
import functools
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from retrainscope.exceptions import MissingExtraError, OutputError, ResultFormatError

__all__ = [
    "SCHEMA_VERSION",
    "check_place",
    "from_plain",
    "import_pandas",
    "load_json",
    "save_json",
    "to_plain",
    "write_bytes",
    "write_text",
]

SCHEMA_VERSION = 1
T = TypeVar("T")


def save_json(result: Any, path: str | Path) -> None:
    """Write a result dataclass to a file."""
    document = {"retrainscope": type(result).__name__, "schema": SCHEMA_VERSION, "result": to_plain(result)}
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: first beside it, then in its place."""
    write_bytes(path, text.encode("utf-8"))


def check_place(path: str | Path) -> None:
    """Refuse a file whose folder is not there."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise OutputError(f"There is no folder {folder} to write {Path(path).name} to. Make it, or name another one.")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: first beside it and down to the disk, then in its place."""
    path = Path(path)
    check_place(path)
    draft = path.with_name(f".{path.name}.part")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def load_json(kind: type[T], path: str | Path) -> T:
    """Read a result dataclass from a file, or say why it cannot be."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultFormatError(f"{path} is not a JSON file ({error}).") from error
    if not isinstance(document, dict) or document.get("retrainscope") != kind.__name__:
        found = document.get("retrainscope") if isinstance(document, dict) else None
        raise ResultFormatError(f"{path} holds no {kind.__name__} (found: {found or 'something else'}).")
    if not isinstance(document.get("schema"), int) or document["schema"] > SCHEMA_VERSION:
        raise ResultFormatError(
            f"{path} was written by a newer version (schema {document.get('schema')}; this one reads up to "
            f"{SCHEMA_VERSION}). Update retrainscope."
        )
    try:
        return typing.cast(T, from_plain(kind, document["result"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ResultFormatError(f"{path} is damaged: {error}.") from error


def to_plain(value: Any, *, tensors: bool = False) -> Any:
    """Turn a result into JSON's types; numbers that are not finite become null.

    With `tensors` into what ``torch.save`` writes bit for bit: arrays become tensors, and numbers stay as they are.
    """
    plain = functools.partial(to_plain, tensors=tensors)
    if tensors and isinstance(value, np.generic):
        value = value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [f.name for f in dataclasses.fields(value) if f.metadata.get("saved", True)]
        return {name: plain(getattr(value, name)) for name in kept}
    if isinstance(value, np.ndarray):
        if tensors:
            return torch.tensor(value)
        return {"shape": list(value.shape), "values": [plain(x) for x in value.ravel().tolist()]}
    if isinstance(value, Mapping):
        # As pairs, so that keys (class labels) keep their types.
        return [[plain(k), plain(v)] for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if tensors or math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ResultFormatError(
        f"A {type(value).__name__} ({value!r}) cannot be saved: class labels must be strings, numbers, "
        "booleans, None or tuples of these."
    )


def from_plain(kind: Any, plain: Any) -> Any:
    """Build a value of an annotated type again."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        make: Any = kind
        # What an older version did not write has a default.
        names = [f.name for f in dataclasses.fields(kind) if f.name in plain or not _has_default(f)]
        return make(**{name: from_plain(hints[name], plain[name]) for name in names})
    if isinstance(plain, torch.Tensor):
        return plain.numpy()
    if origin in (np.ndarray, NDArray):  # the latter where NumPy has made it a type of its own
        numbers = [np.nan if x is None else x for x in plain["values"]]
        return np.array(numbers, dtype=np.float64).reshape(plain["shape"])
    if origin is tuple:
        items = arguments[:1] * len(plain) if arguments[-1] is Ellipsis else arguments
        return tuple(from_plain(item, x) for item, x in zip(items, plain, strict=True))
    if origin is dict:
        return {from_plain(arguments[0], k): from_plain(arguments[1], v) for k, v in plain}
    if origin is typing.Union or origin is types.UnionType:
        options = [option for option in arguments if option is not type(None)]
        return None if plain is None else from_plain(options[0], plain)
    if kind is float:
        return math.nan if plain is None else float(plain)
    return _label(plain)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _label(plain: Any) -> Any:
    """Turn the lists of JSON back into tuples, which are what a label can be."""
    return tuple(_label(item) for item in plain) if isinstance(plain, list) else plain


def import_pandas() -> Any:
    """Import pandas, or name the extra that brings it."""
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtraError.for_package("pandas", "frame") from error
    return pd
