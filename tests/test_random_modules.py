"""The model is sacred: random modules are given back bit for bit, whatever happens.

CI looks at 60 modules a test, always the same ones. The big run, of 2,000 others (half of them in each of two tests),
is one command::

    RETRAINSCOPE_EXAMPLES=2000 python -m pytest tests/test_random_modules.py

A failure prints the recipe and the call; ``build(Recipe(...))`` of `random_modules` makes the module again.
"""

import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import sympy  # noqa: F401 -- torch imports it late, and it adds a filter of warnings then
import torch
from helpers import HOOK_TABLES, content_of, unchanged
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from random_modules import Case, Recipe, build, recipes, unpacked
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import retrainscope as rs
from retrainscope.exceptions import RetrainscopeError

BIG_RUN = os.environ.get("RETRAINSCOPE_EXAMPLES")
N_TESTS = 2

many = settings(
    max_examples=60 if BIG_RUN is None else -(-int(BIG_RUN) // N_TESTS),
    derandomize=BIG_RUN is None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

pytestmark = [
    # What the modules themselves are warned of, and what two steps of a descent may end with.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Using .*non-full backward hook"),
    pytest.mark.filterwarnings("ignore:For backward hooks to be called"),
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:Training one layer changes another"),
]


# What must be as before, beyond what `unchanged` looks at


def settings_of_torch() -> dict[str, Any]:
    """Return what is set for the whole process or thread."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomalies": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "global hooks": [
            len(getattr(torch_module, f"_global{table}"))
            for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ],
        # Not in the oldest torch.
        "saved tensors": getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", bool)(True),
        "warnings": list(warnings.filters),
        "numpy errors": np.geterr(),
    }


def parts_of(model: nn.Module) -> dict[str, Any]:
    """Return the objects that a model is made of, by their places: hooks, attributes, and what is in its lists."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            if key != "training":  # a flag, which `unchanged` compares
                found[f"{name}|{key}"] = value
        for table in (*HOOK_TABLES, "_parameters", "_buffers", "_modules"):
            found |= {
                f"{name}|{table}|{place}|{key}": v for place, (key, v) in enumerate(getattr(module, table).items())
            }
        for place, weight in enumerate(getattr(module, "_flat_weights", ())):
            found[f"{name}|_flat_weights|{place}"] = weight
    for name, parameter in model.named_parameters():
        for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found |= {f"{name}|{table}|{key}": value for key, value in (getattr(parameter, table) or {}).items()}
    return found


@contextmanager
def kept(case: Case) -> Iterator[None]:
    """Fail if the block leaves anything other than it found it: the model, the data, or what is set for all."""
    before, around = parts_of(case.model), settings_of_torch()
    keys = list(case.model.state_dict())
    versions = {name: parameter._version for name, parameter in case.model.named_parameters()}
    contents = [content_of(tensor) for tensor in case.tensors]
    with unchanged(case.model):
        yield
    after = parts_of(case.model)
    assert list(before) == list(after)
    assert [place for place in before if before[place] is not after[place]] == []
    assert list(case.model.state_dict()) == keys
    # A weight that was written to, if only with its own value, breaks a graph that the user holds.
    assert {name: parameter._version for name, parameter in case.model.named_parameters()} == versions
    assert [content_of(tensor) for tensor in case.tensors] == contents
    assert settings_of_torch() == around


# Calls of the library


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CALLERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@dataclass(frozen=True)
class Call:
    """A call of the library; places count modules, round and round."""

    what: str
    caller: str = "plain"
    layers: tuple[int, ...] | str | None = None
    head: int | None = None
    input_layer: bool = True
    batch_size: int = 8
    optimizer: str = "lbfgs"
    gradients: bool = False  # whether the user of traced outputs asks for some


def calls() -> st.SearchStrategy[Call]:
    """Return the strategy that draws calls."""
    places = st.lists(st.integers(0, 30), min_size=1, max_size=3).map(tuple)
    return st.builds(
        Call,
        st.sampled_from(list(ACTIONS)),
        st.sampled_from(["plain", *CALLERS]),
        st.none() | st.none() | places | st.sampled_from(["**", "Linear"]),
        st.none() | st.none() | st.integers(0, 30),
        st.sampled_from([True, True, True, False]),
        st.integers(4, 30),
        st.sampled_from(["lbfgs", "adam"]),
        st.booleans(),
    )


def named(case: Case, *places: int) -> list[str]:
    """Return the names of the modules at these places."""
    names = [name for name, _ in case.model.named_modules(remove_duplicate=False) if name]
    return [names[place % len(names)] for place in places]


def chosen(case: Case, call: Call) -> dict[str, Any]:
    """Return the options that say what to measure."""
    layers: Any = call.layers
    if isinstance(call.layers, tuple):
        layers = named(case, *call.layers)
    elif isinstance(call.layers, str):
        layers = [nn.Linear if call.layers == "Linear" else call.layers]
    return {
        "layers": layers,
        "head": None if call.head is None else named(case, call.head)[0],
        "input_layer": case.input_layer if call.input_layer else None,
    }


def find(case: Case, call: Call) -> rs.Layers:
    """Find the layers that the call is about."""
    return rs.find_layers(case.model, case.known, **chosen(case, call))


def names_of(case: Case, call: Call) -> list[str]:
    """Return names of layers, as a user writes them down: found, or any."""
    return named(case, *call.layers) if isinstance(call.layers, tuple) else list(find(case, call).names)


def estimated(kind: Any, **options: Any) -> Callable[[Case, Call], tuple[str, ...]]:
    """Return the call that fits and scores."""

    def act(case: Case, call: Call) -> tuple[str, ...]:
        more = {"optimizer": call.optimizer} if kind is rs.GradientInverter else {}
        common = {"batch_size": call.batch_size, "random_state": 0}
        estimator = kind(case.model, **chosen(case, call), **common, **options, **more)
        scores = estimator.fit(case.known).score_layers(case.unknown)
        assert scores.layers == estimator.layers_.names
        return scores.layers

    return act


def recommended(case: Case, call: Call) -> tuple[str, ...]:
    """Advise."""
    advice = rs.recommend_layers(
        case.model, case.known, case.unknown, **chosen(case, call), batch_size=call.batch_size, random_state=0
    )
    return tuple(row.name for row in advice.table)


def looked_for(case: Case, call: Call) -> tuple[str, ...]:
    """Find layers, which own every parameter once."""
    layers = find(case, call)
    owned = [name for names in layers.parameters.values() for name in names]
    assert sorted([*owned, *layers.unused]) == sorted(name for name, _ in case.model.named_parameters())
    return layers.names


def inverted(case: Case, call: Call) -> None:
    """Invert layers."""
    names = names_of(case, call)
    options = {"input_layer": case.input_layer, "batch_size": call.batch_size, "random_state": 0}
    descent = rs.Descent(max_iter=2, optimizer=call.optimizer)
    assert list(rs.invert_layers(case.model, case.known, names, descent=descent, **options)) == [*dict.fromkeys(names)]


def traced(case: Case, call: Call) -> None:
    """Trace a forward pass of the user's, who may want gradients of what was traced."""
    names = names_of(case, call)
    with rs.trace_layers(case.model, names) as outputs, taken_back(case.model):
        case.call(6)
        assert set(outputs) <= set(names)
        ends = [output.float().sum() for output in outputs.values() if output.requires_grad]
        weights = [weight for weight in case.model.parameters() if weight.requires_grad]
        if ends and weights and call.gradients:
            torch.autograd.grad(sum(ends), weights, allow_unused=True)


def trained_only(case: Case, call: Call) -> None:
    """Freeze all but some layers, and use the model."""
    with rs.train_only(case.model, names_of(case, call)), taken_back(case.model):
        case.call(6)


@contextmanager
def taken_back(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass of the user's own does to buffers and random states, which is not for the library."""
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    contents = [(buffer, buffer.clone()) for _, table in tables for buffer in table.values() if buffer is not None]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)
        for buffer, content in contents:
            buffer.copy_(content)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


ACTIONS: dict[str, Callable[[Case, Call], tuple[str, ...] | None]] = {
    "find_layers": looked_for,
    "ActivationSpread": estimated(rs.ActivationSpread),
    "LayerDecoderProbe": estimated(rs.LayerDecoderProbe, max_epochs=1),
    "GradientInverter": estimated(rs.GradientInverter, max_iter=2, samples_per_class=2),
    "invert_layers": inverted,
    "trace_layers": traced,
    "recommend_layers": recommended,
    "train_only": trained_only,
}


def attempt(case: Case, call: Call) -> tuple[tuple[str, ...] | None, BaseException | None]:
    """Make the call where its caller is, look that all is as before, and return the layers and the error."""
    with CALLERS[call.caller](), kept(case):
        try:
            return ACTIONS[call.what](case, call), None
        except AssertionError:
            raise
        except BaseException as error:
            return None, error


# Errors


def fails_by_itself(recipe: Recipe, call: Call, error: BaseException) -> bool:
    """Tell whether a module fails so without the library: as its user has it, or in evaluation mode, frozen."""
    ways = product((12, 6, 4, 1), (False, True), ("none", "of the input", "of all", "of the weights"))
    for n_samples, frozen, gradient in ways:
        case = build(recipe)
        if frozen:
            case.model.eval().requires_grad_(False)
        try:
            with CALLERS[call.caller](), torch.inference_mode(False), torch.set_grad_enabled(gradient != "none"):
                run_by_hand(case, recipe, n_samples, gradient)
        except Exception as own:
            if type(own) is type(error) and str(own)[:40] == str(error)[:40]:
                return True
    return False


def run_by_hand(case: Case, recipe: Recipe, n_samples: int, gradient: str) -> None:
    """Call the model, and ask for the gradient of its output: in either way, since some modules know only one."""
    leaves: list[Tensor] = []

    def as_leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().clone().requires_grad_(gradient in ("of the input", "of all")))
        return leaves[-1].clone()

    if case.input_layer is not None:
        case.model.get_submodule(case.input_layer).register_forward_hook(lambda _m, _a, output: as_leaf(output))
    elif isinstance(case.inputs, dict):
        case.inputs["x"] = as_leaf(case.inputs["x"])
    else:
        case.inputs = as_leaf(case.inputs)
    output = unpacked(case.call(n_samples), "tensor" if recipe.plain else recipe.form)
    if gradient == "of the input":
        torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    elif gradient != "none":
        output.sum().backward()


class Boom(Exception):  # noqa: N818 -- not a kind of error, but the one that the bomb makes
    """An error of the model's own."""


class Bomb:
    """A hook that raises an error at one of its calls, counted over all copies of the model."""

    def __init__(self, error: BaseException, at: int | None) -> None:
        self.error, self.at, self.calls = error, at, 0

    def __deepcopy__(self, memo: dict[int, object]) -> "Bomb":
        return self

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error


class BackwardBomb(Bomb):
    """Raises where the gradient comes back to a module's output instead."""

    def __call__(self, *args: Any) -> None:
        output = args[-1]
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(super().__call__)


def with_bomb(
    recipe: Recipe, moment: str, place: int, error: BaseException, at: int | None = None
) -> tuple[Case, Bomb]:
    """Build a recipe and put a bomb into one of its modules, before or after its forward pass or on the way back."""
    case = build(recipe)
    bomb = (BackwardBomb if moment == "backward" else Bomb)(error, at)
    modules = list(case.model.modules())
    module = modules[place % len(modules)]
    if moment == "before":
        module.register_forward_pre_hook(bomb)
    else:
        module.register_forward_hook(bomb)
    return case, bomb


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


# The tests


@many
@given(calls(), recipes())
def test_a_module_is_given_back(call, recipe):
    """After a call that succeeds or is refused, all is as before; scores are for the layers that find_layers finds."""
    case = build(recipe)
    names, error = attempt(case, call)
    what_came = "succeeds" if error is None else type(error).__name__
    event(f"{call.what}: {what_came}")
    if error is not None and not isinstance(error, RetrainscopeError) and not fails_by_itself(recipe, call, error):
        raise error
    if names is not None:
        assert names == find(case, call).names


@many
@given(
    st.sampled_from([Boom, KeyboardInterrupt]),
    calls(),
    recipes(),
    st.sampled_from(["before", "after", "after", "backward"]),
    st.integers(0, 60),
    st.floats(0, 1),
)
def test_a_module_is_given_back_after_an_error_inside(kind, call, recipe, moment, place, when):
    """Whichever call of whichever submodule raises an error, it comes through, and all is as before."""
    case, bomb = with_bomb(recipe, moment, place, kind("boom"))
    attempt(case, call)  # how often does it run?
    if bomb.calls == 0:
        event(f"{call.what}: the place never runs")
        return
    at = 1 + round(when * (bomb.calls - 1))
    case, bomb = with_bomb(recipe, moment, place, kind("boom"), at)
    _, error = attempt(case, call)
    event(f"{call.what}: {type(error).__name__}")
    assert bomb.calls >= at
    if kind is KeyboardInterrupt or not isinstance(error, RetrainscopeError):
        assert error is bomb.error
    else:
        assert bomb.error in causes(error)
