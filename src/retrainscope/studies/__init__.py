"""The paper's experiments, run with the public API."""
