"""
Images rebuilt through depth
============================

The input is sought, by gradient descent from noise, that gives the activations of a layer. What to see: the first layer
gives the digits back, and the deeper the layer the less is left of them, of known and unknown digits alike.
"""

import matplotlib.pyplot as plt
import torch
from digits import digits, network

import retrainscope as rs
from retrainscope.plotting import plot_reconstructions

model = network()
known, unknown = digits(range(1, 4), start=300, n=1), digits(range(5, 8), n=1)
images, labels = torch.cat([known[0], unknown[0]]), torch.cat([known[1], unknown[1]]).tolist()

# %%
# All images are inverted at once, each with a step length of its own.
descent = rs.Descent(max_iter=200, tv_weight=1e-3)
layers = ["conv1", "conv2", "fc1"]
found = rs.invert_layers(model, images, layers, descent=descent, low=0, high=1, random_state=0)
rebuilt = {layer: inversion.inputs[:, 0].numpy() for layer, inversion in found.items()}
plt.figure(plot_reconstructions(images[:, 0].numpy(), rebuilt, labels, known=[0, 1, 2, 3, 4]))

# %%
# In numbers: the squared error of an image, summed over its pixels.
for layer, inversion in found.items():
    errors = inversion.input_error
    print(f"{layer:6} known {errors[:3].mean():8.3f}   unknown {errors[3:].mean():8.3f}")
