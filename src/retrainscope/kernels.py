"""Kernels of a tangent model: products of what goes into the head, and of gradients, brought to one scale."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrainscope.batches import Inputs
from retrainscope.exceptions import NonFiniteError, UnsupportedModelError
from retrainscope.heads import head_inputs

__all__ = ["Body", "check_finite", "draw_directions", "head_kernel", "scaled"]

_LAYER_SCALE = 0.01  # of a layer's kernel against the head's; chosen on the tuning tasks of the benchmark

Floats = NDArray[np.float64]


class Body(nn.Module):
    """A model up to its head."""

    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return what goes into the head."""
        inputs: Inputs = args[0] if args else kwargs
        return head_inputs(self.model, self.head, inputs)[0]


def head_kernel(features: Floats) -> Floats:
    """Return the products of what goes into the head, its bias included."""
    products: Floats = features @ features.T + 1
    return products


def draw_directions(n_features: int, n: int, seed: int) -> Tensor:
    """Draw random orthogonal directions of length one, as many as there can be."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_features, min(n, n_features), generator=generator, dtype=torch.float64)
    orthogonal, _ = torch.linalg.qr(drawn)
    directions: Tensor = orthogonal.T.float().contiguous()
    return directions


def check_finite(values: Floats, what: str) -> None:
    """Refuse NaN and infinity."""
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"{what} NaN or infinity for the unknown data. Check the weights and the scale of the inputs or, if the "
            "model is in half precision, give model.float()."
        )


def scaled(kernels: Mapping[str, Floats], n_parameters: Mapping[str, int], head: float) -> dict[str, Floats]:
    """Divide each layer's kernel by the root mean square of its gradients, and bring all to a share of the head's."""
    adapted = {}
    for name, kernel in kernels.items():
        mean_square = np.trace(kernel) / len(kernel) / max(1, n_parameters[name])
        adapted[name] = kernel / np.sqrt(mean_square) if mean_square > 0 else kernel
    mean = np.mean([np.trace(kernel) for kernel in adapted.values()])
    if not mean > 0:
        raise UnsupportedModelError(
            "No layer's weights change what goes into the head, so that nothing can be forecast. Should layers below "
            "the head run under torch.no_grad() or be detached, let them take part in gradients."
        )
    return {name: kernel * (_LAYER_SCALE * head / mean) for name, kernel in adapted.items()}
