"""Contrast, reference and need of one measure, layer by layer."""

import matplotlib.pyplot as plt
from small_network import KNOWN, UNKNOWN, digits, network

import retrainscope as rs
from retrainscope.figures import PALETTE

spread = rs.ActivationSpread(network(), random_state=0).fit(digits(KNOWN, start=300))
scores = spread.score_layers(digits(UNKNOWN))

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
places = ["input", *scores.layers]
known, unknown = [scores.known_reference[0], *scores.known], [scores.unknown_reference[0], *scores.unknown]
left.plot(places, unknown, "o-", color=PALETTE[3], label="unknown data (5-9)")
left.plot(places, known, "s-", color=PALETTE[0], label="known data (0-4)")
left.vlines(places, known, unknown, color="0.6", linestyle=":", label="contrast")
left.set_yscale("log")
left.set_yticks([0.2, 0.4, 0.8], ["0.2", "0.4", "0.8"], minor=False)
left.minorticks_off()
left.set_ylabel("share of variance within classes\n(logarithmic)")
left.set_title("the measure", fontsize=10)
left.legend(frameon=False, fontsize=8)

low, high = scores.interval.T
right.errorbar(scores.layers, (low + high) / 2, yerr=(high - low) / 2, fmt="none", ecolor=PALETTE[2], capsize=4)
right.plot(scores.layers, scores.values, "D", color=PALETTE[2])
right.axhline(0, color="0.8", linewidth=1)
right.axhline(0.15, color="0.4", linestyle="--", linewidth=1, label="threshold 0.15")
right.set_xlim(-0.5, len(scores.layers) - 0.5)
right.set_ylabel("need (nats), with 90 % interval")
right.set_title("contrast less that of the input", fontsize=10)
right.legend(frameon=False, fontsize=8)
