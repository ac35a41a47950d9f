"""Advice made by hand, and a network to train by it that has what training changes unasked: statistics and dropout."""

import math

import torch
from helpers import content_of
from torch import Tensor, nn

import retrainscope as rs


class Block(nn.Module):
    """A linear layer with batch normalisation and dropout."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(n_in, n_out)
        self.norm = nn.BatchNorm1d(n_out)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations."""
        return self.drop(torch.relu(self.norm(self.fc(x))))


class BlockNet(nn.Module):
    """Three blocks, ``"blocks.0"`` and so on, and the head ``"head"``; one parameter is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(4, 8), Block(8, 8), Block(8, 8))
        self.head = nn.Linear(8, 3)
        self.spare = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.blocks(x))


def labelled(n: int = 24) -> tuple[Tensor, Tensor]:
    """Return samples in four dimensions and their classes, of three."""
    return torch.randn(n, 4), torch.arange(n) % 3


def advise(
    model: nn.Module, data: object, layers: tuple[str, ...], measured: list[str], *, head: str = "retrain"
) -> rs.Recommendation:
    """Return advice to retrain these layers, of those measured, and the head."""
    found = rs.find_layers(model, data, layers=measured)
    total = sum(found.n_parameters.values())

    def row(name: str, verdict: str) -> rs.LayerAdvice:
        count = found.n_parameters[name]
        owned = (found.parameters[name], found.buffers[name])
        return rs.LayerAdvice(name, verdict, 0.0, (0.0, 0.0), {}, {}, count, count / total, *owned, math.nan)

    assert set(layers) <= set(found.names)
    return rs.Recommendation(
        layers=layers,
        head=row(found.head, head),
        verdict="undecided" if head == "undecided" else "middle",
        per_class={},
        table=tuple(row(name, "retrain" if name in layers else "keep") for name in found.names),
        scores=(),
        cost={"parameters": 0.5, "backward": 0.5},
        threshold=0.0,
        estimators=(),
        versions={},
    )


def owned(rec: rs.Recommendation) -> tuple[set[str], set[str]]:
    """Return the names of the parameters that the advice trains, and of the buffers that go with them."""
    rows = [row for row in (*rec.table, rec.head) if row.verdict == "retrain"]
    return {name for row in rows for name in row.parameters}, {name for row in rows for name in row.buffers}


def trainable(model: nn.Module) -> set[str]:
    """Return the names of the parameters that get a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def contents(model: nn.Module) -> dict[str, tuple[Tensor, bytes]]:
    """Return every parameter and buffer, and the bytes that it holds."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (tensor, content_of(tensor)) for name, tensor in tensors.items()}


def changed(before: dict[str, tuple[Tensor, bytes]]) -> set[str]:
    """Return the names of the tensors that hold something else now."""
    return {name for name, (tensor, content) in before.items() if content_of(tensor) != content}


def assert_trained_by(rec: rs.Recommendation, model: nn.Module, before: dict[str, tuple[Tensor, bytes]]) -> None:
    """Fail unless the model's trainable parameters are those of the advice, all have changed, and nothing else has."""
    parameters, buffers = owned(rec)
    statistics = {f"{name.rpartition('.')[0]}.num_batches_tracked" for name in buffers if "running_" in name}
    assert trainable(model) == parameters
    moved = changed(before)
    assert moved >= parameters
    assert moved - parameters <= buffers | statistics
