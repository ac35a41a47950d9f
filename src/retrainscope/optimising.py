"""`param_groups`: what is to be trained, for an optimizer, with a learning rate a layer."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from retrainscope.advice import Recommendation
from retrainscope.checks import check_number
from retrainscope.exceptions import InvalidDataError
from retrainscope.finetuning import tensors_to_train
from retrainscope.layers import is_norm

__all__ = ["param_groups"]

_LEAST_SHARE = 0.1  # of the learning rate, by need: what is advised is trained


def param_groups(
    model: nn.Module,
    layers: Recommendation | Iterable[str],
    lr: float,
    *,
    layer_decay: float | None = None,
    by_need: bool = False,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Sort what is to be trained into groups for any torch optimizer, with a learning rate for each layer.

    The model is not changed: freeze the rest with `train_only` or `freeze_rest`.

    Parameters
    ----------
    model : nn.Module
        One in `nn.DataParallel` is taken as the model inside.
    layers : Recommendation or iterable of str
        As of `train_only`. Names are to be in the order of execution, the head last; a parameter that is inside
        several of them counts with the first.
    lr : float
        The learning rate of the head, and of every layer unless an option says otherwise.
    layer_decay : float, optional
        In (0, 1]. A layer learns at ``lr * layer_decay ** n``, with n the number of trained layers above it, the head
        included: lower layers are more general, and change less [1]_ [2]_.
    by_need : bool
        A layer learns at ``lr * need / largest need`` of the trained layers, but not below a tenth of ``lr``, since it
        is to be trained. For a Recommendation, and not with `layer_decay`.
    weight_decay : float
        Of weights. Biases, scales and whatever else has at most one dimension or belongs to a normalisation get 0.

    Returns
    -------
    list of dict
        For each layer, the head last: a dict for what decays and one for what does not, where there is such, with the
        keys ``"params"``, ``"lr"``, ``"weight_decay"`` and ``"name"`` (of the layer).

    Raises
    ------
    InvalidDataError
        If nothing is left to train, a number is out of its limits, or the needs give no learning rate.
    LayerNotFoundError
        If the model lacks a layer that is named, or parameters of the advice.

    References
    ----------
    .. [1] J. Howard, S. Ruder (2018), Universal language model fine-tuning for text classification, arXiv 1801.06146.
    .. [2] H. Bao et al. (2021), BEiT: BERT pre-training of image transformers, arXiv 2106.08254.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> groups = rs.param_groups(model, ["0", "2"], 0.1, layer_decay=0.5, weight_decay=0.01)
    >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    [('0', 0.05, 0.01), ('0', 0.05, 0.0), ('2', 0.1, 0.01), ('2', 0.1, 0.0)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    check_number("lr", lr, whole=False, zero=True)
    check_number("weight_decay", weight_decay, whole=False, zero=True)
    if layer_decay is not None:
        _check_layer_decay(layer_decay, by_need)
    model = model.module if isinstance(model, nn.DataParallel) else model
    found = _parameters_of(model, layers)
    shares = _shares_by_need(layers, list(found)) if by_need else _shares_by_depth(list(found), layer_decay or 1.0)
    still = _without_decay(model)
    groups = []
    for layer, parameters in found.items():
        kinds: dict[float, list[nn.Parameter]] = {}  # by weight decay
        for parameter in parameters:
            kinds.setdefault(0.0 if id(parameter) in still else weight_decay, []).append(parameter)
        groups += [
            {"params": kinds[decay], "lr": lr * shares[layer], "weight_decay": decay, "name": layer}
            for decay in sorted(kinds, reverse=True)
        ]
    return groups


def _check_layer_decay(layer_decay: float, by_need: bool) -> None:
    check_number("layer_decay", layer_decay, whole=False)
    if layer_decay > 1:
        raise InvalidDataError(f"The 'layer_decay' parameter must be at most 1. Got {layer_decay!r} instead.")
    if by_need:
        raise InvalidDataError("Learning rates go by layer_decay= or by need. Leave one of the two out.")


def _parameters_of(model: nn.Module, layers: Recommendation | Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each layer that has some, each parameter once."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for layer, tensors in tensors_to_train(model, layers).items():
        for tensor in tensors.values():
            if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                found.setdefault(layer, []).append(tensor)
    return found


def _shares_by_depth(names: list[str], layer_decay: float) -> dict[str, float]:
    return {name: layer_decay**above for above, name in enumerate(reversed(names))}


def _shares_by_need(layers: Recommendation | Iterable[str], names: list[str]) -> dict[str, float]:
    if not isinstance(layers, Recommendation):
        raise InvalidDataError("Names have no needs. Give a Recommendation with by_need=True, or leave it out.")
    needs = {row.name: row.need for row in layers.table if row.name in names}
    for name, need in needs.items():
        if not math.isfinite(need):
            raise InvalidDataError(f"The need of the layer {name!r} is {need}. Leave by_need= out.")
    largest = max(needs.values(), default=1.0)
    if largest <= 0:
        raise InvalidDataError("No layer to be trained has a need above 0, so none leads. Leave by_need= out.")
    return {name: max(needs[name] / largest, _LEAST_SHARE) if name in needs else 1.0 for name in names}


def _without_decay(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that weight decay would only distort."""
    tensors: list[Tensor] = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    for module in model.modules():
        tensors += module.parameters(recurse=False) if is_norm(module) else []
    return {id(tensor) for tensor in tensors}
