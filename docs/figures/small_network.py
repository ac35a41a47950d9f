"""What the figures of these pages are drawn of: a small network that knows the digits 0 to 4, and digits."""

from functools import cache

import torch
from torch import Tensor, nn

from retrainscope.data import load_mnist

__all__ = ["KNOWN", "UNKNOWN", "digits", "network"]

KNOWN, UNKNOWN = range(5), range(5, 10)


def digits(classes: range, *, start: int = 0, n: int = 50, test: bool = False) -> tuple[Tensor, Tensor]:
    """Take n images of each digit, of shape (n_samples, 1, 28, 28) in [0, 1], and their labels."""
    mnist = load_mnist()
    images, labels = (mnist.test_images, mnist.test_labels) if test else (mnist.train_images, mnist.train_labels)
    X, y = torch.from_numpy(images), torch.from_numpy(labels)
    rows = torch.cat([torch.nonzero(y == digit)[start : start + n, 0] for digit in classes])
    return X[rows], y[rows]


@cache
def network() -> nn.Module:
    """Train two convolutions and a linear layer on the digits 0 to 4; once for all figures that one process draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("conv1", nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU()))
        model.add_module("conv2", nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()))
        model.add_module("fc1", nn.Sequential(nn.Flatten(), nn.Linear(400, 64), nn.ReLU()))
        model.add_module("head", nn.Linear(64, 5))
        X, y = digits(KNOWN, n=300)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(5):
            for rows in torch.randperm(len(X)).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
                optimizer.step()
    return model.eval()
