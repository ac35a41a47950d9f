"""A forecast's choice tried out: a sweep of what it speaks for, of the head alone and of everything."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retrainscope.checks import check_number, reason_of
from retrainscope.choice import Choice, confirm
from retrainscope.exceptions import CheckpointError, InvalidDataError, ProcessError, RetrainscopeError
from retrainscope.forecast import Forecast
from retrainscope.policies import ALL, NONE
from retrainscope.sweep import sweep_layers
from retrainscope.sweep_task import Options
from retrainscope.trials import LayerSweep

__all__ = ["check_trial", "try_out"]


def check_trial(trial: Mapping[str, Any] | None, *, own: Iterable[str]) -> None:
    """Refuse what is no option of a sweep, or is one of the caller's own parameters."""
    if trial is None:
        return
    not_here, defaults = {*own, "test", "policies"} - {"batch_size"}, inspect.signature(sweep_layers).parameters
    options = [name for name in defaults if name not in not_here]
    wrong = [name for name in trial if name not in options] if isinstance(trial, Mapping) else trial
    if wrong or not isinstance(trial, Mapping):
        raise InvalidDataError(
            f"The 'trial' parameter must be a mapping of options of sweep_layers: {', '.join(options)}. Got {wrong!r}."
        )
    given = {name: trial.get(name, default.default) for name, default in defaults.items()}
    given["optimizer"] = given["optimizer"] or torch.optim.Adam
    check_number("test_size", given["test_size"], whole=False, below=1)
    Options(**{field.name: given[field.name] for field in fields(Options)}).checked()


def try_out(
    model: nn.Module,
    known: Any,
    unknown: Any,
    choice: Choice,
    forecast: Forecast,
    *,
    allowed: NDArray[np.bool_] | None,
    options: Mapping[str, Any],
) -> tuple[Choice, LayerSweep | None, str]:
    """Train what the forecast speaks for and its alternatives, and keep to the choice or go over to a better one.

    Parameters
    ----------
    model : nn.Module
    known, unknown
        As in `sweep_layers`.
    choice : Choice
        Of a policy.
    forecast : Forecast
    allowed : ndarray of bool of shape (n_policies,), optional
        What the budget allows.
    options : mapping
        Of `sweep_layers`.

    Returns
    -------
    choice : Choice
    sweep : LayerSweep or None
        None where it could not be tried out.
    note : str
        What came of it.
    """
    try:
        sweep = sweep_layers(model, known, unknown, policies=_to_try(choice, forecast, allowed), **options)
    except (CheckpointError, ProcessError):
        raise
    except Exception as error:  # of the user's optimizer too: the forecast must not be lost for it
        told = str(error) if isinstance(error, RetrainscopeError) else f"{type(error).__name__}: {reason_of(error)}"
        return choice, None, f"It could not be tried out: {told}"
    confirmed = confirm(choice, sweep)
    return confirmed, sweep, _trial_text(sweep, choice, confirmed)


def _to_try(choice: Choice, forecast: Forecast, allowed: NDArray[np.bool_] | None) -> list[tuple[str, ...]]:
    """Return what is tried beside the head alone: what the forecast speaks for, and everything if it is allowed."""
    rows = [forecast.row_of(choice.policy or NONE), forecast.policies.index(ALL)]
    return [forecast.trained[row] for row in rows if allowed is None or allowed[row]]


def _trial_text(sweep: LayerSweep, before: Choice, after: Choice) -> str:
    results = ", ".join(
        f"{policy} {f'{accuracy:.1%}' if np.isfinite(accuracy) else 'diverged'}"
        for policy, accuracy in sweep.mean_accuracy.items()
    )
    text = f"Tried out on {sweep.n_samples[2]} samples that were held out: {results}."
    if before.policy in sweep.mean_accuracy and np.isnan(sweep.mean_accuracy[before.policy]):
        return f"{text} What the forecast speaks for could not be trained: give smaller learning_rates= in trial=."
    return text if after == before else f"{text} The forecast spoke for {before.policy}, which was clearly worse."
