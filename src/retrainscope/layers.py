"""Where to measure, and which layer owns which parameter: `find_layers`."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from retrainscope.batches import Batch, Inputs, as_batches
from retrainscope.exceptions import LayerNotFoundError, LayerNotRunError, ReusedLayerError, UnsupportedModelError
from retrainscope.tracing import borrow, call_model, main_tensor, model_place, named_layers, run_layers

__all__ = ["Layers", "find_layers"]

_DRY_RUN_SAMPLES = 4
_MOST_LAYERS, _FEWEST_LAYERS = 24, 8  # of those found by default


@dataclass(frozen=True)
class Layers:
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
    """

    names: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    head: str
    parameters: dict[str, tuple[str, ...]]
    buffers: dict[str, tuple[str, ...]]
    n_parameters: dict[str, int]
    flops: dict[str, int]
    unused: tuple[str, ...]


def find_layers(
    model: nn.Module,
    example: Any,
    *,
    layers: Iterable[str | type[nn.Module]] | None = None,
    head: str | None = None,
    input_layer: str | None = None,
) -> Layers:
    """Find the layers of a model to measure, by one dry run on a few samples.

    Parameters
    ----------
    model : nn.Module
    example : Tensor, array, (X, y), Dataset, DataLoader, or a re-iterable of batches
        Data that the model takes; a few samples of the first batch are used.
    layers : iterable of str or type, optional
        The layers to measure: names; patterns such as ``"layer3.*"``, where ``*`` stands for anything but a dot and
        ``**`` for anything; types such as ``nn.Conv2d``. Of what a pattern or type fits, taken is what runs once
        and returns a tensor, below the head. None takes every module that has weights of its own (convolutions,
        linear layers, attention, recurrent ones) but the head; where such a module stands alone in a block, with
        at most normalisation, activation, pooling or dropout around it, the block. If these are more than 24, the
        modules around them are taken instead, from the innermost outwards (residual or transformer blocks), and
        if that leaves too few, 24 of them at even distances; the others count with the next one measured.
    head : str, optional
        The module that produces the output. None takes the last one with weights that runs.
    input_layer : str, optional
        The module whose output stands for the input (an embedding); it is no layer to measure.

    Returns
    -------
    Layers

    Raises
    ------
    LayerNotFoundError, LayerNotRunError, ReusedLayerError
        If a layer does not exist, does not run, or runs more than once.
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
    device, dtype = model_place(model)
    batches = as_batches(example, name="example", batch_size=_DRY_RUN_SAMPLES, device=device, dtype=dtype)
    with borrow(model):
        return layers_of(model, batches.first(), layers=layers, head=head, input_layer=input_layer)


def layers_of(
    model: nn.Module,
    batch: Batch,
    *,
    layers: Iterable[str | type[nn.Module]] | None,
    head: str | None,
    input_layer: str | None,
) -> Layers:
    """Find the layers of a borrowed model."""
    asked = None if layers is None else _asked(model, [layers] if isinstance(layers, str) else [*layers])
    for name, what in ((head, "head"), (input_layer, "input layer")):
        if name is not None:
            named_layers(model, [name], what=what)
    n_samples = min(_DRY_RUN_SAMPLES, len(batch))
    inputs = _first(batch.inputs, n_samples)
    run = _dry_run(model, inputs)
    head = head or _find_head(model, run)
    apart = [name for name in (head, input_layer) if name is not None]
    if asked is None:
        names = _default_layers(model, run, apart)
    else:
        names = tuple(name for name, exactly in asked.items() if exactly or _can_be_measured(name, run, apart))
    _check_runs(run, names, head)
    names = tuple(sorted(names, key=lambda name: run.ends[name][0]))
    shapes: dict[str, tuple[int, ...]] = {}

    def note_shape(name: str, output: Tensor) -> None:
        shapes[name] = tuple(output.shape[1:])

    with torch.no_grad():
        run_layers(model, inputs, names, note_shape)
        if n_samples > 1:  # with other than so many samples, an output that has them elsewhere shows itself
            run_layers(model, _first(inputs, n_samples - 1), names, lambda *_: None)
    parameters = dict(model.named_parameters())
    inside = {name: set(module.modules()) for name, module in named_layers(model, (*names, head)).items()}
    owners = _owners(run, names, head, inside)

    def owned(tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
        return {name: tuple(t for t in tensors if owners.get(t) == name) for name in (*names, head)}

    owned_parameters = owned(parameters)
    flops = [run.flops[name] // n_samples for name in names]
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
    )


@dataclass
class _Run:
    """What happened when in a forward pass; times count events."""

    ends: dict[str, list[int]] = field(default_factory=dict)
    returns_tensor: dict[str, bool] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    users: dict[str, nn.Module] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    total_flops: int = 0
    now: int = 0


class _UseRecorder(TorchFunctionMode):
    """Note when each parameter or buffer is first given to an operation, and inside which module."""

    def __init__(self, names: dict[int, str], run: _Run, stack: list[nn.Module]) -> None:
        super().__init__()
        self.names, self.run, self.stack = names, run, stack

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # To ask for a tensor's type, shape or device is not to use it.
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        for leaf in tree_leaves((args, kwargs)):
            name = self.names.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if name is not None and name not in self.run.uses:
                self.run.now += 1
                self.run.uses[name] = self.run.now
                self.run.users[name] = self.stack[-1]
        return result


def _dry_run(model: nn.Module, inputs: Inputs) -> _Run:
    from torch.utils.flop_counter import FlopCounterMode

    run, stack = _Run(), [model]
    tensors = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    counter = FlopCounterMode(display=False)

    def left(name: str, output: Any) -> None:
        run.now += 1
        run.ends.setdefault(name, []).append(run.now)
        run.returns_tensor[name] = main_tensor(output) is not None
        run.flops[name] = counter.get_total_flops()
        stack.pop()

    with ExitStack() as opened, torch.no_grad():
        for name, module in model.named_modules(remove_duplicate=False):
            opened.enter_context(_watched(module, name, stack.append, left))
        opened.enter_context(counter)
        opened.enter_context(_UseRecorder(tensors, run, stack))
        call_model(model, inputs)
        run.total_flops = counter.get_total_flops()
    return run


@contextmanager
def _watched(
    module: nn.Module, name: str, entered: Callable[[nn.Module], None], left: Callable[[str, Any], None]
) -> Iterator[None]:
    before = module.register_forward_pre_hook(lambda *_: entered(module))
    after = module.register_forward_hook(lambda _module, _args, output: left(name, output))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _find_head(model: nn.Module, run: _Run) -> str:
    """Take the last module that has parameters of its own and runs."""
    owning: list[str] = [
        name for name, module in model.named_modules() if name in run.ends and name and _own_parameters(name, module)
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


def _can_be_measured(name: str, run: _Run, apart: Iterable[str]) -> bool:
    """Tell whether a module runs once, returns a tensor, and neither is nor holds nor is part of what is apart."""
    return (
        name != ""
        and len(run.ends.get(name, ())) == 1
        and run.returns_tensor[name]
        and not any(_is_inside(other, name) or _is_inside(name, other) for other in apart)
    )


def _is_inside(name: str, block: str) -> bool:
    return f"{name}.".startswith(f"{block}.")


def _default_layers(model: nn.Module, run: _Run, apart: list[str]) -> tuple[str, ...]:
    modules = dict(model.named_modules())

    def has_weights(name: str) -> bool:
        return name != "" and name in run.ends and any(p.ndim > 1 for p in _own_parameters(name, modules[name]))

    weighted = [name for name in modules if has_weights(name)]
    weighted = [name for name in weighted if not any(_is_inside(other, name) for other in weighted if other != name)]

    def stands_alone(block: str) -> bool:
        inside = [name for name in weighted if _is_inside(name, block)]
        holds_apart = any(_is_inside(other, block) for other in apart)
        return len(inside) == 1 and len(run.ends.get(block, ())) == 1 and not holds_apart

    chosen = []
    for name in weighted:
        if any(_is_inside(name, other) for other in apart):
            continue
        candidates = [name]
        while "." in candidates[-1] and stands_alone(candidates[-1].rpartition(".")[0]):
            candidates.append(candidates[-1].rpartition(".")[0])
        chosen += [candidate for candidate in candidates if run.returns_tensor[candidate]][-1:]
    if not chosen:
        raise UnsupportedModelError(
            f"The model has no layer with weights that returns a tensor besides its head {apart[0]!r}. Name the layers "
            "with layers=, or another head with head=."
        )
    return _coarse(tuple(dict.fromkeys(chosen)), run, apart)


def _coarse(names: tuple[str, ...], run: _Run, apart: list[str]) -> tuple[str, ...]:
    """Take the modules around layers that are too many, from the innermost outwards, or some at even distances."""

    def around(name: str) -> str | None:
        parts = name.split(".")
        outer = (".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1))
        return next((block for block in outer if _can_be_measured(block, run, apart)), None)

    while len(names) > _MOST_LAYERS:
        blocks = {name: around(name) for name in names}
        depth = max((block.count(".") for block in blocks.values() if block is not None), default=None)
        merged = {block for block in blocks.values() if block is not None and block.count(".") == depth}
        outside = [name for name in names if not any(_is_inside(name, block) for block in merged)]
        if len(merged) + len(outside) < _FEWEST_LAYERS or not merged:
            ordered = sorted(names, key=lambda name: run.ends[name][0])
            places = {round(place * (len(names) - 1) / (_MOST_LAYERS - 1)) for place in range(_MOST_LAYERS)}
            return tuple(ordered[place] for place in sorted(places))
        names = (*outside, *merged)
    return names


def _first(inputs: Inputs, n_samples: int) -> Inputs:
    return inputs[:n_samples] if isinstance(inputs, Tensor) else {k: t[:n_samples] for k, t in inputs.items()}


def _own_parameters(name: str, module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own parameters, with those that its parametrised weights are made from."""
    if "parametrizations" in name.split("."):
        return []  # part of the module whose weights it makes
    own = list(module.parameters(recurse=False))
    return own + list(module.get_submodule("parametrizations").parameters()) if is_parametrized(module) else own


def _check_runs(run: _Run, names: tuple[str, ...], head: str) -> None:
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
    for name in names:
        if len(run.ends[name]) > 1:
            raise ReusedLayerError(
                f"The layer {name!r} runs {len(run.ends[name])} times in one forward pass, so its output is not "
                "one thing. Name the modules around it that run once with layers=."
            )


def _owners(run: _Run, names: tuple[str, ...], head: str, inside: dict[str, set[nn.Module]]) -> dict[str, str]:
    """Give each parameter and buffer that is used to a layer; `inside` tells the modules of each layer."""
    owners: dict[str, str] = {}
    previous = None
    for tensor, time in run.uses.items():  # in the order of use
        user = run.users[tensor]
        owner = next((name for name in names if run.ends[name][0] >= time), head)
        if user in inside[head]:
            owner = head
        elif previous is not None and user not in inside[owner] and _is_norm(user):
            owner = previous
        owners[tensor] = previous = owner
    return owners


def _is_norm(module: nn.Module) -> bool:
    # There is no common base class of normalisations, and many are home-made: the class name tells.
    return "norm" in type(module).__name__.lower()
