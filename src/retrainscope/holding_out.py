"""Samples held out from learning, and kept apart from the others at every pass."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrainscope.batches import Batch, Inputs, Label
from retrainscope.comparing import check_class_counts
from retrainscope.exceptions import InvalidDataError

__all__ = ["check_order", "fingerprints", "split_positions"]

_LEAST_PER_CLASS = 5


def split_positions(
    labels: list[Label], holdout: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the samples to learn from and those to measure, class by class."""
    positions: dict[Label, list[int]] = {}
    for position, label in enumerate(labels):
        positions.setdefault(label, []).append(position)
    counts = np.array([len(rows) for rows in positions.values()], dtype=np.float64)
    check_class_counts(tuple(positions), counts, "known", least=_LEAST_PER_CLASS)
    fitted, held_out = [], []
    for rows in positions.values():
        mixed = rng.permutation(rows)
        n_held = min(max(2, round(holdout * len(rows))), len(rows) - 2)
        held_out.append(mixed[:n_held])
        fitted.append(mixed[n_held:])
    return np.sort(np.concatenate(fitted)), np.sort(np.concatenate(held_out))


def fingerprints(inputs: Inputs) -> NDArray[np.float64]:
    """Return a number for each sample that another sample hardly shares, shape (n_samples,)."""
    tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    total = np.zeros(len(tensors[0]))
    for tensor in tensors:
        flat = tensor.reshape(len(tensor), -1).float()
        total += (flat * torch.linspace(1, 2, flat.shape[1], device=flat.device)).sum(dim=1).cpu().numpy()
    return total


def check_order(batch: Batch, expected: NDArray[np.float64]) -> None:
    """Refuse a batch whose samples are not those that were at their positions before."""
    if not np.allclose(fingerprints(batch.inputs), expected[batch.positions], rtol=1e-3, atol=1e-3):
        raise InvalidDataError(
            "The known data comes in another order at every pass, so samples to learn from cannot be told from "
            "samples to measure. Give a Dataset, or a DataLoader that shuffles with torch's generators."
        )
