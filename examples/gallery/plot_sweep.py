"""
A sweep against the advice
==========================

Is the advice right? What to see: the accuracy that retraining by every choice of layers gave on test digits, in the
same order as the forecast above it; what was advised is marked.
"""

import textwrap

import matplotlib.pyplot as plt
from digits import digits, network

import retrainscope as rs
from retrainscope.plotting import plot_policies

model = network()
known, unknown = digits(range(5), start=300), digits(range(5, 10))
rec = rs.recommend_layers(model, known, unknown, random_state=0)
plt.figure(plot_policies(rec.forecast))

# %%
# :meth:`~retrainscope.Recommendation.verify` retrains copies by every choice and by the advice.
test = digits(range(5, 10), n=200, test=True)
options = {"steps": 100, "learning_rates": (3e-3,), "n_seeds": 2, "random_state": 0}
sweep = rec.verify(model, known, unknown, test=test, **options)
plt.figure(plot_policies(sweep))

# %%
# *Regret* is what a choice leaves lying against the best one, in points of accuracy.
print(textwrap.fill(sweep.summary(), 90))
