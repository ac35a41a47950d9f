"""The finished parts of a long run, kept in a folder, so that it can be stopped and go on: `Parts`."""

import hashlib
import io
import json
import os
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from retrainscope.checks import reason_of
from retrainscope.exceptions import CheckpointError, InvalidDataError
from retrainscope.processes import from_first, rank
from retrainscope.saving import write_bytes, write_text

__all__ = ["NOTHING_KEPT", "Parts", "check_folder"]

_SCHEMA_VERSION = 1
_MANIFEST, _SUFFIX = "manifest.json", ".bin"
_SHARE = 0.05  # of the time, at most, that what is under way may take to be kept


class Parts:
    """What is finished of a run, each part in a file of its own that is written whole or not at all.

    A file is a digest, which tells damage and files of other runs, and what ``torch.save`` makes of plain data and
    tensors; it is read with ``weights_only=True``. Without a folder nothing is kept. Of several processes all make the
    same calls, the first alone reads and writes, and the others are told.

    Parameters
    ----------
    folder : Path or None
    fingerprint : str
        Of the run.
    prefix : str
        Of the names of these parts.
    """

    def __init__(self, folder: Path | None, fingerprint: str = "", prefix: str = "") -> None:
        self._folder, self._fingerprint, self._prefix = folder, fingerprint, prefix
        self._written, self._cost = -float("inf"), 0.0  # when the last part was written, and how long that took

    @classmethod
    def open(cls, folder: Path, fingerprint: str) -> "Parts":
        """Begin a folder, or go on with one, all of whose files are looked at.

        Raises
        ------
        CheckpointError
            If the folder holds another run or something else, or a file is damaged.
        """
        manifest, parts = folder / _MANIFEST, cls(folder, fingerprint)
        if rank():
            return parts
        if not manifest.exists():
            found = {"retrainscope": "checkpoint", "schema": _SCHEMA_VERSION, "fingerprint": fingerprint}
            parts._write(lambda: write_text(manifest, json.dumps(found, indent=1) + "\n"))
            return parts
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
            schema, same = int(found["schema"]), found["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{manifest} is damaged ({reason_of(error)}). {_way_out(folder)}") from error
        if schema > _SCHEMA_VERSION:
            raise CheckpointError(
                f"{folder} was written by a newer version (schema {schema}; this one reads up to {_SCHEMA_VERSION}). "
                f"Update retrainscope, or name another folder with checkpoint=."
            )
        if not same:
            raise CheckpointError(
                f"{folder} holds parts of another run: model, data, settings and random_state must be the same. "
                f"{_way_out(folder)}"
            )
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            parts._payload(path)
        return parts

    def under(self, name: str) -> "Parts":
        """Return the parts whose names begin with this one."""
        return Parts(self._folder, self._fingerprint, f"{self._prefix}{name}.")

    def get(self, name: str) -> Any:
        """Return a part, its tensors on the CPU, or None where it is still to be done."""
        path = self._path(name)
        return None if path is None else from_first(f"the part {name}", self._read(path) if rank() == 0 else None)

    def _read(self, path: Path) -> Any:
        if not path.exists():
            return None
        try:
            return torch.load(io.BytesIO(self._payload(path)), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise _damaged(path, reason_of(error)) from error

    def put(self, name: str, part: Any) -> None:
        """Keep a part: numbers, text, None and tensors, in dicts, lists and tuples."""
        path = self._path(name)
        if path is None or rank():
            return
        began = time.monotonic()
        buffer = io.BytesIO()
        torch.save(part, buffer)
        payload = buffer.getvalue()
        self._write(lambda: write_bytes(path, self._digest(path, payload) + payload))
        self._written = time.monotonic()
        self._cost = self._written - began

    def due(self) -> bool:
        """Tell whether to keep what is under way: whether the last time is long past against what that took."""
        passed = time.monotonic() - self._written
        return self._folder is not None and from_first("whether to keep", passed >= self._cost / _SHARE)

    def clear(self) -> None:
        """Forget these parts, which are parts of one that is finished."""
        if self._folder is not None and rank() == 0:
            for path in self._folder.glob(f"{self._prefix}*{_SUFFIX}"):
                path.unlink()

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{self._prefix}{name}{_SUFFIX}"

    def _digest(self, path: Path, payload: bytes) -> bytes:
        return hashlib.sha256(f"{self._fingerprint} {path.name}\n".encode() + payload).digest()

    def _payload(self, path: Path) -> bytes:
        size = hashlib.sha256().digest_size
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _damaged(path, error.strerror or "cannot be read") from error
        payload = content[size:]
        if content[:size] != self._digest(path, payload):
            raise _damaged(path, "its content is not what was written")
        return payload

    def _write(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise CheckpointError(
                f"{self._folder} cannot be written ({error.strerror or error}), so nothing more can be kept. Make "
                "room, or name another folder with checkpoint=; what is there already is whole."
            ) from error


NOTHING_KEPT = Parts(None)


def check_folder(path: Any) -> Path:
    """Make the folder if it is missing, and refuse what process 0 cannot write, or what holds something else."""
    if not isinstance(path, str | os.PathLike):
        raise InvalidDataError(f"The 'checkpoint' parameter must be the path of a folder. Got {path!r} instead.")
    folder = Path(path)
    if rank():
        return folder
    if not folder.exists() and not folder.parent.is_dir():
        raise InvalidDataError(
            f"The 'checkpoint' parameter must name a folder, or a new one in a folder that exists. Got {str(folder)!r}."
        )
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]  # drafts may be left over
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint folder {folder} cannot be written ({error.strerror}). Name another one with checkpoint=."
        ) from error
    if names and _MANIFEST not in names:
        raise CheckpointError(
            f"The folder {folder} holds something else ({min(names)}), and no {_MANIFEST}. Name a new or an empty "
            "one with checkpoint=."
        )
    return folder


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, or was written by another run ({why}). Remove this file, and that part is done again; or "
        "name another folder with checkpoint=."
    )


def _way_out(folder: Path) -> str:
    return f"Name another folder with checkpoint=, or remove {folder}."
