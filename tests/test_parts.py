"""Long runs that are stopped and go on: what `recommend_layers` keeps in a folder, and what it refuses."""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import unchanged
from networks import Failing, TokenNet, classifier, samples
from torch import Tensor, nn
from torch.utils.data import DataLoader

import retrainscope as rs
from retrainscope import criteria
from retrainscope import parts as parts_module
from retrainscope.base import LayerEstimator
from retrainscope.exceptions import InvalidDataError, ResultFormatError
from retrainscope.parts import Parts
from retrainscope.saving import write_bytes

UNKNOWN = samples(classes=(3, 4, 5), seed=1)


def noisy_decoder(activation: tuple[int, ...], wanted: tuple[int, ...]) -> nn.Module:
    """A decoder that draws from the global random generators while it learns."""
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(math.prod(activation), math.prod(wanted)))


def every_kind(model: nn.Module, **options: object) -> list[LayerEstimator]:
    """Estimators with many parts each, and one of which nothing is kept but the scores."""
    options = {"random_state": 0, "progress": False} | options
    return [
        rs.TangentProbe(model, n_directions=2, **options),
        rs.ActivationSpread(model, **options),
        rs.LayerDecoderProbe(model, max_epochs=3, decoder=noisy_decoder, **options),
        rs.GradientInverter(model, max_iter=np.int64(5), samples_per_class=6, batch_size=25, **options),
        criteria.HScore(model, **options),
    ]


def normed() -> nn.Sequential:
    """A classifier with batch normalisation and dropout, in training mode."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
    return nn.Sequential(*layers)


def advised(model: nn.Module, folder: Path | None = None, *, given: bool = True, **options: object):
    """Advise on the small network, by every kind of estimator, or by the forecast with a trial."""
    if given:
        options = {"estimators": every_kind(model)} | options
    else:
        trial = {"steps": 3, "learning_rates": (1e-2,)}
        options = {"trial": trial, "random_state": 0, "progress": False} | options
    return rs.recommend_layers(model, samples(), UNKNOWN, checkpoint=folder, **options)


def text_of(advice: rs.Recommendation) -> str:
    """Return all that advice holds, but for the seconds that trials took."""
    with tempfile.TemporaryDirectory() as folder:
        advice.save(Path(folder, "advice.json"))
        document = json.loads(Path(folder, "advice.json").read_text())
    if document["result"]["trial"] is not None:
        del document["result"]["trial"]["seconds"]
    return json.dumps(document)


@pytest.fixture
def always(monkeypatch):
    """Keep what is under way at every opportunity, however short ago the last one was."""
    monkeypatch.setattr(parts_module, "_SHARE", math.inf)


@pytest.mark.parametrize("given", [True, False], ids=["estimators", "forecast"])
@pytest.mark.parametrize("written", [True, False], ids=["after", "before"])
def test_stopped_at_every_part(tmp_path, monkeypatch, always, given, written):
    """Stopped after every part, or before the next one is written, the run that goes on gives the same, bit for bit."""
    model, folder, stops = normed(), tmp_path / "parts", 0
    whole = text_of(advised(model, given=given))
    calls = []

    def stopping(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 2 and not written:
            raise KeyboardInterrupt
        write_bytes(path, content)
        if written:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts_module, "write_bytes", stopping)
    while True:
        calls.clear()
        try:
            with unchanged(model):
                advice = advised(model, folder, given=given)
            break
        except KeyboardInterrupt:
            stops += 1
    assert text_of(advice) == whole
    assert stops >= (20 if given else 5)


def padded(n: int, first: int, *, seed: int) -> dict[str, object]:
    """Return token ids of two classes, padded, with names as labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(first, first + 5, (n, 6), generator=generator)
    mask = (torch.arange(6) < 3 + torch.arange(n)[:, None] % 4).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": [("even", "odd")[k % 2] for k in range(n)]}


class Masked(TokenNet):
    """A token classifier that takes a mask by keyword."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits."""
        hidden = torch.relu(self.mix(self.embedding(input_ids))) * attention_mask[..., None]
        return self.head(hidden.mean(dim=1))


def masked() -> nn.Module:
    """Return the token classifier."""
    torch.manual_seed(0)
    return Masked()


@pytest.mark.parametrize(
    ("make", "known", "unknown", "options"),
    [
        (classifier, samples()[0], samples(seed=1)[0], {}),
        (classifier, samples(classes=(("a", 1), ("b", 2))), samples(classes=(("c", 1), ("d", 2)), seed=1), {}),
        (masked, padded(40, 0, seed=0), padded(40, 5, seed=1), {"input_layer": "embedding"}),
    ],
    ids=["unlabelled", "tuples", "tokens"],
)
def test_kinds_of_data(tmp_path, monkeypatch, always, make, known, unknown, options):
    """Data without labels, labels of several parts, and padded tokens go on as well."""
    model = make()
    options |= {"random_state": 0, "progress": False}
    estimators = [
        rs.ActivationSpread(model, **options),
        rs.LayerDecoderProbe(model, max_epochs=2, **options),
        rs.GradientInverter(model, max_iter=3, samples_per_class=2, **options),
    ]
    whole = text_of(rs.recommend_layers(model, known, unknown, estimators=estimators))

    def stopping(path: Path, content: bytes) -> None:
        write_bytes(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(parts_module, "write_bytes", stopping)
    for _ in range(100):
        with contextlib.suppress(KeyboardInterrupt):
            advice = rs.recommend_layers(model, known, unknown, estimators=estimators, checkpoint=tmp_path)
            break
    assert text_of(advice) == whole
    assert len([*tmp_path.glob("*.bin")]) == 6


class Reusing(nn.Module):
    """A classifier that uses a weight a second time, so that its gradients are begun anew without a rule for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        hidden = torch.relu(self.first(x))
        return self.head(self.second(hidden) + nn.functional.linear(hidden, self.second.weight))


def test_gradients_that_are_begun_anew(tmp_path, monkeypatch, always):
    """Gradients that had to be begun anew go on from where they were."""
    model, counts = Reusing(), []
    model.first.register_forward_hook(lambda *_: counts.append(1))
    made = functools.partial(rs.recommend_layers, model, samples(), samples(150, classes=(3, 4, 5), seed=1))
    whole = text_of(made(random_state=0))
    n_whole = len(counts)

    def stopping(path: Path, content: bytes) -> None:
        write_bytes(path, content)
        if "gradients-1-2" in path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts_module, "write_bytes", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(random_state=0, checkpoint=tmp_path)
    assert len([*tmp_path.glob("*gradients-1-*")]) == 3
    counts.clear()
    assert text_of(made(random_state=0, checkpoint=tmp_path)) == whole
    assert len(counts) < n_whole - 2


def test_stopped_anywhere(tmp_path, always):
    """Stopped in a forward pass, wherever and however it comes, the run that goes on gives the same, bit for bit."""
    sound = nn.Sequential(Failing(0, RuntimeError("boom")), *classifier())
    whole = text_of(advised(sound))
    n_calls = sound[0].calls[0]
    for number, at in enumerate(range(1, n_calls, n_calls // 7)):
        error = (KeyboardInterrupt(), RuntimeError("boom"))[number % 2]
        folder = tmp_path / str(number)
        model = nn.Sequential(Failing(at, error), *classifier())
        with pytest.raises(type(error)), unchanged(model):
            advised(model, folder)
        assert text_of(advised(model, folder)) == whole


def test_what_is_done_is_not_done_again(tmp_path):
    """A run whose parts are all there runs no layer but to find the layers, and leaves the estimators as before."""
    counted, sizes = classifier(), list[int]()
    counted[0].register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    estimators = every_kind(counted)[:4]
    first = advised(counted, tmp_path / "parts", estimators=estimators)
    n_calls = len(sizes)
    sizes.clear()
    again = every_kind(counted)[:4]
    assert text_of(advised(counted, tmp_path / "parts", estimators=again)) == text_of(first)
    assert len(sizes) < n_calls / 4
    assert max(sizes) <= 4
    X = samples(5)[0]
    for one, other in zip(estimators[2:], again[2:], strict=True):
        rebuilt = [each.reconstruct(X, "0", control=True) for each in (one, other)]
        rebuilt = [each if isinstance(each, torch.Tensor) else each.inputs for each in rebuilt]
        torch.testing.assert_close(*rebuilt, rtol=0, atol=0)
    assert again[1].neighbours_ == estimators[1].neighbours_
    np.testing.assert_array_equal(again[0].forecast_.draws, estimators[0].forecast_.draws)
    np.testing.assert_array_equal(again[2].losses_, estimators[2].losses_)
    assert not any("_parts" in vars(estimator) for estimator in (*estimators, *again))
    assert again[0].fit(samples()).score_layers(UNKNOWN).n_samples == first.scores[0].n_samples


def test_without_a_checkpoint_nothing_is_written(tmp_path, monkeypatch):
    """Without a checkpoint no file is written."""
    monkeypatch.chdir(tmp_path)
    advised(classifier())
    assert not list(tmp_path.iterdir())


def test_the_threshold_may_be_another(tmp_path):
    """What the advice is made of is kept, so that threshold, tolerance and budget may be others when it goes on."""
    first = advised(classifier(), tmp_path / "a", given=False, trial=None)
    other = advised(classifier(), tmp_path / "a", given=False, trial=None, budget={"parameters": 0.3})
    assert other.forecast.accuracy.tolist() == first.forecast.accuracy.tolist()
    assert text_of(other) == text_of(advised(classifier(), given=False, trial=None, budget={"parameters": 0.3}))


def test_a_loader_goes_on(tmp_path, always):
    """Data from a loader that shuffles is the same data when the run goes on."""
    X, labels = samples()
    loader = DataLoader([*zip(X, labels, strict=True)], batch_size=16, shuffle=True)
    model = nn.Sequential(Failing(0, RuntimeError("boom")), *classifier())
    made = functools.partial(rs.recommend_layers, model, loader, UNKNOWN)
    whole = text_of(made(estimators=every_kind(model)))
    model[0].at, model[0].calls[0] = model[0].calls[0] // 2, 0
    with pytest.raises(RuntimeError, match="boom"):
        made(estimators=every_kind(model), checkpoint=tmp_path / "parts")
    assert text_of(made(estimators=every_kind(model), checkpoint=tmp_path / "parts")) == whole


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_parts
from networks import classifier
folder = Path(sys.argv[1])
advice = test_parts.advised(classifier(), folder / "parts")
(folder / "result").write_text(test_parts.text_of(advice))
"""


def test_killed(tmp_path):
    """After ``kill -9`` the same call goes on and gives the same, bit for bit."""
    whole, n_killed = text_of(advised(classifier())), 0
    for n_files in (4, None):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
        with subprocess.Popen(command) as process:
            while process.poll() is None:
                if n_files is not None and len([*tmp_path.glob("parts/*.bin")]) >= n_files:
                    os.kill(process.pid, signal.SIGKILL)
                    n_killed += 1
                    break
                time.sleep(0.01)
    assert process.returncode == 0
    assert n_killed == 1
    assert (tmp_path / "result").read_text() == whole


class Other(nn.Module):
    """A rectifier of another name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the positive part."""
        return x.relu()


@pytest.mark.parametrize(
    "other",
    [
        {"model": classifier(seed=1)},
        {"model": nn.Sequential(*classifier()[:3], Other(), classifier()[4])},
        {"known": samples(seed=3)},
        {"known": (samples()[0], samples()[1][::-1])},
        {"unknown": samples(classes=(3, 4, 5), seed=3)},
        {"random_state": 1},
        {"layers": ["2"]},
        {"batch_size": 16},
        {"groups": list(range(60))},
        {"trial": {"steps": 2}},
        {"estimators": [rs.ActivationSpread]},
    ],
    ids=lambda other: "-".join(other),
)
def test_the_folder_of_another_run(tmp_path, other):
    """The folder of another model, other data or settings is refused before any work, and left as it is."""
    options = {"model": classifier(), "known": samples(), "unknown": UNKNOWN, "random_state": 0}
    rs.recommend_layers(**options, checkpoint=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options |= other
    if "estimators" in other:
        options["estimators"] = [kind(options["model"], random_state=0) for kind in other["estimators"]]
    with pytest.raises(InvalidDataError, match=rf"{tmp_path.name} holds parts of another run.*checkpoint=, or remove"):
        rs.recommend_layers(**options, checkpoint=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def flipped(content: bytes) -> bytes:
    """Return content with one bit of its middle turned."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda content: content[:-10], lambda content: b""], ids=["flipped", "cut", "empty"]
)
@pytest.mark.parametrize("name", ["1-TangentProbe.known.bin", "0-ActivationSpread.unknown.bin", "manifest.json"])
def test_a_damaged_file(tmp_path, damage, name):
    """A file with one bit turned, cut off or empty is refused by name before any work; without it the run goes on."""
    whole = advised(classifier(), tmp_path, given=False)
    path = tmp_path / name
    assert path.exists()
    path.write_bytes(damage(path.read_bytes()))
    counted = classifier()
    counted[0].register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(InvalidDataError, match=f"{name} is damaged|holds parts of another run"):
        advised(counted, tmp_path, given=False)
    path.unlink()
    if name == "manifest.json":
        with pytest.raises(InvalidDataError, match=r"holds something else .*no manifest.json.*empty one with checkp"):
            advised(classifier(), tmp_path, given=False)
    else:
        assert text_of(advised(classifier(), tmp_path, given=False)) == text_of(whole)


def test_a_damaged_trial(tmp_path):
    """The trial's file is looked at before any work, too."""
    advised(classifier(), tmp_path, given=False)
    (tmp_path / "trial.json").write_text("{")
    with pytest.raises(InvalidDataError, match=r"trial.json is no checkpoint of a sweep, or a damaged one"):
        advised(classifier(), tmp_path, given=False)
    (tmp_path / "trial.json").write_text(json.dumps({"fingerprint": "another", "trials": {}}))
    with pytest.raises(InvalidDataError, match=r"trial.json holds no part of this sweep"):
        advised(classifier(), tmp_path, given=False)


def test_a_file_of_another_run(tmp_path):
    """A part that was copied from another run's folder is refused by its name."""
    for seed in (0, 1):
        advised(classifier(seed=seed), tmp_path / str(seed), given=False, trial=None)
    name = "0-ActivationSpread.known.bin"
    (tmp_path / "0" / name).write_bytes((tmp_path / "1" / name).read_bytes())
    with pytest.raises(InvalidDataError, match=rf"{name} is damaged, or was written by another run.*Remove this file"):
        advised(classifier(), tmp_path / "0", given=False, trial=None)


def test_a_newer_folder(tmp_path):
    """A folder of a newer version is refused."""
    advised(classifier(), tmp_path, given=False, trial=None)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(InvalidDataError, match=r"newer version \(schema 2; this one reads up to 1\). Update"):
        advised(classifier(), tmp_path, given=False, trial=None)


def test_a_folder_that_cannot_be(tmp_path):
    """A folder in one that is not there, a file, and one that the system does not let be made are refused."""
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "no" / "where", "must name a folder, or a new one in a folder that exists. Got .*where"),
        (tmp_path / "file", "checkpoint folder .*file cannot be written .*Name another one with checkpoint="),
        (Path("/proc/parts"), "checkpoint folder /proc/parts cannot be written"),
        (3, "'checkpoint' parameter must be the path of a folder. Got 3 instead"),
    ):
        with pytest.raises(InvalidDataError, match=message):
            advised(classifier(), path)


def test_a_folder_of_something_else(tmp_path):
    """A folder with other files in it is refused; one with a draft that was left over is taken."""
    (tmp_path / ".manifest.json.part").write_text("{")
    advised(classifier(), tmp_path, given=False, trial=None)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter-1.txt").write_text("")
    with pytest.raises(InvalidDataError, match=r"thesis holds something else \(chapter-1.txt\), and no manifest.json"):
        advised(classifier(), other)


def test_a_full_disk(tmp_path, monkeypatch):
    """Where a part cannot be written any more, the error says so and what is there is whole."""
    folder = tmp_path / "parts"

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(parts_module, "write_bytes", full)
        with pytest.raises(InvalidDataError, match=r"parts cannot be written \(No space left on device\).*Make room"):
            advised(classifier(), folder)
    assert text_of(advised(classifier(), folder)) == text_of(advised(classifier()))


@pytest.mark.parametrize("random_state", [None, np.random.RandomState(0)], ids=["none", "generator"])
def test_an_integer_is_needed(tmp_path, random_state):
    """Without an integer random state, of the estimators where they are given, there is no same run."""
    with pytest.raises(InvalidDataError, match="With 'checkpoint' give an integer random_state"):
        advised(classifier(), tmp_path, given=False, random_state=random_state)
    model = classifier()
    with pytest.raises(InvalidDataError, match="With 'checkpoint' give an integer random_state"):
        advised(model, tmp_path, estimators=every_kind(model, random_state=random_state))
    assert not list(tmp_path.iterdir())


def test_labels_that_cannot_be_kept(tmp_path):
    """Labels that no file can hold are refused before any work."""
    X, labels = samples()
    known = X, [frozenset({label}) for label in labels]
    model = classifier()
    with pytest.raises(ResultFormatError, match="class labels must be strings, numbers"):
        rs.recommend_layers(model, known, known, estimators=every_kind(model), checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_unpickled(tmp_path):
    """A part that would run code when it is read is refused, though its digest is right."""
    parts = Parts.open(tmp_path, "same")
    parts.put("code", Path("x"))
    with pytest.raises(InvalidDataError, match=r"code.bin is damaged"):
        parts.get("code")
