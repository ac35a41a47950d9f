"""What a model is, kept while it is lent, and put back bit for bit: `put_back`."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retrainscope.exceptions import UnsupportedModelError
from retrainscope.sharding import is_sharded

__all__ = ["put_back"]

_MOST_KEPT = 2**30  # bytes of parameters, up to which their content is kept too
_TABLES = (dict, OrderedDict, defaultdict, set, list)  # whose content is known to be all that they are


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Put back what a model is, on every path: its modules' attributes, its buffers, and its parameters.

    Of attributes that are tables or tensors the content is put back too, hooks among them. Of parameters
    ``requires_grad``, the gradient and the memory that they lie in are, and their content: of a model of more than
    1 GiB, of which it is not copied, only where a forward pass is known to change it (``max_norm`` of an embedding).

    Raises
    ------
    UnsupportedModelError
        On leaving, if a parameter was written to in place.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    may_change = {
        id(getattr(module, "weight", None))
        for module in modules.values()
        if getattr(module, "max_norm", None) is not None
    }
    whole = not is_sharded(model)  # pieces are put together in place
    small = whole and sum(p.numel() * p.element_size() for p in parameters.values()) <= _MOST_KEPT
    content = {n: p.detach().clone() for n, p in parameters.items() if small or id(p) in may_change}
    before = {n: (p.data, _version(p)) for n, p in parameters.items() if whole and id(p) not in may_change}
    with ExitStack() as given_back:  # of which each is done whatever comes of the others
        for buffer in dict.fromkeys(model.buffers()):
            given_back.callback(_put_back_content, buffer, buffer.clone(), _version(buffer))
        for name, parameter in parameters.items():
            if name in content:
                given_back.callback(_put_back_content, parameter, content[name], _version(parameter))
            given_back.callback(_put_back_parameter, parameter, parameter.data, parameter.requires_grad, parameter.grad)
        for module in modules.values():
            attributes = dict(vars(module))
            for tensor in (value for value in attributes.values() if isinstance(value, Tensor)):
                given_back.callback(_put_back_content, tensor, tensor.detach().clone(), _version(tensor))
            named = (module._parameters, module._buffers, module._modules)
            others = [value for value in attributes.values() if type(value) in _TABLES]
            tables = [(table, copy.copy(table)) for table in (*named, *others)]
            given_back.callback(_put_back_attributes, module, attributes, tables)
        yield
        for name, (data, version) in before.items():
            if _version(parameters[name]) != version or (name in content and not _equal(data, content[name])):
                raise UnsupportedModelError(
                    f"The model writes to its parameter {name!r} in place when it runs, also in evaluation mode, so "
                    f"that measuring {'would change' if name in content else 'has changed'} it. Let its forward pass "
                    "compute with a changed copy of it instead."
                )


def _put_back_attributes(module: nn.Module, attributes: dict[str, Any], tables: list[tuple[Any, Any]]) -> None:
    """Put back whatever is held by a module, its hooks and the names of its parameters and modules included."""
    vars(module).clear()
    vars(module).update(attributes)
    for table, content in tables:
        table.clear()
        if isinstance(table, list):
            table.extend(content)
        else:
            table.update(content)


def _put_back_content(tensor: Tensor, content: Tensor, version: int) -> None:
    """Write to a tensor only where it has changed: a graph of the user's may still hold it."""
    if version == _version(tensor) and _equal(tensor, content):
        return
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape != content.shape:
            tensor.resize_(content.shape)
        tensor.copy_(content)


def _put_back_parameter(parameter: Tensor, data: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    plain = type(data) is Tensor and data.layout == torch.strided
    if plain and (parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape):
        parameter.data = data
    if parameter.requires_grad != requires_grad:
        with torch.inference_mode(parameter.is_inference()):  # such a parameter takes it in its own mode alone
            parameter.requires_grad_(requires_grad)
    parameter.grad = gradient


def _equal(tensor: Tensor, content: Tensor) -> bool:
    # Sparse tensors cannot be compared; what is written to them is counted.
    if tensor.layout != torch.strided or torch.equal(tensor, content):
        return True
    both_nan = tensor.isnan() & content.isnan() if tensor.shape == content.shape else torch.tensor(False)
    return bool(both_nan.any()) and torch.equal(tensor[~both_nan], content[~both_nan])


def _version(tensor: Tensor) -> int:
    """Tell how often a tensor was written to in place; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version
