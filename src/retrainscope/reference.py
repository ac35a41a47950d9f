"""What stands for the input: the reference that layers are compared with, and what is to be rebuilt from them."""

import torch
from torch import Tensor

from retrainscope.batches import Batch, Inputs, Shapes, input_shapes, items_of, shapes_text
from retrainscope.exceptions import InvalidDataError
from retrainscope.padding import n_tokens_of, tells_padding

__all__ = ["check_inputs_vary", "check_same_shape", "floating_inputs", "input_axes", "reference_inputs"]


def reference_inputs(inputs: Inputs) -> Tensor:
    """Return the floating inputs as one tensor of shape (n_samples, ...), or ask for an input layer."""
    floating = list(floating_inputs(inputs).values())
    if not floating:
        kinds = ", ".join(sorted({str(tensor.dtype) for _, tensor in items_of(inputs)}))
        raise InvalidDataError(
            f"The inputs must be floating-point numbers. Got {kinds} instead. Convert images with .float(); for "
            "token ids name the embedding with input_layer=."
        )
    if len(floating) == 1:
        return floating[0]
    return torch.cat([tensor.flatten(start_dim=1) for tensor in floating], dim=1)


def floating_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Return the inputs of floating-point numbers by key, without those that tell what is padding."""
    return {key: tensor for key, tensor in items_of(inputs) if tensor.is_floating_point() and not tells_padding(key)}


def input_axes(inputs: Inputs) -> dict[str, int]:
    """Return the axis of the reference inputs that the tokens are along, under the key ``""``; none if there is none.

    Raises
    ------
    InvalidDataError
        If padding would count: the inputs have one number a token, or are several that do not fit together.
    """
    reference, n_tokens = reference_inputs(inputs), n_tokens_of(inputs)
    shapes = {key: tensor.shape[1:] for key, tensor in floating_inputs(inputs).items()}
    padded = [key for key, shape in shapes.items() if n_tokens is not None and shape[:1] == (n_tokens,)]
    if not padded:
        return {}
    if len(shapes) > 1 or reference.ndim < 3:
        raise InvalidDataError(
            f"In the input {', '.join(padded)} padding cannot be told from tokens: one input of shape (n_samples, "
            "n_tokens, n_features) can be compared. Name a module whose output stands for the input with "
            "input_layer=, or, if nothing is padded, leave the mask out."
        )
    return {"": 1}


def check_inputs_vary(varies: bool) -> None:
    """Refuse known inputs that have one value all over."""
    if not varies:
        raise InvalidDataError("The known inputs are all equal, so there is nothing to rebuild.")


def check_same_shape(expected: Shapes, other: Batch, *, name: str = "unknown") -> None:
    """Refuse data of another shape than the known."""
    got = input_shapes(other.inputs)
    if got != expected:
        raise InvalidDataError(
            f"The known and {name} samples must have the same shape. Got {shapes_text(expected)} and "
            f"{shapes_text(got)}."
        )
