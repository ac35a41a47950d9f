"""The paper's VGG-19 experiment: photographs rebuilt from trained and from random weights.

``loading`` brings network, weights and images, ``run`` inverts them and writes the report; what is measured and how
it is shown, for any network, is in ``studies.depth``.
"""
