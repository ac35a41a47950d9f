"""`train_only`: freeze everything but the layers that are to be retrained."""

from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any

from torch import nn

from retrainscope.advice import RETRAIN, UNDECIDED, Recommendation
from retrainscope.exceptions import InvalidDataError, LayerNotFoundError
from retrainscope.lending import model_place
from retrainscope.tracing import named_layers

__all__ = ["train_only", "training"]


@contextmanager
def train_only(model: nn.Module, layers: Recommendation | Iterable[str]) -> Iterator[list[nn.Parameter]]:
    """Freeze everything but some layers, for as long as the context lasts.

    Frozen parameters get no gradient, and frozen modules that keep buffers (the running statistics of batch
    normalisation, the vectors of spectral normalisation) run in evaluation mode, so that they do not update
    them, also when the training loop calls ``model.train()``.

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
    trained = _trained_tensors(model, layers)
    chosen = [parameter for parameter in model.parameters() if id(parameter) in trained]
    if not chosen:
        undecided = isinstance(layers, Recommendation) and UNDECIDED in (layers.verdict, layers.head.verdict)
        reason = "the advice is undecided" if undecided else "no layer is advised or named"
        raise InvalidDataError(
            f"Nothing is to be trained: {reason}. Use the model as it is, or name what to train: "
            "train_only(model, [names])."
        )
    with training(model, trained):
        yield chosen


@contextmanager
def training(model: nn.Module, trained: Set[int]) -> Iterator[None]:
    """Freeze everything but the parameters and buffers with these ids, for as long as the context lasts."""
    frozen = [
        module
        for module in model.modules()
        if next(module.buffers(recurse=False), None) is not None
        and not any(id(tensor) in trained for tensor in (*module.parameters(), *module.buffers()))
    ]
    flags = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = []
    try:
        for parameter, _ in requires_grad:
            parameter.requires_grad_(id(parameter) in trained)
        for module in frozen:
            # In a hook, since the training loop's model.train() would undo a flag that is set once; before all
            # others, since spectral normalisation updates its vectors in one.
            handles.append(module.register_forward_pre_hook(_evaluate, prepend=True))
            module.training = False
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        for module, flag in flags:
            module.training = flag


def _evaluate(module: nn.Module, _args: Any) -> None:
    module.training = False


def _trained_tensors(model: nn.Module, layers: Recommendation | Iterable[str]) -> set[int]:
    """Return the ids of the parameters to train and of the buffers to update."""
    # With duplicates, since a tied weight has two names and may be asked for by either.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = parameters | dict(model.named_buffers(remove_duplicate=False))
    if isinstance(layers, Recommendation):
        rows = [row for row in layers.table if row.name in layers.layers]
        rows += [layers.head] if layers.head.verdict == RETRAIN else []
        named = {name for row in rows for name in row.parameters}
        for name in sorted(named - set(parameters)):
            raise LayerNotFoundError.for_name(name, parameters, what="parameter")
        named |= {name for row in rows for name in row.buffers if name in tensors}
    else:
        prefixes = tuple(f"{name}." for name in named_layers(model, layers))
        named = {name for name in tensors if name.startswith(prefixes)}
    return {id(tensors[name]) for name in named}
