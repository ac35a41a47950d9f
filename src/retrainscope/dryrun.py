"""What happens in a forward pass on a few samples: what runs when, which parameters it uses, which shapes come out."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retrainscope.batches import Inputs
from retrainscope.outputs import has_several, output_of
from retrainscope.padding import n_tokens_of
from retrainscope.sharding import is_sharded
from retrainscope.tracing import call_model

__all__ = [
    "DryRun",
    "Shape",
    "dry_run",
    "first_samples",
    "is_inside",
    "measurable_modules",
    "run_and_note",
    "shape_of",
]

Shape = tuple[int, ...]


@dataclass
class DryRun:
    """What happened when in a forward pass; times count events.

    Attributes
    ----------
    ends : dict of str to list of int
        When each module ended, at each of its calls.
    flops : dict of str to list of int
        Floating-point operations of the whole model up to then.
    shapes : dict of str to tuple of int, or None
        Of each module's output, at its last call; None where that is no tensor of real numbers, or one row for all
        samples (learnt positions, say).
    uses : dict of str to int
        When each parameter or buffer was first given to an operation.
    users : dict of str to nn.Module
        The module that was running then.
    total_flops, now : int
    several : bool
        Whether the model returned more than one tensor.
    """

    ends: dict[str, list[int]] = field(default_factory=dict)
    flops: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[str, Shape | None] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    users: dict[str, nn.Module] = field(default_factory=dict)
    total_flops: int = 0
    now: int = 0
    several: bool = False


class _UseRecorder(TorchFunctionMode):
    """Note when each parameter or buffer is first given to an operation, and inside which module."""

    def __init__(self, names: dict[int, str], run: DryRun, stack: list[nn.Module]) -> None:
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


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count floating-point operations by torch's formulas; its own counter follows modules, which hooks do here."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # here, as it imports triton where that is there

        super().__init__()  # type: ignore[no-untyped-call]
        self.total, self._formulas = 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def dry_run(model: nn.Module, inputs: Inputs) -> DryRun:
    """Run a borrowed model on a few samples and note what happens."""
    run, stack = DryRun(), [model]
    tensors = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    counter = _FlopCounter()
    n_tokens = n_tokens_of(inputs)
    # Of a model in pieces others are in the place of the parameters while a module runs.
    places = {
        (module, key): tensors[id(parameter)]
        for module in (model.modules() if is_sharded(model) else ())
        for key, parameter in module._parameters.items()
        if parameter is not None
    }

    def entered(module: nn.Module) -> None:
        stack.append(module)
        if places:
            tensors.update({id(t): places[module, key] for key, t in module._parameters.items() if t is not None})

    def left(name: str, module: nn.Module, returned: Any) -> None:
        run.now += 1
        run.ends.setdefault(name, []).append(run.now)
        run.flops.setdefault(name, []).append(counter.total)
        run.shapes[name] = shape_of(module, returned, n_tokens)
        stack.pop()

    with ExitStack() as opened, torch.no_grad():
        for name, module in model.named_modules(remove_duplicate=False):
            opened.enter_context(_watched(module, name, entered, left))
        opened.enter_context(counter)
        opened.enter_context(_UseRecorder(tensors, run, stack))
        returned = call_model(model, inputs)
        run.total_flops, run.several = counter.total, has_several(returned)
    return run


@contextmanager
def _watched(
    module: nn.Module, name: str, entered: Callable[[nn.Module], None], left: Callable[[str, nn.Module, Any], None]
) -> Iterator[None]:
    before = module.register_forward_pre_hook(lambda *_: entered(module))
    after = module.register_forward_hook(lambda module, _args, returned: left(name, module, returned))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def measurable_modules(
    model: nn.Module, run: DryRun, inputs: Inputs, n_samples: int, apart: list[str], *, reused: bool
) -> set[str]:
    """Return the modules that return a tensor with a row a sample, and run once unless `reused` ones count too.

    Those that are, hold or belong to what is `apart` are left out. A second run with one sample less tells which
    dimension the samples are.
    """
    fewer: dict[str, Shape | None] = {}
    n_tokens = n_tokens_of(inputs)
    if n_samples > 1:
        run_and_note(
            model,
            first_samples(inputs, n_samples - 1),
            lambda name, module, returned: fewer.update({name: shape_of(module, returned, n_tokens)}),
        )

    def has_rows(name: str) -> bool:
        shape, other = run.shapes[name], fewer.get(name)
        if not shape or len(shape) < 2 or shape[0] != n_samples:
            return False
        return n_samples == 1 or (other is not None and other == (n_samples - 1, *shape[1:]))

    return {
        name
        for name, ends in run.ends.items()
        if name and (reused or len(ends) == 1) and has_rows(name) and not _touches(name, apart)
    }


def run_and_note(model: nn.Module, inputs: Inputs, note: Callable[[str, nn.Module, Any], None]) -> None:
    """Run a borrowed model to its end and call note(name, module, returned) whenever a module has run."""
    with ExitStack() as opened, torch.no_grad():
        for name, module in model.named_modules(remove_duplicate=False):
            opened.enter_context(_watched(module, name, lambda *_: None, note))
        call_model(model, inputs)


def shape_of(module: nn.Module, returned: Any, n_tokens: int | None = None) -> Shape | None:
    """Return the shape of a module's output; None where that is no tensor of real numbers, or has one row for all."""
    output = output_of(module, returned, n_tokens)
    if output is None or output.is_complex() or (output.ndim and output.shape[0] > 1 and output.stride(0) == 0):
        return None
    return tuple(output.shape)


def _touches(name: str, apart: Iterable[str]) -> bool:
    return any(is_inside(other, name) or is_inside(name, other) for other in apart)


def is_inside(name: str, block: str) -> bool:
    """Tell whether a module is a block or part of it, by their names."""
    return f"{name}.".startswith(f"{block}.")


def first_samples(inputs: Inputs, n_samples: int) -> Inputs:
    """Return the inputs of so many samples."""
    return inputs[:n_samples] if isinstance(inputs, Tensor) else {k: t[:n_samples] for k, t in inputs.items()}
