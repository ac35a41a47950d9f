"""
Maps of a layer, known and unknown
==================================

The activations of two layers for known digits (rings) and unknown ones (filled), brought to the plane by t-SNE. What to
see: in the last layer the known digits form clusters, and the unknown ones lie between and across them, while in the
first layer all look much as they do in the images.
"""

import matplotlib.pyplot as plt
import torch
from digits import digits, network

import retrainscope as rs
from retrainscope.plotting import plot_maps

model = network()
known, unknown = digits(range(5), start=300, n=40), digits(range(5, 10), n=40)
spread = rs.ActivationSpread(model, random_state=0).fit(known)

# %%
# Known and unknown samples go into one map: maps that were made apart cannot be compared.
both = torch.cat([known[0], unknown[0]])
labels = torch.cat([known[1], unknown[1]]).tolist()
maps = {layer: spread.embed(both, layer) for layer in ("conv1", "fc1")}
plt.figure(plot_maps(maps, labels, known=list(range(5))))

# %%
# In numbers: the share of a layer's variance that the classes do not explain. The need is how much larger it is for the
# unknown digits, less how much larger it is in the images themselves.
print(spread.score_layers(unknown))
