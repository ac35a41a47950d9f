"""Data from a path: an archive of arrays, a folder of images by class, or a folder saved by ``datasets``."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from retrainscope.batches import Label
from retrainscope.checks import reason_of
from retrainscope.commands.model_names import import_library
from retrainscope.exceptions import DataUnavailableError, InvalidDataError
from retrainscope.images import image_files, read_image
from retrainscope.sources import count_samples, labels_of, take_rows, tensors_of

__all__ = ["ClassFolders", "Loaded", "draw_samples", "load_data"]

_LABELS = ("y", "labels", "label", "label_ids")


class Loaded(NamedTuple):
    """Data in a form that `recommend_layers` takes, and what each sample is a part of, if that was asked for."""

    data: Any
    groups: NDArray[Any] | None = None


def load_data(
    path: Path,
    name: str,
    *,
    image_transform: Callable[[], Callable[[Any], Any]] | None = None,
    samples: int | None = None,
    seed: int = 0,
    groups: str | None = None,
) -> Loaded:
    """Bring the data at a path, in a form that `recommend_layers` takes.

    Parameters
    ----------
    path : path
        A ``.npz`` file, a folder with one folder of images for each class, or a folder of ``Dataset.save_to_disk``.
    name : str
        ``"known"`` or ``"unknown"``.
    image_transform : callable () -> (callable (image) -> sample), optional
        Makes what turns an image into a sample.
    samples : int, optional
        The most samples of each class that are taken, drawn at random. None takes all.
    seed : int
        Of the drawing.
    groups : str, optional
        The name of the array, or of the column, that tells what each sample is a part of. It is no input of the model.

    Returns
    -------
    Loaded
        With Tensor, ndarray, dict, (X, y) or Dataset as data. Its groups are None where the data has none.

    Raises
    ------
    DataUnavailableError
        If a file cannot be read, or a folder holds nothing.
    InvalidDataError
        If it is in none of these forms.
    MissingExtraError
        If what reads it is not installed.
    """
    if not path.is_dir():
        return _arrays(path, name, samples, seed, groups)
    if (path / "dataset_dict.json").exists():
        try:
            splits = [str(split) for split in json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]]
            first = splits[0]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataUnavailableError(
                f"{path / 'dataset_dict.json'} is damaged ({reason_of(error)}). Save the dataset again."
            ) from error
        raise InvalidDataError(f"{path} holds the splits {', '.join(splits)}. Give one of them: {path / first}.")
    if (path / "dataset_info.json").exists():
        return _saved_dataset(path, name, samples, seed, groups)
    if image_transform is None:
        raise InvalidDataError(
            f"{path} is a folder of images, and the model does not tell how it takes them. Give --image-size N for "
            "squares of N pixels with values from 0 to 1, or the data as arrays in a .npz file."
        )
    return Loaded(ClassFolders(path, image_transform(), samples=samples, seed=seed))


class ClassFolders(Dataset[tuple[Any, str]]):
    """Images in one folder for each class; its name is the label.

    Parameters
    ----------
    folder : path
        Folders in it whose names begin with a dot are left out.
    transform : callable (image) -> sample
    samples : int, optional
        The most of each class, drawn with `seed`.
    seed : int

    Raises
    ------
    DataUnavailableError
        If there are no folders, one is empty, or a file is no image. Of damaged images only the beginning is looked
        at before they are needed.
    """

    def __init__(
        self, folder: Path, transform: Callable[[Any], Any], *, samples: int | None = None, seed: int = 0
    ) -> None:
        self.transform = transform
        classes = sorted(inside for inside in folder.iterdir() if inside.is_dir() and not inside.name.startswith("."))
        if not classes:
            raise DataUnavailableError(f"The folder {folder} has no folders in it, one with images for each class.")
        self.files: list[tuple[Path, str]] = []
        for inside in classes:
            # A name is bytes to some file systems, which need not be text.
            label = os.fsencode(inside.name).decode("utf-8", "backslashreplace")
            files = image_files(inside)
            if not files:
                raise DataUnavailableError(f"The folder {inside} holds no images. Delete it, or put some into it.")
            self.files += [(file, label) for file in files]
        if samples is not None:
            labels = [label for _, label in self.files]
            self.files = [self.files[row] for row in draw_samples(labels, len(labels), samples, seed)]
        for file, _ in self.files:
            read_image(file, whole=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[Any, str]:
        file, label = self.files[place]
        return self.transform(read_image(file)), label


def draw_samples(labels: Sequence[Label] | None, n: int, most: int, seed: int) -> NDArray[np.int64]:
    """Draw at most so many samples of each class, or of all where there are no labels.

    Returns
    -------
    ndarray of int
        Their places, in the order of the data.

    Examples
    --------
    >>> draw_samples(["a", "b", "b", "a"], 4, 2, seed=0)
    array([0, 1, 2, 3])
    >>> len(draw_samples(None, 100, 30, seed=0))
    30
    """
    counts, drawn = Counter[Label](), []
    for place in np.random.default_rng(seed).permutation(n).tolist():
        label = None if labels is None else labels[place]
        if counts[label] < most:
            counts[label] += 1
            drawn.append(place)
    return np.sort(np.array(drawn, dtype=np.int64))


def _arrays(path: Path, name: str, samples: int | None, seed: int, group_key: str | None) -> Loaded:
    try:
        # Pickled objects are refused, since to read them is to run them.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # what a damaged archive raises is not to be foreseen
        raise DataUnavailableError(
            f"{path} cannot be read as a .npz file of plain arrays ({reason_of(error)}). Write it with "
            "np.savez(file, X=X, y=y)."
        ) from error
    groups = None if group_key is None else arrays.pop(group_key, None)
    labels = next((arrays.pop(key) for key in _LABELS if key in arrays), None)
    if not arrays or any(key.startswith("arr_") for key in arrays):
        raise InvalidDataError(
            f"{path} must hold an array X, or several by the names that the model's forward takes, and labels y. Got "
            f"{', '.join(arrays) or 'no inputs'}. Write it with np.savez(file, X=X, y=y)."
        )
    if labels is not None and labels.dtype.kind not in "biufU":
        raise InvalidDataError(f"The labels in {path} must be numbers or text. Got {labels.dtype}; try y.astype(str).")
    single = [key for key in ("X", "inputs") if set(arrays) == {key}]
    inputs = tensors_of(arrays[single[0]] if single else arrays, name)
    if samples is not None:
        n = count_samples(inputs, name)
        rows = draw_samples(labels_of(labels, n, name), n, samples, seed)
        if groups is not None and len(groups) != n:
            raise InvalidDataError(
                f"{path} has {n:,} samples and {len(groups):,} {group_key}. Give one for each sample."
            )
        inputs = take_rows(inputs, rows)
        labels, groups = (None if array is None else array[rows] for array in (labels, groups))
    return Loaded(inputs if labels is None else (inputs, labels), groups)


def _saved_dataset(path: Path, name: str, samples: int | None, seed: int, group_key: str | None) -> Loaded:
    datasets = import_library("datasets")
    try:
        data = datasets.load_from_disk(str(path))
        if samples is not None:
            key = next((key for key in _LABELS if key in data.column_names), None)
            labels = None if key is None else labels_of(data[key][:], len(data), name)
            data = data.select(draw_samples(labels, len(data), samples, seed))
        groups = None
        if group_key is not None and group_key in data.column_names:
            groups = np.array(data[group_key][:])
            data = data.remove_columns(group_key)
    except InvalidDataError:
        raise
    except Exception as error:  # what a damaged folder raises is not to be foreseen
        raise DataUnavailableError(f"{path} cannot be read as a saved data set ({reason_of(error)}).") from error
    return Loaded(data, groups)
