"""The documentation is complete: every public name is on a page of the API, and every error on the page of errors."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import error_list
import pytest
import torch
from networks import classifier

import retrainscope as rs
from retrainscope import exceptions

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "retrainscope"
MODULES = ["retrainscope", *(f"retrainscope.{name}" for name in ("criteria", "data", "exceptions", "export"))]
NAMES = [(module, name) for module in MODULES for name in importlib.import_module(module).__all__]
ENTRIES, NOTES = error_list.read_errors(PACKAGE)
INTERNAL = {"_AllSeen", "_UnlikeError", "_TooManyClassesError"}  # caught again inside the library
FOREIGN = {"ValueError", "argparse.ArgumentTypeError", "error", "kind"}  # the latter are raised elsewhere, and again


def listed():
    """Return the names on the page of the API with their modules, in their order."""
    module, names = "", []
    for line in (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"\.\. currentmodule:: (\S+)", line):
            module = found[1]
        elif found := re.fullmatch(r"   (\w+)", line):
            names.append((module, found[1]))
    return names


def test_every_public_name_is_on_a_page():
    """The page of the API lists the public names of the package, each once, and nothing else."""
    assert sorted(listed()) == sorted(NAMES)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_public_name_has_an_example(module, name):
    """The docstring of every public name has an example, which the doctests run."""
    text = inspect.getdoc(getattr(importlib.import_module(module), name))
    _, _, examples = text.partition("\nExamples\n--------\n")
    assert ">>> " in examples
    assert "doctest: +SKIP" not in examples


def test_every_raise_is_read():
    """Every raise in the source is on the page of errors, but for what is caught inside or is another's."""
    raised = {
        (path.relative_to(PACKAGE), number)
        for path in PACKAGE.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if (found := re.match(r" +raise ([\w.]+)", line)) and found[1] not in INTERNAL | FOREIGN
    }
    assert {(entry.path, entry.line) for entry in ENTRIES} == raised


def test_every_error_has_a_cause_and_a_remedy():
    """On the page every message stands under its kind, with what was wrong and what to do."""
    page = error_list.page(PACKAGE)
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == [
        name for name in NOTES if name in exceptions.__all__ and name != "RetrainscopeError"
    ]  # of which all are kinds
    rows = re.findall(r"^\| (.*) \| (.*) \| (`.*`) \|$", page, re.MULTILINE)
    assert len({(entry.kind, entry.message) for entry in ENTRIES}) == len(rows)
    assert all(cause.strip() and remedy.strip() for cause, remedy, _ in rows)


def imported(tree):
    """Return the package's modules that a module imports when it is loaded, by the first part of their names."""
    names = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[1] for name in names if name.startswith("retrainscope.")}


def test_the_house_is_as_drawn():
    """Every module stands in one row of the page on contributing, and imports none from a row above."""
    text = (PACKAGE.parents[1] / "docs" / "contributing.md").read_text(encoding="utf-8")
    table = text.split("| what | modules of")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[name.rstrip("/") for name in re.findall(r"`([\w/]+)`", line)] for line in table]
    place = {name: number for number, row in enumerate(rows) for name in row}
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert sorted(name for row in rows for name in row) == sorted(found - {"__init__", "__main__"})
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        above = {other for other in imported(ast.parse(path.read_text())) if place[other] < place.get(name, 0)}
        assert not above, name


def fail_by_data():
    rs.ActivationSpread(classifier()).fit((torch.randn(4, 4), [0, 1]))


def fail_by_name():
    rs.find_layers(classifier(), torch.zeros(4, 4), layers=["conv"])


def fail_by_helper():
    with rs.train_only(classifier(), []):
        pass


@pytest.mark.parametrize("fail", [fail_by_data, fail_by_name, fail_by_helper])
def test_what_is_read_is_what_is_raised(fail):
    """The message that is raised is one of the page's, with its placeholders filled in."""
    with pytest.raises(exceptions.RetrainscopeError) as raised:
        fail()
    kind = type(raised.value).__name__
    assert any(fits(entry.message, str(raised.value)) for entry in ENTRIES if entry.kind == kind)


def fits(message, text):
    """Tell whether a message with placeholders becomes that text; one that is a placeholder alone fits nothing."""
    parts = re.split("‹.*?›", message)
    return any(len(part) > 5 for part in parts) and re.fullmatch(".*".join(map(re.escape, parts)), text) is not None


def test_what_is_no_markup_stays_text():
    """What messages are made of is text in Markdown: stars, bars and backticks do not change the table."""
    assert error_list._marked("a | b, *c, `d` ‹e› __f__ [g](h)") == (r"a \| b, \*c, \`d\` *e* \_\_f\_\_ \[g\]\(h\)")
