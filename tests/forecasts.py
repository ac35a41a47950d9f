"""Forecasts made by hand."""

import numpy as np

import retrainscope as rs

NAMES = ("c1", "c2", "f1")
N_PARAMETERS = {"c1": 10, "c2": 30, "f1": 50, "head": 10}
TRAINED = {
    "none": (),
    "head": (),
    "head + c1": ("c1",),
    "head + c2": ("c2",),
    "head + f1": ("f1",),
    "c2 and up": ("c2", "f1"),
    "all": NAMES,
}


def forecast_of(
    error: dict[str, float],
    *,
    accuracy: dict[str, float] | None = None,
    spread: float = 0.0,
    paired: bool = True,
    **changed: object,
) -> rs.Forecast:
    """Make a forecast of these errors by policy; the accuracy is 1 - error unless given, the draws are spread evenly.

    Paired draws differ between policies as much as their means do; others go up where those of the next go down.
    """
    names = tuple(error)
    errors = np.array(list(error.values()))
    hits = np.array([(accuracy or {}).get(name, 1 - error[name]) for name in names])
    noise = np.linspace(-spread, spread, 101)[:, None] * (1 if paired else (-1.0) ** np.arange(len(names)))
    made = {
        "policies": names,
        "trained": tuple(TRAINED[name] for name in names),
        "layers": NAMES,
        "head": "head",
        "n_parameters": N_PARAMETERS,
        "error": errors,
        "accuracy": hits,
        "draws": errors + noise,
        "accuracy_draws": hits + noise,
        "chance": 0.5,
        "chance_error": 0.5,
        "n_samples": 100,
        "n_classes": 2,
        "smallest_class": 50,
    }
    return rs.Forecast(**(made | changed))
