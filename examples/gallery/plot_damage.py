"""
A damaged layer is found
========================

The weights of one layer are shuffled, which changes neither their sizes nor their number; the data is what the network
knew. What to see: before the damage nothing needs retraining, and after it the damaged layer alone.
"""

import copy

import matplotlib.pyplot as plt
import torch
from digits import accuracy, digits, network

import retrainscope as rs
from retrainscope.plotting import plot_needs

model = network()
known, again = digits(range(5), start=300), digits(range(5), start=400)
print("verdict:", rs.recommend_layers(model, known, again, random_state=0).verdict)

# %%
# Now one layer is damaged. The known digits are what the network is to be repaired for.
damaged = copy.deepcopy(model)
with torch.no_grad():
    weight = damaged.conv2.weight
    weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))
print(f"accuracy before {accuracy(model, again):.1%}, after {accuracy(damaged, again):.1%}")

# %%
# A need above 0 says that retraining the layer would help by itself; what is advised is the cheapest choice that is
# nearly as good as the best.
rec = rs.recommend_layers(damaged, known, again, random_state=0)
print(rec)
plt.figure(plot_needs(rec))
