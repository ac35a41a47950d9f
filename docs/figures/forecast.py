"""What retraining every set of layers was forecast to give, and what it gave."""

import matplotlib.pyplot as plt
import numpy as np
from small_network import KNOWN, UNKNOWN, digits, network

import retrainscope as rs
from retrainscope.figures import PALETTE

model, known, unknown = network(), digits(KNOWN, start=300), digits(UNKNOWN)
forecast = rs.TangentProbe(model, random_state=0).fit(known).forecast(unknown)
sweep = rs.sweep_layers(
    model,
    known,
    unknown,
    test=digits(UNKNOWN, n=200, test=True),
    steps=120,
    learning_rates=(2e-3,),
    n_seeds=1,
    random_state=0,
)

figure, ax = plt.subplots(figsize=(6.8, 3.2), layout="constrained")
rows = np.arange(len(forecast.policies))
for shift, values, draws, colour, marker, label in (
    (-0.12, forecast.accuracy, forecast.accuracy_draws, PALETTE[0], "o", "forecast, nothing trained"),
    (0.12, sweep.accuracy.mean(axis=1), sweep.draws, PALETTE[3], "D", "measured, retrained"),
):
    low, high = 100 * np.quantile(draws, (0.05, 0.95), axis=0)
    centre, reach = (low + high) / 2, (high - low) / 2
    ax.errorbar(centre, rows + shift, xerr=reach, fmt="none", ecolor=colour, capsize=3)
    ax.plot(100 * values, rows + shift, marker, color=colour, label=label)
shares = [f"{name}, {forecast.share(name):.0%}" for name in forecast.policies]
ax.set_yticks(rows, shares)
ax.invert_yaxis()
ax.set_xlabel("accuracy (%), with 90 % interval")
ax.set_ylabel("policy, and share trained")
figure.legend(loc="outside lower center", ncols=2, frameon=False)
