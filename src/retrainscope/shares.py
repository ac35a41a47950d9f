"""Data under torch.distributed: gone through by all processes together, each with its share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.batches import Batch, Batches, Inputs, Label, Shapes, input_shapes, items_of, shapes_text
from retrainscope.exceptions import InvalidDataError
from retrainscope.lending import seed_of
from retrainscope.moments import ClassMoments
from retrainscope.processes import agree, digest_of, digests_of_model, from_first, gather, n_processes, rank
from retrainscope.sources import Indexed, take_rows

__all__ = ["Told", "all_of", "check_same", "dealt", "everywhere", "held", "in_order", "merged", "same_seed", "together"]

T = TypeVar("T")

_CPU = torch.device("cpu")
_PLAIN = (str, int, float)
_MOST_HELD = 2**30  # bytes of samples that are held for several passes


@dataclass(frozen=True)
class Told:
    """What a process tells the others of its batch.

    Attributes
    ----------
    labels : tuple of n labels
        None each where the data has none.
    positions : ndarray of shape (n,)
        The place of each sample in the whole data.
    shapes : dict
        Of one sample.
    """

    labels: tuple[Label, ...]
    positions: NDArray[np.int64]
    shapes: Shapes

    @classmethod
    def of(cls, batch: Batch) -> "Told":
        """Return what is told of a batch."""
        return cls(batch.labels or (None,) * len(batch), batch.positions, input_shapes(batch.inputs))


def together(batches: Batches) -> Iterator[tuple[Batch | None, list[Told]]]:
    """Go through data together with the other processes, each with its share, in the order of the whole.

    Yields
    ------
    batch : Batch or None
        That of this process; None where only others have one left.
    told : list of Told
        Of each process, in their order: what would come one after the other in one process. Those that have no
        batch left tell of no samples.

    Raises
    ------
    InvalidDataError
        If the shares have other shapes, or labels in some of them only.
    """
    name, first, nothing = batches.name, None, Told((), np.arange(0), {})
    mine = iter(replace(batches, shared=n_processes() > 1))
    while True:
        batch = next(mine, None)
        told = gather(f"a batch of the {name} data", None if batch is None else Told.of(batch))
        if not any(told):
            return
        for number, one in enumerate(told):
            if one is None:
                continue
            first = one if first is None else first
            if one.shapes != first.shapes:
                raise InvalidDataError(
                    f"The {name} samples must all have the same shape. Got {shapes_text(first.shapes)} and, in "
                    f"process {number}, {shapes_text(one.shapes)}. Pad or crop them."
                )
            if (None in one.labels) != (None in first.labels):
                raise InvalidDataError(
                    f"The {name} data has labels in some batches only (process {number} differs from the first batch). "
                    "Give labels for all samples, or for none."
                )
        yield batch, [nothing if one is None else one for one in told]


def same_seed(random_state: int | np.random.RandomState | None) -> int:
    """Return a seed, the same in all processes: without a random state the one that process 0 draws."""
    seed = seed_of(random_state)
    if random_state is None:
        return from_first("the seed", seed)
    agree({"random_state": str(seed)})
    return seed


def check_same(settings: Mapping[str, Any], model: nn.Module, *data: Batches) -> None:
    """Refuse other settings, another model or another data set in another process.

    Of settings those are compared that are plain values, of data the size and the first batch.
    """
    if n_processes() == 1:
        return
    plain = {name: repr(value) for name, value in settings.items() if value is None or isinstance(value, _PLAIN)}
    agree({**plain, **digests_of_model(model)})
    for batches in data:
        _check_same_data(batches)


def _check_same_data(batches: Batches) -> None:
    sampler, name, first = batches.sampler, batches.name, batches.first()
    if sampler is not None and (sampler.rank, sampler.num_replicas) != (rank(), n_processes()):
        raise InvalidDataError(
            f"The DistributedSampler of the {name} data is for process {sampler.rank} of {sampler.num_replicas}, and "
            f"this is process {rank()} of {n_processes()}. Make it without num_replicas= and rank=."
        )
    kind = "batches of a DistributedSampler" if sampler else "samples" if batches.indexed else "batches"
    what = {f"the form of the {name} data": kind}
    if sampler is None:
        size = batches.source.n_samples if isinstance(batches.source, Indexed) else batches.n_batches
        content = digest_of((tensor for _, tensor in items_of(first.inputs)), first.labels)
        what |= {f"the number of {name} {kind}": str(size), f"the first {name} batch": content}
    agree(what | {f"the shape of the {name} samples": shapes_text(input_shapes(first.inputs))})


def in_order(what: str, mine: Sequence[T | None]) -> list[T]:
    """Return what the processes have found in the batches of `together`, one each, in the order of the whole data."""
    return [one for some in zip_longest(*gather(what, mine)) for one in some if one is not None]


def merged(what: str, mine: ClassMoments | None) -> ClassMoments:
    """Return the moments of what all processes have looked at; None: of nothing."""
    return reduce(ClassMoments.merge, [part for part in gather(what, mine) if part is not None])


def all_of(batches: Batches, mine: Sequence[Batch | None]) -> list[Batch]:
    """Return batches that the processes have taken of this data in `together`, in the order of the whole."""
    if n_processes() == 1:
        return in_order("", mine)
    kept = [None if batch is None else replace(batch, inputs=_moved(batch.inputs, _CPU)) for batch in mine]
    found = in_order(f"samples of the {batches.name} data", kept)
    return [replace(batch, inputs=_moved(batch.inputs, batches.device)) for batch in found]


def dealt(batches: Batches) -> Batches:
    """Return the share of this process of data that all have, in batches so small that there are some for every one."""
    n = n_processes()
    return replace(batches, shared=True, batch_size=-(-batches.batch_size // n)) if n > 1 else batches


def everywhere(batches: Batches) -> Batches:
    """Return the same samples where every process has them all: those of a ``DistributedSampler`` are gathered."""
    if not batches.distributed:
        return batches
    name = batches.name
    mine = [replace(batch, inputs=_moved(batch.inputs, _CPU)) for batch in replace(batches, shared=True)]
    found = [batch for some in gather(f"samples of the {name} data", mine) for batch in some]
    if not _stackable(found):
        raise InvalidDataError(
            f"The batches of the {name} data are padded to different lengths, which does not work with a "
            "DistributedSampler. Pad all to one length, or give the same loader without it to every process."
        )
    return _stacked(batches, found)


def held(batches: Batches) -> Batches:
    """Return the samples chosen as `everywhere` does, read once and held on the device for the passes to come.

    Those of a stream, of which but a few of every batch may be chosen, then come in whole batches. Where they take more
    than a gigabyte, or are padded to different lengths, they are read again at every pass instead.
    """
    batches, found = everywhere(batches), list[Batch]()
    assert batches.chosen is not None
    for batch in batches:
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in items_of(batch.inputs)) / len(batch)
        if size * len(batches.chosen) > _MOST_HELD:
            return batches
        found.append(batch)
    return _stacked(batches, found) if _stackable(found) else batches


def _stackable(found: Sequence[Batch]) -> bool:
    """Tell whether batches are padded to one length."""
    return len({(key, tensor.shape[1:]) for batch in found for key, tensor in items_of(batch.inputs)}) == len(
        items_of(found[0].inputs)
    )


def _stacked(batches: Batches, found: Sequence[Batch]) -> Batches:
    """Return data made of batches that were taken of it, in any order."""
    positions = np.concatenate([batch.positions for batch in found])
    order = np.argsort(positions)
    positions = positions[order]
    labels = [label for batch in found for label in batch.labels or (None,) * len(batch)]
    tensors = [dict(items_of(batch.inputs)) for batch in found]
    joined = {key: torch.cat([each[key] for each in tensors]) for key in tensors[0]}
    take = _Stack(joined[""] if list(joined) == [""] else joined, None if None in labels else labels, positions, order)
    return replace(batches, source=Indexed(len(order), take), chosen=positions)


@dataclass(frozen=True)
class _Stack:
    """What `Indexed` takes of samples that are held: those at some positions of the whole data.

    Attributes
    ----------
    inputs : Tensor of shape (n_samples, ...) or dict of such
    labels : list of n_samples labels, or None
    positions : ndarray of shape (n_samples,)
        In rising order.
    order : ndarray of shape (n_samples,)
        The row of `inputs` and `labels` that is at each of `positions`.
    """

    inputs: Inputs
    labels: list[Label] | None
    positions: NDArray[np.int64]
    order: NDArray[np.int64]

    def __call__(self, rows: NDArray[np.int64]) -> tuple[Any, Any]:
        places = self.order[np.searchsorted(self.positions, rows)]
        labels = None if self.labels is None else [self.labels[place] for place in places]
        return take_rows(self.inputs, places), labels


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    return inputs.to(device) if isinstance(inputs, Tensor) else {key: each.to(device) for key, each in inputs.items()}
