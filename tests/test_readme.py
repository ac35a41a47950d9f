"""The README and the pages of docs tell the truth: code runs, files and targets exist, tables are filled."""

import re
from pathlib import Path

import pytest
import torch
from networks import classifier, samples

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_lines_to_paste_run():
    """The lines to paste run as they stand, one block after the other, with a model and data of one's own."""
    first, *later = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model, known, unknown = classifier(), samples(400), samples(400, classes=(5, 6), seed=1)
    names = {"model": model, "known": known, "unknown": unknown, "n_classes": 2}
    exec(compile(first, "README.md", "exec"), names)
    assert names["rec"].head.verdict == "retrain"
    assert isinstance(names["optimizer"], torch.optim.AdamW)
    for code in later:
        exec(compile(code, "README.md", "exec"), names)
    assert model[4].out_features == 2
    assert {p for group in names["groups"] for p in group["params"]} == {*names["parameters"]}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|\$ )make ([a-z-]+)", " ".join(TEXTS.values())))))
def test_every_make_target_exists(target):
    """Every `make` command that a page names is a target."""
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@each_page
def test_every_picture_and_link_exists(page):
    """Every picture that a page shows, and every file that it links to, is there."""
    found = [target for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]) if "://" not in target]
    assert found
    assert all((page.parent / target).exists() for target in found)


@each_page
def test_every_marked_place_has_a_table(page):
    """Between the marks of a table that a command makes, there is one."""
    marked = re.findall(r"<!-- ([^:]+): begin.*?-->\n(.*?)<!-- \1: end -->", TEXTS[page], re.DOTALL)
    assert len(marked) == TEXTS[page].count(": begin")
    assert all(table.count("\n| ") >= 3 for _, table in marked)
