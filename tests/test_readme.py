"""The README tells the truth: its code runs and its files exist."""

import re
from pathlib import Path

import pytest
import torch
from networks import classifier, samples

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_five_lines_run():
    """The lines to paste run as they stand, with a model and data of one's own."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model, known, unknown = classifier(), samples(400), samples(400, classes=(5, 6), seed=1)
    names = {"model": model, "known": known, "unknown": unknown}
    exec(compile(code, "README.md", "exec"), names)
    assert names["rec"].head.verdict == "retrain"
    assert isinstance(names["optimizer"], torch.optim.AdamW)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_every_make_target_exists(target):
    """Every `make` command that the README names is a target."""
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_picture_exists():
    """Every picture that the README shows is there."""
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
