"""Freeze everything but the layers that are to be retrained: `train_only`, `freeze_rest`, `unfreeze`."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from retrainscope.advice import RETRAIN, UNDECIDED, LayerAdvice, Recommendation
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError, UnsupportedModelError
from retrainscope.freezing import freeze, give_back, is_frozen, training
from retrainscope.lending import model_place
from retrainscope.tracing import named_layers

__all__ = ["freeze_rest", "rows_to_train", "tensors_to_train", "train_only", "unfreeze"]

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


@contextmanager
def train_only(model: nn.Module, layers: Recommendation | Iterable[str]) -> Iterator[list[nn.Parameter]]:
    """Freeze everything but some layers, for as long as the context lasts.

    Frozen parameters get no gradient. Frozen modules run in evaluation mode, also when the training loop calls
    ``model.train()``: their dropout is off, and the running statistics of batch normalisation or the vectors of
    spectral normalisation stay as they are. What has neither parameters nor buffers, such as a dropout, goes with the
    nearest module around it that has parameters: frozen if all of those are.

    Parameters
    ----------
    model : nn.Module
        One in `nn.DataParallel` is taken as the model inside.
    layers : Recommendation or iterable of str
        The advice: its layers, and its head where that is to be retrained, with the parameters that each owns; of a
        head that was replaced since, all that is in it. Or the names of modules, with the parameters inside each;
        name the head too.

    Yields
    ------
    list of nn.Parameter
        What is to be trained, for the optimizer.

    Raises
    ------
    InvalidDataError
        If nothing is left to train.
    LayerNotFoundError
        If the model lacks a layer that is named, or parameters of the advice.
    UnsupportedModelError
        If the model is wrapped for several processes or compiled: see `freeze_rest`.

    Warns
    -----
    UserWarning
        If a parameter that is trained is also used by a layer that is not.

    See Also
    --------
    freeze_rest : The same until further notice.

    Notes
    -----
    On leaving, ``requires_grad`` and the training flags are what they were, and the weights are as trained. A frozen
    recurrent module (``nn.LSTM``) follows ``model.train()`` with its dropout set to 0, which is the same: cuDNN gives
    no gradient through one in evaluation mode.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> with rs.train_only(model, ["2"]) as parameters:
    ...     optimizer = torch.optim.SGD(parameters, lr=0.1)
    ...     model(torch.ones(5, 3)).sum().backward()
    ...     optimizer.step()
    >>> model[0].weight.grad is None, model[0].weight.requires_grad
    (True, True)
    """
    trained = _trained(model, layers, stacklevel=5)  # from here over contextlib to the with statement
    with training(model, trained):
        yield [parameter for parameter in model.parameters() if id(parameter) in trained]


def freeze_rest(model: nn.Module, layers: Recommendation | Iterable[str]) -> list[nn.Parameter]:
    """Freeze everything but some layers, as `train_only`, until `unfreeze` is called.

    What is frozen stays so when the model is copied, pickled, or saved and loaded as a whole; its ``state_dict`` is
    what it was. A second call replaces the first. For several processes, or to compile the model, freeze first, then
    wrap.

    Parameters
    ----------
    model : nn.Module
    layers : Recommendation or iterable of str
        As of `train_only`.

    Returns
    -------
    list of nn.Parameter
        What is to be trained, for the optimizer.

    Raises
    ------
    InvalidDataError, LayerNotFoundError, UnsupportedModelError
        As `train_only`; the model is left as it was.

    Warns
    -----
    UserWarning
        If a parameter that is trained is also used by a layer that is not.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    >>> parameters = rs.freeze_rest(model, ["2"])
    >>> [module.training for module in model.train()], model[0].weight.requires_grad
    ([False, False, True], False)
    >>> rs.unfreeze(model)
    >>> [module.training for module in model], model[0].weight.requires_grad
    ([True, True, True], True)
    """
    trained = _trained(model, layers, stacklevel=4)
    give_back(model.modules())
    freeze(model, trained)
    return [parameter for parameter in model.parameters() if id(parameter) in trained]


def unfreeze(model: nn.Module) -> None:
    """Take back what `freeze_rest` did.

    ``requires_grad`` and the training flags are what they were before it, and the weights are as trained.

    Parameters
    ----------
    model : nn.Module
        The model, a copy of it, or what it was wrapped in since. Wrap the model anew to train it further by several
        processes: ``DistributedDataParallel`` takes no notice of parameters that need a gradient later.

    Raises
    ------
    InvalidDataError
        If it is not frozen.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))
    >>> _ = rs.freeze_rest(model, ["2"])
    >>> rs.unfreeze(model)
    >>> all(parameter.requires_grad for parameter in model.parameters()), model[1].training
    (True, True)
    """
    if not is_frozen(model):
        raise InvalidDataError(
            "The model is not frozen, so there is nothing to unfreeze. It is frozen by freeze_rest(model, layers)."
        )
    give_back(model.modules())


def tensors_to_train(model: nn.Module, layers: Recommendation | Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Return the parameters and buffers to train by layer and name: of advice in the order of execution, head last."""
    model_place(model)
    # With duplicates, since a tied weight has two names and may be asked for by either.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors: dict[str, Tensor] = parameters | dict(model.named_buffers(remove_duplicate=False))
    if isinstance(layers, Recommendation):
        named = _advised(layers, parameters, tensors)
    else:
        named = {name: _inside(name, tensors) for name in named_layers(model, layers)}
    found = {
        layer: {name: tensors[name] for name in names if name not in parameters or _is_trainable(tensors[name])}
        for layer, names in named.items()
    }
    if not any(name in parameters for names in found.values() for name in names):
        raise _nothing_to_train(layers)
    return found


def rows_to_train(advice: Recommendation) -> list[LayerAdvice]:
    """Return what is advised to train, the head last, or refuse advice to train nothing, or that is undecided."""
    if not isinstance(advice, Recommendation):
        raise InvalidDataError(
            f"This needs advice, a Recommendation, which tells what each layer owns. Got {type(advice).__name__} "
            "instead. Names are for train_only, freeze_rest and param_groups."
        )
    rows = [row for row in advice.table if row.name in advice.layers]
    rows += [advice.head] if advice.head.verdict == RETRAIN else []
    undecided = advice.verdict == UNDECIDED and not advice.layers
    if undecided or not any(row.parameters for row in rows):
        raise _nothing_to_train(advice)
    return rows


def _nothing_to_train(layers: Recommendation | Iterable[str]) -> InvalidDataError:
    if isinstance(layers, Recommendation) and UNDECIDED in (layers.verdict, layers.head.verdict):
        undecided = "The advice is undecided, so it does not tell what to train."
        all_the_same = "To train all the same, name what: train_only(model, [names])."
        return InvalidDataError(" ".join(filter(None, [undecided, layers.reason, all_the_same])))
    return InvalidDataError(
        "Nothing is to be trained: no layer with parameters is advised or named. Use the model as it is, or name what "
        "to train: train_only(model, [names])."
    )


def _advised(
    advice: Recommendation, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    rows = rows_to_train(advice)

    def fits(row: LayerAdvice) -> bool:
        return all(name in parameters for name in row.parameters)

    def names_of(row: LayerAdvice) -> list[str]:
        # A head that was replaced since may have parameters of other names.
        new = [] if fits(row) else _inside(row.name, tensors)
        return [*dict.fromkeys([*(name for name in (*row.parameters, *row.buffers) if name in tensors), *new])]

    strange = [row for row in rows if not fits(row) and not (row is advice.head and _inside(row.name, tensors))]
    if strange:
        missing = next(name for name in strange[0].parameters if name not in parameters)
        nearest = LayerNotFoundError.for_name(missing, parameters, what="parameter")
        raise LayerNotFoundError(
            f"The advice is for another model: it names the layer{'s' if len(strange) > 1 else ''} "
            f"{', '.join(repr(row.name) for row in strange)}, whose parameters this one lacks. {nearest}"
        )
    return {row.name: names_of(row) for row in rows}


def _inside(layer: str, tensors: Iterable[str]) -> list[str]:
    return [name for name in tensors if name.startswith(f"{layer}.")]


def _is_trainable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()  # what is quantised takes no gradient


def _trained(model: nn.Module, layers: Recommendation | Iterable[str], *, stacklevel: int) -> set[int]:
    """Return the ids of the parameters to train and of the buffers to update, for a model to be frozen."""
    if type(model).__name__ in _WRAPPERS:  # by name, since to import their classes takes seconds
        raise UnsupportedModelError(
            f"The model is wrapped in {type(model).__name__}, which took note of what needs a gradient. Freeze first, "
            f"then wrap: freeze_rest(model, layers), then {_again(model)}."
        )
    inner = model.module if isinstance(model, nn.DataParallel) else model
    found = tensors_to_train(inner, layers)
    _warn_of_tied(inner, found, stacklevel)
    return {id(tensor) for tensors in found.values() for tensor in tensors.values()}


def _again(model: nn.Module) -> str:
    name = type(model).__name__
    return "torch.compile(model)" if name == "OptimizedModule" else f"{name}(model)"


def _warn_of_tied(model: nn.Module, found: Mapping[str, Mapping[str, Tensor]], stacklevel: int) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = {part for layer in found if layer in modules for part in modules[layer].modules()}
    names = {name: tensor for tensors in found.values() for name, tensor in tensors.items()}
    name_of = {id(tensor): name for name, tensor in names.items()}
    pairs = [
        (name_of[id(parameter)], f"{place}.{key}".removeprefix("."))
        for place, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if module not in inside and id(parameter) in name_of
    ]
    tied = [f"{name!r} is also {other!r}" for name, other in pairs if other not in names]
    if tied:
        warnings.warn(
            f"Training one layer changes another, which is not to be trained: {', '.join(tied)} (tied weights). Name "
            "both, or give each a weight of its own.",
            UserWarning,
            stacklevel=stacklevel,
        )
