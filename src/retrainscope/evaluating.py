"""How well a model tells classes: its outputs on labelled data, without training."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.batches import Batch, Batches, Label
from retrainscope.heads import predictions_of
from retrainscope.memory import Halving

__all__ = ["hits_of", "mean_of", "targets_of", "validated"]

_EVALUATED = 256  # samples a forward pass, where nothing is trained


def targets_of(batch: Batch, places: dict[Label, int]) -> Tensor:
    """Return which output stands for each sample's class."""
    return torch.tensor([places[label] for label in batch.labels or ()], device=batch.device)


@torch.no_grad()
def hits_of(model: nn.Module, batches: Batches, places: dict[Label, int], halving: Halving) -> NDArray[np.bool_]:
    """Tell for each sample whether its class has the highest output, in the order of positions."""
    rows, hits = [], []
    for outputs, targets, positions in _predicted(model, batches, places, halving):
        right = outputs.argmax(dim=1) == targets
        hits.append((right & ~outputs.isnan().any(dim=1)).cpu().numpy())  # argmax takes NaN for the highest
        rows.append(positions)
    found: NDArray[np.bool_] = np.concatenate(hits)[np.argsort(np.concatenate(rows))]
    return found


@torch.no_grad()
def validated(model: nn.Module, batches: Batches, places: dict[Label, int], halving: Halving) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy."""
    found = [(outputs.float(), targets) for outputs, targets, _ in _predicted(model, batches, places, halving)]
    scores, truth = (torch.cat(each) for each in zip(*found, strict=True))
    loss = float(nn.functional.cross_entropy(scores, truth))
    return (float((scores.argmax(dim=1) == truth).float().mean()) if np.isfinite(loss) else np.nan), loss


def _predicted(
    model: nn.Module, batches: Batches, places: dict[Label, int], halving: Halving
) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64]]]:
    """Yield outputs, targets and positions."""
    for batch in replace(batches, batch_size=max(batches.batch_size, _EVALUATED)):
        for piece, outputs in halving.run(batch, lambda piece: predictions_of(model, piece.inputs)):
            yield outputs, targets_of(piece, places), piece.positions


def mean_of(hits: NDArray[np.bool_] | None) -> float:
    """Return the accuracy; NaN where there is none."""
    return np.nan if hits is None else float(hits.mean())
