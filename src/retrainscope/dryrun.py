"""What happens in a forward pass on a few samples: what runs when, which parameters it uses, which shapes come out."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from retrainscope.batches import Inputs
from retrainscope.tracing import batch_first, call_model, main_tensor

__all__ = ["DryRun", "dry_run", "first_samples", "is_inside", "measurable_modules"]


@dataclass
class DryRun:
    """What happened when in a forward pass; times count events."""

    ends: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    users: dict[str, nn.Module] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    total_flops: int = 0
    now: int = 0


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


def dry_run(model: nn.Module, inputs: Inputs) -> DryRun:
    """Run a borrowed model on a few samples and note what happens."""
    from torch.utils.flop_counter import FlopCounterMode

    run, stack = DryRun(), [model]
    tensors = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    counter = FlopCounterMode(display=False)

    def left(name: str, module: nn.Module, output: Any) -> None:
        run.now += 1
        run.ends.setdefault(name, []).append(run.now)
        run.shapes[name] = _shape_of(module, output)
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
    module: nn.Module, name: str, entered: Callable[[nn.Module], None], left: Callable[[str, nn.Module, Any], None]
) -> Iterator[None]:
    before = module.register_forward_pre_hook(lambda *_: entered(module))
    after = module.register_forward_hook(lambda module, _args, output: left(name, module, output))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def measurable_modules(model: nn.Module, run: DryRun, inputs: Inputs, n_samples: int, apart: list[str]) -> set[str]:
    """Return the modules that run once and return a tensor with one row a sample.

    Those that are, hold or belong to what is `apart` are left out. A second run with one sample less tells which
    dimension the samples are.
    """
    fewer: dict[str, tuple[int, ...] | None] = {}
    with ExitStack() as opened, torch.no_grad():
        for name, module in model.named_modules(remove_duplicate=False):
            left = partial(_note_shape, fewer)
            opened.enter_context(_watched(module, name, lambda _: None, left))
        if n_samples > 1:
            call_model(model, first_samples(inputs, n_samples - 1))

    def has_rows(name: str) -> bool:
        shape, other = run.shapes[name], fewer.get(name)
        if not shape or shape[0] != n_samples:
            return False
        return n_samples == 1 or (other is not None and other == (n_samples - 1, *shape[1:]))

    return {
        name
        for name, ends in run.ends.items()
        if name and len(ends) == 1 and has_rows(name) and not _touches(name, apart)
    }


def _note_shape(shapes: dict[str, tuple[int, ...] | None], name: str, module: nn.Module, output: Any) -> None:
    shapes[name] = _shape_of(module, output)


def _shape_of(module: nn.Module, output: Any) -> tuple[int, ...] | None:
    tensor = main_tensor(output)
    return None if tensor is None else tuple(batch_first(module, tensor).shape)


def _touches(name: str, apart: Iterable[str]) -> bool:
    return any(is_inside(other, name) or is_inside(name, other) for other in apart)


def is_inside(name: str, block: str) -> bool:
    """Tell whether a module is a block or part of it, by their names."""
    return f"{name}.".startswith(f"{block}.")


def first_samples(inputs: Inputs, n_samples: int) -> Inputs:
    """Return the inputs of so many samples."""
    return inputs[:n_samples] if isinstance(inputs, Tensor) else {k: t[:n_samples] for k, t in inputs.items()}
