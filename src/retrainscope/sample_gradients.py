"""Gradients sample by sample, for all layers in one pass."""

import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrainscope.batches import Inputs, items_of
from retrainscope.costs import passing
from retrainscope.exceptions import UnsupportedModelError
from retrainscope.outputs import output_of
from retrainscope.precision import asked_precision, full_precision, network_precision, wide
from retrainscope.tracing import call_model

__all__ = ["Objective", "differentiable", "gradients_of", "rows_of", "sample_gradients", "summed_gradient"]

Objective = Callable[[Tensor, Tensor], Tensor]

_MOST_BYTES = 2**28  # of the gradients held at once
_FEW, _MOST_SAMPLES = 32, 256  # at once
_ROOM = 2**26  # bytes, for more samples than a few; with more than that it is no quicker
_LIKE = 0.1  # of a gradient's norm: what is passed over is lost whole, and rounding is far less
_ROUNDING = 1e-6  # of the greatest of the norms
_TORCH = str(Path(torch.__file__).parent)


def sample_gradients(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    objective: Objective,
    parameters: Mapping[str, Iterable[str]],
    *,
    max_bytes: int = _MOST_BYTES,
) -> Iterator[dict[str, Tensor]]:
    """Compute the gradient of each sample's objective with respect to the parameters of each layer.

    Several samples are done at once by `torch.func.vmap`. Where torch cannot do that for a model (its flow depends on
    the data, say), and where it gives the first sample another gradient than a pass of its own does (weights held
    elsewhere than in a module's parameters are passed over), samples are done one by one: slower, and as exact. Where
    torch can do several samples in full precision alone, autocast is not followed.

    Parameters
    ----------
    model : nn.Module
        Lent by `borrow`: in evaluation mode, so that no sample counts for another.
    inputs : Tensor of shape (n_samples, ...) or dict of such
        A dict is passed by keyword.
    targets : Tensor of shape (n_samples, ...)
        What the objective needs to know of each sample: its class, or the cotangent of its outputs.
    objective : callable (output, target) -> Tensor of shape ()
        Made of torch functions; called with one sample's row of the model's main output (see `output_of`), in single
        precision at least, and its row of `targets`. ``cross_entropy`` is one;
        ``lambda output, target: (output * target).sum()`` gives the product of the Jacobian with a given vector.
    parameters : mapping of str to iterable of str
        The names of the parameters of each layer, as in ``Layers.parameters``. A parameter may also be frozen. What is
        not floating-point has no gradient and is left out.
    max_bytes : int
        Of the gradients held at once, unless one sample's are more; while they are put together it is twice as much.
        More than 32 samples are done at once only where their gradients and what the network keeps for the way back
        take no more than 64 MiB, and never more than 256.

    Yields
    ------
    dict of str to Tensor of shape (n, n_parameters of the layer)
        The gradients of the next n samples, in their order: for each layer the gradients of its parameters,
        flattened and one after the other. 0 for what the output does not depend on.

    Raises
    ------
    UnsupportedModelError
        If the model does not return one row a sample.

    References
    ----------
    X. Pan et al., "Function transforms in PyTorch": https://docs.pytorch.org/tutorials/intermediate/per_sample_grads.html

    Examples
    --------
    For a linear model and half the squared output the gradient of a sample is its output times the sample.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    >>> half_square = lambda output, target: (output - target).square().sum() / 2
    >>> list(sample_gradients(model, X, torch.zeros(2, 1), half_square, {"layer": ["weight"]}))
    [{'layer': tensor([[ 3.,  6.],
            [ 6., -2.]])}]
    """
    asked = _asked(model, parameters)
    owned = _owned(asked, parameters)
    n_samples = len(targets)
    size = sum(weight.numel() * weight.element_size() for weight in asked.values())
    chunk = max(1, max_bytes // max(size, 1))
    if min(chunk, n_samples) > _FEW:
        room = min(max_bytes, _ROOM)
        chunk = max(_FEW, min(_MOST_SAMPLES, room // (size + _kept(model, rows_of(inputs, 0, 1), asked))))
    together = chunk > 1 and n_samples > 1
    for start in range(0, n_samples, chunk):
        rows = range(start, min(start + chunk, n_samples))
        found = None
        if together:
            part = rows_of(inputs, rows[0], rows[-1] + 1)
            found = _at_once(model, part, targets[rows[0] : rows[-1] + 1], objective, asked)
            if start == 0 and found is not None:
                found = found if _first_alike(model, part, targets, objective, asked, found) else None
            together = found is not None
        if found is None:
            each = [_gradients(model, rows_of(inputs, i, i + 1), targets[i : i + 1], objective, asked) for i in rows]
            found = {name: torch.stack([gradients[name] for gradients in each]) for name in asked}
        place = targets.device
        yield {layer: _joined([found[name] for name in names], (len(rows),), place) for layer, names in owned.items()}


def summed_gradient(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    objective: Objective,
    parameters: Mapping[str, Iterable[str]],
) -> dict[str, Tensor]:
    """Compute the gradient of the sum of the samples' objectives with respect to the parameters of each layer.

    Parameters
    ----------
    model, inputs, targets, objective, parameters
        As for `sample_gradients`.

    Returns
    -------
    dict of str to Tensor of shape (n_parameters of the layer,)

    Raises
    ------
    UnsupportedModelError
        If the model does not return one row a sample.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    >>> summed_gradient(model, X, torch.ones(2, 1), lambda output, target: (output * target).sum(), {"all": ["weight"]})
    {'all': tensor([4., 1.])}
    """
    asked = _asked(model, parameters)
    found = _gradients(model, inputs, targets, objective, asked)
    owned = _owned(asked, parameters).items()
    return {layer: _joined([found[name] for name in names], (), targets.device) for layer, names in owned}


def _at_once(
    model: nn.Module, inputs: Inputs, targets: Tensor, objective: Objective, asked: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """Return each sample's gradient of each parameter, all samples done together; None if torch cannot."""
    weights = {name: weight.detach() for name, weight in asked.items()}

    def value(weights: dict[str, Tensor], inputs: Inputs, target: Tensor) -> Tensor:
        alone = {key: tensor[None].clone() for key, tensor in items_of(inputs)}
        arguments: Any = ((), alone) if isinstance(inputs, dict) else (tuple(alone.values()),)
        with network_precision(target.device):
            returned = functional_call(model, weights, *arguments)
        return objective(_outputs(model, returned, 1)[0], target)

    found: dict[str, Tensor] | None = None
    try:
        # Outside of the transform no graph is kept; of attention only the plain form can be done for many samples.
        with _put_back(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            with passing(len(targets)):
                found = vmap(grad(value), in_dims=(None, 0, 0))(weights, inputs, targets)
    except Exception as error:
        if _raised_by_model(error):
            raise
    if found is None and asked_precision(targets.device) is not None:  # as with normalisations: not two types at once
        with full_precision(network=True):
            return _at_once(model, inputs, targets, objective, asked)
    return found


def _kept(model: nn.Module, inputs: Inputs, asked: Mapping[str, Tensor]) -> int:
    """Return how many bytes a model keeps of a sample for the way back; 1 at least.

    A parameter counts at every use, as there is a gradient of each: recurrent modules use theirs at every step.
    """
    kept = [1]

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    # Of attention the plain form is what is done for many samples, and not all steps of a recurrent module in one.
    plainly = torch.backends.mkldnn.flags(enabled=False)
    with warnings.catch_warnings(), torch.enable_grad(), differentiable(asked.values()), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", message="TF32 acceleration")
        with plainly, saved_tensors_hooks(note, lambda tensor: tensor):
            call_model(model, inputs)
    return sum(kept)


def _first_alike(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    objective: Objective,
    asked: Mapping[str, Tensor],
    found: Mapping[str, Tensor] | None,
) -> bool:
    """Tell whether the first sample's gradients are those of a pass of its own, but for rounding."""
    with ExitStack() as opened:
        if asked_precision(targets.device) is not None:  # whose rounding may be as large as what is looked for
            opened.enter_context(full_precision(network=True))
            found = _at_once(model, rows_of(inputs, 0, 2), targets[:2], objective, asked)
        alone = _gradients(model, rows_of(inputs, 0, 1), targets[:1], objective, asked)
    return found is not None and _alike({name: gradient[0] for name, gradient in found.items()}, alone)


def _gradients(
    model: nn.Module, inputs: Inputs, targets: Tensor, objective: Objective, asked: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the gradient of the sum over all samples, of each parameter."""
    weights = list(asked.values())
    gradients: tuple[Tensor | None, ...] = (None,) * len(weights)
    with torch.enable_grad(), differentiable(weights):
        outputs = _outputs(model, call_model(model, inputs), len(targets))
        total = torch.stack([objective(*pair) for pair in zip(outputs, targets, strict=True)]).sum()
        if weights and total.requires_grad:
            gradients = gradients_of(total, weights)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(asked.items(), gradients, strict=True)
    }


def gradients_of(total: Tensor, tensors: Sequence[Tensor], *, retain_graph: bool = False) -> tuple[Tensor | None, ...]:
    """Go back from a total to some tensors, or say why a model cannot be gone back through."""
    try:
        found = torch.autograd.grad(total, tensors, retain_graph=retain_graph, allow_unused=True)
        return tuple(g.to_dense() if g is not None and g.layout != torch.strided else g for g in found)
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise UnsupportedModelError(
            f"The model overwrites in place what its own gradients need, so that it cannot be trained ({error}). "
            "Let it make new tensors there, such as x = x + y instead of x += y."
        ) from error


def _raised_by_model(error: Exception) -> bool:
    """Tell an error that the model's own code raises, and would raise again, from what torch cannot do."""
    last = traceback.extract_tb(error.__traceback__, limit=-1)[0]
    return (last.line or "").startswith("raise") and not last.filename.startswith(_TORCH)


def _alike(found: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> bool:
    """Tell whether one sample's gradients are the same but for rounding, parameter by parameter."""
    norms = {name: float(gradient.norm()) for name, gradient in alone.items()}
    least = _ROUNDING * max(norms.values(), default=0.0)
    return all(float((found[name] - alone[name]).norm()) <= _LIKE * norm + least for name, norm in norms.items())


def _asked(model: nn.Module, parameters: Mapping[str, Iterable[str]]) -> dict[str, Tensor]:
    """Return the parameters of all layers by name, without those that have no gradient by their type."""
    weights = dict(model.named_parameters())
    names = dict.fromkeys(name for names in parameters.values() for name in names)
    return {name: weights[name] for name in names if weights[name].is_floating_point()}


def _owned(asked: Mapping[str, Tensor], parameters: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    return {layer: [name for name in names if name in asked] for layer, names in parameters.items()}


def rows_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return some of the samples."""
    if isinstance(inputs, Tensor):
        return inputs[start:stop]
    return {key: tensor[start:stop] for key, tensor in inputs.items()}


def _outputs(model: nn.Module, returned: Any, n_samples: int) -> Tensor:
    output = output_of(model, returned)
    if output is None or output.ndim == 0 or output.shape[0] != n_samples:
        what = "no floating-point tensor" if output is None else f"shape {tuple(output.shape)}"
        raise UnsupportedModelError(
            f"The model returns {what} for {n_samples} sample{'' if n_samples == 1 else 's'}; one row a sample is "
            "needed. Let it keep the axis of the samples, also where that has length 1."
        )
    return wide(output)


def _joined(gradients: list[Tensor], rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Flatten gradients after the axis of the samples, if there is one, and put one after the other."""
    flat = [gradient.reshape(*rows, math.prod(gradient.shape[len(rows) :])) for gradient in gradients]
    return torch.cat(flat, dim=-1) if flat else torch.zeros(*rows, 0, device=device)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Put every module's own parameters back: `functional_call` leaves others in a module that has two names.

    Recurrent modules keep lists of theirs beside, which it makes anew.
    """
    tables = [(module, dict(module._parameters)) for module in model.modules()]
    lists = [
        (module, name, module.__dict__[name])
        for module, _ in tables
        for name in ("_flat_weights", "_flat_weight_refs")
        if name in module.__dict__
    ]
    try:
        yield
    finally:
        for module, table in tables:
            module._parameters.clear()
            module._parameters.update(table)
        for module, name, kept in lists:
            module.__dict__[name] = kept


@contextmanager
def differentiable(weights: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters take part in a gradient, and give their flags back."""
    flags = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in flags:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)
