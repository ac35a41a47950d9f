"""Settings for all tests: one thread, fixed seeds, quiet hypothesis."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_mlp
from hypothesis import settings
from torch import nn

from retrainscope.cli import main

torch.set_num_threads(1)
settings.register_profile("quick", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the study, which takes longest: what is left can then be shared out among the processes."""
    items.sort(key=lambda item: item.path.name != "test_study.py")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random states, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the global state is what is set
    torch.manual_seed(0)


@pytest.fixture
def mlp() -> nn.Sequential:
    """Return a network of two layers ("0", "2") and a head ("4") for inputs of shape (n, 3)."""
    return small_mlp()


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the MNIST study, run once with one seed.

    Other tests run beside it when there are several processes: threads beyond its share of the cores would only wait.
    """
    folder = tmp_path_factory.mktemp("mnist") / "study"
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    try:
        assert main(["mnist", "--seeds", "1", "--out", str(folder)]) == 0
    finally:
        torch.set_num_threads(threads)
    return folder
