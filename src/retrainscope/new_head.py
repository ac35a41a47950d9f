"""A new head in the place of the old one, for other classes: `replace_head`."""

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from retrainscope.advice import Recommendation
from retrainscope.checks import check_number
from retrainscope.exceptions import InvalidDataError, UnsupportedModelError
from retrainscope.lending import model_place, seed_of
from retrainscope.tracing import named_layers

__all__ = ["replace_head"]

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Rows = nn.Linear | _Convolution  # what has one row of weights an output
_CONSTRUCTORS = tuple(kind.__init__ for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
_COUNTS = ("num_labels", "num_classes")  # where Hugging Face, timm and torchvision note how many classes there are


def replace_head(
    model: nn.Module,
    n_classes: int,
    *,
    head: str | Recommendation | None = None,
    keep: Literal["all"] | Iterable[int] | Mapping[int, int] | None = None,
    random_state: int | np.random.RandomState | None = None,
) -> nn.Module:
    """Give a classifier a new last layer, for other classes; the model is changed in place.

    The new layer is of the old one's class, device, type and mode, with a bias if that had one, and trainable. New
    rows are drawn as torch initialises such a layer; kept ones are the old ones bit for bit. What Hugging Face, timm
    and torchvision note beside it is brought in line: ``num_labels`` or ``num_classes`` of the model and of its
    configuration, and the names of the classes there. Hooks of the old layer are not taken over, and an optimizer
    made before holds the old one's parameters.

    Parameters
    ----------
    model : nn.Module
    n_classes : int
        How many outputs the new head has: at least two.
    head : str or Recommendation, optional
        The name of the old one, or of a module that ends in it, such as torchvision's ``"classifier"``; or the advice,
        whose head it is. None finds it: where the model or its configuration tells the number of classes, the layer
        with as many outputs, of several the one that lies least deep; else the last layer of the model. Auxiliary
        heads stay as they are, as those of torchvision's GoogLeNet and Inception.
    keep : "all", iterable of int or mapping, optional
        The old outputs to keep: ``{new place: old place}``; or the old places, which come first in this order;
        ``"all"`` are all of them, in their order, before the new ones. None keeps none.
    random_state : int or RandomState, optional
        Of the new rows, which are the same on every device. Global random states stay as they are.

    Returns
    -------
    nn.Module
        The new head.

    Raises
    ------
    InvalidDataError
        If `n_classes` or `keep` does not fit.
    LayerNotFoundError
        If the model has no module of this name.
    UnsupportedModelError
        If it is not clear which layer is the head, or a new one cannot take its place: it must be an ``nn.Linear`` or
        a convolution of kernel size 1, and share its weights with no other.

    Examples
    --------
    Classes 0 to 2 were known, 3 and 4 are new:

    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> rs.replace_head(model, 5, keep="all", random_state=0)
    Linear(in_features=8, out_features=5, bias=True)
    >>> model(torch.zeros(1, 4)).shape
    torch.Size([1, 5])
    """
    check_number("n_classes", n_classes, whole=True, least=2)
    n_classes = int(n_classes)
    model_place(model)
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError(
            "The model has adapters of peft, which put others in the place of layers or beside them. Replace the head "
            "first, then add the adapters, with the head in modules_to_save."
        )
    name = _find_head(model) if head is None else _named_head(model, head)
    old = _replaceable(model, name)
    rows = _kept_rows(keep, n_classes, len(old.weight))
    new: _Rows = _fresh(old, n_classes, seed_of(random_state))
    with torch.no_grad():
        for tensor, old_tensor in ((new.weight, old.weight), (new.bias, old.bias)):
            if tensor is not None and old_tensor is not None and rows:
                tensor[[*rows]] = old_tensor[[*rows.values()]]
    model.set_submodule(name, new)
    _update_counts(model, name, len(old.weight), n_classes, rows)
    return new


def _find_head(model: nn.Module) -> str:
    """Find the layer with as many outputs as the model tells classes; where it tells nothing, take the last one."""
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if _has_rows(module)}
    told = next((getattr(holder, count) for holder, count in _counts(model)), None)
    if told is not None:
        fitting = [name for name, module in layers.items() if len(module.weight) == told]
        if not fitting:
            raise _unclear(f"the model tells of {told} classes, and no layer has as many outputs", layers)
        depth = min(name.count(".") for name in fitting)
        fitting = [name for name in fitting if name.count(".") == depth]
        if len(fitting) > 1:
            raise _unclear(f"{len(fitting)} layers have one output for each of {told} classes", fitting)
        return fitting[0]
    last = _last_layer(model)
    if last not in layers:
        kind = type(model.get_submodule(last)).__name__
        raise _unclear(f"the last module with parameters is {last!r}, a {kind}", layers)
    return last


def _named_head(model: nn.Module, head: str | Recommendation) -> str:
    """Return the name of the layer that is meant: of a module with others inside, the last one."""
    name = head.head.name if isinstance(head, Recommendation) else head
    module = named_layers(model, [name], what="head")[name]
    inside = "" if isinstance(module, nn.Linear | _Convolution) else _last_layer(module)
    return f"{name}.{inside}" if inside else name


def _last_layer(model: nn.Module) -> str:
    """Return the name of the last module that has parameters of its own, or "" if none has."""
    return next(
        (n for n, m in reversed([*model.named_modules()]) if any(True for _ in m.parameters(recurse=False))), ""
    )


def _unclear(why: str, names: Iterable[str]) -> UnsupportedModelError:
    last = [repr(name) for name in names][-5:]
    could = f" Candidates: {', '.join(last)}." if last else ""
    return UnsupportedModelError(
        f"Which layer is the head is not clear: {why}.{could} Name it with head=; where several are heads at once, "
        "replace each in turn."
    )


def _has_rows(module: nn.Module) -> bool:
    """Tell whether each output of a module is a linear function, by a row of weights, of all inputs at one place."""
    if isinstance(module, _Convolution):
        return module.groups == 1 and set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear)


def _replaceable(model: nn.Module, name: str) -> Any:
    """Return the old head, or say why none can take its place."""
    old = model.get_submodule(name)
    own = {parameter: tensor for tensor, parameter in old.named_parameters()}
    if name == "":
        raise UnsupportedModelError(
            f"The model is one {type(old).__name__}, and its head cannot be replaced in place. Wrap it in an "
            "nn.Sequential."
        )
    if not _has_rows(old) or type(old).__init__ not in _CONSTRUCTORS:
        raise UnsupportedModelError(
            f"The head {name!r} is a {type(old).__name__}; an nn.Linear, or a convolution of kernel size 1 without "
            f"groups, can be replaced. Name another with head=, or put your own there: model.set_submodule({name!r}, "
            "...)."
        )
    others = sorted({*own.values()} - {"weight", "bias"})
    if others:
        raise UnsupportedModelError(
            f"The weight of the head {name!r} is made from other tensors ({', '.join(others)}). Undo "
            "that first, such as with torch.nn.utils.parametrize.remove_parametrizations."
        )
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in own and other != f"{name}.{own[parameter]}":
            raise UnsupportedModelError(
                f"The head {name!r} shares its weights with another module: {name}.{own[parameter]} is also {other}. "
                "Name another with head=, or give it weights of its own first."
            )
    return old


def _kept_rows(keep: Any, n_classes: int, n_old: int) -> dict[int, int]:
    """Return the old place of each new place that keeps its row."""
    if keep is None:
        return {}
    if isinstance(keep, str) and keep == "all":
        if n_classes < n_old:
            raise InvalidDataError(
                f"keep='all' needs at least as many classes as the old head has outputs, {n_old}. Got n_classes="
                f"{n_classes}; n_classes counts the old ones too."
            )
        return {place: place for place in range(n_old)}
    pairs = keep.items() if isinstance(keep, Mapping) else enumerate(_items(keep))
    return {_place(new, n_classes, "new"): _place(old, n_old, "old") for new, old in pairs}


def _items(keep: Any) -> Iterable[Any]:
    if isinstance(keep, str) or not isinstance(keep, Iterable):
        raise InvalidDataError(
            "The 'keep' parameter must be 'all', the old places to keep, such as [3, 5], or {new place: old place}. "
            f"Got {keep!r} instead."
        )
    return keep


def _place(place: Any, n: int, which: str) -> int:
    try:
        number = -1 if isinstance(place, bool | np.bool_) else operator.index(place)
    except TypeError:
        number = -1
    if not 0 <= number < n:
        raise InvalidDataError(
            f"The 'keep' parameter names the {which} place {place!r}, and the {which} head's outputs are numbered from "
            f"0 to {n - 1}."
        )
    return number


def _fresh(old: Any, n_classes: int, seed: int) -> Any:
    """Make a layer like the old one with other outputs, drawn on the CPU so that the device makes no difference."""
    settings = {"bias": old.bias is not None, "device": "cpu", "dtype": old.weight.dtype}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the other devices too
        if isinstance(old, nn.Linear):
            new = type(old)(old.in_features, n_classes, **settings)
        else:
            new = type(old)(old.in_channels, n_classes, old.kernel_size, old.stride, old.padding, **settings)
    return new.to(old.weight.device).train(old.training)


def _counts(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yield what tells the number of classes, a module's configuration or itself, and the attribute."""
    for holder in (getattr(module, "config", None), module):
        yield from ((holder, count) for count in _COUNTS if type(getattr(holder, count, None)) is int)


def _update_counts(model: nn.Module, name: str, n_old: int, n_classes: int, rows: Mapping[int, int]) -> None:
    """Note the new number of classes in the modules around the head, wherever the old one is noted."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    noted = [(holder, count) for m in around for holder, count in _counts(m) if getattr(holder, count) == n_old]
    for holder, _ in {id(holder): (holder, count) for holder, count in noted}.values():
        if isinstance(getattr(holder, "id2label", None), dict):
            names = _class_names(holder.id2label, n_classes, rows)
            holder.id2label, holder.label2id = names, {label: place for place, label in names.items()}
        if getattr(holder, "problem_type", None) == "regression":
            holder.problem_type = None  # which a loss with one output had noted; the next loss sees to it
    for holder, count in noted:
        setattr(holder, count, n_classes)


def _class_names(old: Mapping[int, str], n_classes: int, rows: Mapping[int, int]) -> dict[int, str]:
    """Return Hugging Face's names of the new outputs: their own for kept rows that have one."""
    kept = {new: str(old.get(place, "LABEL_")) for new, place in rows.items()}
    named = {new: label for new, label in kept.items() if not label.startswith("LABEL_")}
    return {place: named.get(place, f"LABEL_{place}") for place in range(n_classes)}
