"""Hooks on a user's model, set and taken away: `trace_layers`, `run_layers`."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from retrainscope.batches import Inputs
from retrainscope.checks import all_finite, check_choice
from retrainscope.costs import passing
from retrainscope.exceptions import (
    LayerNotFoundError,
    LayerNotRunError,
    NonFiniteError,
    ReusedLayerError,
    UnsupportedModelError,
)
from retrainscope.outputs import is_packed, output_of, with_output
from retrainscope.padding import real_tokens, token_mask
from retrainscope.precision import network_precision, outside_network
from retrainscope.sharding import is_sharded

__all__ = [
    "call_model",
    "check_calls",
    "gradient_break",
    "named_layers",
    "replace_output",
    "run_layers",
    "trace_layers",
]

_CALLS = ("first", "last", "sum")


@contextmanager
def trace_layers(model: nn.Module, layers: Iterable[str], *, calls: str | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect what layers put out, for as long as the context lasts.

    Parameters
    ----------
    model : nn.Module
        Any module; it is called by you, inside the context.
    layers : iterable of str
        Dotted names as in ``model.named_modules()``.
    calls : {"first", "last", "sum"}, optional
        What counts of a layer that runs several times in a forward pass; None: that is an error.

    Yields
    ------
    dict of str to Tensor
        The outputs of the latest forward pass by layer, in the order of execution: clones, so that an
        in-place operation that follows cannot change them, and part of the autograd graph. Of a tuple, list or
        mapping that a layer returns, the first floating-point tensor (``last_hidden_state`` or ``logits`` before
        others); of a recurrent or attention module that has the samples second, with the samples first; of a packed
        sequence, padded.

    Raises
    ------
    LayerNotFoundError
        If the model has no such layer; no hook is set then.
    ReusedLayerError
        In the forward pass, if a layer runs twice in it, and `calls` is None.
    UnsupportedModelError
        In the forward pass, if there is no tensor of real numbers in what a layer returns.

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
    check_calls(calls)
    modules = named_layers(model, layers)
    outputs: dict[str, Tensor] = {}

    def collect(name: str, output: Tensor) -> None:
        if calls is None:
            _check_once(name, outputs)
        outputs[name] = _taken(outputs.get(name), output, calls)

    start = model.register_forward_pre_hook(lambda _module, _args: outputs.clear())
    try:
        with _hooked(modules, collect, n_tokens=0):
            yield outputs
    finally:
        start.remove()


def run_layers(
    model: nn.Module,
    inputs: Inputs,
    layers: Iterable[str],
    visit: Callable[[str, Tensor], None],
    *,
    calls: str | None = None,
    token_axes: Mapping[str, int] = MappingProxyType({}),
    where: str = "",
    check_finite: bool = True,
    to_the_end: bool = False,
) -> Any:
    """Run the model on a batch until every one of the layers has put out its output.

    Parameters
    ----------
    model : nn.Module
    inputs : Tensor or dict of Tensor
    layers : iterable of str
    visit : callable (name, output) -> None
        Called with each output inside the hook, before anything that follows can overwrite it. What
        it keeps it must clone.
    calls : {"first", "last", "sum"}, optional
        What counts of a layer that runs several times; for the last and the sum the model is run to its end.
    token_axes : mapping of str to int
        The axes that tokens are along, where there may be padding: what padding holds need not be finite.
    where : str
        The batch, for the message about NaN.
    check_finite : bool
        Whether NaN or infinity in an output is an error.
    to_the_end : bool
        Whether to run the model to its end in any case.

    Returns
    -------
    anything
        What the model returns, where it was run to its end; else None.

    Raises
    ------
    LayerNotRunError
        If the forward pass ends and a layer has not run.
    NonFiniteError
        If an output has NaN or infinity.
    ReusedLayerError
        If a layer runs twice, and `calls` is None.
    UnsupportedModelError
        If an output is no tensor with one row a sample.
    """
    modules = named_layers(model, layers)
    n_samples = len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values())))
    mask = token_mask(inputs)
    seen: set[str] = set()
    # What brings parameters together does not stand being left half-way: neither here nor in other processes.
    sharded, failed = is_sharded(model), list[Exception]()
    kept: dict[str, Tensor] = {}  # of calls whose last one or sum counts; else nothing outlives its hook

    def finite(name: str, output: Tensor) -> bool:
        # What padding holds need not be finite, but is looked at only if something is not.
        if mask is None or name not in token_axes:
            return all_finite(output)
        return all_finite(output) or all_finite(real_tokens(output, token_axes[name], mask))

    def check_and_visit(name: str, output: Tensor) -> None:
        if output.ndim == 0 or output.shape[0] != n_samples:
            raise UnsupportedModelError(
                f"The layer {name!r} returns shape {tuple(output.shape)} for {n_samples} samples; one row a "
                "sample is needed. Name a layer whose output has the batch first."
            )
        if check_finite and not finite(name, output.detach()):
            raise NonFiniteError(f"The layer {name!r} puts out NaN or infinity{where and ' in '}{where}.")
        visit(name, output)

    def at_each(name: str, output: Tensor) -> None:
        if calls in ("last", "sum"):
            kept[name] = _taken(kept.get(name), output, calls)
            return
        if calls is None:
            _check_once(name, seen)
        elif name in seen:
            return
        check_and_visit(name, output)
        seen.add(name)
        if len(seen) == len(modules) and not (sharded or to_the_end):
            raise _AllSeen

    n_tokens = None if mask is None else mask.shape[1]
    try:
        with _hooked(modules, at_each, n_tokens=n_tokens, later=failed if sharded else None):
            returned = call_model(model, inputs)
    except _AllSeen:
        return None
    for error in failed:
        raise error
    missing = sorted(set(modules) - seen - set(kept))
    if missing:
        raise LayerNotRunError(
            f"These layers do not run in the forward pass: {', '.join(missing)}. Leave them out of layers=."
        )
    if calls in ("last", "sum"):
        for name in modules:
            check_and_visit(name, kept[name])
    return returned


@contextmanager
def replace_output(model: nn.Module, layer: str, output: Tensor) -> Iterator[None]:
    """Put a tensor in the place of a layer's main output, for as long as the context lasts.

    The model gets a copy, since it may go on in place; gradients flow through.
    """

    def hook(module: nn.Module, _args: Any, returned: Any) -> Any:
        return with_output(module, returned, output.clone())

    handle = named_layers(model, [layer])[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


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


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model with a tensor by position, with a mapping by keyword; it may write into its copy of them.

    It computes as the caller's autocast would have it.
    """
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
    with passing(len(first)), network_precision(first.device):
        if isinstance(inputs, Tensor):
            return model(inputs.clone())
        return model(**{key: tensor.clone() for key, tensor in inputs.items()})


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
    modules: Mapping[str, nn.Module],
    visit: Callable[[str, Tensor], None],
    *,
    n_tokens: int | None,
    later: list[Exception] | None = None,
) -> Iterator[None]:
    """Call visit(name, output) whenever one of the modules has run; errors are put into `later` where that is given."""

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _args: Any, returned: Any) -> None:
            try:
                with outside_network():  # what is made of outputs is no part of the network
                    look(module, returned)
            except Exception as error:
                if later is None:
                    raise
                later.append(error)

        def look(module: nn.Module, returned: Any) -> None:
            if torch._C._current_graph_task_id() != -1:  # a checkpoint runs its part again on the way back
                return
            if n_tokens is None and is_packed(returned):
                raise UnsupportedModelError(
                    f"The layer {name!r} returns a packed sequence, and the data does not tell how many tokens of a "
                    "sample are real. Give the data as a mapping with 'lengths' or 'attention_mask', or name a layer "
                    "that returns one row a sample."
                )
            tensor = output_of(module, returned, n_tokens)
            if tensor is None:
                kind = f"tensor of {returned.dtype}" if isinstance(returned, Tensor) else type(returned).__name__
                raise UnsupportedModelError(
                    f"The layer {name!r} returns a {kind} without a floating-point tensor in it. Name a module inside "
                    "or after it that returns one."
                )
            if tensor.is_complex():
                raise UnsupportedModelError(
                    f"The layer {name!r} returns complex numbers, which are not supported. Name a module before or "
                    "after it that returns real ones."
                )
            visit(name, tensor)

        return hook

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(hook_for(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_calls(calls: str | None) -> None:
    """Refuse what is neither None nor one of the words."""
    if calls is not None:
        check_choice("calls", calls, _CALLS)


def _check_once(name: str, seen: Container[str]) -> None:
    if name in seen:
        raise ReusedLayerError(
            f"The layer {name!r} runs more than once in one forward pass, so its output is not one thing. Name the "
            "modules around it that run once, or say with calls= whether the first, the last or the sum counts."
        )


def _taken(before: Tensor | None, output: Tensor, calls: str | None) -> Tensor:
    """Return what counts of a layer's calls so far."""
    if before is None or calls == "last":
        return output.clone()
    return before if calls == "first" else before + output


class _AllSeen(BaseException):
    """Ends a forward pass early; not an Exception, so that a model's own ``except`` lets it through."""
