"""Needs of the same layers by six estimators, for new classes and for known ones that are turned."""

import matplotlib.pyplot as plt
import torch
from small_network import KNOWN, UNKNOWN, digits, network

import retrainscope as rs
from retrainscope import criteria
from retrainscope.figures import PALETTE

kinds = (rs.TangentProbe, rs.ActivationSpread, criteria.LogME, criteria.LinearProbe, criteria.RelativeGradientNorm,
         criteria.EmpiricalFisher)  # fmt: skip
images, labels = digits(KNOWN, start=400)
tasks = {"new digits, 5-9": digits(UNKNOWN), "0-4, turned by 90°": (torch.rot90(images, dims=(2, 3)), labels)}

figure, axes = plt.subplots(len(tasks), len(kinds), figsize=(10.4, 4.2), layout="constrained", sharey=True)
for column, kind in enumerate(kinds):
    estimator = kind(network(), random_state=0).fit(digits(KNOWN, start=300))
    axes[0, column].set_title(kind.__name__, fontsize=8.5)
    for ax, unknown in zip(axes[:, column], tasks.values(), strict=True):
        scores = estimator.score_layers(unknown)
        low, high = scores.interval.T
        ax.errorbar((low + high) / 2, scores.layers, xerr=(high - low) / 2, fmt="none", ecolor="0.5", capsize=3)
        ax.plot(scores.values, scores.layers, "o", color=PALETTE[0])
        ax.axvline(0, color="0.8", linewidth=1, zorder=0)
        ax.locator_params(axis="x", nbins=4)
        ax.margins(x=0.15, y=0.25)
for ax, task in zip(axes[:, 0], tasks, strict=True):
    ax.set_ylabel(task)
axes[0, 0].invert_yaxis()
figure.supxlabel("need (nats), with 90 % interval; each on its own scale", fontsize=9)
