"""What counts as a module's output, in whatever form it comes."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

__all__ = ["has_several", "is_packed", "output_of", "with_output"]

_MAIN_KEYS = ("logits", "last_hidden_state")  # the first that is there


def output_of(module: nn.Module, returned: Any, n_tokens: int | None = None) -> Tensor | None:
    """Return what counts as a module's output: one tensor, with the samples first.

    That is what the module returns, or the first tensor in it: a tuple or list is looked through in order, a
    mapping (a ``ModelOutput`` of Hugging Face is one) too, but there the entry ``logits``, and after it
    ``last_hidden_state``, comes first. Integers, as positions or lengths, do not count. A packed sequence is padded to
    shape (n_samples, n_tokens, ...). Recurrent and attention modules that have the samples second get them first.

    Parameters
    ----------
    module : nn.Module
    returned : anything
    n_tokens : int, optional
        To how many tokens a packed sequence is padded, at least those of its longest sample.

    Returns
    -------
    Tensor or None
        None if there is no such tensor, or a packed sequence and `n_tokens` is not known.
    """
    found = _main(returned)
    if isinstance(found, PackedSequence):
        if n_tokens is None:
            return None
        n_tokens = max(n_tokens, len(found.batch_sizes))
        return pad_packed_sequence(found, batch_first=True, total_length=n_tokens)[0]
    return None if found is None else _batch_first(module, found)


def has_several(returned: Any) -> bool:
    """Tell whether there are more tensors than the one that counts in what a module returned."""
    return sum(1 for _ in _candidates(returned)) > 1


def is_packed(returned: Any) -> bool:
    """Tell whether a module's output is a packed sequence."""
    return isinstance(_main(returned), PackedSequence)


def with_output(module: nn.Module, returned: Any, tensor: Tensor) -> Any:
    """Return what a module returned, with another tensor in the place of its output."""
    found = _main(returned)
    if isinstance(found, PackedSequence):
        rows = tensor if found.sorted_indices is None else tensor[found.sorted_indices]
        steps = [rows[:size, step] for step, size in enumerate(found.batch_sizes.tolist())]
        replaced: Any = found._replace(data=torch.cat(steps))
    else:
        replaced = _batch_first(module, tensor)
    return _put(returned, replaced)


def _main(returned: Any) -> Tensor | PackedSequence | None:
    return next((found for _, found in _candidates(returned)), None)


def _candidates(returned: Any) -> Iterator[tuple[Any, Tensor | PackedSequence]]:
    """Yield the place and the tensor of each floating one, the main one first."""
    if isinstance(returned, Tensor | PackedSequence):
        values = returned.data if isinstance(returned, PackedSequence) else returned
        if values.is_floating_point() or values.is_complex():
            yield None, returned
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(returned, Mapping):
        items = sorted(returned.items(), key=lambda item: _place(item[0]))
    elif isinstance(returned, tuple | list):
        items = [*enumerate(returned)]
    for place, item in items:
        found = _main(item)
        if found is not None:
            yield place, found


def _place(key: Any) -> int:
    return _MAIN_KEYS.index(key) if key in _MAIN_KEYS else len(_MAIN_KEYS)


def _put(returned: Any, replaced: Tensor | PackedSequence) -> Any:
    place = next((place for place, _ in _candidates(returned)), None)
    if place is None:
        return replaced
    if isinstance(returned, Mapping):
        changed: Any = copy.copy(returned)
        changed[place] = _put(returned[place], replaced)
        return changed
    items = [*returned]
    items[place] = _put(items[place], replaced)
    return type(returned)(*items) if hasattr(returned, "_fields") else type(returned)(items)


def _batch_first(module: nn.Module, tensor: Tensor) -> Tensor:
    """Bring the samples of a module that has them second to the front, and back."""
    swapped = getattr(module, "batch_first", True) is False and tensor.ndim == 3
    return tensor.transpose(0, 1) if swapped else tensor
