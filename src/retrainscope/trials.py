"""`LayerSweep`: what retraining by every policy gave."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from retrainscope.exceptions import InvalidDataError
from retrainscope.layers import Layers
from retrainscope.policies import HEAD, NONE, Policies
from retrainscope.saving import check_place, import_pandas, load_json, save_json
from retrainscope.scores import TAILS
from retrainscope.tables import Shown, Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LayerSweep", "Trial", "summarise"]

_N_DRAWS = 400
_ALL_DIVERGED = (
    "Training diverged by every policy. Give smaller learning_rates or, if the model is in half precision, give "
    "model.float()."
)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """One policy with one seed.

    Attributes
    ----------
    hits : ndarray of shape (n_test,), bool
        Which test samples are classified right; None where training diverged with every learning rate.
    known_accuracy : float
        On the known data, afterwards.
    validation : tuple of float
        Accuracy on the validation samples, by learning rate; NaN where training diverged.
    learning_rate : float
        The one chosen.
    seconds : float
    """

    hits: NDArray[np.bool_] | None
    known_accuracy: float
    validation: tuple[float, ...]
    learning_rate: float
    seconds: float

    def to_plain(self) -> dict[str, Any]:
        """Return the trial as JSON can hold it."""
        bits = None if self.hits is None else base64.b64encode(np.packbits(self.hits).tobytes()).decode()
        numbers = (self.known_accuracy, self.learning_rate, self.seconds, *self.validation)
        return {
            "hits": bits,
            "n_test": 0 if self.hits is None else len(self.hits),
            "numbers": [x if math.isfinite(x) else None for x in numbers],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Build a trial again."""
        known, rate, seconds, *validation = (math.nan if x is None else float(x) for x in plain["numbers"])
        hits = None
        if plain["hits"] is not None:
            packed = np.frombuffer(base64.b64decode(plain["hits"], validate=True), dtype=np.uint8)
            hits = np.unpackbits(packed, count=plain["n_test"]).astype(bool)
        return cls(hits, known, tuple(validation), rate, seconds)


@dataclass(frozen=True, eq=False, repr=False)
class LayerSweep(Policies, Shown):
    """What retraining by every policy gave: the ground truth.

    Attributes
    ----------
    policies : tuple of str
        ``"none"`` (where the model can be used as it is), ``"head"``, ``"head + NAME"``, ``"NAME and up"``, ``"all"``.
    trained : tuple of tuple of str
        The layers that each policy trains, besides the head.
    layers, head, n_parameters
        The model's layers in the order of execution, its head, and how many scalars each of them owns.
    accuracy : ndarray of shape (n_policies, n_seeds)
        On the test samples; NaN where training diverged.
    interval : ndarray of shape (n_policies, 2)
        90 % bootstrap interval of the mean accuracy, over seeds and test samples.
    known_accuracy : ndarray of shape (n_policies, n_seeds)
        On the known data after retraining: where the head was replaced, with the head that the model had. NaN where
        the known labels are no places of the model's outputs.
    known_before : float
        The same before.
    learning_rate : ndarray of shape (n_policies, n_seeds)
        Chosen on the validation samples.
    validation : ndarray of shape (n_policies, n_seeds, n_rates)
        Accuracy on the validation samples; NaN where training diverged.
    learning_rates : tuple of float
    draws : ndarray of shape (n_draws, n_policies)
        Bootstrap draws of the mean accuracies, the policies paired.
    seconds : ndarray of shape (n_policies, n_seeds)
        What training took, over all learning rates.
    new_head : tuple of bool
        For each seed, whether the model's head gave way to a new one.
    n_samples : tuple of four int
        Trained on, validated on, tested on; and of the known data.
    steps, batch_size : int
    advised : str, optional
        The policy that an advice stands for.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> X, y = torch.randn(90, 4), torch.arange(90) % 3
    >>> X[:, 0] += 3.0 * y
    >>> sweep = rs.sweep_layers(model, (X, y), (X.roll(1, dims=1), y + 3), steps=20, n_seeds=1, random_state=0)
    >>> sweep.policies, sweep.accuracy.shape
    (('head', 'all'), (2, 1))
    >>> regret, low, high = sweep.regret(sweep.best)
    >>> regret
    0.0
    """

    accuracy: Floats
    interval: Floats
    known_accuracy: Floats
    known_before: float
    learning_rate: Floats
    validation: Floats
    learning_rates: tuple[float, ...]
    draws: Floats
    seconds: Floats
    new_head: tuple[bool, ...]
    n_samples: tuple[int, int, int, int]
    steps: int
    batch_size: int
    advised: str | None = None

    @property
    def mean_accuracy(self) -> dict[str, float]:
        """Mean accuracy over the seeds, by policy."""
        return {policy: float(row.mean()) for policy, row in zip(self.policies, self.accuracy, strict=True)}

    @property
    def best(self) -> str:
        """The policy of the highest mean accuracy; of several the one that trains the fewest parameters."""
        means = self.accuracy.mean(axis=1)
        if np.isnan(means).all():
            raise InvalidDataError(_ALL_DIVERGED)
        ties = np.flatnonzero(means == np.nanmax(means))
        return self.policies[min(ties, key=lambda row: self.share(self.policies[row]))]

    @property
    def gains(self) -> dict[str, float]:
        """What training a layer gains on top of the head alone, in accuracy, by layer; NaN where it was not tried."""
        means = self.mean_accuracy
        gained = {}
        for layer in self.layers:
            policy = self.policy_of((layer,))
            gained[layer] = math.nan if policy is None else means[policy] - means[HEAD]
        return gained

    @property
    def diverged(self) -> tuple[str, ...]:
        """Where training diverged, in words."""
        places = np.argwhere(np.isnan(self.validation[..., : len(self.learning_rates)]))
        return tuple(
            f"{self.policies[policy]}, seed {seed}, learning rate {self.learning_rates[rate]:g}"
            for policy, seed, rate in places
            if self.policies[policy] != NONE
        )

    def regret(self, policy: str) -> tuple[float, float, float]:
        """Return how much accuracy a policy leaves lying, against the best: value, and 90 % interval.

        The best is that of the sweep itself, so that by chance alone even the truly best policy has some regret.
        """
        row, best = self.row_of(policy), self.row_of(self.best)
        low, high = np.quantile(self.draws[:, best] - self.draws[:, row], TAILS)
        return float(self.accuracy[best].mean() - self.accuracy[row].mean()), float(low), float(high)

    def summary(self) -> str:
        """Say what was best, and what the advice and the rules leave lying."""
        points = {policy: 100 * self.regret(policy)[0] for policy in self.policies if self._finished(policy)}
        if not points:
            return _ALL_DIVERGED
        text = (
            f"Best: {self.best}, {self.mean_accuracy[self.best]:.1%} on {self.n_samples[2]:,} test samples; "
            f"{self.n_samples[0]:,} trained on, {self.steps} steps of {self.batch_size}, "
            f"{self.accuracy.shape[1]} seed{'s' if self.accuracy.shape[1] > 1 else ''}."
        )
        if self.advised is not None and self.advised in points:
            _, low, high = self.regret(self.advised)
            text += (
                f" Regret of the advice ({self.advised}): {points[self.advised]:.1f} points "
                f"[{100 * low:.1f}, {100 * high:.1f}]."
            )
        rules = ", ".join(f"{rule} {points[policy]:.1f}" for rule, policy in self.rules().items() if policy in points)
        return f"{text} Regret of trivial rules, in points: {rules}." if rules else text

    def as_table(self) -> Table:
        """Return one row a policy."""
        header = ["policy", "parameters", "accuracy", "90 % interval", "regret", "known data", "rate"]
        rows = []
        for row, policy in enumerate(self.policies):
            finished = self._finished(policy)
            rates = sorted({float(rate) for rate in self.learning_rate[row] if np.isfinite(rate)})
            low, high = self.interval[row]
            rows.append(
                [
                    policy + (" (advised)" if policy == self.advised else ""),
                    f"{self.share(policy):.1%}",
                    f"{self.accuracy[row].mean():.1%}" if finished else "diverged",
                    f"[{low:.1%}, {high:.1%}]" if finished else "-",
                    f"{100 * self.regret(policy)[0]:.1f}" if finished else "-",
                    f"{self.known_accuracy[row].mean():.1%}" if np.isfinite(self.known_accuracy[row]).all() else "-",
                    ", ".join(f"{rate:g}" for rate in rates) or "-",
                ]
            )
        known = f"; known data before: {self.known_before:.1%}" if math.isfinite(self.known_before) else ""
        note = f"Regret in points of accuracy{known}."
        if self.diverged:
            some = "; ".join(self.diverged[:5])
            note += f" Training diverged: {some}{f' and {len(self.diverged) - 5} more' if self.diverged[5:] else ''}."
        return Table("Retrained and tested, by policy", header, rows, note=note)

    def to_frame(self) -> "pd.DataFrame":
        """Return one row a policy as a pandas DataFrame.

        Raises
        ------
        MissingExtraError
            If pandas is not installed.
        """
        rows = [
            {
                "policy": policy,
                "share": self.share(policy),
                "accuracy": self.accuracy[row].mean(),
                "accuracy_low": self.interval[row, 0],
                "accuracy_high": self.interval[row, 1],
                "regret": self.regret(policy)[0] if self._finished(policy) else math.nan,
                "known_accuracy": self.known_accuracy[row].mean(),
                "seconds": self.seconds[row].sum(),
            }
            for row, policy in enumerate(self.policies)
        ]
        frame: pd.DataFrame = import_pandas().DataFrame(rows)
        return frame

    def report(self, path: str | Path, *, title: str = "Retrained and tested") -> Path:
        """Write one self-contained HTML page with the summary, the table and the figure.

        To show a sweep beside the advice that it was held against, give it to `Recommendation.report`.

        Parameters
        ----------
        path : path
            A file, written whole or not at all.
        title : str

        Returns
        -------
        Path
            Of the file.

        Raises
        ------
        MissingExtraError
            If jinja2 or matplotlib is not installed.
        OutputError
            If the folder of the file is not there; before anything is drawn.
        """
        from retrainscope.report import sweep_section, write_report

        check_place(path)
        return write_report(path, title, [sweep_section(self)], footer="Made by retrainscope.")

    def save(self, path: str | Path) -> None:
        """Write the sweep to a JSON file."""
        save_json(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a sweep that `save` wrote.

        Raises
        ------
        ResultFormatError
            If the file holds something else, or was written by a newer version.
        """
        return load_json(cls, path)

    def _finished(self, policy: str) -> bool:
        return bool(np.isfinite(self.accuracy[self.row_of(policy)]).all())


def summarise(
    trials: Mapping[str, Sequence[Trial]],
    *,
    trained: tuple[tuple[str, ...], ...],
    layers: Layers,
    learning_rates: tuple[float, ...],
    seed: int,
    same_test: bool,
    **described: Any,
) -> LayerSweep:
    """Put the trials of all policies, one a seed, together.

    Parameters
    ----------
    trials : mapping of policy to sequence of Trial
    trained : tuple of tuple of str
        The layers that each policy trains.
    layers : Layers
    learning_rates : tuple of float
    seed : int
        For the bootstrap.
    same_test : bool
        Whether all seeds were tested on the same samples.
    **described
        new_head, known_before, n_samples, steps and batch_size of the result.

    Returns
    -------
    LayerSweep
    """
    rows = list(trials.values())
    draws = _draws(rows, np.random.default_rng(seed), same_test=same_test)
    n_rates = len(learning_rates)

    def of(read: Any) -> Floats:
        return np.array([[read(trial) for trial in row] for row in rows], dtype=np.float64)

    return LayerSweep(
        policies=tuple(trials),
        trained=trained,
        layers=layers.names,
        head=layers.head,
        n_parameters=layers.n_parameters,
        accuracy=of(lambda trial: np.nan if trial.hits is None else trial.hits.mean()),
        interval=np.quantile(draws, TAILS, axis=0).T,
        known_accuracy=of(lambda trial: trial.known_accuracy),
        learning_rate=of(lambda trial: trial.learning_rate),
        # The policy that trains nothing has one value, whatever the rate.
        validation=of(lambda trial: (trial.validation * n_rates)[:n_rates]),
        learning_rates=learning_rates,
        draws=draws,
        seconds=of(lambda trial: trial.seconds),
        **described,
    )


def _draws(rows: Sequence[Sequence[Trial]], rng: np.random.Generator, *, same_test: bool) -> Floats:
    """Resample seeds, and within each its test samples; the policies share both, and seeds what they have in common."""
    n_seeds = len(rows[0])
    by_seed = []
    # All seeds hold out equally many.
    n_test = max((len(trial.hits) for row in rows for trial in row if trial.hits is not None), default=1)
    for number in range(n_seeds):
        hits = np.full((len(rows), n_test), np.nan)
        for place, row in enumerate(rows):
            if row[number].hits is not None:
                hits[place] = row[number].hits
        if number == 0 or not same_test:
            counts = rng.multinomial(n_test, np.full(n_test, 1 / n_test), size=_N_DRAWS)
        by_seed.append(counts @ hits.T / n_test)
    picked = rng.integers(0, n_seeds, (_N_DRAWS, n_seeds))
    draws: Floats = np.stack(by_seed)[picked, np.arange(_N_DRAWS)[:, None]].mean(axis=1)
    return draws
