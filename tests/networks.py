"""Tiny networks and data for the tests of the estimators and of what is made of their scores."""

import torch
from torch import Tensor, nn


def classifier(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two measured layers, ``"0"`` and ``"2"``, and the head ``"4"``; untrained, in training mode."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    return net.to(dtype)


def samples(n: int = 60, *, classes: tuple[object, ...] = (0, 1), seed: int = 0) -> tuple[Tensor, list[object]]:
    """Gaussian classes of equal size in four dimensions, parted along the first, in turn."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 4, generator=generator)
    places = torch.arange(n) % len(classes)
    X[:, 0] += 2.0 * places
    return X, [classes[place] for place in places.tolist()]


class TokenNet(nn.Module):
    """Token ids, an embedding, a layer a token, and a head on their mean; measured is ``"mix"``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.mix = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(torch.relu(self.mix(self.embedding(ids))).mean(dim=1))


class Failing(nn.Module):
    """Passes its input on, and raises an error at one of its calls, counted over all copies of it."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.kept, self.at, self.error = ([0],), at, error  # what a module holds itself is given back

    def __deepcopy__(self, memo: dict[int, object]) -> "Failing":
        twin = Failing(self.at, self.error)
        twin.kept = self.kept
        return twin

    @property
    def calls(self) -> list[int]:
        """How often it was called, in a list of one number."""
        return self.kept[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        self.calls[0] += 1
        if self.calls[0] == self.at:
            raise self.error
        return x
