"""
Images rebuilt by decoders
==========================

For each layer a small decoder learns, on known digits alone, to rebuild the image from the activations. What to see:
from the first layer it draws unknown digits as well as known ones; from the last both are blurred, the unknown ones
more.
"""

import matplotlib.pyplot as plt
import torch
from digits import digits, network

import retrainscope as rs
from retrainscope.plotting import plot_reconstructions

model = network()
known, unknown = digits(range(5), start=300, n=120), digits(range(5, 10), n=20)
layers = ["conv1", "conv2", "fc1"]
probe = rs.LayerDecoderProbe(model, layers=layers, max_epochs=8, random_state=0).fit(known)

# %%
# One known digit of each kind that the decoders did not see, and one unknown.
shown = [digits(range(1, 4), n=1, test=True), digits(range(5, 8), n=1)]
images, labels = torch.cat([X for X, _ in shown]), torch.cat([y for _, y in shown]).tolist()
rebuilt = {layer: probe.reconstruct(images, layer)[:, 0].numpy() for layer in layers}
plt.figure(plot_reconstructions(images[:, 0].numpy(), rebuilt, labels, known=[0, 1, 2, 3, 4]))

# %%
# The need compares the error on unknown digits with that on known ones, and with the same of an untrained network.
print(probe.score_layers(unknown))
