"""The examples, each as a process of its own: what they assert of their results holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HERE = ["compare_with_sweep", "lightning_digits", "own_estimator", "peft_text", "plain_loop"]
WITH_TORCHVISION = ["resnet_folder"]
ELSEWHERE = ["text"]  # takes eight minutes: make example-text


@pytest.mark.parametrize("name", [*HERE, *(pytest.param(name, marks=pytest.mark.vision) for name in WITH_TORCHVISION)])
def test_example_runs(name, tmp_path):
    """An example runs to its end, in any folder."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Verdict:" in done.stdout


def test_notebook_runs():
    """The notebook runs from top to bottom, without a word of warning, and shows now what it was saved with."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "advice.ipynb", as_version=4)
    saved = shown_in(notebook)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute(env=environment)
    assert shown_in(notebook) == saved
    assert sum("image/png" in kinds for cell in saved for kinds in cell) == 7
    assert not any("stderr" in kinds for cell in saved for kinds in cell)


def shown_in(notebook):
    """Return for every cell what it shows: the names of streams, which may come in parts, and forms of results."""
    cells = [cell.get("outputs", []) for cell in notebook.cells]
    kinds = [[(out["name"],) if "name" in out else tuple(sorted(out["data"])) for out in outputs] for outputs in cells]
    return [list(dict.fromkeys(cell)) for cell in kinds]


def test_every_example_is_run_somewhere():
    """No example is forgotten here; what has no `main` is a part of others."""
    runnable = {file.stem for file in EXAMPLES.glob("*.py") if "__main__" in file.read_text(encoding="utf-8")}
    assert runnable == {*HERE, *WITH_TORCHVISION, *ELSEWHERE}
