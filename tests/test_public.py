"""The public names, and the version."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import retrainscope


def test_public_names():
    """The public names are these, sorted, and every one of them is there and has a docstring."""
    assert retrainscope.__all__ == [
        "ActivationSpread",
        "Descent",
        "Forecast",
        "GradientInverter",
        "InputSpace",
        "Inversion",
        "LayerAdvice",
        "LayerDecoderProbe",
        "LayerScores",
        "LayerSweep",
        "Layers",
        "Recommendation",
        "TangentProbe",
        "find_layers",
        "freeze_rest",
        "invert_layers",
        "param_groups",
        "recommend_layers",
        "replace_head",
        "sweep_layers",
        "trace_layers",
        "train_only",
        "unfreeze",
    ]
    for name in retrainscope.__all__:
        assert getattr(retrainscope, name).__doc__


def test_one_version():
    """The changelog's newest release and the citation are of the version that pyproject.toml names."""
    root = Path(retrainscope.__file__).parents[2]
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert metadata.version("retrainscope") == version
    assert f"\nversion: {version}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.*)\]", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == version
