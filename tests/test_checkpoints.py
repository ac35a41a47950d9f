"""Sweeps that are stopped and go on: what a checkpoint keeps, and which ones are refused."""

import functools
import json

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import classifier, samples
from sweeping import Recorder, assert_same, noisy, numbered, swept, watched, worn
from torch import Tensor, nn

import retrainscope as rs
from retrainscope.exceptions import CheckpointError, InvalidDataError


def test_the_same_again():
    """An integer random state gives the same sweep bit for bit, whatever the global generators and the model's mode."""
    first = swept(noisy())
    torch.rand(3)
    assert_same(swept(noisy().eval()), first)
    assert_same(swept(noisy(), device="cpu"), first)


def test_in_parts_it_is_the_same(tmp_path):
    """A sweep that was made in parts, policies asked for later among them, is bit for bit that made in one go."""
    options = {"checkpoint": tmp_path / "sweep.json", "n_seeds": 2}
    unknown = samples(classes=(0, 1), seed=1)
    whole = swept(noisy(), unknown=unknown, n_seeds=2)
    swept(noisy(), unknown=unknown, policies=[["5"]], **options)
    assert_same(swept(noisy(), unknown=unknown, **options), whole)


def test_what_is_done_is_skipped(tmp_path):
    """Going on, what is done is not trained again, down to the last forward pass; more policies train these alone."""
    options = {"checkpoint": str(tmp_path / "sweep.json"), "learning_rates": (1e-2, 1e-3), "n_seeds": 2}
    seen: list[tuple[bool, list[int]]] = []

    def made(**more: object) -> tuple[rs.LayerSweep, Recorder]:
        seen.clear()
        recorder = Recorder()
        return swept(watched(seen), numbered(first=1000), numbered(), optimizer=recorder, **options, **more), recorder

    first, recorder = made(policies=[["1"]])
    assert len(recorder.made) == 2 * 2 * 2
    again, recorder = made(policies=[["1"]])
    assert recorder.made == []
    assert not any(training for training, _ in seen)
    assert_same(again, first, ignoring=())
    more, recorder = made(policies=[["1", "3"], ["1"]])
    assert more.policies == ("head", "all", "head + 1")
    assert [len(made.parameters) for made in recorder.made] == [6] * 4
    np.testing.assert_array_equal(more.accuracy[[0, 2]], first.accuracy)
    fewer, recorder = made(policies=[])
    assert fewer.policies == ("head",)
    assert recorder.made == []


def test_more_seeds_go_on(tmp_path):
    """A sweep that is asked for more seeds trains these alone, and is that which had them from the start."""
    options = {"checkpoint": tmp_path / "sweep.json", "policies": [["2"]]}
    swept(n_seeds=1, **options)
    recorder = Recorder()
    whole = swept(n_seeds=3, policies=[["2"]])
    assert_same(swept(n_seeds=3, **options), whole)
    swept(n_seeds=2, optimizer=recorder, checkpoint=tmp_path / "other.json", policies=[["2"]])
    made = len(recorder.made)
    swept(n_seeds=3, optimizer=recorder, checkpoint=tmp_path / "other.json", policies=[["2"]])
    assert (made, len(recorder.made)) == (4, 6)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
def test_what_was_done_before_an_interruption_is_kept(tmp_path, error):
    """After an interruption what was done is in the checkpoint, and the sweep that goes on is the whole one."""
    options = {"checkpoint": tmp_path / "sweep.json", "n_seeds": 2}
    model = worn()
    stopped, rest = Recorder(at=4, error=error), Recorder()
    with pytest.raises(type(error)), unchanged(model):
        swept(model, optimizer=stopped, **options)
    sweep = swept(model, optimizer=rest, **options)
    assert (len(stopped.made), len(rest.made)) == (3, 5)
    assert_same(sweep, swept(model, optimizer=Recorder(), n_seeds=2))
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def moved(data: tuple[Tensor, list[object]]) -> tuple[Tensor, list[object]]:
    """Return samples of which the last has another value."""
    X = data[0].clone()
    X[-1, -1] += 1
    return X, data[1]


UNKNOWN, TEST = samples(classes=("a", "b", "c"), seed=1), samples(classes=("a", "b", "c"), seed=2)


@pytest.mark.parametrize(
    "other",
    [
        {"model": classifier(seed=1)},
        {"known": moved(samples())},
        {"known": (samples()[0], samples()[1][::-1])},
        {"unknown": moved(UNKNOWN)},
        {"unknown": (UNKNOWN[0], UNKNOWN[1][::-1])},
        {"test": moved(TEST)},
        {"test": (TEST[0], TEST[1][::-1])},
        {"test": None},
        {"layers": ["2"]},
        {"steps": 5},
        {"batch_size": 16},
        {"learning_rates": (1e-3,)},
        {"validation_size": 0.3},
        {"random_state": 1},
        {"optimizer": torch.optim.SGD},
    ],
    ids=lambda other: "-".join(other),
)
def test_the_checkpoint_of_another_sweep(tmp_path, other):
    """A checkpoint of another model, other data or settings is refused before training, and left as it is."""
    path = tmp_path / "sweep.json"
    options = {"model": classifier(), "unknown": UNKNOWN, "test": TEST, "checkpoint": path, "policies": []}
    swept(optimizer=Recorder(), **options)
    before, recorder = path.read_bytes(), Recorder()
    with pytest.raises(InvalidDataError, match=r"sweep.json holds no part of this sweep.*checkpoint=, or remove"):
        swept(**(options | {"optimizer": recorder} | other))
    assert recorder.made == []
    assert path.read_bytes() == before


def test_settings_of_an_optimizer_are_told_apart(tmp_path):
    """A partial optimizer goes on with what it was given before, and not with anything else."""
    options = {"checkpoint": tmp_path / "sweep.json", "policies": []}
    for momentum in (0.5, 0.5):
        swept(optimizer=functools.partial(torch.optim.SGD, momentum=momentum), **options)
    with pytest.raises(InvalidDataError, match="no part of this sweep"):
        swept(optimizer=functools.partial(torch.optim.SGD, momentum=0.6), **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\xff\xfe",
        lambda text: json.dumps({"fingerprint": json.loads(text)["fingerprint"]}),
        lambda text: json.dumps(json.loads(text) | {"trials": [1]}),
        lambda text: json.dumps(json.loads(text) | {"trials": {"[[], 0]": {"hits": None}}}),
        lambda text: text.replace('"hits": "', '"hits": "?'),
    ],
    ids=["cut", "empty", "list", "bytes", "no trials", "no mapping", "no numbers", "no base64"],
)
def test_a_damaged_checkpoint(tmp_path, damage):
    """A file that is no checkpoint, or a damaged one, is refused before training, with what to do."""
    path, recorder = tmp_path / "sweep.json", Recorder()
    swept(checkpoint=path, policies=[], optimizer=Recorder())
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with pytest.raises(InvalidDataError, match=r"is no checkpoint of a sweep, or a damaged one.*or remove this one"):
        swept(checkpoint=path, policies=[], optimizer=recorder)
    assert recorder.made == []


@pytest.mark.parametrize("random_state", [None, np.random.RandomState(0)])
def test_a_checkpoint_needs_to_be_the_same_sweep(tmp_path, random_state):
    """With a checkpoint the random state has to be an integer; one of numpy will do."""
    options = {"checkpoint": tmp_path / "sweep.json", "policies": []}
    with pytest.raises(InvalidDataError, match="'checkpoint' give an integer random_state"):
        swept(random_state=random_state, **options)
    assert_same(swept(random_state=np.int64(0), **options), swept(**options), ignoring=())


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    """A checkpoint in a folder that is not there, or that is a folder, is refused before training."""
    recorder = Recorder()
    for path in (tmp_path / "nowhere" / "sweep.json", tmp_path):
        with pytest.raises(InvalidDataError, match=r"'checkpoint' parameter must name a file in a folder that exists"):
            swept(checkpoint=path, optimizer=recorder)
    assert recorder.made == []


def test_a_full_disk(tmp_path, monkeypatch):
    """Where nothing can be written any more, the error says so, and what is there is whole."""
    options = {"checkpoint": tmp_path / "sweep.json", "policies": []}

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(InvalidDataError, match=r"sweep.json cannot be written \(No space left on device\).*Make"):
            swept(**options)
    assert_same(swept(**options), swept(policies=[]))


@pytest.mark.parametrize("change", ["content", "name"])
def test_what_is_not_saved_with_the_model_counts(tmp_path, change):
    """A buffer that is no part of the state, such as the mean of the inputs, makes another run."""

    def model(mean: float, name: str = "mean") -> nn.Module:
        made = classifier()
        made.register_buffer(name, torch.tensor(mean), persistent=False)
        return made

    swept(model(1.0), checkpoint=tmp_path / "sweep.json")
    swept(model(1.0), checkpoint=tmp_path / "sweep.json")
    other = model(2.0) if change == "content" else model(1.0, "median")
    with pytest.raises(CheckpointError, match="holds no part of this sweep"):
        swept(other, checkpoint=tmp_path / "sweep.json")
