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
from retrainscope.snapshot import put_back

__all__ = [
    "autograd_on",
    "borrow",
    "copy_model",
    "gradients_in_evaluation",
    "model_place",
    "random_from",
    "seed_of",
    "start_random",
]


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
    leaving, whatever the modules hold (training flags, buffers, attributes of their own), every parameter's memory,
    gradient and ``requires_grad``, and the states of the global generators are what they were.

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
        If the model has no parameters, has lazy ones that do not exist yet, lies on several devices, or is in pieces;
        if samples count for each other in it; on leaving, if it has overwritten a parameter.
    """
    home, _ = model_place(model)
    # Only for what measures: in pieces it can be frozen and trained.
    check_pieces(model, in_pieces=in_pieces and device is None)
    _check_statistics(model)
    reshard(model)
    with random_from(seed), _every_module_called(), put_back(model):
        try:
            for module in model.modules():
                module.training = False
                # What module.compile() made passes over hooks that come later; it is there again at the end.
                module._compiled_call_impl = None
            for parameter in model.parameters():
                parameter.grad = None  # what accumulates in place must not reach the owner's gradient
            # A tensor tells which of several devices "cuda" means.
            target = home if device is None else torch.empty(0, device=device).device
            # What was made in inference mode takes no part in a gradient; a copy does.
            lent = target == home and not any(parameter.is_inference() for parameter in model.parameters())
            yield model if lent else copy_model(model).to(target)
        finally:
            reshard(model)


@contextmanager
def gradients_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Let gradients go back through recurrent modules in evaluation mode, which cuDNN does in training mode alone."""
    enabled = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = enabled and not any(isinstance(m, nn.RNNBase) for m in model.modules())
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


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
    """Copy a model, or say why it cannot be copied.

    What a module has computed from its parameters and keeps (a weight of `weight_norm`, say) is copied as it is.
    """
    held = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in held if isinstance(value, Tensor) and value.grad_fn is not None]
    try:
        return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})
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


def _check_statistics(model: nn.Module) -> None:
    """Refuse models in which samples count for each other, so that what is measured would depend on the batches."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UnsupportedModelError(
                f"The module {name!r} ({type(module).__name__}) has no running statistics and normalises each batch by "
                "its own, also in evaluation mode, so that what comes out for a sample depends on the others. Give it "
                "running statistics (track_running_stats=True, and a few batches in training mode)."
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
