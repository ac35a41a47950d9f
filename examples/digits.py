"""The data and the network of the short examples: a small one that knows the handwritten digits 0 to 4.

Nothing is downloaded: the digits come with the package. Replace this by your own model and data.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from retrainscope.data import load_mnist

__all__ = ["Pair", "accuracy", "digits", "fit", "network"]

Pair = tuple[Tensor, Tensor]


def digits(classes: range, *, start: int = 0, n: int = 50, test: bool = False) -> Pair:
    """Take n images of each digit, of shape (n_samples, 1, 28, 28) in [0, 1], and their labels."""
    mnist = load_mnist()
    images, labels = (mnist.test_images, mnist.test_labels) if test else (mnist.train_images, mnist.train_labels)
    X, y = torch.from_numpy(images), torch.from_numpy(labels)
    rows = torch.cat([torch.nonzero(y == digit)[start : start + n, 0] for digit in classes])
    return X[rows], y[rows]


def network() -> nn.Module:
    """Train a convolutional network on the digits 0 to 4."""
    torch.manual_seed(0)
    parts = {
        **{"conv1": nn.Conv2d(1, 8, 5, stride=2), "norm1": nn.BatchNorm2d(8), "relu1": nn.ReLU()},
        **{"conv2": nn.Conv2d(8, 16, 3, stride=2), "norm2": nn.BatchNorm2d(16), "relu2": nn.ReLU()},
        **{"flatten": nn.Flatten(), "fc1": nn.Linear(16 * 25, 64), "relu3": nn.ReLU(), "dropout": nn.Dropout(0.2)},
        "head": nn.Linear(64, 5),
    }
    model = nn.Sequential(OrderedDict(parts))
    fit(model, digits(range(5), n=300), list(model.parameters()), epochs=5)
    return model


def fit(model: nn.Module, data: Pair, parameters: list[nn.Parameter], *, epochs: int = 20, lr: float = 2e-3) -> None:
    """Train some parameters: the loop that you have already."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0])).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Pair) -> float:
    """Return the share of samples that are classified right."""
    return float((model.eval()(data[0]).argmax(dim=1) == data[1]).float().mean())
