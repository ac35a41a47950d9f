"""The paper's MNIST study: a network that knows the digits 0-4 meets the digits 5-9.

``experiments`` runs it once, ``paper`` holds what the paper printed and claimed, ``tables`` puts both
side by side, ``run`` does it for several seeds and writes the report.
"""
