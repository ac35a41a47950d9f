"""Tokens in the outputs of layers: along which axis they lie."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from retrainscope.batches import Inputs
from retrainscope.dryrun import Shape, run_and_note, shape_of
from retrainscope.exceptions import UnsupportedModelError
from retrainscope.outputs import output_of
from retrainscope.padding import filled_up, token_mask, without_last

__all__ = ["find_token_axes", "unclear_tokens"]


def find_token_axes(model: nn.Module, inputs: Inputs, shapes: Mapping[str, Shape]) -> tuple[dict[str, int], set[str]]:
    """Find the axis of each module's output that the tokens are along, for data that tells what is padding.

    That is the one after the samples, if it and no other is as long as the data has tokens. Elsewhere, as many features
    as tokens could mislead: the model is run once more on fewer tokens, and the axis that gets shorter is the one.

    Parameters
    ----------
    model : nn.Module
        Borrowed.
    inputs : Tensor or dict of Tensor
        A few samples.
    shapes : dict of str to tuple of int
        Of the modules' outputs for these samples.

    Returns
    -------
    axes : dict of str to int
        Modules whose output has no tokens (they were pooled) are not in it.
    unclear : set of str
        Modules in whose output padding cannot be told from tokens.
    """
    mask = token_mask(inputs)
    if mask is None:
        return {}, set()
    assert isinstance(inputs, dict)
    n_tokens = mask.shape[1]
    axes: dict[str, int] = {}
    doubtful: dict[str, Shape] = {}
    for name, shape in shapes.items():
        fitting = [axis for axis in range(1, len(shape)) if shape[axis] == n_tokens]
        if len(shape) > 2 and fitting == [1]:
            axes[name] = 1
        elif len(shape) > 2 or fitting:
            doubtful[name] = shape
    n = max(1, n_tokens // 8)
    if not doubtful or n == n_tokens:
        return axes, set()
    shorter: dict[str, Shape | None] = {}

    def note(name: str, module: nn.Module, returned: object) -> None:
        shorter[name] = shape_of(module, returned, n_tokens - n)

    try:
        run_and_note(model, without_last(inputs, n), note)
    except Exception:  # a model of one fixed length may fail in any way
        return axes, set(doubtful)
    steady, unclear = set(), set()
    for name, shape in doubtful.items():
        other = shorter.get(name) or ()
        changed = [axis for axis in range(1, len(shape)) if len(other) == len(shape) and shape[axis] != other[axis]]
        if len(other) == len(shape) and not changed:
            steady.add(name)
        elif len(changed) == 1 and _in_proportion(shape[changed[0]], other[changed[0]], n_tokens, n):
            axes[name] = changed[0]
        else:
            unclear.add(name)
    maps = [name for name in steady if len(doubtful[name]) > 2]
    return axes, unclear | _touched_by_padding(model, inputs, maps, n)


def unclear_tokens(layer: str, shape: Shape) -> UnsupportedModelError:
    """Build the error for a layer in whose output padding cannot be told from tokens."""
    return UnsupportedModelError(
        f"In the output of the layer {layer!r}, of shape {shape}, padding cannot be told from tokens: it has another "
        "number of them than the data, or several axes as long. Pad the data to another length (a multiple of what "
        "the model pads to by itself), or name other layers with layers=."
    )


def _in_proportion(n: int, n_after: int, n_tokens: int, n_cut: int) -> bool:
    """Tell whether a layer has as many tokens as the data, or has gathered every few of them into one."""
    return n == n_tokens or (n < n_tokens and abs(n_after - n * (1 - n_cut / n_tokens)) <= 1)


def _touched_by_padding(model: nn.Module, inputs: dict[str, Tensor], names: Iterable[str], n: int) -> set[str]:
    """Return those modules whose output changes with what padding holds: some pad further by themselves."""
    names, outputs = set(names), list[dict[str, Tensor]]()
    for high in (False, True) if names else ():
        found: dict[str, Tensor] = {}

        def note(name: str, module: nn.Module, returned: object, found: dict[str, Tensor] = found) -> None:
            output = output_of(module, returned) if name in names else None
            if output is not None:
                found[name] = output.float().clone()

        try:
            run_and_note(model, filled_up(inputs, n, high=high), note)
        except Exception:  # some values mean more than a word, such as the place of an image
            return names
        outputs.append(found)
    return {name for name in names if not torch.allclose(outputs[0][name], outputs[1][name], atol=1e-4)}
