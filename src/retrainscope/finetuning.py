"""`train_only`: freeze everything but the layers that are to be retrained."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from retrainscope.advice import RETRAIN, Recommendation
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError
from retrainscope.tracing import model_place, named_layers

__all__ = ["train_only"]


@contextmanager
def train_only(model: nn.Module, layers: Recommendation | Iterable[str]) -> Iterator[list[nn.Parameter]]:
    """Freeze everything but some layers, for as long as the context lasts.

    Frozen parameters get no gradient, and frozen modules that keep running statistics (batch
    normalisation) do not update them, also when the training loop calls ``model.train()``.

    Parameters
    ----------
    model : nn.Module
    layers : Recommendation or iterable of str
        The advice: its layers, and its head where that is to be retrained, with the parameters that each owns.
        Or the names of modules, with the parameters inside each; name the head too.

    Yields
    ------
    list of nn.Parameter
        What is to be trained, for the optimizer.

    Raises
    ------
    InvalidDataError
        If nothing is left to train.
    LayerNotFoundError
        If the model lacks a layer or parameter that is named.

    Notes
    -----
    On leaving, ``requires_grad`` and the training flags are what they were, and the weights are as trained.

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
    model_place(model)
    trained, kept_buffers = _trained_tensors(model, layers)
    parameters = dict(model.named_parameters())
    chosen = [parameter for name, parameter in parameters.items() if name in trained]
    if not chosen:
        raise InvalidDataError(
            "Nothing is to be trained: the advice is to keep every layer and the head. Use the model as it is, or "
            "name layers."
        )
    frozen = [
        module
        for name, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None
        and f"{name}.running_mean".removeprefix(".") not in kept_buffers
    ]
    flags = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        for module in frozen:
            # In a hook, since the training loop's model.train() would undo a flag that is set once.
            handles.append(module.register_forward_pre_hook(_evaluate))
            module.eval()
        yield chosen
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        for module, flag in flags:
            module.training = flag


def _evaluate(module: nn.Module, _args: Any) -> None:
    module.training = False


def _trained_tensors(model: nn.Module, layers: Recommendation | Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the names of the parameters to train and of the buffers to update."""
    parameters = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    if isinstance(layers, Recommendation):
        rows = [row for row in layers.table if row.name in layers.layers]
        rows += [layers.head] if layers.head.verdict == RETRAIN else []
        trained = {name for row in rows for name in row.parameters}
        for name in sorted(trained - set(parameters)):
            raise LayerNotFoundError.for_name(name, parameters, what="parameter")
        return trained, {name for row in rows for name in row.buffers}
    prefixes = tuple(f"{name}." for name in named_layers(model, layers))
    return (
        {name for name in parameters if name.startswith(prefixes)},
        {name for name in buffers if name.startswith(prefixes)},
    )
