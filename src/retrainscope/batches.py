"""The user's data, in whatever form it comes, as batches on the model's device."""

import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from retrainscope.exceptions import InvalidDataError, NonFiniteError

__all__ = ["Batch", "Batches", "Inputs", "Label", "as_batches", "input_shapes", "shapes_text"]

Inputs = Tensor | dict[str, Tensor]
Label = Hashable
_LABELS_KEY = "labels"


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together.

    Attributes
    ----------
    inputs : Tensor of shape (n, ...) or dict of such
        A dict is passed to the model by keyword.
    labels : tuple of n labels, or None
        None where the data has none.
    positions : ndarray of shape (n,)
        The place of each sample in the whole data.
    """

    inputs: Inputs
    labels: tuple[Label, ...] | None
    positions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, rows: NDArray[np.int64]) -> "Batch":
        """Return the batch of these rows only."""
        labels = None if self.labels is None else tuple(self.labels[row] for row in rows)
        return Batch(_take(self.inputs, rows), labels, self.positions[rows])


@dataclass(frozen=True)
class Batches:
    """Data that can be run through again and again, always in the same order.

    Data that can be indexed (tensors, arrays, a ``Dataset``) may be subset and shuffled; a stream of
    batches (``DataLoader`` and other iterables) may be subset only, and comes as it comes. The global
    random states are set to ``seed`` at the start of a pass over a stream, so that a loader that
    shuffles repeats itself.
    """

    source: "_Indexed | Iterable[Any]"
    name: str
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    seed: int
    chosen: NDArray[np.int64] | None = None
    order_seed: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        first = None
        for number, batch in enumerate(self._indexed() if self.indexed else self._streamed()):
            first = batch if first is None else first
            self._check_alike(first, batch, number)
            self._check_finite(batch.inputs, number)
            yield replace(batch, inputs=self._placed(batch.inputs))
        if first is None:
            raise InvalidDataError(f"The {self.name} data is empty. Give at least two samples a class.")

    @property
    def indexed(self) -> bool:
        """Whether single samples can be reached, so that their order is ours to choose."""
        return isinstance(self.source, _Indexed)

    @property
    def n_batches(self) -> int | None:
        """The number of batches of one pass, or None where it is not known before."""
        if isinstance(self.source, _Indexed):
            n = self.source.n_samples if self.chosen is None else len(self.chosen)
            return -(-n // self.batch_size)
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return None

    def first(self) -> Batch:
        """Return the first batch, for a dry run and for the shapes."""
        iterator = iter(self)
        try:
            return next(iterator)
        finally:
            iterator.close()  # type: ignore[attr-defined]

    def subset(self, positions: NDArray[np.int64], *, order_seed: int | None = None) -> "Batches":
        """Return only the samples at these positions; with a seed, in random order if that can be."""
        return replace(self, chosen=np.sort(positions), order_seed=order_seed)

    def _indexed(self) -> Iterator[Batch]:
        assert isinstance(self.source, _Indexed)
        positions = np.arange(self.source.n_samples) if self.chosen is None else self.chosen
        if self.order_seed is not None:
            positions = np.random.default_rng(self.order_seed).permutation(positions)
        for start in range(0, len(positions), self.batch_size):
            rows = positions[start : start + self.batch_size]
            inputs, labels = self.source.take(rows)
            yield self._checked(inputs, labels, rows)

    def _streamed(self) -> Iterator[Batch]:
        assert not isinstance(self.source, _Indexed)
        start = 0
        with _repeatable(self.source, self.seed):
            for item in self.source:
                inputs, labels = _split(item, self.name)
                batch = self._checked(inputs, labels, None, start)
                start += len(batch)
                if self.chosen is None:
                    yield batch
                    continue
                rows = np.flatnonzero(np.isin(batch.positions, self.chosen))
                if len(rows):
                    yield batch.take(rows)

    def _checked(self, inputs: Any, labels: Any, rows: NDArray[np.int64] | None, start: int = 0) -> Batch:
        tensors = _as_tensors(inputs, self.name)
        n = _n_samples(tensors, self.name)
        positions = np.arange(start, start + n) if rows is None else rows
        return Batch(tensors, _as_labels(labels, n, self.name), positions)

    def _check_alike(self, first: Batch, batch: Batch, number: int) -> None:
        if input_shapes(batch.inputs) != input_shapes(first.inputs):
            raise InvalidDataError(
                f"The {self.name} samples must all have the same shape. Got {shapes_text(input_shapes(first.inputs))} "
                f"in the first batch and {shapes_text(input_shapes(batch.inputs))} in batch {number}. Pad or crop them."
            )
        if (batch.labels is None) != (first.labels is None):
            raise InvalidDataError(
                f"The {self.name} data has labels in some batches only (batch {number} differs from the first). Give "
                "labels for all samples, or for none."
            )

    def _check_finite(self, inputs: Inputs, number: int) -> None:
        for key, tensor in _items(inputs):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                where = f" (input {key!r})" if key else ""
                raise NonFiniteError(
                    f"The {self.name} data has NaN or infinity in batch {number}{where}. Remove or mend those samples."
                )

    def _placed(self, inputs: Inputs) -> Inputs:
        def place(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)

        return place(inputs) if isinstance(inputs, Tensor) else {k: place(t) for k, t in inputs.items()}


def as_batches(
    data: Any, *, name: str, batch_size: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Batches:
    """Turn data into re-iterable batches, or say what is wrong with it.

    Parameters
    ----------
    data : Tensor, ndarray, (X, y), Dataset, DataLoader, or a re-iterable of batches
        X may be a mapping of such arrays; the model is then called with keywords, and the key
        ``"labels"`` holds the labels unless y is given. A list is a re-iterable of batches.
    name : str
        What the data is called in error messages: ``"known"`` or ``"unknown"``.
    batch_size : int
        Samples a batch, for data that is not batched already.
    device, dtype
        Where the inputs go, and the type that floating ones get.
    seed : int
        Makes a loader that shuffles repeat its order.

    Returns
    -------
    Batches

    Raises
    ------
    InvalidDataError
        If the data is empty, of no known form, or can be run through only once.
    """
    if not isinstance(batch_size, int | np.integer) or isinstance(batch_size, bool) or batch_size < 1:
        raise InvalidDataError(f"The 'batch_size' parameter must be a positive integer. Got {batch_size!r}.")
    source = _as_source(data, name, batch_size)
    if isinstance(source, _Indexed) and source.n_samples == 0:
        raise InvalidDataError(f"The {name} data is empty. Give at least two samples a class.")
    return Batches(source, name, batch_size, device, dtype, seed)


def input_shapes(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """Return the shape of one sample, for each input; the key of a single tensor is empty."""
    return {key: tuple(tensor.shape[1:]) for key, tensor in _items(inputs)}


def shapes_text(shapes: dict[str, tuple[int, ...]]) -> str:
    """Write the shapes of one sample, for messages."""
    return str(shapes[""]) if list(shapes) == [""] else str(shapes)


@dataclass(frozen=True)
class _Indexed:
    """Data whose samples can be reached one by one."""

    n_samples: int
    take: Callable[[NDArray[np.int64]], tuple[Any, Any]]


def _as_source(data: Any, name: str, batch_size: int) -> "_Indexed | Iterable[Any]":
    if isinstance(data, Tensor | np.ndarray | Mapping | tuple):
        inputs, labels = _split(data, name)
        tensors = _as_tensors(inputs, name)
        n = _n_samples(tensors, name)
        known_labels = _as_labels(labels, n, name)

        def take(rows: NDArray[np.int64]) -> tuple[Any, Any]:
            chosen = None if known_labels is None else [known_labels[row] for row in rows]
            return _take(tensors, rows), chosen

        return _Indexed(n, take)
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=batch_size)
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        dataset: Any = data
        return _Indexed(len(dataset), lambda rows: _split(default_collate([dataset[int(row)] for row in rows]), name))
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        if isinstance(data, Iterator):  # calling iter() would draw random numbers, and start a loader's workers
            raise InvalidDataError(
                f"The {name} data is a {type(data).__name__}, which can be run through only once, and several "
                "passes are needed. Give a list, a Dataset or a DataLoader instead."
            )
        return data
    raise InvalidDataError(
        f"The {name} data must be a tensor, an array, a tuple (X, y), a Dataset, a DataLoader or a re-iterable "
        f"of batches. Got {type(data).__name__} instead."
    )


def _split(item: Any, name: str) -> tuple[Any, Any]:
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
        labels = inputs.get(_LABELS_KEY) if labels is None else labels
        inputs = {key: value for key, value in inputs.items() if key != _LABELS_KEY}
    return inputs, labels


def _as_tensors(inputs: Any, name: str) -> Inputs:
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
        raise InvalidDataError(f"The {name} inputs must be tensors or numeric arrays. Got {kind} instead.")
    if array.is_complex():
        raise InvalidDataError(f"The {name} inputs are complex, which is not supported. Give real numbers.")
    if array.ndim < 2 and array.is_floating_point():
        raise InvalidDataError(
            f"The {name} inputs must have the shape (n_samples, ...). Got shape {tuple(array.shape)}; "
            "reshape a single feature to (n_samples, 1)."
        )
    return array.detach()


def _n_samples(inputs: Inputs, name: str) -> int:
    sizes = {key: tensor.shape[0] if tensor.ndim else 0 for key, tensor in _items(inputs)}
    if len(set(sizes.values())) > 1:
        raise InvalidDataError(f"The {name} inputs must have equally many samples. Got {sizes}.")
    return next(iter(sizes.values()))


def _as_labels(labels: Any, n: int, name: str) -> tuple[Label, ...] | None:
    if labels is None:
        return None
    if isinstance(labels, Tensor | np.ndarray):
        if labels.ndim != 1:
            raise InvalidDataError(
                f"The {name} labels must have the shape (n_samples,). Got shape {tuple(labels.shape)}."
            )
        labels = labels.tolist()
    if not isinstance(labels, Sequence) or isinstance(labels, str | bytes):
        raise InvalidDataError(f"The {name} labels must be a sequence. Got {type(labels).__name__} instead.")
    if len(labels) != n:
        raise InvalidDataError(f"The {name} data has {n} samples but {len(labels)} labels.")
    plain = tuple(label.item() if isinstance(label, np.generic | Tensor) else label for label in labels)
    for label in plain:
        if not isinstance(label, Hashable) or label is None or label != label:
            raise InvalidDataError(f"The {name} labels must be hashable, not None and not NaN. Got {label!r}.")
    return plain


def _items(inputs: Inputs) -> Iterable[tuple[str, Tensor]]:
    return [("", inputs)] if isinstance(inputs, Tensor) else inputs.items()


def _take(inputs: Inputs, rows: NDArray[np.int64]) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[torch.from_numpy(np.asarray(rows)).to(inputs.device)]
    return {key: tensor[torch.from_numpy(np.asarray(rows)).to(tensor.device)] for key, tensor in inputs.items()}


@contextmanager
def _repeatable(stream: Iterable[Any], seed: int) -> Iterator[None]:
    """Start a stream from the same random states at every pass, and give back a loader's own generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- the global state is what a user's data set draws from
    torch.manual_seed(seed)
    generators = _own_generators(stream)
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _own_generators(stream: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators that a loader or its samplers were made with."""
    if not isinstance(stream, DataLoader):
        return []
    inner = getattr(stream.batch_sampler, "sampler", None)
    found = [getattr(owner, "generator", None) for owner in (stream, stream.sampler, stream.batch_sampler, inner)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
