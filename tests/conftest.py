"""Settings for all tests: one thread, fixed seeds, quiet hypothesis."""

import os
import random
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_mlp
from hypothesis import Phase, settings
from torch import nn

from retrainscope.cli import main
from retrainscope.decoding import LayerDecoderProbe
from retrainscope.inversion import GradientInverter
from retrainscope.studies.mnist import experiments

torch.set_num_threads(1)
settings.register_profile("quick", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("mutation", settings.get_profile("quick"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: what is left can then be shared out among the processes."""
    longest = ["test_study.py", "test_examples.py", "test_contract.py"]
    items.sort(key=lambda item: (*longest, item.path.name).index(item.path.name))


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


@dataclass(frozen=True)
class StudyRun:
    """A finished run of the study: where it is, and what it wrote to stdout and stderr."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="session")
def study_run(tmp_path_factory: pytest.TempPathFactory) -> StudyRun:
    """Run the MNIST study once with one seed, with --quiet.

    It is smaller where no test looks at how good it gets: less retraining in the sweep, fewer steps of decoders and
    inversions.
    Other tests run beside it when there are several processes: threads beyond its share of the cores would only wait.
    """
    folder = tmp_path_factory.mktemp("mnist") / "study"
    sweep = experiments._sweep

    def short_sweep(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as shorter:
            shorter.setattr(experiments, "_STEPS", 30)
            shorter.setattr(experiments, "_PASSES", 1)
            return sweep(*args)

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(StringIO()) as out,
            redirect_stderr(StringIO()) as err,
        ):
            patch.setattr(experiments, "_sweep", short_sweep)
            patch.setattr(experiments, "LayerDecoderProbe", partial(LayerDecoderProbe, max_epochs=12))
            patch.setattr(experiments, "GradientInverter", partial(GradientInverter, max_iter=25))
            assert main(["mnist", "--seeds", "1", "--out", str(folder), "--quiet"]) == 0
    finally:
        torch.set_num_threads(threads)
    return StudyRun(folder, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def study_folder(study_run: StudyRun) -> Path:
    """Return the folder of the MNIST study."""
    return study_run.folder
