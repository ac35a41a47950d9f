"""Odd modules, as people have them in their own code."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from helpers import Apply
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

# Networks that are the same one written in another way


class Chain(nn.Module):
    """Written plainly: two layers, ``"first"`` and ``"second"``, and a head for vectors of length four."""

    linear: type[nn.Linear] = nn.Linear

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = self.linear(4, 6), self.linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


Pair = namedtuple("Pair", ["index", "hidden"])


@dataclass
class Output(ModelOutput):
    """What models of Hugging Face return."""

    index: Tensor | None = None
    last_hidden_state: Tensor | None = None


class Mapped(Mapping):
    """A mapping of one's own, that is no dict."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items_of = items

    def __getitem__(self, key: str) -> Any:
        return self.items_of[key]

    def __iter__(self) -> Any:
        return iter(self.items_of)

    def __len__(self) -> int:
        return len(self.items_of)


# Integers, as positions, come first and do not count.
FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda i, x: (i, x), lambda out: out[1]),
    "list": (lambda i, x: [x, i], lambda out: out[0]),
    "dict": (lambda i, x: {"index": i, "hidden": x}, lambda out: out["hidden"]),
    "ordered": (lambda i, x: OrderedDict(other=x + 1, logits=x), lambda out: out["logits"]),
    "namedtuple": (Pair, lambda out: out.hidden),
    "ModelOutput": (lambda i, x: Output(i, x), lambda out: out.last_hidden_state),
    "mapping": (lambda i, x: Mapped({"index": i, "hidden": x}), lambda out: out["hidden"]),
    "nested": (lambda i, x: (None, [{"index": i}, (x, x + 1)]), lambda out: out[1][1][0]),
}


class FormLinear(nn.Linear):
    """Returns its output in one of the forms."""

    form = "tuple"

    def forward(self, x: Tensor) -> Any:
        return FORMS[self.form][0](torch.arange(len(x)), super().forward(x))


class InForm(Chain):
    """Its layers return no tensor but something with a tensor in it."""

    linear = FormLinear

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first.form = self.second.form = form
        self.unpack = FORMS[form][1]

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.unpack(self.first(x)))
        return self.head(torch.relu(self.unpack(self.second(h))))


class InPlace(Chain):
    """Writes into what its layers return."""

    def forward(self, x: Tensor) -> Any:
        h = self.second(self.first(x).relu_())
        h.clamp_(min=0)
        return self.head(h)


class IntoInput(Chain):
    """Writes into its own input."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.mul_(3).sub_(1))


class OutOfPlace(Chain):
    """Computes the same as `IntoInput`."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * 3 - 1)


class Checkpointed(Chain):
    """Computes its layers again for the gradient."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Any:
        h = checkpoint(lambda y: torch.relu(self.first(y)), x, use_reentrant=self.use_reentrant)
        h = checkpoint(lambda y: torch.relu(self.second(y)), h, use_reentrant=self.use_reentrant)
        return self.head(h)


class Catching(Chain):
    """Catches whatever goes wrong inside, and begins anew."""

    def forward(self, x: Tensor) -> Any:
        for _ in range(3):
            try:
                return super().forward(x)
            except Exception:
                continue
        return None


class WithLoss(Chain):
    """Returns a scalar loss and the logits, as for training."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {"loss": logits.square().mean(), "logits": logits}


class Keywords(Chain):
    """Takes whatever it is given."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return super().forward(*args, *kwargs.values())


class WithLabels(Chain):
    """Computes a loss only where it gets labels."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        assert labels is None, "the labels must stay outside"
        return super().forward(x)


class Looped(Chain):
    """Calls a list of modules in a loop; only the names differ."""

    def __init__(self) -> None:
        super().__init__()
        head = self.head
        del self.head  # made in the order of use, as the control draws its weights in that order
        self.blocks, self.head = nn.ModuleList([self.first, self.second]), head
        del self.first, self.second

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


class Keyed(Chain):
    """Holds its layers in mappings of mappings; only the names differ."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"body": nn.ModuleDict({"one": self.first, "two": self.second}), "top": self.head})
        del self.first, self.second, self.head

    def forward(self, x: Tensor) -> Any:
        body = self.parts["body"]
        return self.parts["top"](torch.relu(body["two"](torch.relu(body["one"](x)))))


class Delegating(Chain):
    """Is called by another method than forward, as wrappers do."""

    def forward(self, x: Tensor) -> Any:
        return self.predict(x)

    def predict(self, x: Tensor) -> Any:
        """Return the logits."""
        return Chain.forward(self, x)


class AddInPlace(Chain):
    """Adds to what its layers return, in place."""

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        h += 1
        return self.head(torch.relu(self.second(torch.relu(h)).mul_(2)))


class Added(Chain):
    """Computes the same as `AddInPlace`."""

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.second(torch.relu(self.first(x) + 1)) * 2))


class Remembering(Chain):
    """Keeps what it computed in an attribute."""

    def forward(self, x: Tensor) -> Any:
        self.kept = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(self.kept)))


class LateBuffer(Chain):
    """Makes a buffer at its first call, and another one new at every call."""

    def forward(self, x: Tensor) -> Any:
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(6))
        h = torch.relu(self.first(x)) * self.scale
        self.scale = self.scale * 1
        return self.head(torch.relu(self.second(h)))


class SwitchingModes(Chain):
    """Puts itself into evaluation and then into training mode."""

    def forward(self, x: Tensor) -> Any:
        self.eval()
        logits = super().forward(x)
        self.train()
        return logits


class OneByOne(Chain):
    """Runs a layer sample by sample, by vmap."""

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.vmap(lambda h: torch.relu(self.second(h)))(torch.relu(self.first(x))))


class Functional(Chain):
    """Calls a layer with weights that it has computed."""

    def forward(self, x: Tensor) -> Any:
        weights = {name: weight * 1 for name, weight in self.first.named_parameters()}
        h = torch.func.functional_call(self.first, weights, (x,))
        return self.head(torch.relu(self.second(torch.relu(h))))


def parallel_part() -> nn.Module:
    """Return a chain a part of which is parallel."""
    model = Chain()
    model.second = nn.DataParallel(model.second)
    return model


def frozen(model: nn.Module) -> nn.Module:
    """Freeze all weights but the head's, as for fine-tuning."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def made_in_inference_mode() -> nn.Module:
    """Make a model in inference mode, as servers do."""
    with torch.inference_mode():
        return Chain()


class Recurrent(nn.Module):
    """A recurrent layer, the last step of it, and a head; the samples first or second inside."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, bidirectional: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(4, 6, batch_first=batch_first, bidirectional=bidirectional)
        self.mix, self.head = nn.Linear(12 if bidirectional else 6, 5), nn.Linear(5, 2)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        turned = x if self.batch_first else x.transpose(0, 1)
        found = self.rnn(turned)[0]
        last = found[:, -1] if self.batch_first else found[-1]
        return self.head(torch.tanh(self.mix(last)))


class Attending(nn.Module):
    """Attention over tokens, with the samples first or second inside."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.mix, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        turned = x if self.batch_first else x.transpose(0, 1)
        found = self.attention(turned, turned, turned)[0]
        found = found if self.batch_first else found.transpose(0, 1)
        return self.head(torch.tanh(self.mix(found)).mean(dim=1))


def convolutions(**options: Any) -> nn.Module:
    """Two convolutions with batch normalisation and dropout, and a head; in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(48, 2),
    ).to(**options)


class Force(nn.Module):
    """Its layers are a function of a gradient that it computes itself, as models of forces do."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.one, self.head = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            (force,) = torch.autograd.grad(self.energy(x).square().sum(), x, create_graph=True)
        return self.head(torch.tanh(self.one(force)))


class Guarded(Chain):
    """Lets no gradient through its first layer."""

    def __init__(self, guard: Callable[[], Any]) -> None:
        super().__init__()
        self.guard = guard

    def forward(self, x: Tensor) -> Any:
        with self.guard():
            h = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(h)))


def parametrised(name: str) -> nn.Module:
    """Return a chain whose first weight is made from others."""
    model = Chain()
    getattr(parametrizations, name)(model.first)
    return model


def weight_normalised() -> nn.Module:
    """Return a chain with a weight normalised in the old way, by a hook."""
    model = Chain()
    torch.nn.utils.weight_norm(model.first)
    return model


def pruned() -> nn.Module:
    """Return a chain with a mask on a weight, that cuts nothing off."""
    model = Chain()
    prune.identity(model.first, "weight")
    return model


def hooked() -> nn.Module:
    """Return a chain with a hook of the user's on its first layer, that doubles its output."""
    model = Chain()
    model.first.register_forward_hook(lambda _module, _args, output: output * 2)
    return model


class Doubling(Chain):
    """Computes the same as `hooked`, by a module after the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.doubled = Apply(lambda x: x * 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.second(torch.relu(self.doubled(self.first(x))))))


# Networks whose answer is known by hand


class TwoInputs(nn.Module):
    """Takes a picture of the world in two parts, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, *, a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.left(a)) + torch.tanh(self.right(b))
        return self.head(h)


class Positions(nn.Module):
    """A class token and positions that belong to no child, before two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 6, 4))
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x))))[:, 0])


class Tied(nn.Module):
    """Two modules that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Listed(nn.Module):
    """Keeps weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.factors = nn.ParameterList([nn.Parameter(torch.rand(4)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.two(torch.tanh(self.one(x)) * self.factors[0]))
        return self.head(x * self.factors[1])


class Uncalled(nn.Module):
    """Uses the weights of a module without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.lent, self.one, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.lent.weight, self.lent.bias)
        return self.head(torch.tanh(self.one(x)))


class Unused(nn.Module):
    """Has a branch for training that the forward pass never takes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.auxiliary, self.head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        return self.head(h if not self.training else h + self.auxiliary(h).sum())


class Choosing(nn.Module):
    """A module with weights that returns no vector of real numbers, between two layers."""

    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.one, self.choice, self.two = nn.Linear(4, 5), kind(5, 3), nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        choice = self.choice(h).reshape(len(x), 1)
        return self.head(torch.tanh(self.two(h)) + choice)


class Argmax(nn.Linear):
    """Returns the place of the greatest, one a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(dim=1)


class Codes(nn.Linear):
    """Returns whole numbers, several a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argsort(dim=1)[:, :1]


class Scalar(nn.Linear):
    """Returns one number a sample, of shape (n_samples,)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(dim=1)


class Fourier(nn.Linear):
    """Returns complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(super().forward(x))


class ThroughFourier(nn.Module):
    """A layer in the middle returns complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.fourier, self.two, self.head = nn.Linear(4, 5), Fourier(5, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(self.fourier(torch.tanh(self.one(x))).abs())))


class Bagged(nn.Module):
    """Sums up the embeddings of a sample's words."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.one, self.head = nn.EmbeddingBag(10, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.one(self.bag(x))))


class Worded(nn.Module):
    """Token ids, an embedding, layers a token, and a head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.one, self.head = nn.Embedding(10, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.one(self.words(x))).mean(dim=1))


class Recorded(nn.Linear):
    """Returns a dataclass that is no mapping."""

    def forward(self, x: Tensor) -> Any:
        return Record(super().forward(x))


@dataclass
class Record:
    """A return value that is no collection."""

    hidden: Tensor


class ThroughRecord(nn.Module):
    """A layer in the middle returns a dataclass of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.record, self.two, self.head = nn.Linear(4, 5), Recorded(5, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(self.record(torch.tanh(self.one(x))).hidden)))


class MapNet(nn.Module):
    """Convolutions over signals, images or volumes."""

    def __init__(self, conv: Any, channels: int) -> None:
        super().__init__()
        self.one, self.two, self.head = conv(channels, 3, 3, padding=1), conv(3, 4, 3, stride=2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))).flatten(2).mean(dim=2))


class Awake(Chain):
    """Made of lazy modules, that a first batch has given their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LazyLinear(6), nn.LazyLinear(5)
        self(torch.zeros(2, 4))


def transformer(**options: Any) -> nn.Module:
    """Return an encoder of two layers over tokens of four numbers."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, **options), Apply(lambda h: h.mean(dim=1)), nn.Linear(4, 2))


def deep(n_layers: int = 60) -> nn.Module:
    """Return a tower of many linear layers that keeps the size of its input."""
    layers = [nn.Linear(4, 4) for _ in range(n_layers)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*layers, nn.Linear(4, 2))


# What is refused


def scripted() -> nn.Module:
    """Return a chain whose second layer is scripted."""
    model = Chain()
    model.second = torch.jit.script(model.second)
    return model


def traced() -> nn.Module:
    """Return a chain whose second layer is traced."""
    model = Chain()
    model.second = torch.jit.trace(model.second, torch.zeros(2, 6))
    return model


def on_two_devices() -> nn.Module:
    """Return a chain whose head has no content yet."""
    model = Chain()
    model.head.to("meta")
    return model


def quantised() -> nn.Module:
    """Return a chain whose second layer is quantised."""
    return torch.ao.quantization.quantize_dynamic(Chain(), {"second"})


class Again(nn.Module):
    """Runs one layer twice, with another between."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.between, self.after, self.head = (nn.Linear(2, 2, bias=False) for _ in range(4))
        with torch.no_grad():
            for factor, module in zip((2.0, 5.0, 1.0, 1.0), self.children(), strict=True):
                module.weight.copy_(factor * torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.twice(self.between(self.twice(x)))))


class Rolled(nn.Module):
    """Runs one layer three times; `Unrolled` has a module for each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return self.head(x)


class Unrolled(Rolled):
    """Computes the same as `Rolled`, with a module for each of its calls and one for their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.sum = Apply(lambda a, b, c: a + b + c)
        for module in (self.first, self.between, self.last):
            module.load_state_dict(self.cell.state_dict())
        del self.cell

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.between(torch.tanh(a))
        c = self.last(torch.tanh(b))
        self.sum(a, b, c)
        return self.head(torch.tanh(c))
