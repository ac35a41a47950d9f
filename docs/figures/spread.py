"""Activations of known and unknown digits at two layers, as maps."""

import matplotlib.pyplot as plt
import torch
from small_network import KNOWN, UNKNOWN, digits, network

import retrainscope as rs
from retrainscope.plotting_maps import plot_maps

known, unknown = digits(KNOWN, start=300, n=40), digits(UNKNOWN, n=40)
both = torch.cat([known[0], unknown[0]]), torch.cat([known[1], unknown[1]])
spread = rs.ActivationSpread(network(), random_state=0).fit(known)
maps = {layer: spread.embed(both, layer) for layer in ("conv1", "fc1")}
plt.figure(plot_maps(maps, both[1].numpy(), known=[*KNOWN]))
