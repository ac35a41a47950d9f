"""The control: the same architecture with freshly initialised weights."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from retrainscope.lending import copy_model, model_place

__all__ = ["untrained_copy"]


def untrained_copy(model: nn.Module, *, seed: int, keep: str | None = None) -> nn.Module:
    """Copy a model and give the copy the weights of a network that was never trained.

    Every module that has ``reset_parameters`` (or ``_reset_parameters``), to be called without arguments, is asked to
    initialise itself.
    Parameters that this leaves as they were (class tokens, parametrised weights, modules of one's
    own) have their entries shuffled: their distribution stays and what was learnt goes.

    Parameters
    ----------
    model : nn.Module
    seed : int
        Decides the new weights. The global random state of torch is set to it: call this inside
        `borrow`.
    keep : str, optional
        A module whose weights stay: the input layer, whose output both networks must rebuild.

    Returns
    -------
    nn.Module
        A copy in evaluation mode, on the same device.
    """
    home, _ = model_place(model)
    copied = copy_model(model).cpu()  # where the same is drawn for every device
    kept = set() if keep is None else set(copied.get_submodule(keep).modules())
    torch.manual_seed(seed)
    before = {name: parameter.detach().clone() for name, parameter in copied.named_parameters()}
    for module in copied.modules():
        if module in kept:
            continue
        for method in ("reset_parameters", "_reset_parameters"):
            # Asked of the class: a wrapper, as of a compiled module, passes on what it does not have itself.
            if hasattr(type(module), method) and _takes_nothing(getattr(module, method)):
                getattr(module, method)()
                break
    kept_parameters = {id(parameter) for module in kept for parameter in module.parameters()}
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if id(parameter) in kept_parameters:
                parameter.copy_(before[name])  # a module that shares it may have reset it
            elif torch.equal(parameter, before[name]):
                parameter.copy_(_shuffled(parameter))
    return copied.eval().to(home)


def _takes_nothing(method: Any) -> bool:
    """Tell whether something can be called, and without arguments."""
    try:
        inspect.signature(method).bind()
    except TypeError:
        return False
    return True


def _shuffled(tensor: Tensor) -> Tensor:
    order = torch.randperm(tensor.numel())
    return tensor.flatten()[order].reshape(tensor.shape)
