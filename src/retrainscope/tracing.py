"""Hooks on a user's model, taken and given back: `trace_layers`, `run_layers`, `borrow`."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from retrainscope.batches import Inputs
from retrainscope.exceptions import (
    LayerNotFoundError,
    LayerNotRunError,
    NonFiniteError,
    ReusedLayerError,
    UnsupportedModelError,
)

__all__ = [
    "batch_first",
    "borrow",
    "call_model",
    "gradient_break",
    "main_tensor",
    "model_place",
    "named_layers",
    "replace_output",
    "run_layers",
    "trace_layers",
]


_MAIN_KEYS = ("last_hidden_state", "logits")


@contextmanager
def trace_layers(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what layers put out, for as long as the context lasts.

    Parameters
    ----------
    model : nn.Module
        Any module; it is called by you, inside the context.
    layers : iterable of str
        Dotted names as in ``model.named_modules()``.

    Yields
    ------
    dict of str to Tensor
        The outputs of the latest forward pass by layer, in the order of execution: clones, so that an
        in-place operation that follows cannot change them, and part of the autograd graph. Of a tuple, list or
        mapping that a layer returns, the first floating-point tensor (``last_hidden_state`` or ``logits`` before
        others); of a recurrent or attention module that has the samples second, with the samples first.

    Raises
    ------
    LayerNotFoundError
        If the model has no such layer; no hook is set then.
    ReusedLayerError
        In the forward pass, if a layer runs twice in it.
    UnsupportedModelError
        In the forward pass, if there is no tensor in what a layer returns.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(inplace=True))
    >>> with rs.trace_layers(model, ["0"]) as outputs:
    ...     final = model(torch.ones(5, 3))
    >>> outputs["0"].shape
    torch.Size([5, 2])
    """
    modules = named_layers(model, layers)
    outputs: dict[str, Tensor] = {}

    def collect(name: str, output: Tensor) -> None:
        outputs[name] = output.clone()

    start = model.register_forward_pre_hook(lambda _module, _args: outputs.clear())
    try:
        with _hooked(modules, collect, seen=outputs):
            yield outputs
    finally:
        start.remove()


def run_layers(
    model: nn.Module,
    inputs: Inputs,
    layers: Iterable[str],
    visit: Callable[[str, Tensor], None],
    *,
    where: str = "",
    check_finite: bool = True,
) -> None:
    """Run the model on a batch until every one of the layers has put out its output.

    Parameters
    ----------
    model : nn.Module
    inputs : Tensor or dict of Tensor
    layers : iterable of str
    visit : callable (name, output) -> None
        Called with each output inside the hook, before anything that follows can overwrite it. What
        it keeps it must clone.
    where : str
        The batch, for the message about NaN.
    check_finite : bool
        Whether NaN or infinity in an output is an error.

    Raises
    ------
    LayerNotRunError
        If the forward pass ends and a layer has not run.
    NonFiniteError
        If an output has NaN or infinity.
    UnsupportedModelError
        If an output is no tensor with one row a sample.
    """
    modules = named_layers(model, layers)
    n_samples = len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values())))
    seen: dict[str, Tensor] = {}

    def check_and_visit(name: str, output: Tensor) -> None:
        if output.ndim == 0 or output.shape[0] != n_samples:
            raise UnsupportedModelError(
                f"The layer {name!r} returns shape {tuple(output.shape)} for {n_samples} samples; one row a "
                "sample is needed. Name a layer whose output has the batch first."
            )
        # One sum is cheap; only when it is not finite (it may just have overflowed) is each value looked at.
        if check_finite and not torch.isfinite(output.detach().sum()) and not torch.isfinite(output).all():
            raise NonFiniteError(f"The layer {name!r} puts out NaN or infinity{where and ' in '}{where}.")
        visit(name, output)
        seen[name] = output
        if len(seen) == len(modules):
            raise _AllSeen

    try:
        with _hooked(modules, check_and_visit, seen=seen):
            call_model(model, inputs)
    except _AllSeen:
        return
    missing = sorted(set(modules) - set(seen))
    if missing:
        raise LayerNotRunError(
            f"These layers do not run in the forward pass: {', '.join(missing)}. Leave them out of layers=."
        )


def main_tensor(output: Any) -> Tensor | None:
    """Return what counts as a module's output: a tensor, or the first one in what it returns.

    A tuple or list is looked through in order, a mapping (a ``ModelOutput`` of Hugging Face is one) too, but there
    the entry ``last_hidden_state`` or ``logits`` comes first. Integers, as positions or lengths, do not count. None
    if there is no such tensor.
    """
    return next((tensor for _, tensor in _tensors_in(output)), None)


@contextmanager
def replace_output(model: nn.Module, layer: str, output: Tensor) -> Iterator[None]:
    """Put a tensor in the place of a layer's main output, for as long as the context lasts."""

    def hook(module: nn.Module, _args: Any, found: Any) -> Any:
        return _with_main_tensor(found, batch_first(module, output))

    handle = named_layers(model, [layer])[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def borrow(model: nn.Module, *, device: str | torch.device | None = None, seed: int = 0) -> Iterator[nn.Module]:
    """Lend a model for measuring and give it back bit for bit, on every path.

    Inside, every module is in evaluation mode and the global random generators of torch, numpy and Python
    start from `seed`, and no parameter has a gradient. On leaving, each module's training flag, every
    buffer, every parameter's gradient and ``requires_grad``, and the states of the global generators are
    what they were.

    Parameters
    ----------
    model : nn.Module
    device : device, optional
        Where to measure. A model that lies elsewhere is not moved: a copy of it is lent.
    seed : int

    Yields
    ------
    nn.Module
        The model itself, or its copy on `device`.

    Raises
    ------
    UnsupportedModelError
        If the model has no parameters, has lazy ones that do not exist yet, or lies on several devices.
    """
    home, _ = model_place(model)
    flags = [(module, module.training) for module in model.modules()]
    tables = [(module, dict(module._buffers)) for module in model.modules()]
    buffers = [
        (buffer, buffer.clone(), _version(buffer))
        for _, table in tables
        for buffer in table.values()
        if buffer is not None
    ]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with _random_states_kept():
        try:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 -- the model's own code may draw from the global state
            torch.manual_seed(seed)
            for module, _ in flags:
                module.training = False
            for parameter, _, _ in parameters:
                parameter.grad = None  # what accumulates in place must not reach the owner's gradient
            # A tensor tells which of several devices "cuda" means.
            target = home if device is None else torch.empty(0, device=device).device
            yield model if target == home else copy_model(model).to(target)
        finally:
            for module, flag in flags:
                module.training = flag
            for module, table in tables:
                module._buffers.clear()
                module._buffers.update(table)
            for buffer, content, version in buffers:
                # Written to only where it has changed: a graph of the user's may still hold the buffer.
                if version != _version(buffer) or not torch.equal(buffer, content):
                    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                        buffer.copy_(content)
            for parameter, requires_grad, gradient in parameters:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
                parameter.grad = gradient


def gradient_break(model: nn.Module, layer: str, features_of: Callable[[Tensor], Tensor], inputs: Tensor) -> str:
    """Tell in words where the gradient from a layer to the input ends.

    Parameters
    ----------
    model : nn.Module
        With parameters that have no gradient.
    layer : str
    features_of : callable
        Runs the model up to the layer.
    inputs : Tensor
    """
    outputs: list[tuple[str, Tensor]] = []

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, output))

        return hook

    leaves = {name: module for name, module in model.named_modules() if not any(module.children())}
    handles = [module.register_forward_hook(hook_for(name), prepend=True) for name, module in leaves.items()]
    try:
        features = features_of(inputs.detach().clone().requires_grad_(True))
        found = outputs.copy()
        outputs.clear()
        features_of(2 * inputs.detach() + 1)
    finally:
        for handle in handles:
            handle.remove()
    # Only what depends on the input lies on the way.
    outputs = [one for one, (_, other) in zip(found, outputs, strict=False) if not torch.equal(one[1], other)]
    cut = [name for name, output in outputs if not output.requires_grad]
    if not cut and features.requires_grad:
        gradients = torch.autograd.grad(
            features, [output for _, output in outputs], torch.ones_like(features), allow_unused=True
        )
        cut = [
            name
            for (name, _), gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and gradient.any()
        ]
    culprit = cut[0] if cut else layer
    kind = type(dict(model.named_modules())[culprit]).__name__
    return f"it ends at {culprit!r} ({kind}) or just before it"


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model, or say why it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"The model cannot be copied ({error}). Remove non-parameter tensors that carry a gradient "
            "graph from its attributes, or move it to the device yourself and leave device= out."
        ) from error


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model with a tensor by position, with a mapping by keyword; it may write into its copy of them."""
    if isinstance(inputs, Tensor):
        return model(inputs.clone())
    return model(**{key: tensor.clone() for key, tensor in inputs.items()})


def model_place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device of the parameters and the type of the floating ones."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"The model must be a torch.nn.Module. Got {type(model).__name__} instead.")
    _check_kind(model)
    parameters = list(model.parameters())
    if not parameters:
        raise UnsupportedModelError("The model has no parameters, so there is nothing to retrain.")
    if any(is_lazy(tensor) for tensor in (*parameters, *model.buffers())):
        raise UnsupportedModelError("The model has lazy parameters or buffers. Run one batch through it first.")
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"The model lies on several devices ({', '.join(sorted(map(str, devices)))}). Move it to one."
        )
    floating = [parameter.dtype for parameter in parameters if parameter.is_floating_point()]
    return devices.pop(), floating[0] if floating else torch.get_default_dtype()


def _check_kind(model: nn.Module) -> None:
    """Refuse models that only wrap the one to measure, or that hooks cannot look into."""
    parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    if parallel or hasattr(model, "_orig_mod"):  # what torch.compile returns; to import its class takes seconds
        raise UnsupportedModelError(
            f"The model is wrapped in {type(model).__name__}, whose layers have other names. Give the model inside it: "
            f"model.{'module' if parallel else '_orig_mod'}, whose weights are the same."
        )
    for name, module in model.named_modules():
        where = f"The module {name!r}" if name else "The model"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{where} is compiled by TorchScript, which hooks cannot look into. Give the Python module that it was "
                "made from."
            )
        if ".quantized" in type(module).__module__:
            raise UnsupportedModelError(
                f"{where} is quantised ({type(module).__name__}), and has no weights to retrain. Give the model as it "
                "was before quantisation."
            )


def named_layers(model: nn.Module, layers: Iterable[str], *, what: str = "layer") -> dict[str, nn.Module]:
    """Look layers up by name, or name the nearest ones."""
    if isinstance(layers, str):
        layers = [layers]
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for name in layers:
        if name not in modules or name == "":
            raise LayerNotFoundError.for_name(name, modules, what=what)
        found[name] = modules[name]
    return found


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], visit: Callable[[str, Tensor], None], *, seen: Mapping[str, Tensor]
) -> Iterator[None]:
    """Call visit(name, output) whenever one of the modules has run; `seen` tells which already have."""

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            if name in seen:
                raise ReusedLayerError(
                    f"The layer {name!r} runs more than once in one forward pass, so its output is not one "
                    "thing. Name the modules around it that run once."
                )
            tensor = main_tensor(output)
            if tensor is None:
                raise UnsupportedModelError(
                    f"The layer {name!r} returns a {type(output).__name__} without a floating-point tensor in it. Name "
                    "a module inside or after it that returns one."
                )
            visit(name, batch_first(module, tensor))

        return hook

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(hook_for(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_in(output: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yield the place and the tensor of each floating one in an output, the main one first."""
    if isinstance(output, Tensor):
        yield None, output
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Mapping):
        items = sorted(output.items(), key=lambda item: item[0] not in _MAIN_KEYS)
    elif isinstance(output, tuple | list):
        items = [*enumerate(output)]
    for place, item in items:
        tensor = main_tensor(item)
        if tensor is not None and tensor.is_floating_point():
            yield place, tensor


def _with_main_tensor(output: Any, tensor: Tensor) -> Any:
    """Return an output of the same form with another main tensor."""
    place = next((place for place, _ in _tensors_in(output)), None)
    if isinstance(output, Tensor) or place is None:
        return tensor
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[place] = _with_main_tensor(output[place], tensor)
        return changed
    items = [*output]
    items[place] = _with_main_tensor(items[place], tensor)
    if hasattr(output, "_fields"):
        return type(output)(*items)
    return type(output)(items)


def batch_first(module: nn.Module, tensor: Tensor) -> Tensor:
    """Bring the samples of a recurrent or attention module that has them second to the front, and back."""
    swapped = getattr(module, "batch_first", True) is False and tensor.ndim == 3
    return tensor.transpose(0, 1) if swapped else tensor


class _AllSeen(BaseException):
    """Ends a forward pass early; not an Exception, so that a model's own ``except`` lets it through."""


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 -- the global state is what is kept
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def _version(buffer: Tensor) -> int:
    """Tell how often a tensor was written to in place; tensors of inference mode do not count that."""
    return 0 if buffer.is_inference() else buffer._version
