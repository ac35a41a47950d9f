"""
Within a budget
===============

How much of the network may be trained? What to see: each point is a choice of layers, with its share of the parameters
and its forecast error; the rings are what is advised for a budget, the best to the left of its line.
"""

import matplotlib.pyplot as plt
from digits import digits, network

import retrainscope as rs

model = network()
known, unknown = digits(range(5), start=300), digits(range(5, 10))
shares = (0.05, 0.3, 1.0)
advice = {}
for share in shares:
    rec = rs.recommend_layers(model, known, unknown, budget={"parameters": share}, random_state=0)
    print(f"at most {share:4.0%}: {', '.join(rec.layers)} and the head, {rec.cost['parameters']:.1%} of the parameters")
    advice[share] = rec

# %%
# Errors are squared distances between prediction and class: 0 is right and sure.
forecast = advice[1.0].forecast
figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
places = {policy: (forecast.share(policy), forecast.error[row]) for row, policy in enumerate(forecast.policies)}
for policy, place in places.items():
    ax.plot(*place, "o", color="#0072B2")
    ax.annotate(policy, place, xytext=(6, 5), textcoords="offset points", fontsize=8)
for share, rec in advice.items():
    ax.plot(*places[forecast.policy_of(rec.layers)], "o", color="#D55E00", ms=14, mfc="none")
    ax.axvline(share, color="0.7", linestyle="--", linewidth=1)
ax.set_xlim(-0.03, 1.25)
ax.set_xlabel("share of the parameters that is trained")
ax.set_ylabel("forecast error")
