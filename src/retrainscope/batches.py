"""The user's data as batches on the model's device."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from retrainscope.checks import all_finite
from retrainscope.exceptions import InvalidDataError, NonFiniteError
from retrainscope.lending import start_random
from retrainscope.padding import n_tokens_of, token_mask
from retrainscope.processes import digest_of, n_processes, rank
from retrainscope.sources import (
    Indexed,
    Inputs,
    Label,
    count_samples,
    items_of,
    labels_of,
    source_of,
    split_labels,
    take_rows,
    tensors_of,
)

__all__ = [
    "Batch",
    "Batches",
    "Inputs",
    "Label",
    "Shapes",
    "as_batches",
    "input_shapes",
    "items_of",
    "ordered_classes",
    "shapes_text",
]

_FEW = 4  # samples, for a dry run

Shapes = dict[str, tuple[int | None, ...]]


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

    @property
    def device(self) -> torch.device:
        """Where the inputs lie."""
        _, tensor = next(iter(items_of(self.inputs)))
        return tensor.device

    @property
    def mask(self) -> Tensor | None:
        """Which tokens are real, of shape (n, n_tokens); None if the data does not tell what is padding."""
        return token_mask(self.inputs)

    @property
    def digests(self) -> list[str]:
        """A few letters for each sample, which are the same where the inputs are."""
        tensors = [tensor.cpu() for _, tensor in items_of(self.inputs)]
        return [digest_of(tensor[row] for tensor in tensors) for row in range(len(self))]

    def take(self, rows: NDArray[np.int64]) -> "Batch":
        """Return the batch of these rows only."""
        labels = None if self.labels is None else tuple(self.labels[row] for row in rows)
        return Batch(take_rows(self.inputs, rows), labels, self.positions[rows])


@dataclass(frozen=True)
class Batches:
    """Data that can be run through again and again, always in the same order.

    Data that can be indexed (tensors, arrays, a ``Dataset``) may be subset and shuffled; a stream of
    batches (``DataLoader`` and other iterables) may be subset only, and comes as it comes. The global
    random states are set to ``seed`` at the start of a pass over a stream, so that a loader that
    shuffles repeats itself.

    Under torch.distributed all processes have the same data, but for loaders with a ``DistributedSampler``, which have
    a share each; `retrainscope.shares` goes through shares.
    """

    source: Indexed | Iterable[Any]
    name: str
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    seed: int
    chosen: NDArray[np.int64] | None = None
    order_seed: int | None = None
    shared: bool = False  # whether only the share of this process is gone through: every n_processes-th batch

    def __iter__(self) -> Iterator[Batch]:
        first = None
        for number, batch in self._indexed() if self.indexed else self._streamed():
            first = batch if first is None else first
            self._check_alike(first, batch, number)
            batch = replace(batch, inputs=self._placed(batch.inputs))
            self._check_finite(batch, number)  # there, where it is quickest
            yield batch
        if first is None and not self.shared:
            raise InvalidDataError(f"The {self.name} data is empty. Give at least two samples a class.")

    @property
    def indexed(self) -> bool:
        """Whether single samples can be reached, so that their order is ours to choose."""
        return isinstance(self.source, Indexed)

    @property
    def distributed(self) -> bool:
        """Whether the source brings this process a share of its own."""
        return self.sampler is not None

    @property
    def sampler(self) -> DistributedSampler[Any] | None:
        """What deals the samples of a loader to the processes, if anything does."""
        if n_processes() == 1:
            return None
        inner = getattr(getattr(self.source, "batch_sampler", None), "sampler", None)
        samplers = (getattr(self.source, "sampler", None), inner)
        return next((sampler for sampler in samplers if isinstance(sampler, DistributedSampler)), None)

    @property
    def n_batches(self) -> int | None:
        """The number of batches of one pass over all, or None where it is not known before."""
        if isinstance(self.source, Indexed):
            return -(-(self.n_samples or 0) // self.batch_size)
        try:
            return len(self.source) * (n_processes() if self.distributed else 1)  # type: ignore[arg-type]
        except TypeError:
            return None

    def first(self) -> Batch:
        """Return the first batch."""
        iterator = iter(self)
        try:
            return next(iterator)
        finally:
            iterator.close()  # type: ignore[attr-defined]

    @property
    def n_samples(self) -> int | None:
        """How many samples there are; None where that is not known before."""
        if not isinstance(self.source, Indexed):
            return None
        return self.source.n_samples if self.chosen is None else len(self.chosen)

    @property
    def reordered(self) -> bool:
        """Whether samples come in another order than that of the data set, as a loader may have them."""
        if not isinstance(self.source, DataLoader) or isinstance(self.source.dataset, IterableDataset):
            return False
        batch_sampler = self.source.batch_sampler
        if batch_sampler is None:  # the data set makes the batches
            return not isinstance(self.source.sampler, SequentialSampler)
        # One of another kind may draw as it likes, whatever sampler it names.
        return type(batch_sampler) is not BatchSampler or not isinstance(batch_sampler.sampler, SequentialSampler)

    def few(self) -> Batch:
        """Return the first few samples, for a dry run and for the shapes; where it can be indexed no more are read."""
        first = (replace(self, batch_size=min(self.batch_size, _FEW)) if self.indexed else self).first()
        return first.take(np.arange(_FEW)) if len(first) > _FEW else first

    def subset(self, positions: NDArray[np.int64], *, order_seed: int | None = None) -> "Batches":
        """Return only the samples at these positions; with a seed, in random order if that can be."""
        return replace(self, chosen=np.sort(positions), order_seed=order_seed)

    def _is_mine(self, number: int) -> bool:
        """Tell whether a batch is of this process's share, or all are."""
        return not self.shared or self.distributed or number % n_processes() == rank()

    def _indexed(self) -> Iterator[tuple[int, Batch]]:
        assert isinstance(self.source, Indexed)
        positions = np.arange(self.source.n_samples) if self.chosen is None else self.chosen
        if self.order_seed is not None:
            positions = np.random.default_rng(self.order_seed).permutation(positions)
        for number, start in enumerate(range(0, len(positions), self.batch_size)):
            if self._is_mine(number):
                rows = positions[start : start + self.batch_size]
                inputs, labels = self.source.take(rows)
                yield number, self._checked(inputs, labels, rows)

    def _streamed(self) -> Iterator[tuple[int, Batch]]:
        assert not isinstance(self.source, Indexed)
        start, number, sampler = 0, 0, self.sampler
        with _repeatable(self.source, self.seed):
            for item in self.source:
                inputs, labels = split_labels(item, self.name)
                batch = self._checked(inputs, labels, None, start)
                start += len(batch)
                if sampler is not None:  # it deals in turn, and repeats samples at the end so that all get as many
                    batch = replace(batch, positions=batch.positions * n_processes() + rank())
                    batch = batch.take(np.flatnonzero(batch.positions < len(sampler.dataset)))  # type: ignore[arg-type]
                if self.chosen is not None:
                    batch = batch.take(np.flatnonzero(np.isin(batch.positions, self.chosen)))
                if not len(batch):
                    continue
                if self._is_mine(number):
                    yield number, batch
                number += 1

    def _checked(self, inputs: Any, labels: Any, rows: NDArray[np.int64] | None, start: int = 0) -> Batch:
        tensors = tensors_of(inputs, self.name)
        n = count_samples(tensors, self.name)
        token_mask(tensors, self.name)  # refused here if it does not fit
        positions = np.arange(start, start + n) if rows is None else rows
        return Batch(tensors, labels_of(labels, n, self.name), positions)

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

    def _check_finite(self, batch: Batch, number: int) -> None:
        for key, tensor in items_of(batch.inputs):
            if tensor.is_floating_point() and not all_finite(tensor):
                where = f"input {key!r}, " if key else ""
                kind = str(tensor.dtype).removeprefix("torch.")
                row = int(torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1).logical_not().nonzero()[0, 0])
                raise NonFiniteError(
                    f"The {self.name} data has NaN or infinity in batch {number}, first in sample "
                    f"{batch.positions[row]} ({where}as {kind}). Remove or mend those samples."
                )

    def _placed(self, inputs: Inputs) -> Inputs:
        # Copies, which a model may change in place; out of pinned memory while the processor goes on.
        aside = self.device.type == "cuda"

        def place(tensor: Tensor) -> Tensor:
            dtype = self.dtype if tensor.is_floating_point() else None
            return tensor.to(self.device, dtype, non_blocking=aside, copy=True)

        return place(inputs) if isinstance(inputs, Tensor) else {k: place(t) for k, t in inputs.items()}


def as_batches(
    data: Any, *, name: str, batch_size: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Batches:
    """Turn data into re-iterable batches, or say what is wrong with it.

    Parameters
    ----------
    data : Tensor, ndarray, (X, y), Dataset, DataLoader, or a re-iterable of batches
        X may be a mapping of such arrays; the model is then called with keywords, and the key
        ``"labels"``, ``"label"`` or ``"label_ids"`` holds the labels unless y is given. A ``Dataset`` is one of torch
        or of Hugging Face. A list is a re-iterable of batches.
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
    source = source_of(data, name, batch_size)
    if isinstance(source, Indexed) and source.n_samples == 0:
        raise InvalidDataError(f"The {name} data is empty. Give at least two samples a class.")
    return Batches(source, name, batch_size, device, dtype, seed)


def input_shapes(inputs: Inputs) -> Shapes:
    """Return the shape of one sample, for each input; the key of a single tensor is empty.

    Where the data tells what is padding, the number of tokens is None: it may be another one in every batch.
    """
    n_tokens = n_tokens_of(inputs)

    def shape_of(tensor: Tensor) -> tuple[int | None, ...]:
        shape = tuple(tensor.shape[1:])
        return (None, *shape[1:]) if n_tokens is not None and shape[:1] == (n_tokens,) else shape

    return {key: shape_of(tensor) for key, tensor in items_of(inputs)}


def ordered_classes(labels: Iterable[Label]) -> tuple[Label, ...]:
    """Return the distinct labels, sorted, or as they came where they do not compare."""
    found = tuple(dict.fromkeys(labels))
    try:
        return tuple(sorted(found))  # type: ignore[type-var]
    except TypeError:
        return found


def shapes_text(shapes: Shapes) -> str:
    """Write the shapes of one sample, for messages."""
    return str(shapes[""] if list(shapes) == [""] else shapes).replace("None", "tokens")


@contextmanager
def _repeatable(stream: Iterable[Any], seed: int) -> Iterator[None]:
    """Start a stream from the same random states at every pass, and give back a loader's own generators."""
    start_random(seed)
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
