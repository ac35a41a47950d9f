"""
Advice on new digits
====================

A network that knows the digits 0 to 4 meets 50 samples of each of 5 to 9. What to see: the need of every layer with
its interval, and below it what the forecast expects of every choice of layers, the advised one marked.
"""

import matplotlib.pyplot as plt
from digits import digits, network

import retrainscope as rs
from retrainscope.plotting import plot_needs, plot_policies

model = network()
known, unknown = digits(range(5), start=300), digits(range(5, 10))
rec = rs.recommend_layers(model, known, unknown, random_state=0)
print(rec)

# %%
# The need of a layer is by how much retraining it together with the head is expected to lower the error. 0 is no
# evidence.
plt.figure(plot_needs(rec))

# %%
# Nothing was trained for this: the accuracies are forecast from gradients. Where two choices are nearly equal, the one
# that trains fewer parameters is advised.
plt.figure(plot_policies(rec.forecast))
