"""Everything but some tensors of a model, frozen and given back: `freeze`, `give_back`, `training`."""

from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["freeze", "give_back", "is_frozen", "training"]

_BEFORE = "_before_freezing"  # the attribute of each module that says what it was


@dataclass(frozen=True, eq=False)
class _Before:
    """What a module was before it was frozen: some of its attributes, and ``requires_grad`` of its own parameters."""

    attributes: dict[str, Any]
    requires_grad: dict[str, bool]


@dataclass(frozen=True, eq=False)
class _Still:
    """Stands in for ``train`` of a frozen module, and passes the call on to the modules inside.

    No hook, since those would be part of what is compiled, and switch torch's fast paths off.
    """

    module: nn.Module

    def __call__(self, mode: bool = True) -> nn.Module:
        for child in self.module.children():
            child.train(mode)
        return self.module


@contextmanager
def training(model: nn.Module, trained: Set[int]) -> Iterator[None]:
    """Freeze everything but the parameters and buffers with these ids, for as long as the context lasts."""
    modules = freeze(model, trained)
    try:
        yield
    finally:
        give_back(modules)


def freeze(model: nn.Module, trained: Set[int]) -> list[nn.Module]:
    """Freeze everything but the parameters and buffers with these ids; return the modules to give back."""
    modules = list(model.modules())
    still = _still_modules(model, trained)
    for module in modules:
        before = _Before(
            {key: vars(module)[key] for key in _kept(module) if key in vars(module)},
            {name: parameter.requires_grad for name, parameter in module.named_parameters(recurse=False)},
        )
        vars(module)[_BEFORE] = before
    try:
        for parameter in model.parameters():
            able = parameter.is_floating_point() or parameter.is_complex()  # whole numbers are not trained
            parameter.requires_grad_(able and id(parameter) in trained)
        for module in modules:
            _forget_outer(module)
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # which a still layer would hand on to one in training that takes none
            if module in still and isinstance(module, nn.RNNBase):
                module.dropout = 0.0  # cuDNN goes back through it in training mode alone
            elif module in still:
                module.training = False
                vars(module)["train"] = _Still(module)
    except BaseException:
        give_back(modules)
        raise
    return modules


def _kept(module: nn.Module) -> tuple[str, ...]:
    """Return the attributes of a module that may change."""
    recurrent, encoder = isinstance(module, nn.RNNBase), isinstance(module, nn.TransformerEncoder)
    return ("training", "train", _BEFORE, *["dropout"] * recurrent, *["use_nested_tensor"] * encoder)


def _forget_outer(module: nn.Module) -> None:
    """Let a module move that the call around this one keeps still, until it is given back."""
    attributes = vars(module)[_BEFORE].attributes
    if isinstance(attributes.get("train"), _Still):
        del vars(module)["train"]
    if _BEFORE in attributes:
        vars(module).update({k: v for k, v in attributes[_BEFORE].attributes.items() if k == "dropout"})


def is_frozen(model: nn.Module) -> bool:
    """Tell whether some of a model is as `freeze` left it."""
    return any(_BEFORE in vars(module) for module in model.modules())


def give_back(modules: Iterable[nn.Module]) -> None:
    """Make frozen modules what they were; others stay as they are."""
    for module in modules:
        before = vars(module).get(_BEFORE)
        if before is None:
            continue
        for key in ("train", _BEFORE):
            vars(module).pop(key, None)
        vars(module).update(before.attributes)
        for name, parameter in module.named_parameters(recurse=False):
            if name in before.requires_grad:
                parameter.requires_grad_(before.requires_grad[name])


def _still_modules(model: nn.Module, trained: Set[int]) -> set[nn.Module]:
    """Return the modules that run in evaluation mode."""
    frozen: dict[str, bool] = {}  # whether all parameters of a module, or of the nearest around it, are
    moving = set()  # a module with several names is still if it is by each
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        parameters, buffers = list(module.parameters()), list(module.buffers())
        untrained = not any(id(tensor) in trained for tensor in (*parameters, *buffers))
        frozen[name] = untrained if parameters else frozen.get(name.rpartition(".")[0], False)
        has_buffers = any(True for _ in module.buffers(recurse=False))
        if not (untrained and (frozen[name] or has_buffers)):
            moving.add(module)
    return set(modules.values()) - moving
