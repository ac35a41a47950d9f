"""The command: its exit status and its messages."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from retrainscope.cli import main
from retrainscope.descent import Descent
from retrainscope.studies.vgg19.run import DEFAULT_LAYERS
from retrainscope.studies.vgg19.run import run_study as original_run_study


def test_version(capsys):
    """--version prints the version."""
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("retrainscope 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["nonsense"], "invalid choice"),
        (["mnist", "--seeds", "0"], "must be a whole number, at least 1; got 0"),
        (["mnist", "--seeds", "x"], "must be a whole number, at least 1; got x"),
        (["mnist", "--seed", "-1"], "must be a whole number, at least 0; got -1"),
        (["vgg19", "--size", "0"], "must be a whole number, at least 1; got 0"),
        (["vgg19", "--inits", "0"], "must be a whole number, at least 1; got 0"),
        (["vgg19", "--max-iter", "1.5"], "must be a whole number, at least 1; got 1.5"),
        (["vgg19", "--seed", "-1"], "must be a whole number, at least 0; got -1"),
        (["vgg19", "--optimizer", "sgd"], "invalid choice"),
        (["vgg19", "--tv-weight", "x"], "invalid float"),
        (["vgg19", "--images"], "expected at least one argument"),
        (["vgg19", "--layers"], "expected one argument"),
    ],
)
def test_bad_use(arguments, message, capsys):
    """Bad use ends with status 2 and says why."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_folder_without_full(tmp_path, capsys):
    """A folder of images that would not be used is refused."""
    assert main(["mnist", "--mnist-folder", str(tmp_path)]) == 2
    assert "--mnist-folder is for --full" in capsys.readouterr().err


def test_errors_are_one_line(tmp_path):
    """An error with a remedy is one line on standard error, without a traceback."""
    command = [sys.executable, "-m", "retrainscope", "mnist", "--full", "--mnist-folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("retrainscope: ")
    assert "has no file 'train-images-idx3-ubyte'" in line


@pytest.mark.parametrize("study", ["mnist", "vgg19"])
def test_interrupt(study, monkeypatch, capsys):
    """Ctrl-C ends with status 130 and says what is kept."""

    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"retrainscope.studies.{study}.run.run_study", interrupted)
    assert main([study, "--out", "study"]) == 130
    assert "what is finished is kept" in capsys.readouterr().err
    assert main([study]) == 130
    assert "nothing is kept without --out" in capsys.readouterr().err


@pytest.fixture
def taken(monkeypatch):
    """Return what the command hands on to the VGG-19 study, which does not run."""
    got = {}
    monkeypatch.setattr("retrainscope.studies.vgg19.run.run_study", lambda **options: got.update(options))
    monkeypatch.setattr("retrainscope.studies.vgg19.run.tables", lambda _: [])
    return got


def test_vgg19_defaults(taken):
    """Without options, the command asks for what run_study does by itself."""
    assert main(["vgg19"]) == 0
    parameters = inspect.signature(original_run_study).parameters
    for name in ("weights", "size", "n_inits", "seed", "device", "out", "progress"):
        assert taken[name] == parameters[name].default, name
    assert tuple(taken["layers"]) == DEFAULT_LAYERS
    assert list(taken["images"]) == []
    assert taken["descent"] == Descent("lbfgs", max_iter=200)


def test_vgg19_options(taken):
    """Every option reaches the study."""
    assert main([
        "vgg19", "--weights", "w.pt", "--images", "a.png", "b", "--layers", "1, features.7,,", "--size", "64",
        "--inits", "2", "--optimizer", "adam", "--max-iter", "7", "--tv-weight", "0.5", "--device", "cpu",
        "--seed", "4", "--quiet",
    ]) == 0  # fmt: skip
    assert callable(taken.pop("say"))
    assert taken == {
        "weights": "w.pt",
        "images": [Path("a.png"), Path("b")],
        "layers": ["1", "features.7"],
        "size": 64,
        "n_inits": 2,
        "descent": Descent("adam", max_iter=7, tv_weight=0.5),
        "seed": 4,
        "device": "cpu",
        "out": None,
        "progress": False,
    }


def test_vgg19_bad_prior(taken, capsys):
    """A weight below 0 is refused before any work."""
    assert main(["vgg19", "--tv-weight", "-1"]) == 2
    assert "'tv_weight' parameter must be zero or a positive number" in capsys.readouterr().err
    assert taken == {}
