"""The forms that the user's data comes in: inputs and labels from each."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from retrainscope.checks import reason_of
from retrainscope.exceptions import InvalidDataError

__all__ = [
    "Indexed",
    "Inputs",
    "Label",
    "count_samples",
    "items_of",
    "labels_of",
    "source_of",
    "split_labels",
    "take_rows",
    "tensors_of",
]

Inputs = Tensor | dict[str, Tensor]
Label = Hashable
_ONE_HOT = " Turn one-hot labels into classes, by argmax(1)."
_LABELS = ("labels", "label", "label_ids")  # the keys that Hugging Face gives them


@dataclass(frozen=True)
class Indexed:
    """Data whose samples can be reached one by one; what is taken may be the user's own memory."""

    n_samples: int
    take: Callable[[NDArray[np.int64]], tuple[Any, Any]]


def source_of(data: Any, name: str, batch_size: int) -> Indexed | Iterable[Any]:
    """Turn data into samples that can be reached one by one, or into a re-iterable of batches."""
    # By the module's name, as to import it takes seconds; a folder of one's own may have that name too.
    if type(data).__module__.partition(".")[0] == "datasets" and hasattr(data, "with_format"):
        return _hugging_face(data, name, batch_size)
    if isinstance(data, Tensor | np.ndarray | Mapping | tuple):
        inputs, labels = split_labels(data, name)
        tensors = tensors_of(inputs, name)
        n = count_samples(tensors, name)
        known_labels = labels_of(labels, n, name)

        def take(rows: NDArray[np.int64]) -> tuple[Any, Any]:
            chosen = None if known_labels is None else [known_labels[row] for row in rows]
            if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):  # a view, without copying
                span = slice(int(rows[0]), int(rows[0]) + len(rows))
                return (
                    tensors[span] if isinstance(tensors, Tensor) else {k: t[span] for k, t in tensors.items()}
                ), chosen
            return take_rows(tensors, rows), chosen

        return Indexed(n, take)
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=batch_size)
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        dataset: Any = data
        return Indexed(len(dataset), lambda rows: _collated([dataset[int(row)] for row in rows], name))
    if isinstance(data, Iterable) and not isinstance(data, str | bytes) and not _is_frame(data):
        if isinstance(data, Iterator):  # calling iter() would draw random numbers, and start a loader's workers
            raise InvalidDataError(
                f"The {name} data is a {type(data).__name__}, which can be run through only once, and several "
                "passes are needed. Give a list, a Dataset or a DataLoader instead."
            )
        if isinstance(data, list) and _is_pair(data):
            raise InvalidDataError(
                f"The {name} data is a list of inputs and labels, and a list is a re-iterable of batches. Give the "
                "tuple (X, y) instead."
            )
        return data
    raise InvalidDataError(
        f"The {name} data must be a tensor, an array, a tuple (X, y), a Dataset, a DataLoader or a re-iterable "
        f"of batches. Got {type(data).__name__} instead.{_hint(data)}"
    )


def _is_frame(data: Any) -> bool:
    """Tell whether data is a frame of pandas or another library, or a column of one."""
    return hasattr(data, "to_numpy")


def _hint(data: Any) -> str:
    return " Give its values, by .to_numpy()." if _is_frame(data) else ""


def _is_pair(data: list[Any]) -> bool:
    """Tell whether a list is inputs and their labels instead of two batches, which have as many axes."""
    if len(data) != 2 or not isinstance(data[0], Tensor | np.ndarray) or data[0].ndim < 2:
        return False
    if isinstance(data[1], Tensor | np.ndarray):
        return data[1].ndim == 1 and len(data[1]) == len(data[0])
    plain = isinstance(data[1], list) and not any(isinstance(one, Tensor | np.ndarray | list) for one in data[1])
    return plain and len(data[1]) == len(data[0])


def _collated(samples: list[Any], name: str) -> tuple[Any, Any]:
    """Put the samples of a data set together; labels stay what they are."""
    labels: list[Any] | None = None
    if isinstance(samples[0], tuple | list) and len(samples[0]) == 2:
        samples, labels = [sample[0] for sample in samples], [sample[1] for sample in samples]
    elif isinstance(samples[0], Mapping):
        key = _label_key(samples[0])
        labels = None if key is None else [sample[key] for sample in samples]
        samples = [{k: value for k, value in sample.items() if k != key} for sample in samples]
    try:
        inputs = default_collate(samples)
    except (TypeError, RuntimeError) as error:
        raise InvalidDataError(
            f"The samples of the {name} data cannot be put into one batch ({reason_of(error)}). Let the data set "
            "return tensors of one shape, or give a DataLoader with a collate_fn of its own."
        ) from error
    return (inputs, labels) if labels is not None else split_labels(inputs, name)


def _hugging_face(data: Any, name: str, batch_size: int) -> Indexed | Iterable[Any]:
    """Read a data set of Hugging Face ``datasets``, whose batches are mappings of columns."""
    if isinstance(data, Mapping):
        raise InvalidDataError(
            f"The {name} data has the splits {', '.join(map(repr, data))}. Give one of them, as in "
            f"data[{next(iter(data))!r}]."
        )
    if hasattr(data, "__len__"):
        return Indexed(len(data), lambda rows: split_labels(_columns(data[rows.tolist()], name), name))
    return _Streamed(data, name, batch_size)


@dataclass(frozen=True)
class _Streamed:
    """A data set of Hugging Face that is read in order, again at every pass."""

    data: Any
    name: str
    batch_size: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.data.iter(self.batch_size):
            yield _columns(batch, self.name)


def _columns(batch: Mapping[str, Any], name: str) -> dict[str, Any]:
    key = _label_key(batch)
    return {column: values if column == key else _column(column, values, name) for column, values in batch.items()}


def _column(column: str, values: Any, name: str) -> Any:
    """Turn a column of inputs, which may be a list of numbers, lists, arrays or tensors, into one array."""
    if isinstance(values, Tensor | np.ndarray):
        return values
    if all(isinstance(value, Tensor) for value in values) and len({value.shape for value in values}) == 1:
        return torch.stack(list(values))
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind in "biuf":
        return array
    if isinstance(values[0], list | Tensor | np.ndarray):
        raise InvalidDataError(
            f"The samples of the {name} data have different lengths in the column {column!r}. Pad them, or give a "
            "DataLoader that does: collate_fn=DataCollatorWithPadding(tokenizer)."
        )
    raise InvalidDataError(
        f"The column {column!r} of the {name} data holds {type(values[0]).__name__}, which no model takes. Turn it "
        f"into numbers with map() or with_transform(), or leave it out with remove_columns({column!r})."
    )


def _label_key(inputs: Mapping[str, Any]) -> str | None:
    return next((key for key in _LABELS if key in inputs), None)


def split_labels(item: Any, name: str) -> tuple[Any, Any]:
    """Tell inputs and labels apart."""
    if isinstance(item, list | tuple):
        if len(item) not in (1, 2):
            raise InvalidDataError(
                f"The {name} data must come as X or (X, y). Got a {type(item).__name__} of {len(item)} parts; "
                "put several inputs into a mapping."
            )
        inputs, labels = item if len(item) == 2 else (item[0], None)
    else:
        inputs, labels = item, None
    if isinstance(inputs, Mapping):
        label_key = _label_key(inputs)
        labels = inputs.get(label_key) if labels is None else labels
        inputs = {key: value for key, value in inputs.items() if key != label_key}
    return inputs, labels


def tensors_of(inputs: Any, name: str) -> Inputs:
    """Turn inputs into tensors, or refuse them."""
    if isinstance(inputs, Mapping):
        if not inputs:
            raise InvalidDataError(f"The {name} data is a mapping without inputs.")
        return {str(key): _as_tensor(value, name) for key, value in inputs.items()}
    return _as_tensor(inputs, name)


def _as_tensor(array: Any, name: str) -> Tensor:
    if isinstance(array, np.ndarray) and array.dtype.kind in "biuf":
        # Torch takes neither negative strides nor another byte order.
        array = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
        array = torch.from_numpy(array if array.flags.writeable else array.copy())
    if not isinstance(array, Tensor):
        kind = f"array of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        hint = " Ask the tokenizer for return_tensors='pt'." if isinstance(array, list) else _hint(array)
        raise InvalidDataError(f"The {name} inputs must be tensors or numeric arrays. Got {kind} instead.{hint}")
    if array.is_complex():
        raise InvalidDataError(f"The {name} inputs are complex, which is not supported. Give real numbers.")
    if array.ndim < 2 and array.is_floating_point():
        raise InvalidDataError(
            f"The {name} inputs must have the shape (n_samples, ...). Got shape {tuple(array.shape)}; "
            "reshape a single feature to (n_samples, 1)."
        )
    return array.detach()


def count_samples(inputs: Inputs, name: str) -> int:
    """Return the number of samples, the same for all inputs."""
    sizes = {key: tensor.shape[0] if tensor.ndim else 0 for key, tensor in items_of(inputs)}
    if len(set(sizes.values())) > 1:
        raise InvalidDataError(f"The {name} inputs must have equally many samples. Got {sizes}.")
    return next(iter(sizes.values()))


def labels_of(labels: Any, n: int, name: str) -> tuple[Label, ...] | None:
    """Turn the labels of n samples into plain hashable values, or refuse them."""
    if labels is None:
        return None
    if isinstance(labels, Tensor | np.ndarray):
        if labels.ndim != 1:
            raise InvalidDataError(
                f"The {name} labels must have the shape (n_samples,). Got shape {tuple(labels.shape)}."
                f"{_ONE_HOT if labels.ndim == 2 else ''}"
            )
        labels = labels.tolist()
    if not isinstance(labels, Sequence) or isinstance(labels, str | bytes):
        raise InvalidDataError(
            f"The {name} labels must be a sequence. Got {type(labels).__name__} instead.{_hint(labels)}"
        )
    if len(labels) != n:
        raise InvalidDataError(f"The {name} data has {n} samples but {len(labels)} labels.")
    if {*map(type, labels)} <= {int, str}:  # plain already, as of every batch of data that is indexed
        return tuple(labels)
    if n and getattr(labels[0], "ndim", 0):
        shape = (n, *labels[0].shape)
        raise InvalidDataError(f"The {name} labels must have the shape (n_samples,). Got shape {shape}.{_ONE_HOT}")
    plain = tuple(label.item() if isinstance(label, np.generic | Tensor) else label for label in labels)
    for label in plain:
        if not isinstance(label, Hashable) or label is None or label != label:
            raise InvalidDataError(f"The {name} labels must be hashable, not None and not NaN. Got {label!r}.")
    return plain


def items_of(inputs: Inputs) -> Collection[tuple[str, Tensor]]:
    """Return the tensors by key; the key of a single one is empty."""
    return [("", inputs)] if isinstance(inputs, Tensor) else inputs.items()


def take_rows(inputs: Inputs, rows: NDArray[np.int64]) -> Inputs:
    """Return the inputs of these samples."""
    if isinstance(inputs, Tensor):
        return inputs[torch.from_numpy(np.asarray(rows)).to(inputs.device)]
    return {key: tensor[torch.from_numpy(np.asarray(rows)).to(tensor.device)] for key, tensor in inputs.items()}
