"""A user's model, lent for measuring and given back bit for bit: `borrow`."""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from retrainscope.exceptions import UnsupportedModelError
from retrainscope.precision import full_precision
from retrainscope.sharding import check_pieces, reshard

__all__ = ["autograd_on", "borrow", "copy_model", "model_place", "random_from", "seed_of", "start_random"]


@contextmanager
def autograd_on(*, follow_autocast: bool = True) -> Iterator[None]:
    """Let gradients be had, whatever context the caller is in; this ends `torch.no_grad` as well.

    Of autocast there is none in it but what the calls of the model follow, if they do.
    """
    with torch.inference_mode(False), full_precision(network=not follow_autocast):
        yield


@contextmanager
def borrow(
    model: nn.Module, *, device: str | torch.device | None = None, seed: int = 0, in_pieces: bool = False
) -> Iterator[nn.Module]:
    """Lend a model for measuring and give it back bit for bit, on every path.

    Inside, every module is in evaluation mode and the global random generators of torch, numpy and Python
    start from `seed`, no parameter has a gradient, and torch's transformers call their inner modules one by one. On
    leaving, each module's training flag, every
    buffer, every parameter's gradient and ``requires_grad``, and the states of the global generators are
    what they were.

    Parameters
    ----------
    model : nn.Module
    device : device, optional
        Where to measure. A model that lies elsewhere is not moved: a copy of it is lent; so of one whose parameters
        were made in inference mode.
    seed : int
    in_pieces : bool
        Whether a model of ``fully_shard`` may be lent, which all processes have to run equally often, to its end.

    Yields
    ------
    nn.Module
        The model itself, or its copy on `device`.

    Raises
    ------
    UnsupportedModelError
        If the model has no parameters, has lazy ones that do not exist yet, lies on several devices, or is in pieces.
    """
    home, _ = model_place(model)
    # Only for what measures: in pieces it can be frozen and trained.
    check_pieces(model, in_pieces=in_pieces and device is None)
    reshard(model)
    flags = [(module, module.training) for module in model.modules()]
    tables = [(module, dict(module._buffers)) for module in model.modules()]
    buffers = [
        (buffer, buffer.clone(), _version(buffer))
        for _, table in tables
        for buffer in table.values()
        if buffer is not None
    ]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with random_from(seed), _every_module_called():
        try:
            for module, _ in flags:
                module.training = False
            for parameter, _, _ in parameters:
                parameter.grad = None  # what accumulates in place must not reach the owner's gradient
            # A tensor tells which of several devices "cuda" means.
            target = home if device is None else torch.empty(0, device=device).device
            # What was made in inference mode takes no part in a gradient; a copy does.
            lent = target == home and not any(parameter.is_inference() for parameter, _, _ in parameters)
            yield model if lent else copy_model(model).to(target)
        finally:
            reshard(model)
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
                    _set_requires_grad(parameter, requires_grad)
                parameter.grad = gradient


def start_random(seed: int) -> None:
    """Start the global random generators, which the code of a user's model or data may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 -- the global state is what is drawn from
    torch.manual_seed(seed)


def seed_of(random_state: int | np.random.RandomState | None) -> int:
    """Draw a seed; without a random state from fresh entropy, as numpy's global state is not ours to move."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**31))
    return int(check_random_state(random_state).randint(2**31))


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model, or say why it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedModelError(
            f"The model cannot be copied ({error}). Remove non-parameter tensors that carry a gradient "
            "graph from its attributes, or move it to the device yourself and leave device= out."
        ) from error


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


@contextmanager
def _every_module_called() -> Iterator[None]:
    """Keep torch's transformers off their fast path, which calls no inner module and packs padded sequences."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _set_requires_grad(parameter: Tensor, required: bool) -> None:
    with torch.inference_mode(parameter.is_inference()):  # such a parameter takes it in its own mode alone
        parameter.requires_grad_(required)


@contextmanager
def random_from(seed: int) -> Iterator[None]:
    """Start the global random generators for as long as the context lasts, and give their states back."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 -- the global state is what is kept
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        start_random(seed)
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
