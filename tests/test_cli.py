"""The command: its exit status and its messages."""

import subprocess
import sys

import pytest

from retrainscope.cli import main


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


def test_interrupt(monkeypatch, capsys):
    """Ctrl-C ends with status 130 and says what is kept."""

    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("retrainscope.studies.mnist.run.run_study", interrupted)
    assert main(["mnist", "--out", "study"]) == 130
    assert "finished seeds are kept" in capsys.readouterr().err
    assert main(["mnist"]) == 130
    assert "nothing is kept without --out" in capsys.readouterr().err
