"""The paper's MNIST study: a network that knows the digits 0-4 meets the digits 5-9."""

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from retrainscope.advice import Recommendation
from retrainscope.batches import Label
from retrainscope.data import Mnist
from retrainscope.decoding import LayerDecoderProbe
from retrainscope.finetuning import train_only
from retrainscope.inversion import GradientInverter
from retrainscope.progress import progress_bar
from retrainscope.recommendation import recommend_layers
from retrainscope.scores import LayerScores
from retrainscope.spread import ActivationSpread

__all__ = [
    "KNOWN",
    "LAYERS",
    "N_CHECK",
    "POLICIES",
    "UNKNOWN",
    "Pictures",
    "SeedResult",
    "Split",
    "few_of",
    "images_of",
    "mirrored_decoder",
    "paper_network",
    "run_seed",
    "split_roles",
    "trained",
]

KNOWN, UNKNOWN = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
LAYERS = ("conv1", "conv2", "fc1")
# What is retrained on top of a new head, from the top down.
POLICIES = {"head": 3, "head + fc1": 2, "head + fc1 + conv2": 1, "everything": 0}

_EPOCHS, _BATCH = 15, 32
_STEPS, _PASSES = 300, 5  # of retraining: so many steps, but at least so many passes over the samples
N_CHECK = 50  # samples of each unknown digit for the advice and its check

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class SeedResult:
    """What one run of the study found.

    Attributes
    ----------
    seed : int
    accuracy : float
        Of the network on test digits 0-4.
    spread, known_spread : LayerScores
        Experiment 1 for the unknown digits, and for test digits 0-4 as if they were unknown.
    neighbours : dict of layer to dict of digit to digit
        For each unknown digit the known one whose mean activation is nearest.
    inversion, decoding : LayerScores
        Experiments 2 and 3.
    advice, null : Recommendation
        For 50 samples of each unknown digit, and for test digits 0-4 as if they were unknown.
    check : dict of str to float
        Accuracy on test digits 5-9 after retraining on those samples: the head, what was advised, everything.
    sweep : dict of task to dict of policy to dict of samples a class to float
        Accuracy on test digits after retraining.
    brightness : ndarray of shape (10,)
        Mean squared brightness of each test digit's images, summed over pixels: what no network is needed for.
    seconds : dict of str to float
        What each part took.
    """

    seed: int
    accuracy: float
    spread: LayerScores
    known_spread: LayerScores
    neighbours: dict[str, dict[Label, Label]]
    inversion: LayerScores
    decoding: LayerScores
    advice: Recommendation
    null: Recommendation
    check: dict[str, float]
    sweep: dict[str, dict[str, dict[int, float]]]
    brightness: NDArray[np.float64]
    seconds: dict[str, float]


@dataclass(frozen=True, eq=False)
class Pictures:
    """What one run shows: maps, originals and reconstructions.

    Attributes
    ----------
    map_labels : ndarray of shape (n_points,)
    maps : dict of layer to ndarray of shape (n_points, 2)
    originals : ndarray of shape (10, 28, 28)
        One test image a digit.
    rows : dict of str to ndarray of shape (10, 28, 28)
        Their reconstructions, by method and layer.
    losses : dict of str to ndarray
        Loss curves, by method and layer.
    """

    map_labels: NDArray[np.int64]
    maps: dict[str, NDArray[np.float64]]
    originals: NDArray[np.float64]
    rows: dict[str, NDArray[np.float64]]
    losses: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Split:
    """Who sees what: nothing that is learnt from, by network, estimator or retraining, is tested on."""

    training: tuple[Tensor, Tensor]  # digits 0-4: the network learns from them
    known: tuple[Tensor, Tensor]  # digits 0-4: the estimators learn from them
    unknown: tuple[Tensor, Tensor]  # digits 5-9: measured, and retrained on
    test: tuple[Tensor, Tensor]  # all digits: accuracies, pictures, and known digits as if unknown


def paper_network(n_classes: int = 5) -> nn.Sequential:
    """Build the paper's network: two convolutional layers and two fully connected ones."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Sequential(nn.Conv2d(1, 10, kernel_size=5), nn.MaxPool2d(2), nn.ReLU()),
            conv2=nn.Sequential(nn.Conv2d(10, 20, kernel_size=5), nn.MaxPool2d(2), nn.ReLU()),
            fc1=nn.Sequential(nn.Flatten(), nn.Linear(320, 50), nn.ReLU()),
            fc2=nn.Linear(50, n_classes),
        )
    )


def mirrored_decoder(activation_shape: tuple[int, ...], _input_shape: tuple[int, ...]) -> nn.Sequential:
    """Build the decoder of a layer of `paper_network` as the mirror of what lies below it.

    The paper shows its decoders as pictures only; each undoes one step of the network after the other.
    """
    steps: list[nn.Module] = []
    if activation_shape == (50,):
        steps += [nn.Linear(50, 320), nn.ReLU(), nn.Unflatten(1, (20, 4, 4))]
    if activation_shape != (10, 12, 12):
        steps += [nn.Upsample(scale_factor=2), nn.ConvTranspose2d(20, 10, kernel_size=5), nn.ReLU()]
    return nn.Sequential(*steps, nn.Upsample(scale_factor=2), nn.ConvTranspose2d(10, 1, kernel_size=5))


def run_seed(
    mnist: Mnist, seed: int, *, budgets: Sequence[int], progress: bool | None, say: Progress
) -> tuple[SeedResult, Pictures]:
    """Run the whole study once.

    Parameters
    ----------
    mnist : Mnist
    seed : int
        For everything that is drawn.
    budgets : sequence of int
        Samples a class for the sweep.
    progress : bool or None
        None shows bars on a terminal only.
    say : callable (str) -> None
        Told what happens next.

    Returns
    -------
    (SeedResult, Pictures)
    """
    clock = _Clock(say)
    split = split_roles(mnist)
    clock.start("training the network on digits 0-4")
    network = trained(split.training, seed)
    known_test, unknown_test = (images_of(split.test, digits) for digits in (KNOWN, UNKNOWN))
    accuracy = _accuracy(network, *known_test)

    common: dict[str, Any] = {"random_state": seed, "progress": progress}
    clock.start("experiment 1: spread of the activations")
    spread = ActivationSpread(network, **common).fit(split.known)
    known_spread = spread.score_layers(known_test)
    unknown_spread = spread.score_layers(split.unknown)
    neighbours = spread.neighbours_
    clock.start("experiment 2: gradient inversion")
    inverter = GradientInverter(network, samples_per_class=10, **common).fit(split.known)
    inversion = inverter.score_layers(split.unknown)
    clock.start("experiment 3: decoders")
    probe = LayerDecoderProbe(network, decoder=mirrored_decoder, **common).fit(split.known)
    decoding = probe.score_layers(split.unknown)

    clock.start("the advice and its check")
    few = few_of(split.unknown, UNKNOWN, N_CHECK)
    advice = recommend_layers(network, split.known, few, **common)
    null = recommend_layers(network, split.known, known_test, **common)
    check = _check(network, advice, few, unknown_test, seed)
    clock.start("the sweep: retrain and see")
    sweep = _sweep(network, split, budgets, seed, progress)
    clock.start("pictures")
    pictures = _pictures(split, spread, inverter, probe)
    clock.stop()
    result = SeedResult(
        seed=seed,
        accuracy=accuracy,
        spread=unknown_spread,
        known_spread=known_spread,
        neighbours=neighbours,
        inversion=inversion,
        decoding=decoding,
        advice=advice,
        null=null,
        check=check,
        sweep=sweep,
        brightness=_brightness(*split.test),
        seconds=clock.seconds,
    )
    return result, pictures


class _Clock:
    """Says what starts and keeps what it took."""

    def __init__(self, say: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._say, self._what, self._since = say, "", 0.0

    def start(self, what: str) -> None:
        self.stop()
        self._say(what)
        self._what, self._since = what, time.perf_counter()

    def stop(self) -> None:
        if self._what:
            self.seconds[self._what] = time.perf_counter() - self._since


def split_roles(mnist: Mnist) -> Split:
    """Give every image its role."""
    train = torch.from_numpy(mnist.train_images), torch.from_numpy(mnist.train_labels)
    test = torch.from_numpy(mnist.test_images), torch.from_numpy(mnist.test_labels)
    first, second = [], []
    for digit in KNOWN:
        rows = torch.nonzero(train[1] == digit)[:, 0]
        first.append(rows[: 2 * len(rows) // 3])
        second.append(rows[2 * len(rows) // 3 :])
    halves = [torch.cat(rows).sort().values for rows in (first, second)]
    return Split(
        training=(train[0][halves[0]], train[1][halves[0]]),
        known=(train[0][halves[1]], train[1][halves[1]]),
        unknown=images_of(train, UNKNOWN),
        test=test,
    )


def images_of(data: tuple[Tensor, Tensor], digits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Take all samples of some digits."""
    rows = torch.isin(data[1], torch.tensor(digits))
    return data[0][rows], data[1][rows]


def few_of(data: tuple[Tensor, Tensor], digits: Sequence[int], n: int) -> tuple[Tensor, Tensor]:
    """Take the first n samples of each digit."""
    rows = torch.cat([torch.nonzero(data[1] == digit)[:n, 0] for digit in digits])
    return data[0][rows], data[1][rows]


def trained(training: tuple[Tensor, Tensor], seed: int) -> nn.Sequential:
    """Train the paper's network on the known digits."""
    torch.manual_seed(seed)
    network, (X, y) = paper_network(), training
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(_EPOCHS):
        for rows in torch.split(torch.randperm(len(X), generator=order), 2 * _BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(X[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return network


def _retrain(module: nn.Module, parameters: list[nn.Parameter], X: Tensor, y: Tensor, seed: int) -> None:
    """Retrain some parameters, for as many steps whichever they are."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    rows = torch.empty(0, dtype=torch.long)
    for _ in range(max(_STEPS, _PASSES * len(X) // _BATCH)):
        if len(rows) < min(_BATCH, len(X)):
            rows = torch.cat([rows, torch.randperm(len(X), generator=order)])
        batch, rows = rows[:_BATCH], rows[_BATCH:]
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def _accuracy(network: nn.Module, X: Tensor, y: Tensor) -> float:
    return float((network(X).argmax(dim=1) == y).float().mean())


def _with_new_head(network: nn.Sequential, X: Tensor, y: Tensor) -> nn.Sequential:
    """Copy the network's layers under a new head that is fitted to convergence, the others frozen.

    Every policy starts from there (linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054), so
    that what retraining a layer gains is not what the head has yet to learn.
    """
    renewed = paper_network(int(y.max()) + 1)
    kept = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc2.")}
    renewed.load_state_dict(kept, strict=False)
    with torch.no_grad():
        features = renewed[: POLICIES["head"]](X)
        head = LogisticRegression(max_iter=5000).fit(features.numpy(), y.numpy())
        fitted = {"weight": torch.from_numpy(head.coef_), "bias": torch.from_numpy(head.intercept_)}
        renewed.get_submodule("fc2").load_state_dict(fitted)
    return renewed


def _brightness(X: Tensor, y: Tensor) -> NDArray[np.float64]:
    squares = X.double().square().flatten(1).sum(dim=1)
    return np.array([float(squares[y == digit].mean()) for digit in range(10)])


def _check(
    network: nn.Sequential,
    advice: Recommendation,
    few: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    seed: int,
) -> dict[str, float]:
    """Retrain the head, what was advised and everything on the few samples, and test."""
    choices: dict[str, Recommendation | list[str]] = {"advised": advice, "everything": [*LAYERS, "fc2"]}
    X, y, test_X, test_y = few[0], few[1] - UNKNOWN[0], test[0], test[1] - UNKNOWN[0]
    with_head = _with_new_head(network, X, y)
    accuracies = {"head": _accuracy(with_head, test_X, test_y)}
    for name, layers in choices.items():
        renewed = copy.deepcopy(with_head)
        with train_only(renewed, layers) as parameters:
            _retrain(renewed, parameters, X, y, seed)
        accuracies[name] = _accuracy(renewed, test_X, test_y)
    return accuracies


def _sweep(
    network: nn.Sequential, split: Split, budgets: Sequence[int], seed: int, progress: bool | None
) -> dict[str, dict[str, dict[int, float]]]:
    """Add each unknown digit alone, and all of them, to the known ones; retrain by every policy."""
    tasks = {f"0-4 and {digit}": (*KNOWN, digit) for digit in UNKNOWN} | {"0-9": (*KNOWN, *UNKNOWN)}
    pool = torch.cat([split.training[0], split.unknown[0]]), torch.cat([split.training[1], split.unknown[1]])
    sweep: dict[str, dict[str, dict[int, float]]] = {}
    total = len(tasks) * len(POLICIES) * len(budgets)
    with progress_bar(what="retraining", progress=progress, total=total) as bar:
        for task, digits in tasks.items():
            sweep[task] = {policy: {} for policy in POLICIES}
            test = images_of(split.test, digits)
            place = torch.zeros(10, dtype=torch.long)
            place[list(digits)] = torch.arange(len(digits))
            for budget in budgets:
                X, y = few_of(pool, digits, budget)
                with_head = _with_new_head(network, X, place[y])
                for policy, start in POLICIES.items():
                    renewed = copy.deepcopy(with_head)
                    # What lies below the lowest retrained layer never changes: run through it once.
                    below, above = renewed[:start], renewed[start:]
                    with torch.no_grad():
                        features, test_features = below(X), below(test[0])
                    if policy != "head":
                        _retrain(above, list(above.parameters()), features, place[y], seed)
                    sweep[task][policy][budget] = _accuracy(above, test_features, place[test[1]])
                    bar.update()
    return sweep


def _pictures(split: Split, spread: ActivationSpread, inverter: GradientInverter, probe: LayerDecoderProbe) -> Pictures:
    mapped = few_of(split.test, (*KNOWN, *UNKNOWN), 100)
    shown, _ = few_of(split.test, (*KNOWN, *UNKNOWN), 1)
    rows, losses = {}, {}
    inverted = {
        name: inverter.reconstruct(shown, LAYERS, control=control)
        for name, control in (("", False), (", untrained", True))
    }
    for layer in LAYERS:
        for name, found in inverted.items():
            rows[f"inversion of {layer}{name}"] = found[layer].inputs
            losses[f"inversion of {layer}{name}"] = found[layer].losses.mean(dim=0)
        rows[f"decoder of {layer}"] = probe.reconstruct(shown, layer)
    for place, layer in enumerate(LAYERS):
        losses[f"decoder of {layer}"] = torch.from_numpy(probe.losses_[:, place])
    return Pictures(
        map_labels=mapped[1].numpy(),
        maps={layer: spread.embed(mapped[0], layer) for layer in LAYERS},
        originals=shown[:, 0].double().numpy(),
        rows={name: images[:, 0].double().numpy() for name, images in rows.items()},
        losses={name: curve.double().numpy() for name, curve in losses.items()},
    )
