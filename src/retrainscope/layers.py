"""Where to measure, and which layer owns which parameter: `find_layers`."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from retrainscope.batches import Batch, Inputs, as_batches
from retrainscope.dryrun import DryRun, dry_run, first_samples, is_inside, measurable_modules
from retrainscope.exceptions import LayerNotFoundError, LayerNotRunError, ReusedLayerError, UnsupportedModelError
from retrainscope.lending import autograd_on, borrow, gradients_in_evaluation, model_place
from retrainscope.outputs import output_of
from retrainscope.sharding import is_sharded
from retrainscope.tables import Shown, Table
from retrainscope.tokens import find_token_axes, unclear_tokens
from retrainscope.tracing import call_model, check_calls, named_layers, run_layers

__all__ = ["Layers", "find_layers", "is_norm"]

_DRY_RUN_SAMPLES = 4
_MOST_LAYERS, _FEWEST_LAYERS = 24, 8  # of those found by default


@dataclass(frozen=True, repr=False)
class Layers(Shown):
    """The measuring points of a model, and what belongs to each.

    Attributes
    ----------
    names : tuple of str
        The measured layers in the order of execution, without the head.
    shapes : dict of str to tuple of int
        The shape of each layer's output for one sample.
    head : str
        The module that produces the model's output.
    parameters : dict of str to tuple of str
        For each layer and for the head the names of the parameters that it owns. A parameter belongs to the
        first layer whose output is measured at or after the place where it is first used, else to the head
        (and what is first used inside the head, to the head);
        a normalisation outside any layer counts with what it follows.
    buffers : dict of str to tuple of str
        The same for buffers, such as the running statistics of batch normalisation.
    n_parameters : dict of str to int
        The number of scalars in the owned parameters.
    flops : dict of str to int
        Floating-point operations of one sample's forward pass up to each layer, from the layer before.
    unused : tuple of str
        Parameters that the forward pass does not use.
    token_axes : dict of str to int
        For data that tells what is padding (``attention_mask``, ``key_padding_mask`` or ``lengths``): the axis that
        the tokens are along, for each layer and the input layer; those that pool the tokens are not in it.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> print(rs.find_layers(model, torch.zeros(4, 3)))
    layer     output  parameters  operations
    --------  ------  ----------  ----------
    0              8          32          48
    2 (head)       -          18          32
    """

    names: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    head: str
    parameters: dict[str, tuple[str, ...]]
    buffers: dict[str, tuple[str, ...]]
    n_parameters: dict[str, int]
    flops: dict[str, int]
    unused: tuple[str, ...]
    token_axes: dict[str, int] = field(default_factory=dict)

    def as_table(self) -> Table:
        """Return one row a layer, the head last."""
        rows = [
            [
                name,
                " x ".join(map(str, self.shapes[name])) if name in self.shapes else "-",
                f"{self.n_parameters[name]:,}",
                f"{self.flops[name]:,}",
            ]
            for name in (*self.names, self.head)
        ]
        rows[-1][0] += " (head)"
        note = f"Not used for the output: {', '.join(self.unused)}." if self.unused else ""
        return Table("", ["layer", "output", "parameters", "operations"], rows, note=note)


def find_layers(
    model: nn.Module,
    example: Any,
    *,
    layers: Iterable[str | type[nn.Module]] | None = None,
    head: str | None = None,
    input_layer: str | None = None,
    calls: str | None = None,
) -> Layers:
    """Find the layers of a model to measure, by one dry run on a few samples.

    Parameters
    ----------
    model : nn.Module
    example : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        Data that the model takes; a few samples of the first batch are used.
    layers : str, type, or iterable of such, optional
        The layers to measure: names; patterns such as ``"layer3.*"``, where ``*`` stands for anything but a dot and
        ``**`` for anything; types such as ``nn.Conv2d``. Of what a pattern or type fits, taken is what runs once
        and returns a tensor, below the head. None takes every module that has weights of its own (convolutions,
        linear layers, attention, recurrent ones; no embeddings) but the head; where such a module stands alone in
        a block, with at most normalisation, activation, pooling or dropout around it, the block. Where it runs
        several times, or returns no tensor with one row a sample, the module around it is taken, or, if that holds
        half of the network, none: its weights count with the next layer. If these are more than 24, the modules
        around them are taken instead, from the innermost outwards (residual or transformer blocks), and if that
        leaves too few, 24 of them at even distances; the others count with the next one measured.
    head : str, optional
        The module that produces the output. None takes the last one with weights that runs; of a model that returns
        several tensors, the last one that the output depends on.
    input_layer : str, optional
        The module whose output stands for the input (an embedding); it is no layer to measure.
    calls : {"first", "last", "sum"}, optional
        What counts of a layer that runs several times in a forward pass: its first or last output, or the sum of
        them. None takes no such layer by default, and refuses those asked for.

    Returns
    -------
    Layers

    Raises
    ------
    LayerNotFoundError, LayerNotRunError, ReusedLayerError
        If a layer does not exist, does not run, or runs more than once and `calls` is None.
    UnsupportedModelError
        If the model has no parameters or no layer besides its head.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> found = rs.find_layers(model, torch.zeros(4, 3))
    >>> found.names, found.head, found.parameters["0"]
    (('0',), '2', ('0.weight', '0.bias'))
    """
    check_calls(calls)
    device, dtype = model_place(model)
    batches = as_batches(example, name="example", batch_size=_DRY_RUN_SAMPLES, device=device, dtype=dtype)
    with borrow(model):
        return layers_of(model, batches.first(), layers=layers, head=head, input_layer=input_layer, calls=calls)


def layers_of(
    model: nn.Module,
    batch: Batch,
    *,
    layers: Iterable[str | type[nn.Module]] | None,
    head: str | None,
    input_layer: str | None,
    calls: str | None,
) -> Layers:
    """Find the layers of a borrowed model."""
    asked = None if layers is None else _asked(model, [layers] if isinstance(layers, str | type) else [*layers])
    for name, what in ((head, "head"), (input_layer, "input layer")):
        if name is not None:
            named_layers(model, [name], what=what)
    n_samples = min(_DRY_RUN_SAMPLES, len(batch))
    inputs = first_samples(batch.inputs, n_samples)
    run = dry_run(model, inputs)
    if input_layer is not None and input_layer not in run.ends:
        raise LayerNotRunError(
            f"The input layer {input_layer!r} does not run in the forward pass. Name the module that does, such as the "
            "embedding of the encoder where several share its weights."
        )
    reached = _reached(model, run, first_samples(inputs, 1))
    if head is None:
        head = _find_head(model, run, reached)
    else:
        _check_head(model, head, reached)
    without_effect = {name for name, parameter in model.named_parameters() if id(parameter) not in reached}
    run.uses = {name: time for name, time in run.uses.items() if name not in without_effect}
    apart = [name for name in (head, input_layer) if name is not None]
    measurable = measurable_modules(model, run, inputs, n_samples, apart, reused=calls is not None)
    candidates = {*(measurable if asked is None else asked), *([] if input_layer is None else [input_layer])}
    # What has its samples elsewhere is refused below, for that reason.
    shapes_found = {name: run.shapes.get(name) or () for name in candidates}
    token_axes, unclear = find_token_axes(
        model, inputs, {name: shape for name, shape in shapes_found.items() if shape[:1] == (n_samples,)}
    )
    doubted = unclear if measurable <= unclear else unclear & {input_layer}
    if doubted:
        first = min(doubted, key=lambda name: run.ends[name][0])
        raise unclear_tokens(first, shapes_found[first])
    if asked is None:
        names = _default_layers(model, run, apart, measurable - unclear, reached)
    else:
        names = tuple(name for name, exactly in asked.items() if exactly or name in measurable - unclear)
    _check_runs(run, names, head, reused=calls is not None)
    for name in names:
        if name in unclear:
            raise unclear_tokens(name, shapes_found[name])
    last = -1 if calls in ("last", "sum") else 0  # the call after which a layer's output is there
    names = tuple(sorted(names, key=lambda name: run.ends[name][last]))
    shapes: dict[str, tuple[int, ...]] = {}

    def note_shape(name: str, output: Tensor) -> None:
        shapes[name] = tuple(output.shape[1:])

    with torch.no_grad():
        measured = names if input_layer is None else (*names, input_layer)
        run_layers(model, inputs, measured, note_shape, calls=calls, token_axes=token_axes)
        if asked is not None and n_samples > 1:  # refuses by name what has its samples elsewhere
            fewer = first_samples(inputs, n_samples - 1)
            run_layers(model, fewer, names, lambda *_: None, calls=calls, token_axes=token_axes)
    parameters = dict(model.named_parameters())
    inside = {name: set(module.modules()) for name, module in named_layers(model, (*names, head)).items()}
    owners = _owners(run, {name: run.ends[name][last] for name in names}, head, inside)

    def owned(tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
        return {name: tuple(t for t in tensors if owners.get(t) == name) for name in (*names, head)}

    owned_parameters = owned(parameters)
    flops = [run.flops[name][last] // n_samples for name in names]
    return Layers(
        names=names,
        shapes={name: shapes[name] for name in names},
        head=head,
        parameters=owned_parameters,
        buffers=owned(dict(model.named_buffers())),
        n_parameters={name: sum(parameters[p].numel() for p in mine) for name, mine in owned_parameters.items()},
        flops=dict(
            zip(
                (*names, head),
                (b - a for a, b in zip([0, *flops], [*flops, run.total_flops // n_samples], strict=True)),
                strict=True,
            )
        ),
        unused=tuple(name for name in parameters if name not in run.uses),
        token_axes={name: axis for name, axis in token_axes.items() if name in (*names, input_layer)},
    )


def _reached(model: nn.Module, run: DryRun, inputs: Inputs) -> set[int]:
    """Return the parameters that the model's output depends on, by their ids.

    All of them, without a look, where a model returns nothing but that output, and where gradients do not tell.
    """
    everything = {id(parameter) for parameter in model.parameters()}
    if not run.several or is_sharded(model):
        return everything
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    asked = [parameter.requires_grad for parameter in parameters]
    try:
        with autograd_on(), gradients_in_evaluation(model):
            for parameter in parameters:
                parameter.requires_grad_(True)
            output = output_of(model, call_model(model, inputs))
            if output is None or not output.requires_grad:
                return everything
            found = torch.autograd.grad(output.abs().sum(), parameters, allow_unused=True)
    except Exception:  # whatever a model raises that is not made to be differentiated: that is told where it counts
        return everything
    finally:
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.requires_grad_(before)
    return {id(parameter) for parameter, gradient in zip(parameters, found, strict=True) if gradient is not None}


def _check_head(model: nn.Module, head: str, reached: set[int]) -> None:
    """Refuse a head that has weights, none of which the model's output depends on."""
    owned = {id(parameter) for parameter in model.get_submodule(head).parameters()}
    if owned and not owned & reached:
        raise UnsupportedModelError(
            f"The model returns several tensors, and the one that counts does not depend on the head {head!r}. What "
            "counts is the entry 'logits', or else the first tensor: let the model return the class scores there."
        )


def _find_head(model: nn.Module, run: DryRun, reached: set[int]) -> str:
    """Take the last module that runs and has parameters of its own, on which the output depends."""
    owning: list[str] = [
        name
        for name, module in model.named_modules()
        if name in run.ends and name and any(id(p) in reached for p in _own_parameters(name, module))
    ]
    if not owning:
        raise UnsupportedModelError(
            "The model has no named module with parameters, so no layer can be told from its head. Wrap it in "
            "an nn.Sequential, or give its parts names."
        )
    return max(owning, key=lambda name: run.ends[name][-1])


def _asked(model: nn.Module, layers: Iterable[str | type[nn.Module]]) -> dict[str, bool]:
    """Return the names asked for, and whether each was named exactly, not by a pattern or a type."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, bool] = {}
    for layer in layers:
        if isinstance(layer, type):
            fitting = [name for name, module in modules.items() if name and isinstance(module, layer)]
        elif "*" in layer:
            parts = [part.replace(r"\*", "[^.]*") for part in map(re.escape, layer.split("**"))]
            fitting = [name for name in modules if name and re.fullmatch(".*".join(parts), name)]
        else:
            found |= dict.fromkeys(named_layers(model, [layer]), True)
            continue
        if not fitting:
            what = f"of type {layer.__name__}" if isinstance(layer, type) else f"that fits {layer!r}"
            raise LayerNotFoundError(f"The model has no layer {what}. See model.named_modules() for what it has.")
        found |= {name: False for name in fitting if name not in found}
    return found


def _default_layers(
    model: nn.Module, run: DryRun, apart: list[str], measurable: set[str], reached: set[int]
) -> tuple[str, ...]:
    modules = dict(model.named_modules())

    def has_weights(name: str) -> bool:
        # Of embeddings, positions and kinds of token say nothing of a sample, and the rest is the input layer.
        if name == "" or name not in run.ends or isinstance(modules[name], nn.Embedding | nn.EmbeddingBag):
            return False
        return any(p.ndim > 1 and id(p) in reached for p in _own_parameters(name, modules[name]))

    owning = [name for name in modules if has_weights(name)]
    weighted = [name for name in owning if not any(is_inside(other, name) for other in owning if other != name)]

    def n_inside(block: str) -> int:
        return sum(is_inside(name, block) for name in weighted)

    def measured_at(name: str, most: float) -> str | None:
        """Find the module itself or the next one around it; a block that holds nothing else is better than both."""
        blocks = [block for block in (name, *_around(name)) if block in measurable]
        alone = [block for block in blocks if n_inside(block) == 1]
        nearest = [block for block in blocks[:1] if n_inside(block) <= most]
        return next(iter([*alone[-1:], *nearest]), None)

    inner = [name for name in weighted if not any(is_inside(name, other) for other in apart)]
    # What cannot be measured itself does not swallow half of the network: it counts with the next layer instead.
    found = [measured_at(name, len(weighted) / 2) for name in inner]
    found = found if any(found) else [measured_at(name, np.inf) for name in inner]
    chosen = {name for name in found if name is not None}
    chosen -= {name for name in chosen if any(is_inside(name, other) for other in chosen if other != name)}
    if not chosen:
        for name in inner:
            _check_runs_once(run, name)
        raise UnsupportedModelError(
            f"The model has no layer with weights besides its head {apart[0]!r} that returns a tensor with one row a "
            "sample. Name the layers with layers=, or another head with head=."
        )
    return _coarse(tuple(chosen), run, measurable)


def _coarse(names: tuple[str, ...], run: DryRun, measurable: set[str]) -> tuple[str, ...]:
    """Take the modules around layers that are too many, from the innermost outwards, or some at even distances."""
    while len(names) > _MOST_LAYERS:
        blocks = {name: next((b for b in _around(name) if b in measurable), None) for name in names}
        depth = max((block.count(".") for block in blocks.values() if block is not None), default=None)
        merged = {block for block in blocks.values() if block is not None and block.count(".") == depth}
        outside = [name for name in names if not any(is_inside(name, block) for block in merged)]
        if len(merged) + len(outside) < _FEWEST_LAYERS or not merged:
            ordered = sorted(names, key=lambda name: run.ends[name][0])
            places = {round(place * (len(names) - 1) / (_MOST_LAYERS - 1)) for place in range(_MOST_LAYERS)}
            return tuple(ordered[place] for place in sorted(places))
        names = (*outside, *merged)
    return names


def _around(name: str) -> Iterator[str]:
    """Yield the names of the modules around one, from the inside out."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _own_parameters(name: str, module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own parameters, with those that its parametrised weights are made from."""
    if "parametrizations" in name.split("."):
        return []  # part of the module whose weights it makes
    own = list(module.parameters(recurse=False))
    return own + list(module.get_submodule("parametrizations").parameters()) if is_parametrized(module) else own


def _check_runs(run: DryRun, names: tuple[str, ...], head: str, *, reused: bool) -> None:
    if not names:
        raise LayerNotFoundError(
            "The 'layers' parameter must name at least one layer below the head that runs once and returns a tensor. "
            "Leave it out for the default."
        )
    if head in names:
        raise UnsupportedModelError(
            f"The layer {head!r} is the model's head, which is reported on its own. Leave it out of layers=, or "
            "name another head with head=."
        )
    for name in names:
        if head.startswith(f"{name}."):
            raise UnsupportedModelError(
                f"The layer {name!r} contains the model's head {head!r}, so its output is not below the head. Name "
                "layers below the head, or another head with head=."
            )
    for name in (*names, head):
        if name not in run.ends:
            raise LayerNotRunError(
                f"The layer {name!r} does not run in the forward pass. Leave it out, or name a module that is called."
            )
    for name in () if reused else names:
        _check_runs_once(run, name)


def _check_runs_once(run: DryRun, name: str) -> None:
    if len(run.ends[name]) > 1:
        raise ReusedLayerError(
            f"The layer {name!r} runs {len(run.ends[name])} times in one forward pass, so its output is not "
            "one thing. Name the modules around it that run once with layers=, or say with calls= whether the first, "
            "the last or the sum counts."
        )


def _owners(run: DryRun, ends: dict[str, int], head: str, inside: dict[str, set[nn.Module]]) -> dict[str, str]:
    """Give each parameter and buffer that is used to a layer.

    `ends` tells when each layer's output is there, in this order; `inside` the modules of each.
    """
    owners: dict[str, str] = {}
    previous = None
    for tensor, time in run.uses.items():  # in the order of use
        user = run.users[tensor]
        owner = next((name for name, end in ends.items() if end >= time), head)
        if user in inside[head]:
            owner = head
        elif previous is not None and user not in inside[owner] and is_norm(user):
            owner = previous
        owners[tensor] = previous = owner
    return owners


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalisation: by its class name, since many are home-made and have no common base."""
    return "norm" in type(module).__name__.lower()
