"""Data under torch.distributed: gone through by all processes together, each with its share."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrainscope.batches import Batch, Batches, Inputs, Label, Shapes, input_shapes, items_of, shapes_text
from retrainscope.exceptions import InvalidDataError
from retrainscope.processes import agree, digest_of, gather, n_processes
from retrainscope.sources import Indexed, take_rows

__all__ = ["Told", "check_same_data", "everywhere", "together"]


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


def check_same_data(batches: Batches) -> None:
    """Refuse data that is not the same in all processes, as far as its size and its first batch tell."""
    if n_processes() == 1:
        return
    name, first = batches.name, batches.first()
    kind = "batches of a DistributedSampler" if batches.distributed else "samples" if batches.indexed else "batches"
    what = {f"the form of the {name} data": kind}
    if not batches.distributed:
        size = batches.source.n_samples if isinstance(batches.source, Indexed) else batches.n_batches
        content = digest_of((tensor for _, tensor in items_of(first.inputs)), first.labels)
        what |= {f"the number of {name} {kind}": str(size), f"the first {name} batch": content}
    agree(what | {f"the shape of the {name} samples": shapes_text(input_shapes(first.inputs))})


def everywhere(batches: Batches) -> Batches:
    """Return the same samples where every process has them all: those of a ``DistributedSampler`` are gathered."""
    if not batches.distributed:
        return batches
    name = batches.name
    mine = [replace(batch, inputs=_on_cpu(batch.inputs)) for batch in replace(batches, shared=True)]
    found = [batch for some in gather(f"samples of the {name} data", mine) for batch in some]
    order = np.argsort(np.concatenate([batch.positions for batch in found]))
    labels = [label for batch in found for label in batch.labels or (None,) * len(batch)]
    tensors = [dict(items_of(batch.inputs)) for batch in found]
    if len({(key, tensor.shape[1:]) for each in tensors for key, tensor in each.items()}) > len(tensors[0]):
        raise InvalidDataError(
            f"The batches of the {name} data are padded to different lengths, which does not work with a "
            "DistributedSampler. Pad all to one length, or give the same loader without it to every process."
        )
    joined = {key: torch.cat([each[key] for each in tensors]) for key in tensors[0]}
    inputs = joined[""] if list(joined) == [""] else joined

    def take(rows: NDArray[np.int64]) -> tuple[Any, Any]:
        places = order[rows]
        return take_rows(inputs, places), None if None in labels else [labels[place] for place in places]

    return replace(batches, source=Indexed(len(order), take), chosen=np.arange(len(order)))


def _on_cpu(inputs: Inputs) -> Inputs:
    return inputs.cpu() if isinstance(inputs, Tensor) else {key: tensor.cpu() for key, tensor in inputs.items()}
