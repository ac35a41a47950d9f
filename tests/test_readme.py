"""The README and the pages of docs tell the truth: code runs, files and targets exist, tables are filled."""

import re
import socket
import textwrap
from pathlib import Path

import pytest
import torch
from networks import classifier, samples

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = ("_build", "_generated", "api/generated", "gallery")  # by `make docs`
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if not page.relative_to(DOCS).as_posix().startswith(MADE)),
]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
NOT_RUN = r"\*Not run by `make test`: [^*]+\*\n\n"  # with the reason, for the reader to see


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def code_of(page):
    """Return the Python code of a page, with its line numbers, but for the blocks before which it says not to."""
    blocks = re.finditer(rf"^({NOT_RUN})?```python\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE)
    return [(TEXTS[page].count("\n", 0, block.start(2)), block[2]) for block in blocks if not block[1]]


def run(page, code, names):
    for line, block in code:
        exec(compile("\n" * line + block, name_of(page), "exec"), names)


def given():
    """Return what the first lines to paste take as given: a model and data of one's own."""
    return {
        "model": classifier(),
        "known": samples(400),
        "unknown": samples(400, classes=(5, 6), seed=1),
        "n_classes": 2,
    }


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
TO_PASTE = [ROOT / "README.md", DOCS / "index.md"]
WITH_CODE = [page for page in PAGES if code_of(page) and page not in TO_PASTE]


def test_the_lines_to_paste_run():
    """The lines to paste run as they stand, one block after the other, with a model and data of one's own."""
    names = given()
    (page, index), code = TO_PASTE, code_of(TO_PASTE[0])
    run(page, code[:1], names)
    assert names["rec"].head.verdict == "retrain"
    assert isinstance(names["optimizer"], torch.optim.AdamW)
    run(page, code[1:], names)
    assert names["model"][4].out_features == 2
    assert {p for group in names["groups"] for p in group["params"]} == {*names["parameters"]}
    assert [block for _, block in code_of(index)] == [code[0][1]]


@pytest.mark.filterwarnings("ignore")  # those of the libraries that are shown at work
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """The blocks of code of a page run as they stand, one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    if page.name == "processes.md":  # a group of one process, and what the script imports
        one_process(monkeypatch, tmp_path)
    run(page, code_of(page), {"__name__": "__main__"})


def one_process(monkeypatch, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    mine = """
        from networks import classifier as network, samples
        known, unknown = samples(60), samples(60, classes=(5, 6), seed=1)
    """
    (folder / "mine.py").write_text(textwrap.dedent(mine), encoding="utf-8")


@each_page
def test_no_code_goes_unseen(page):
    """Python code stands in blocks that begin with ```python at the margin, and so is run."""
    begun = r"^[ >]*(?:`{3,}|~{3,}) *(?:\{(?:code|code-block|code-cell|sourcecode)\} *)?(\w+)"
    python = [language for language in re.findall(begun, TEXTS[page], re.MULTILINE) if language.startswith("py")]
    assert python == ["python"] * len(re.findall(r"^```python\n", TEXTS[page], re.MULTILINE))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|\$ )make ([a-z-]+)", " ".join(TEXTS.values())))))
def test_every_make_target_exists(target):
    """Every `make` command that a page names is a target."""
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@each_page
def test_every_picture_and_link_exists(page):
    """Every picture that a page shows, and every file that it links to, is there."""
    found = [target for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]) if "://" not in target]
    missing = [target for target in found if not target.startswith("#") and not is_there(page, target)]
    assert not missing


def is_there(page, target):
    path = (page.parent / target.partition("#")[0]).resolve()
    return path.exists() or (path.is_relative_to(DOCS) and path.relative_to(DOCS).as_posix().startswith(MADE))


@each_page
def test_every_marked_place_has_a_table(page):
    """Between the marks of a table that a command makes, there is one."""
    marked = re.findall(r"<!-- ([^:]+): begin.*?-->\n(.*?)<!-- \1: end -->", TEXTS[page], re.DOTALL)
    assert len(marked) == TEXTS[page].count(": begin")
    assert all(table.count("\n| ") >= 3 for _, table in marked)
