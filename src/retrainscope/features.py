"""A network up to a layer, as a function of its input that can be differentiated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retrainscope.batches import Batch, Inputs
from retrainscope.dryrun import first_samples
from retrainscope.exceptions import InvalidDataError
from retrainscope.padding import broad_mask, real_tokens, token_mask
from retrainscope.reference import floating_inputs, input_axes, reference_inputs
from retrainscope.tokens import find_token_axes, unclear_tokens
from retrainscope.tracing import replace_output, run_layers

__all__ = ["Features", "features_up_to", "keeping_padding", "real_inputs", "token_axes_of", "true_inputs"]

_DRY_RUN_SAMPLES = 4

Features = Callable[[Tensor, Tensor], Tensor]


def features_up_to(
    network: nn.Module, inputs: Inputs, layer: str, input_layer: str | None, *, calls: str | None, axis: int | None
) -> Features:
    """Return the function from inputs (or outputs of the input layer) and their rows to a layer's output.

    Where the output has tokens, along `axis`, it is zero for padding.
    """
    mask = token_mask(inputs) if axis is not None else None

    def features_of(values: Tensor, rows: Tensor) -> Tensor:
        found: list[Tensor] = []

        def run(batch: Inputs) -> None:
            # Nothing runs after the layer, so its output need not be cloned.
            run_layers(network, batch, [layer], lambda _, out: found.append(out), calls=calls, check_finite=False)

        if input_layer is not None:
            with replace_output(network, input_layer, values):
                run(_rows_of(inputs, rows))
        elif isinstance(inputs, Tensor):
            run(values)
        else:
            run({**_rows_of(inputs, rows), _floating_key(inputs): values})
        if mask is None or axis is None:
            return found[0]
        return torch.where(broad_mask(found[0], axis, mask[rows]), found[0], 0)

    return features_of


def keeping_padding(features_of: Features, true: Tensor, real: Tensor) -> Features:
    """Keep padding what it is: only real tokens are sought."""
    return lambda values, rows: features_of(torch.where(real[rows], values, true[rows]), rows)


def true_inputs(
    network: nn.Module, inputs: Inputs, input_layer: str | None, calls: str | None, token_axes: Mapping[str, int]
) -> Tensor:
    """Return what is to be rebuilt: the floating input, or the output of the input layer."""
    if input_layer is None:
        return reference_inputs(inputs)
    found: list[Tensor] = []

    def keep(_: str, output: Tensor) -> None:
        found.append(output.clone())

    with torch.no_grad():
        run_layers(network, inputs, [input_layer], keep, calls=calls, token_axes=token_axes)
    return found[0]


def real_inputs(values: Tensor, batch: Batch, axis: int | None) -> Tensor:
    """Return what counts of the inputs: all, or the real tokens, of shape (n_real, n_features)."""
    return values if axis is None or batch.mask is None else real_tokens(values, axis, batch.mask)


def token_axes_of(
    network: nn.Module, first: Batch, layers: Sequence[str], input_layer: str | None, calls: str | None
) -> dict[str, int]:
    """Find the axes of tokens in the outputs of layers, by a few samples."""
    inputs, shapes = first_samples(first.inputs, _DRY_RUN_SAMPLES), dict[str, tuple[int, ...]]()
    names = [*layers] if input_layer is None else [input_layer, *layers]

    def note_shape(name: str, output: Tensor) -> None:
        shapes[name] = tuple(output.shape)

    with torch.no_grad():
        run_layers(network, inputs, names, note_shape, calls=calls, check_finite=False)
    axes, unclear = find_token_axes(network, inputs, shapes)
    if unclear:
        raise unclear_tokens(min(unclear), shapes[min(unclear)])
    return axes if input_layer is not None else {**axes, **input_axes(first.inputs)}


def _rows_of(inputs: Any, rows: Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return inputs if len(rows) == len(inputs) else inputs[rows]
    return {key: _rows_of(tensor, rows) for key, tensor in inputs.items()}


def _floating_key(inputs: dict[str, Tensor]) -> str:
    keys = [*floating_inputs(inputs)]
    if len(keys) != 1:
        raise InvalidDataError(
            f"GradientInverter rebuilds one floating-point input. Got {', '.join(keys)}; name one module's output "
            "with input_layer= instead."
        )
    return keys[0]
