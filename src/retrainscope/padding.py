"""Padding: what the data says of it, by the names that Hugging Face and torch give masks, and leaving it out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from retrainscope.exceptions import InvalidDataError

__all__ = [
    "broad_mask",
    "filled_up",
    "joined_tokens",
    "layer_mask",
    "mean_over_tokens",
    "n_tokens_of",
    "real_tokens",
    "tells_padding",
    "token_mask",
    "tokens_second",
    "without_last",
]

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
        If it has another shape or negative values, or a sample has no real token.
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
    if key == _MASK and (given < 0).any():
        raise InvalidDataError(
            f"The {key!r} of the {name} data has negative values, as if it were to be added to attention scores. Give "
            "1 for what is real and 0 for padding."
        )
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


def layer_mask(mask: Tensor, n_tokens: int) -> Tensor:
    """Tell which tokens of a layer are real: where it has fewer than the data, those over the middle of real ones.

    Parameters
    ----------
    mask : Tensor of bool of shape (n_samples, n_tokens of the data)
    n_tokens : int
        Of the layer.

    Returns
    -------
    Tensor of bool of shape (n_samples, n_tokens)
        At least one token of each sample is real.
    """
    if mask.shape[1] == n_tokens:
        return mask
    places = ((torch.arange(n_tokens, device=mask.device) + 0.5) * mask.shape[1] / n_tokens).long()
    found = mask[:, places]
    # A sample too short to reach the middle of any token: the token that its first real one lies in.
    first = (mask.long().argmax(dim=1) * n_tokens // mask.shape[1])[:, None]
    return torch.where(found.any(dim=1, keepdim=True), found, torch.zeros_like(found).scatter(1, first, True))


def mean_over_tokens(output: Tensor, axis: int, mask: Tensor) -> Tensor:
    """Average an output of shape (n_samples, ...) over the real tokens, to shape (n_samples, n_features)."""
    tokens = tokens_second(output, axis)
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    real = layer_mask(mask, tokens.shape[1])[..., None]
    # What padding holds may be anything, so it is not just multiplied with zero.
    return torch.where(real, wide, 0).sum(dim=1) / real.sum(dim=1)


def real_tokens(output: Tensor, axis: int, mask: Tensor) -> Tensor:
    """Return the real tokens of all samples, of shape (n_real, n_features)."""
    tokens = tokens_second(output, axis)
    return tokens[layer_mask(mask, tokens.shape[1])]


def broad_mask(output: Tensor, axis: int, mask: Tensor) -> Tensor:
    """Bring a mask to the axes of an output, of length 1 but for the samples and the tokens."""
    shape = [1] * output.ndim
    shape[0], shape[axis] = len(output), output.shape[axis]
    return layer_mask(mask, output.shape[axis]).reshape(shape)


def joined_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Join batches of samples; where some have fewer tokens, NaN stands for those missing."""
    most = max(part.shape[1] for part in parts) if parts[0].ndim > 1 else 0
    if all(part.ndim < 2 or part.shape[1] == most for part in parts):
        return torch.cat([*parts])
    filled = []
    for part in parts:
        missing = part.new_full((len(part), most - part.shape[1], *part.shape[2:]), torch.nan)
        filled.append(torch.cat([part, missing], dim=1))
    return torch.cat(filled)


def tokens_second(output: Tensor, axis: int) -> Tensor:
    """Bring an output to shape (n_samples, n_tokens, n_features)."""
    moved = output.movedim(axis, 1)
    return moved.reshape(*moved.shape[:2], -1)


def _key_of(inputs: Mapping[str, Tensor]) -> str | None:
    for key in (_MASK, *(key for key in inputs if key.endswith(_PADDING))):
        if key in inputs:
            return key
    lengths, others = inputs.get(_LENGTHS), [tensor for tensor in inputs.values() if tensor.ndim > 1]
    whole = lengths is not None and lengths.ndim == 1 and not lengths.is_floating_point()
    return _LENGTHS if whole and others else None


def _has_tokens(tensor: Tensor, n_tokens: int) -> bool:
    return tensor.ndim > 1 and tensor.shape[1] == n_tokens
