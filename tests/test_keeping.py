"""The folder in which a study keeps what is finished."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from retrainscope.exceptions import OutputError
from retrainscope.studies.keeping import kept_folder, reading


@dataclass(frozen=True)
class Settings:
    layers: tuple[str, ...]
    descent: dict[str, str]
    seed: int


SETTINGS = Settings(("conv1", "conv2"), {"optimizer": "lbfgs"}, 0)


def test_new_folder_is_made_with_its_settings(tmp_path):
    """A folder that is not there is made, with its parents, and holds the settings."""
    folder = kept_folder(tmp_path / "a" / "b", SETTINGS, "networks")
    assert folder == tmp_path / "a" / "b" / "networks"
    assert folder.is_dir()
    document = json.loads((tmp_path / "a" / "b" / "settings.json").read_text())
    assert document["retrainscope"] == "Settings"
    assert document["result"] == {"layers": ["conv1", "conv2"], "descent": [["optimizer", "lbfgs"]], "seed": 0}


def test_folder_may_be_a_string(tmp_path):
    """The folder is a path or a string."""
    assert kept_folder(str(tmp_path), SETTINGS, "networks") == tmp_path / "networks"


def test_same_settings_find_the_folder_again(tmp_path):
    """A second run with the same settings gets the same folder, and what is in it stays."""
    first = kept_folder(tmp_path, SETTINGS, "networks")
    (first / "a.npz").write_bytes(b"kept")
    written = (tmp_path / "settings.json").read_bytes()
    again = Settings(("conv1", "conv2"), {"optimizer": "lbfgs"}, 0)
    assert kept_folder(tmp_path, again, "networks") == first
    assert (first / "a.npz").read_bytes() == b"kept"
    assert (tmp_path / "settings.json").read_bytes() == written


def test_other_settings_are_named(tmp_path):
    """A run with other settings is refused with all that differs, and with nothing else."""
    kept_folder(tmp_path, SETTINGS, "networks")
    with pytest.raises(OutputError, match=r"holds a run with other settings \(.*\)\. Name another folder\.") as caught:
        kept_folder(tmp_path, Settings(("conv2",), {"optimizer": "lbfgs"}, 3), "networks")
    assert "(layers was ('conv1', 'conv2'), now ('conv2',), seed was 0, now 3)" in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path} holds")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", r"holds no Settings \(found: something else\)"),
        ('{"retrainscope": "Study", "schema": 1, "result": {}}', r"holds no Settings \(found: Study\)"),
        ('{"retrainscope": "Settings", "schema": 1, "result": {"seed": 0}}', "is damaged"),
        ('{"retrainscope": "Settings", "schema": 1}', "is damaged"),
        ('{"retrainscope": "Settings", "schema": 99, "result": {}}', "was written by a newer version"),
    ],
)
def test_damaged_settings_are_said(content, message, tmp_path):
    """Settings that cannot be read are named, with what to do, and left as they are."""
    path = tmp_path / "settings.json"
    path.write_text(content)
    with pytest.raises(OutputError, match=f"settings.json {message}.*Name another folder, or empty this one"):
        kept_folder(tmp_path, SETTINGS, "networks")
    assert path.read_text() == content


@pytest.mark.parametrize("below", ["file", "file/study"])
def test_folder_that_cannot_be_made(below, tmp_path):
    """A folder in the place of a file, or below one, is refused with the reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=rf"{below} cannot be written \(Not a directory\)\. Name another folder"):
        kept_folder(tmp_path / below, SETTINGS, "networks")


def test_settings_that_cannot_be_written(tmp_path):
    """A folder in the place of the settings is refused with the reason."""
    (tmp_path / "settings.json").mkdir()
    with pytest.raises(OutputError, match=r"cannot be written \(Is a directory\)\. Name another folder"):
        kept_folder(tmp_path, SETTINGS, "networks")


def _read(path):
    with reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in ("a", "b")}


@pytest.fixture
def arrays_file(tmp_path):
    path = tmp_path / "random-0.npz"
    np.savez_compressed(path, a=np.arange(1000), b=np.ones(2))
    return path


def test_whole_file_is_read(arrays_file):
    """A file that is whole is read, and nothing is said."""
    assert _read(arrays_file)["a"].sum() == 499500


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: b"hello", id="text"),
        pytest.param(lambda whole: whole[: len(whole) // 2], id="cut"),
        pytest.param(lambda whole: whole[:80] + b"\0\0\0\0" + whole[84:], id="changed"),
        pytest.param(lambda whole: b"", id="empty"),
    ],
)
def test_damaged_file_is_said(damage, arrays_file):
    """A damaged file is an error that says in which folder it is and what to do."""
    arrays_file.write_bytes(damage(arrays_file.read_bytes()))
    with pytest.raises(OutputError, match=r"damaged.*Delete it to run it again") as caught:
        _read(arrays_file)
    assert str(arrays_file.parent) in str(caught.value)


def test_damaged_file_is_named(arrays_file):
    """The message names the file that is to be deleted."""
    arrays_file.write_bytes(b"hello")
    with pytest.raises(OutputError, match=arrays_file.name):
        _read(arrays_file)


def test_missing_array_is_a_damaged_file(arrays_file):
    """A file without one of the arrays is damaged."""
    np.savez(arrays_file, a=np.ones(1))
    with pytest.raises(OutputError, match=r"damaged file \(.*b is not a file in the archive.*Delete it"):
        _read(arrays_file)


def test_file_that_is_gone(tmp_path):
    """A file that cannot be opened is named."""
    with pytest.raises(OutputError, match=r"random-9\.npz.*Delete it"):
        _read(tmp_path / "random-9.npz")


def test_an_interrupt_passes(tmp_path):
    """Who stops a run is not told of a damaged file."""
    with pytest.raises(KeyboardInterrupt), reading(tmp_path / "x"):
        raise KeyboardInterrupt
