"""Digits rebuilt from three layers by decoders that learnt on the digits 0 to 4 alone."""

import matplotlib.pyplot as plt
import torch
from small_network import KNOWN, UNKNOWN, digits, network

import retrainscope as rs
from retrainscope.plotting_maps import plot_reconstructions

probe = rs.LayerDecoderProbe(network(), max_epochs=16, random_state=0).fit(digits(KNOWN, start=300, n=60))
images, labels = (torch.cat(parts) for parts in zip(digits(KNOWN, start=500, n=1), digits(UNKNOWN, n=1), strict=True))
rows = {layer: probe.reconstruct(images, layer)[:, 0].numpy() for layer in probe.layers_.names}
plt.figure(plot_reconstructions(images[:, 0].numpy(), rows, labels.tolist(), known=[*KNOWN]))
