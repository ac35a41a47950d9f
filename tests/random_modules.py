"""Random small modules made of most of what torch networks are made of, with data for them: `recipes` and `build`.

What hypothesis draws is a recipe: plain data, which it can shrink and print. ``build(Recipe(...))``, pasted from a
failure, makes the same model again, bit for bit.
"""

import random
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

VOCABULARY = 7
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
MEAN_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
FORMS = ("tensor", "tuple", "list", "dict", "namedtuple", "mapping", "dataclass", "nested")
NAMES = ("a", "fc", "block", "norm", "head_", "0", "läyer", "weight_")


class Flow(NamedTuple):
    """What flows between two parts: a vector, tokens (n_tokens, n) or a map (channels, ...), and one's shape."""

    kind: str
    shape: tuple[int, ...]


Inner = Callable[[Flow], tuple[nn.Module, Flow]]


@dataclass(frozen=True)
class Part:
    """One part of a recipe; what it becomes depends on what flows in."""

    kind: str
    name: str
    options: dict[str, Any]
    inner: tuple["Part", ...] = ()


# What a model returns


Pair = namedtuple("Pair", ["index", "hidden"])


class Mapped(OrderedDict):
    """Like the ``ModelOutput`` of Hugging Face."""


@dataclass
class Record:
    """A return value that is no collection."""

    hidden: Tensor


def packed(x: Tensor, form: str) -> Any:
    """Put a tensor into one of the forms that modules return."""
    index = torch.arange(len(x))  # integers come first, to be told from what counts
    return {
        "tensor": x,
        "tuple": (index, x),
        "list": [x, None],
        "dict": {"index": index, "hidden": x},
        "namedtuple": Pair(index, x),
        "mapping": Mapped(other=x.detach() + 1, last_hidden_state=x),
        "dataclass": Record(x),
        "nested": ((index, {"hidden": x}), None),
    }[form]


def unpacked(output: Any, form: str) -> Tensor:
    """Return the tensor that was packed."""
    return {
        "tensor": lambda: output,
        "tuple": lambda: output[1],
        "list": lambda: output[0],
        "dict": lambda: output["hidden"],
        "namedtuple": lambda: output.hidden,
        "mapping": lambda: output["last_hidden_state"],
        "dataclass": lambda: output.hidden,
        "nested": lambda: output[0][1]["hidden"],
    }[form]()


# Modules


class Tokens(nn.Module):
    """Turns a vector or a map into tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None] if x.ndim == 2 else x.flatten(2).transpose(1, 2)


class Around(nn.Module):
    """Runs an inner module, with `how` around it; the base of what is more than a chain."""

    def __init__(self, inner: nn.Module, how: Any = None) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Residual(Around):
    """Adds, perhaps in place, also into its own input."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return {"new": torch.add, "output": lambda y, x: y.add_(x), "input": lambda y, x: x.add_(y)}[self.how](inner, x)


class Twice(Around):
    """Runs a module twice, perhaps by two names."""

    def __init__(self, inner: nn.Module, how: Any) -> None:
        super().__init__(inner, how)
        if how == "two names":
            self.again = inner

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "again", self.inner)(self.inner(x))


class Packed(Around):
    """Returns a tensor in one of the forms."""

    def forward(self, x: Tensor) -> Any:
        return packed(self.inner(x), self.how)


class Unpacked(Around):
    """Takes the tensor out again."""

    def forward(self, x: Tensor) -> Tensor:
        return unpacked(self.inner(x), self.how)


class Checkpointed(Around):
    """Forgets what is inside and computes it again for the gradient; `how` tells whether reentrantly."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.how)


class Mixed(Around):
    """A recurrent module, attention or an encoder layer, which may want the samples second."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.how else x.transpose(0, 1)
        x = self.inner(x, x, x)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
        x = x[0] if isinstance(x, tuple) else x
        return x if self.how else x.transpose(0, 1)


class Marked(Around):
    """Has a class token and positions of its own, outside any child."""

    def __init__(self, inner: nn.Module, flow: Flow) -> None:
        super().__init__(inner)
        n_tokens, n = flow.shape
        self.token = nn.Parameter(torch.randn(1, 1, n))
        self.position = nn.Parameter(torch.randn(1, n_tokens + 1, n))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position)


class Scaled(Around):
    """Has a weight of its own beside its child, and a child that is never called."""

    def __init__(self, inner: nn.Module, how: Any = None) -> None:
        super().__init__(inner, how)
        self.scale, self.spare = nn.Parameter(torch.ones(1)), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)


class Counting(nn.Module):
    """Counts its calls in a buffer, in evaluation mode too."""

    def __init__(self, how: str, *, persistent: bool) -> None:
        super().__init__()
        self.how, self.persistent = how, persistent
        if how != "late":
            self.register_buffer("calls", torch.zeros(2), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.calls += 1
        elif self.how == "data":  # behind the back of the version counter
            self.calls.data.add_(1)
        elif self.how == "another" or hasattr(self, "calls"):
            self.calls = self.calls + 1
        else:
            self.register_buffer("calls", torch.ones(2), persistent=self.persistent)
        return x


class Noisy(nn.Module):
    """Draws from a global generator, in evaluation mode too."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        draws = {"torch": lambda: float(torch.rand(())), "numpy": np.random.rand, "python": random.random}
        return x * (1 + 0.01 * draws[self.source]())


class Net(nn.Module):
    """The whole: an embedding for token ids, a class token and positions of its own, a body and a head."""

    def __init__(self, stem: nn.Module | None, body: nn.Module, head: nn.Module, own: Flow | None, form: str) -> None:
        super().__init__()
        self.stem, self.body, self.head, self.form = stem, body, head, form
        if own is not None:
            self.token = nn.Parameter(torch.randn(1, 1, own.shape[1]))
            self.position = nn.Parameter(torch.randn(1, own.shape[0] + 1, own.shape[1]))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        x = x if self.stem is None else self.stem(x)
        if extra is not None:
            x = x * (1 + extra.to(x.dtype).mean(dim=1).reshape(-1, *[1] * (x.ndim - 1)))
        if hasattr(self, "token"):
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return packed(self.head(self.body(x).flatten(1)), self.form)


# Parts: from what flows in, to a module and what flows out


class _Kind(NamedTuple):
    build: Callable[..., tuple[nn.Module, Flow]]
    options: dict[str, tuple[Any, ...]]
    holds: bool


KINDS: dict[str, _Kind] = {}


def part(*, holds: bool = False, **options: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Enter a builder among the kinds, with the values that its options may have, and whether it holds parts."""

    def enter(build: Any) -> Any:
        KINDS[build.__name__] = _Kind(build, options, holds)
        return build

    return enter


def layer(flow: Flow, width: int, *, bias: bool = True) -> tuple[nn.Module, Flow]:
    """Return a convolution for a map and a linear layer for anything else."""
    if flow.kind == "map":
        made = CONV[len(flow.shape) - 1](flow.shape[0], width, 3, padding=1, bias=bias)
        return made, Flow("map", (width, *flow.shape[1:]))
    return nn.Linear(flow.shape[-1], width, bias=bias), Flow(flow.kind, (*flow.shape[:-1], width))


def tokens(flow: Flow) -> tuple[list[nn.Module], Flow]:
    """Return what makes tokens of anything."""
    if flow.kind == "tokens":
        return [], flow
    return [Tokens()], Flow("tokens", (prod(flow.shape[1:]), flow.shape[0]))


def back(inner: nn.Module, flow: Flow, goal: Flow) -> nn.Module:
    """Let an inner module give what the goal says."""
    if flow == goal:
        return inner
    return nn.Sequential(
        inner, nn.Flatten(), nn.Linear(prod(flow.shape), prod(goal.shape)), nn.Unflatten(1, goal.shape)
    )


@part(width=(2, 4, 5), bias=(True, False), by=("itself", "itself", "weight norm", "spectral norm"))
def weighted(flow: Flow, _: Inner, width: int, bias: bool, by: str) -> tuple[nn.Module, Flow]:
    made, flow = layer(flow, width, bias=bias)
    return {"itself": lambda made: made, "weight norm": weight_norm, "spectral norm": spectral_norm}[by](made), flow


@part(of=("batch", "bare batch", "group", "layer"))
def norm(flow: Flow, _: Inner, of: str) -> tuple[nn.Module, Flow]:
    n_axes = len(flow.shape) - 1 if flow.kind == "map" else 1
    makers = {
        "batch": lambda: BATCH_NORM[n_axes](flow.shape[0]),
        "bare batch": lambda: BATCH_NORM[n_axes](flow.shape[0], affine=False),
        "group": lambda: nn.GroupNorm(1, flow.shape[0]),
        "layer": lambda: nn.LayerNorm(flow.shape[-1]),
    }
    return makers[of](), flow


@part(of=("relu", "relu in place", "gelu", "dropout"))
def function(flow: Flow, _: Inner, of: str) -> tuple[nn.Module, Flow]:
    return {
        "relu": nn.ReLU(), "relu in place": nn.ReLU(inplace=True), "gelu": nn.GELU(), "dropout": nn.Dropout(0.3),
    }[of], flow  # fmt: skip


@part(of=("max", "mean"))
def pool(flow: Flow, _: Inner, of: str) -> tuple[nn.Module, Flow]:
    if flow.kind != "map" or min(flow.shape[1:]) < 2:
        return nn.Identity(), flow
    made = {"max": MAX_POOL, "mean": MEAN_POOL}[of][len(flow.shape) - 1](2)
    return made, Flow("map", (flow.shape[0], *(side // 2 for side in flow.shape[1:])))


@part(width=(2, 3))
def tied(flow: Flow, _: Inner, width: int) -> tuple[nn.Module, Flow]:
    start, flow = layer(flow, width)
    first, second = layer(flow, width)[0], layer(flow, width)[0]
    second.weight = first.weight
    return nn.Sequential(start, first, nn.ReLU(), second), flow


@part(of=("LSTM", "GRU"), batch_first=(True, False), both_ways=(False, True))
def recurrent(flow: Flow, _: Inner, of: str, batch_first: bool, both_ways: bool) -> tuple[nn.Module, Flow]:
    start, flow = tokens(flow)
    made = {"LSTM": nn.LSTM, "GRU": nn.GRU}[of](flow.shape[1], 2, batch_first=batch_first, bidirectional=both_ways)
    return nn.Sequential(*start, Mixed(made, batch_first)), Flow("tokens", (flow.shape[0], 4 if both_ways else 2))


@part(batch_first=(True, False), many_heads=(True, False))
def attention(flow: Flow, _: Inner, batch_first: bool, many_heads: bool) -> tuple[nn.Module, Flow]:
    start, flow = tokens(flow)
    n = flow.shape[1]
    made = Mixed(nn.MultiheadAttention(n, n if many_heads else 1, batch_first=batch_first), batch_first)
    return nn.Sequential(*start, Residual(made, "new")), flow


@part(batch_first=(True, False), norm_first=(True, False))
def encoder(flow: Flow, _: Inner, batch_first: bool, norm_first: bool) -> tuple[nn.Module, Flow]:
    start, flow = tokens(flow)
    made = nn.TransformerEncoderLayer(flow.shape[1], 1, 3, batch_first=batch_first, norm_first=norm_first)
    return nn.Sequential(*start, Mixed(made, batch_first)), flow


@part(how=("in place", "data", "another", "late"), persistent=(True, False))
def counting(flow: Flow, _: Inner, how: str, persistent: bool) -> tuple[nn.Module, Flow]:
    return Counting(how, persistent=persistent), flow


@part(source=("torch", "numpy", "python"))
def noisy(flow: Flow, _: Inner, source: str) -> tuple[nn.Module, Flow]:
    return Noisy(source), flow


@part(holds=True)
def nest(flow: Flow, inner: Inner) -> tuple[nn.Module, Flow]:
    return inner(flow)


@part(holds=True, into=("new", "output", "input"))
def residual(flow: Flow, inner: Inner, into: str) -> tuple[nn.Module, Flow]:
    return Residual(back(*inner(flow), flow), into), flow


@part(holds=True, by=("one name", "two names"))
def twice(flow: Flow, inner: Inner, by: str) -> tuple[nn.Module, Flow]:
    return Twice(back(*inner(flow), flow), by), flow


@part(holds=True, form=FORMS[1:])
def compound(flow: Flow, inner: Inner, form: str) -> tuple[nn.Module, Flow]:
    made, flow = inner(flow)
    return Unpacked(Packed(made, form), form), flow


@part(holds=True)
def marked(flow: Flow, inner: Inner) -> tuple[nn.Module, Flow]:
    start, flow = tokens(flow)
    made, after = inner(Flow("tokens", (flow.shape[0] + 1, flow.shape[1])))
    return nn.Sequential(*start, Marked(made, flow)), after


@part(holds=True)
def scaled(flow: Flow, inner: Inner) -> tuple[nn.Module, Flow]:
    made, flow = inner(flow)
    return Scaled(made), flow


@part(holds=True, reentrant=(False, True))
def checkpointed(flow: Flow, inner: Inner, reentrant: bool) -> tuple[nn.Module, Flow]:
    made, flow = inner(flow)
    return Checkpointed(made, reentrant), flow


def chain(parts: Iterable[Part], flow: Flow) -> tuple[nn.Sequential, Flow]:
    """Build parts one after the other; a name that is taken gets a number."""
    built = nn.Sequential()
    for each in parts:
        kind = KINDS[each.kind]
        module, flow = kind.build(flow, lambda inner, each=each: chain(each.inner, inner), **each.options)
        built.add_module(each.name if each.name not in built._modules else f"{each.name}{len(built)}", module)
    return built, flow


# What a user has done to a model


class Hook:
    """A hook of the user's, which does nothing."""

    def __call__(self, *_: Any) -> None:
        return None


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda module: module.register_forward_hook(Hook()),
    "forward, first": lambda module: module.register_forward_hook(Hook(), prepend=True),
    "forward, with keywords": lambda module: module.register_forward_hook(Hook(), with_kwargs=True),
    "forward, always": lambda module: module.register_forward_hook(Hook(), always_call=True),
    "before": lambda module: module.register_forward_pre_hook(Hook()),
    "before, with keywords": lambda module: module.register_forward_pre_hook(Hook(), with_kwargs=True),
    "backward": lambda module: module.register_full_backward_hook(Hook()),
    "before backward": lambda module: module.register_full_backward_pre_hook(Hook()),
    "old backward": lambda module: module.register_backward_hook(Hook()),
}


def hook(module: nn.Module, kind: str) -> None:
    """Set a hook of the user's, unless torch refuses it beside another."""
    if not ("backward" in kind and module._backward_hooks):
        HOOKS[kind](module)


# Recipes


@dataclass(frozen=True)
class Recipe:
    """A model and its data; places count modules or parameters, round and round."""

    flow: Flow
    parts: tuple[Part, ...]
    ids: bool = False
    plain: bool = False  # the root is an nn.Sequential
    own_token: bool = False
    form: str = "tensor"
    dtype: torch.dtype = torch.float32
    training: bool = True
    otherwise: tuple[int, ...] = ()  # modules in the other mode
    frozen: tuple[int, ...] = ()
    with_gradient: tuple[int, ...] = ()
    hooks: tuple[tuple[str, int], ...] = ()
    keywords: tuple[str, ...] = ()
    labelled: bool = True
    loader: bool = False
    n_samples: int = 12
    n_classes: int = 2
    seed: int = 0


@dataclass
class Case:
    """A built recipe."""

    model: nn.Module
    known: Any
    unknown: Any
    inputs: Tensor | dict[str, Tensor]
    input_layer: str | None
    tensors: list[Tensor] = field(default_factory=list)  # all that the data is made of

    def call(self, n_samples: int) -> Any:
        """Call the model as a user does."""
        if isinstance(self.inputs, dict):
            return self.model(**{key: tensor[:n_samples].clone() for key, tensor in self.inputs.items()})
        return self.model(self.inputs[:n_samples].clone())


def build(recipe: Recipe) -> Case:
    """Make the model and the data."""
    torch.manual_seed(recipe.seed)
    model = _model(recipe).to(recipe.dtype)
    modules, parameters = list(model.modules()), list(model.parameters())
    model.train(recipe.training)
    for place in recipe.otherwise:
        modules[place % len(modules)].train(not recipe.training)
    for place in recipe.frozen:
        parameters[place % len(parameters)].requires_grad_(False)
    for place in recipe.with_gradient:
        parameter = parameters[place % len(parameters)]
        parameter.grad = torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old hooks are deprecated
        for kind, place in recipe.hooks:
            hook(modules[place % len(modules)], kind)
    known, unknown = _inputs(recipe), _inputs(recipe)
    sides = [side if isinstance(side, dict) else {"x": side} for side in (known, unknown)]
    own = known if recipe.keywords else known.to(recipe.dtype if known.is_floating_point() else None)
    if isinstance(own, dict):
        own = {k: t.to(recipe.dtype) if t.is_floating_point() else t for k, t in own.items()}
    return Case(
        model=model,
        known=_with_labels(known, recipe),
        unknown=_with_labels(unknown, recipe),
        inputs=own,
        input_layer="stem" if recipe.ids else None,
        tensors=[tensor for side in sides for tensor in side.values()],
    )


def _model(recipe: Recipe) -> nn.Module:
    flow = recipe.flow
    stem = nn.Embedding(VOCABULARY, flow.shape[-1]) if recipe.ids else None
    own = flow if recipe.own_token and flow.kind == "tokens" and not recipe.plain else None
    body, after = chain(recipe.parts, flow if own is None else Flow("tokens", (flow.shape[0] + 1, flow.shape[1])))
    head = nn.Linear(prod(after.shape), 2)
    if recipe.plain:
        children = {} if stem is None else {"stem": stem}
        return nn.Sequential(OrderedDict(children | body._modules | {"flatten": nn.Flatten(), "output": head}))
    return Net(stem, body, head, own, recipe.form)


def _inputs(recipe: Recipe) -> Any:
    n = recipe.n_samples
    x = torch.randint(VOCABULARY, (n, recipe.flow.shape[0])) if recipe.ids else torch.randn(n, *recipe.flow.shape)
    if not recipe.keywords:
        return x
    extras = {"extra": torch.randn(n, 2), "integer extra": torch.randint(2, (n, 2))}
    more = [extras[key] for key in recipe.keywords if key != "x"]
    return {"x": x, "extra": more[0]} if more else {"x": x}


def _with_labels(inputs: Any, recipe: Recipe) -> Any:
    labels = torch.arange(recipe.n_samples) % recipe.n_classes
    if recipe.loader and not isinstance(inputs, dict):
        dataset = TensorDataset(inputs, labels) if recipe.labelled else TensorDataset(inputs)
        return DataLoader(dataset, batch_size=5, shuffle=True)
    return (inputs, labels) if recipe.labelled else inputs


def _parts(depth: int) -> st.SearchStrategy[Part]:
    def of(name: str) -> st.SearchStrategy[Part]:
        kind = KINDS[name]
        return st.builds(
            Part,
            st.just(name),
            st.sampled_from(NAMES),
            st.fixed_dictionaries({option: st.sampled_from(values) for option, values in kind.options.items()}),
            st.lists(_parts(depth - 1), min_size=1, max_size=3).map(tuple) if kind.holds else st.just(()),
        )

    return st.one_of(*(of(name) for name, kind in KINDS.items() if depth or not kind.holds))


def _flows() -> st.SearchStrategy[Flow]:
    shapes = {"vector": [(3,), (6,)], "tokens": [(3, 2), (2, 4)], "map": [(1, 6), (2, 5, 4), (2, 3, 3, 3)]}
    return st.sampled_from([Flow(kind, shape) for kind, found in shapes.items() for shape in found])


def recipes() -> st.SearchStrategy[Recipe]:
    """Return the strategy that draws models with their data."""
    places = st.lists(st.integers(0, 30), max_size=4).map(tuple)
    keywords = st.sampled_from([(), (), ("x",), ("x", "extra"), ("x", "integer extra")])
    return st.builds(
        Recipe,
        _flows(),
        st.lists(_parts(2), min_size=2, max_size=4).map(tuple),
        own_token=st.booleans(),
        plain=st.sampled_from([False, False, True]),
        form=st.sampled_from(FORMS),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
        training=st.booleans(),
        otherwise=places,
        frozen=places,
        with_gradient=places,
        hooks=st.lists(st.tuples(st.sampled_from(sorted(HOOKS)), st.integers(0, 30)), max_size=2).map(tuple),
        ids=st.booleans(),
        keywords=keywords,
        labelled=st.sampled_from([True, True, False]),
        loader=st.booleans(),
        n_samples=st.integers(12, 24),
        n_classes=st.integers(2, 3),
        seed=st.integers(0, 9),
    ).map(_possible)


def _possible(recipe: Recipe) -> Recipe:
    """Mend what does not go together: token ids are for tokens, keywords for a root that has them."""
    ids = recipe.ids and recipe.flow.kind == "tokens"
    keywords = () if recipe.plain else recipe.keywords
    return Recipe(**{**vars(recipe), "ids": ids, "keywords": keywords})
