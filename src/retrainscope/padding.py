"""What the data says of its padding: masks, by the names that Hugging Face and torch give them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from retrainscope.exceptions import InvalidDataError

__all__ = ["filled_up", "n_tokens_of", "tells_padding", "token_mask", "without_last"]

_MASK, _PADDING, _LENGTHS = "attention_mask", "key_padding_mask", "lengths"


def token_mask(inputs: Tensor | Mapping[str, Tensor], name: str = "given") -> Tensor | None:
    """Tell which tokens are real and which are padding.

    Known by their names are ``attention_mask`` (1 for real), what ends with ``key_padding_mask`` (True for padding),
    and ``lengths`` (how many tokens of each sample are real, from the first on); the first of these there is counts.

    Parameters
    ----------
    inputs : Tensor, or mapping of str to Tensor
    name : str
        What the data is called in error messages.

    Returns
    -------
    Tensor of bool of shape (n_samples, n_tokens), or None
        True for real tokens. None if the data does not tell.

    Raises
    ------
    InvalidDataError
        If it has another shape, or a sample has no real token.
    """
    key = None if isinstance(inputs, Tensor) else _key_of(inputs)
    if key is None:
        return None
    assert not isinstance(inputs, Tensor)
    given = inputs[key]
    if key == _LENGTHS:
        n_tokens = next(tensor.shape[1] for tensor in inputs.values() if tensor.ndim > 1)
        mask = torch.arange(n_tokens, device=given.device) < given[:, None]
    else:
        mask = given == 0 if key.endswith(_PADDING) else given != 0
    if mask.ndim != 2:
        raise InvalidDataError(
            f"The {key!r} of the {name} data tells what is padding, so it must have the shape (n_samples, n_tokens). "
            f"Got {tuple(given.shape)}."
        )
    if not mask.any(dim=1).all():
        empty = int((~mask.any(dim=1)).nonzero()[0])
        raise InvalidDataError(
            f"By the {key!r} of the {name} data, sample {empty} of a batch has no token that is not padding. Leave "
            "such samples out."
        )
    return mask


def n_tokens_of(inputs: Tensor | Mapping[str, Tensor]) -> int | None:
    """Return how many tokens a sample has with its padding; None if the data does not tell what is padding."""
    mask = token_mask(inputs)
    return None if mask is None else mask.shape[1]


def tells_padding(key: str) -> bool:
    """Tell whether an input, by its name, says what is padding and so is nothing to compare."""
    return key in (_MASK, _LENGTHS) or key.endswith(_PADDING)


def without_last(inputs: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """Leave out the last n tokens of every sample."""
    n_tokens = n_tokens_of(inputs)
    assert n_tokens is not None
    kept = {key: tensor[:, :-n] if _has_tokens(tensor, n_tokens) else tensor for key, tensor in inputs.items()}
    return {key: tensor.clamp(max=n_tokens - n) if key == _LENGTHS else tensor for key, tensor in kept.items()}


def filled_up(inputs: Mapping[str, Tensor], n: int, *, high: bool) -> dict[str, Tensor]:
    """Make padding of the last n tokens, all of the lowest or all of the highest value that the data has."""
    n_tokens, mask_key = n_tokens_of(inputs), _key_of(inputs)
    assert n_tokens is not None
    assert mask_key is not None
    filled = {}
    for key, tensor in inputs.items():
        filled[key] = tensor.clone()
        if key == _LENGTHS:
            filled[key].clamp_(max=n_tokens - n)
        elif key == mask_key:
            filled[key][:, -n:] = mask_key.endswith(_PADDING)
        elif _has_tokens(tensor, n_tokens):
            filled[key][:, -n:] = tensor.max() if high else tensor.min()
    return filled


def _key_of(inputs: Mapping[str, Tensor]) -> str | None:
    for key in (_MASK, *(key for key in inputs if key.endswith(_PADDING))):
        if key in inputs:
            return key
    lengths, others = inputs.get(_LENGTHS), [tensor for tensor in inputs.values() if tensor.ndim > 1]
    whole = lengths is not None and lengths.ndim == 1 and not lengths.is_floating_point()
    return _LENGTHS if whole and others else None


def _has_tokens(tensor: Tensor, n_tokens: int) -> bool:
    return tensor.ndim > 1 and tensor.shape[1] == n_tokens
