"""Digits rebuilt from three layers by descent on the input, with the network and with one that was never trained."""

import matplotlib.pyplot as plt
import torch
from small_network import KNOWN, UNKNOWN, digits, network

import retrainscope as rs
from retrainscope.plotting_maps import plot_reconstructions

known = digits(KNOWN, start=300, n=4)
images, labels = (torch.cat(parts) for parts in zip(digits(KNOWN, start=300, n=1), digits(UNKNOWN, n=1), strict=True))
options = {"max_iter": 100, "tv_weight": 0.003, "samples_per_class": 2, "random_state": 0}
inverter = rs.GradientInverter(network(), **options).fit(known)
rows = {}
for name, control in (("", False), (", never trained", True)):
    for layer, found in inverter.reconstruct(images, inverter.layers_.names, control=control).items():
        rows[f"{layer}{name}"] = found.inputs[:, 0].numpy()
plt.figure(plot_reconstructions(images[:, 0].numpy(), rows, labels.tolist(), known=[*KNOWN]))
