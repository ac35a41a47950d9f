"""`Forecast`: what retraining by every policy is expected to give."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from retrainscope.policies import Policies
from retrainscope.saving import import_pandas, load_json, save_json
from retrainscope.scores import TAILS
from retrainscope.tables import Shown, Table, interval_text, number_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Forecast"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class Forecast(Policies, Shown):
    """What retraining by every policy is expected to give on samples that it was not trained on.

    Attributes
    ----------
    policies : tuple of str
        ``"none"`` (where the model can be used as it is), ``"head"``, ``"head + NAME"``, ``"NAME and up"``, ``"all"``.
    trained : tuple of tuple of str
        The layers that each policy trains, besides the head.
    layers, head, n_parameters
        The model's layers in the order of execution, its head, and how many scalars each of them owns.
    error : ndarray of shape (n_policies,)
        Expected squared distance between prediction and one-hot class, from 0 to about 1. NaN for ``"none"``.
    accuracy : ndarray of shape (n_policies,)
        Expected; for ``"none"`` the accuracy of the model as it is.
    draws : ndarray of shape (n_draws, n_policies)
        Bootstrap draws of the error over samples, the policies paired.
    accuracy_draws : ndarray of shape (n_draws, n_policies)
        The same draws of the accuracy.
    chance : float
        The accuracy of always naming the largest class.
    chance_error : float
        The squared error of always answering with the shares of the classes.
    n_samples, n_classes : int
        Of the unknown data.
    smallest_class : int
        Samples of the smallest class; of samples in groups, its groups.
    known_accuracy : float
        Of the model as it is on the known data; NaN where its labels are no places of the model's outputs.
    n_copies : int
        Samples with the inputs of an earlier one, as when a loader draws with replacement. Unless groups were given
        they count as one with it.
    drawing_gain : float
        By how much the accuracy of ``"none"`` is higher than among all of the model's classes: where unknown classes
        were drawn, every policy tells these apart alone.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> X, y = torch.randn(90, 4), torch.arange(90) % 3
    >>> X[:, 0] += 3.0 * y
    >>> forecast = rs.recommend_layers(model, (X, y), (X.roll(1, dims=1), y + 3), random_state=0).forecast
    >>> forecast.policies, forecast.trained
    (('head', 'all'), ((), ('0',)))
    >>> bool(forecast.error[0] > forecast.error[1])  # retraining "0" as well is expected to help
    True
    >>> forecast.best_within(tolerance=1.0)  # the cheapest, if any error will do
    'head'
    """

    error: Floats
    accuracy: Floats
    draws: Floats
    accuracy_draws: Floats
    chance: float
    chance_error: float
    n_samples: int
    n_classes: int
    smallest_class: int
    known_accuracy: float = math.nan
    n_copies: int = 0
    drawing_gain: float = 0.0

    def best_within(self, tolerance: float, *, allowed: NDArray[np.bool_] | None = None) -> str:
        """Return the policy that trains the fewest parameters among those that are nearly as good as the best.

        Parameters
        ----------
        tolerance : float
            How much larger the error may be.
        allowed : ndarray of shape (n_policies,), bool, optional
            The policies to choose from, the best of all included.

        Returns
        -------
        str
            Never ``"none"``.
        """
        error = self.error if allowed is None else np.where(allowed, self.error, np.nan)
        within = np.flatnonzero(error <= np.nanmin(error) + tolerance)
        return self.policies[min(within, key=lambda row: (self.share(self.policies[row]), error[row]))]

    def doubt(self, policy: str, excess: float, *, allowed: NDArray[np.bool_] | None = None) -> float:
        """Return the share of draws in which a policy's error is more than that above the error of the best."""
        errors = self.draws if allowed is None else np.where(allowed, self.draws, np.nan)
        return float((self.draws[:, self.row_of(policy)] - np.nanmin(errors, axis=1) > excess).mean())

    def as_table(self) -> Table:
        """Return one row a policy."""
        rows = [
            [
                policy,
                f"{self.share(policy):.1%}",
                number_text(self.error[row], 3),
                interval_text(np.quantile(self.draws[:, row], TAILS).tolist(), 3),
                f"{self.accuracy[row]:.1%}",
            ]
            for row, policy in enumerate(self.policies)
        ]
        return Table(
            f"Forecast for {self.n_samples} samples of {self.n_classes} classes",
            ["policy", "parameters", "error", "90 % interval", "accuracy"],
            rows,
            note="Cross-validated: expected of a network that is retrained on this data and meets more of it.",
        )

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
                "error": self.error[row],
                "error_low": np.quantile(self.draws[:, row], TAILS[0]),
                "error_high": np.quantile(self.draws[:, row], TAILS[1]),
                "accuracy": self.accuracy[row],
            }
            for row, policy in enumerate(self.policies)
        ]
        frame: pd.DataFrame = import_pandas().DataFrame(rows)
        return frame

    def save(self, path: str | Path) -> None:
        """Write the forecast to a JSON file."""
        save_json(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a forecast that `save` wrote.

        Raises
        ------
        ResultFormatError
            If the file holds something else, or was written by a newer version.
        """
        return load_json(cls, path)
