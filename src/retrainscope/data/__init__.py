"""The bundled sample of MNIST, and the way to the whole set."""

import gzip
import importlib.resources
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrainscope.exceptions import DataUnavailableError, InvalidDataError

__all__ = ["Mnist", "load_mnist", "read_idx"]

_IDX_FILES = (
    ("train-images-idx3-ubyte", (60_000, 28, 28)),
    ("train-labels-idx1-ubyte", (60_000,)),
    ("t10k-images-idx3-ubyte", (10_000, 28, 28)),
    ("t10k-labels-idx1-ubyte", (10_000,)),
)


class Mnist(NamedTuple):
    """Handwritten digits: images of shape (n, 1, 28, 28), float32 in [0, 1]; labels of shape (n,), int64.

    Examples
    --------
    >>> from retrainscope.data import load_mnist
    >>> mnist = load_mnist()
    >>> mnist.test_images.shape, mnist.test_labels[:3].tolist()
    ((2000, 1, 28, 28), [0, 9, 0])
    """

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]


def load_mnist(*, full: bool = False, folder: str | Path | None = None) -> Mnist:
    """Load handwritten digits (LeCun, Cortes and Burges; CC BY-SA 3.0).

    Parameters
    ----------
    full : bool
        False reads the sample inside this package: for each digit 600 images of the standard
        training set and 200 of the standard test set. True reads all 60,000 and 10,000.
    folder : path, optional
        With ``full=True``: the folder with the four standard IDX files, gzipped or not. None
        fetches ``mnist_784`` from OpenML through scikit-learn, which keeps a copy.

    Returns
    -------
    Mnist
        Named tuple (train_images, train_labels, test_images, test_labels).

    Raises
    ------
    InvalidDataError
        If a folder is given without ``full=True``.
    DataUnavailableError
        If a file is missing or damaged, or OpenML cannot be reached.

    Examples
    --------
    >>> from retrainscope.data import load_mnist
    >>> load_mnist().train_images.shape
    (6000, 1, 28, 28)
    """
    if not full:
        if folder is not None:
            raise InvalidDataError("The 'folder' parameter is for the whole set: pass full=True with it.")
        sample = importlib.resources.files("retrainscope.data") / "mnist-sample.npz"
        with sample.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return _as_mnist(*(arrays[name] for name in Mnist._fields))
    if folder is not None:
        return _as_mnist(*(_read_standard(Path(folder), name, shape) for name, shape in _IDX_FILES))
    return _fetch()


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, gzipped or not.

    Parameters
    ----------
    path : path
        The file; a name that ends in ``.gz`` is unpacked.

    Returns
    -------
    ndarray of uint8
        The array, of the shape that the file's header tells.

    Raises
    ------
    DataUnavailableError
        If the file is missing or is not a whole IDX file of unsigned bytes.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from retrainscope.data import read_idx
    >>> path = Path(tempfile.mkdtemp()) / "labels"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
    >>> read_idx(path)
    array([7, 2, 1], dtype=uint8)
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataUnavailableError(f"{path} is damaged ({error}). Get it anew.") from error
    except OSError as error:
        raise DataUnavailableError(f"{path} cannot be read ({error.strerror}).") from error
    n_dims = content[3] if len(content) > 3 else 0
    start = 4 + 4 * n_dims
    if content[:3] != b"\x00\x00\x08" or len(content) < start:
        raise DataUnavailableError(f"{path} is not an IDX file of unsigned bytes. Get it anew.")
    shape = tuple(np.frombuffer(content, ">u4", n_dims, offset=4).astype(int))
    if len(content) - start != np.prod(shape, dtype=int):
        raise DataUnavailableError(
            f"{path} is damaged: its header tells an array of shape {tuple(int(n) for n in shape)}, "
            f"and {len(content) - start} bytes follow. Get it anew."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_standard(folder: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    candidates = [folder / f"{name}.gz", folder / name]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise DataUnavailableError(
            f"{folder} has no file {name!r} or '{name}.gz'. The four standard IDX files of MNIST must "
            "lie in this folder; without a folder they are fetched from OpenML."
        )
    array = read_idx(path)
    if array.shape != shape:
        raise DataUnavailableError(f"{path} holds an array of shape {array.shape}; MNIST's is {shape}.")
    return array


def _fetch() -> Mnist:
    from sklearn.datasets import fetch_openml

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns at every retry; what comes of them is said below
            # By the parser that does without pandas.
            images, labels = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False, parser="liac-arff")
    except (OSError, ValueError) as error:
        raise DataUnavailableError(
            f"MNIST could not be fetched from OpenML ({error}). Without a network, put the four "
            "standard IDX files into a folder and name it (folder=, or --mnist-folder on the command line)."
        ) from error
    images = np.asarray(images, dtype=np.uint8).reshape(-1, 28, 28)
    labels = np.asarray(labels).astype(np.int64)
    return _as_mnist(images[:60_000], labels[:60_000], images[60_000:], labels[60_000:])


def _as_mnist(*arrays: NDArray[Any]) -> Mnist:
    train_images, train_labels, test_images, test_labels = arrays
    return Mnist(
        (train_images[:, None] / np.float32(255)).astype(np.float32),
        train_labels.astype(np.int64),
        (test_images[:, None] / np.float32(255)).astype(np.float32),
        test_labels.astype(np.int64),
    )
