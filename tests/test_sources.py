"""Data as people have it: data sets of Hugging Face, labels of any kind, and very many or very small classes."""

import re
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from helpers import unchanged
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import retrainscope as rs
from retrainscope.exceptions import InvalidDataError

datasets = pytest.importorskip("datasets", reason="the group test brings it")

N = 20
LABELS = [place % 2 for place in range(N)]
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor(LABELS)[:, None]
ESTIMATORS = {
    "spread": lambda model, **options: rs.ActivationSpread(model, random_state=0, **options),
    "probe": lambda model, **options: rs.LayerDecoderProbe(model, max_epochs=1, random_state=0, **options),
    "inverter": lambda model, **options: rs.GradientInverter(
        model, max_iter=2, samples_per_class=5, random_state=0, **options
    ),
}
each_estimator = pytest.mark.parametrize("name", ESTIMATORS)


class Net(nn.Module):
    """Two layers and a head, called by keyword."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(4, width), nn.Linear(width, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))))


def scores_of(known: Any, unknown: Any, name: str) -> rs.LayerScores:
    """Run one estimator, which must leave the model as it was."""
    model = Net()
    with unchanged(model):
        return ESTIMATORS[name](model).fit(known).score_layers(unknown)


def assert_same_scores(first: rs.LayerScores, second: rs.LayerScores) -> None:
    assert first.classes == second.classes
    for number in ("values", "interval", "per_class", "known", "unknown", "known_reference", "unknown_reference"):
        values = getattr(first, number), getattr(second, number)
        np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-7, err_msg=number)  # a need of 1e-8 is rounding


# Hugging Face


def table(factor: float = 1.0, **more: Any) -> Any:
    """Return a data set with the inputs and the labels as lists."""
    return datasets.Dataset.from_dict({"x": (X * factor).tolist(), "label": LABELS, **more})


def in_torch(data: Any) -> Any:
    data.set_format("torch")
    return data


def transformed(data: Any) -> Any:
    return data.with_transform(lambda rows: {"x": [torch.tensor(x) for x in rows["x"]], "label": rows["label"]})


FORMS: dict[str, Callable[[Any], Any]] = {
    "lists": lambda data: data,
    "torch": in_torch,
    "numpy": lambda data: data.with_format("numpy"),
    "transformed": transformed,
    "iterable": lambda data: data.to_iterable_dataset(),
    "iterable in torch": lambda data: data.to_iterable_dataset().with_format("torch"),
    "loader": lambda data: DataLoader(data.with_format("torch"), batch_size=64),
}


@each_estimator
@pytest.mark.parametrize("form", FORMS)
def test_data_sets_of_hugging_face(form, name):
    """A data set of Hugging Face gives the scores of its columns as tensors, in several passes."""
    known, unknown = FORMS[form](table()), FORMS[form](table(2.0))
    scores = scores_of(known, unknown, name)
    # The probe learns from a stream in its own order, and from what can be indexed in a random one.
    plain = [{"x": X, "label": LABELS}], [{"x": 2 * X, "label": LABELS}]
    plain = plain if "iterable" in form or form == "loader" else (plain[0][0], plain[1][0])
    assert_same_scores(scores, scores_of(*plain, name))


@pytest.mark.parametrize("batch_size", [3, 64])
def test_iterable_data_set_in_small_batches(batch_size):
    """How many rows of a stream are read at once changes no score of the spread."""
    model = Net()
    spread = rs.ActivationSpread(model, random_state=0, batch_size=batch_size).fit(table().to_iterable_dataset())
    found = spread.score_layers(table(2.0).to_iterable_dataset())
    assert_same_scores(found, scores_of((X, LABELS), (2 * X, LABELS), "spread"))


def splits() -> Any:
    return datasets.DatasetDict(train=table(), test=table())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "strings": (
        lambda: table(text=["word"] * N),
        r"The column 'text' of the known data holds str.* leave it out with remove_columns\('text'\)",
    ),
    "strings in a stream": (
        lambda: table(text=["word"] * N).to_iterable_dataset(),
        r"The column 'text' of the known data holds str.* leave it out with remove_columns\('text'\)",
    ),
    "unequal lengths": (
        lambda: datasets.Dataset.from_dict({"x": [[1.0] * (1 + row % 3) for row in range(N)], "label": LABELS}),
        r"different lengths in the column 'x'. Pad them, or give a DataLoader that does: collate_fn=",
    ),
    "unequal tensors": (
        lambda: in_torch(
            datasets.Dataset.from_dict({"x": [[1.0] * (1 + row % 3) for row in range(N)], "label": LABELS})
        ),
        r"different lengths in the column 'x'. Pad them, or give a DataLoader that does: collate_fn=",
    ),
    "splits": (splits, "The known data has the splits 'train', 'test'. Give one of them"),
    "splits of streams": (
        lambda: datasets.IterableDatasetDict(train=table().to_iterable_dataset()),
        "The known data has the splits 'train'. Give one of them",
    ),
    "missing numbers": (
        lambda: datasets.Dataset.from_dict({"x": [[1.0, None, 1.0, 1.0]] * N, "label": LABELS}),
        "of the known data|the known data has NaN",
    ),
    "missing labels": (
        lambda: datasets.Dataset.from_dict({"x": X.tolist(), "label": [None, *LABELS[1:]]}),
        "The known labels must be hashable, not None and not NaN. Got None",
    ),
    "no rows": (lambda: table().select([]), "The known data is empty"),
}


@each_estimator
@pytest.mark.parametrize("kind", REFUSED)
def test_data_sets_that_do_not_fit_are_refused(kind, name):
    """What no model takes is refused by the name of its column, with what to do."""
    make, message = REFUSED[kind]
    model = Net()
    with unchanged(model), pytest.raises(InvalidDataError, match=re.compile(message, re.IGNORECASE)):
        ESTIMATORS[name](model).fit(make())


class Encoding(UserDict):
    """Like the ``BatchEncoding`` that tokenizers return."""


@each_estimator
def test_mapping_of_ones_own(name):
    """A mapping that is no dict, as tokenizers return it, gives the scores of a dict; alone and in batches."""
    expected = scores_of((X, LABELS), (2 * X, LABELS), name)
    known, unknown = Encoding(x=X, labels=LABELS), Encoding(x=2 * X, labels=LABELS)
    assert_same_scores(scores_of(known, unknown, name), expected)
    assert_same_scores(scores_of((Encoding(x=X), LABELS), (Encoding(x=2 * X), LABELS), name), expected)
    in_order = scores_of([(X, LABELS)], [(2 * X, LABELS)], name)
    assert_same_scores(scores_of([known], [unknown], name), in_order)


# Labels


class Colour(Enum):
    """Two colours."""

    RED = 0
    BLUE = 1


@dataclass(frozen=True)
class Breed:
    """A label with parts."""

    animal: str
    number: int


class Items(Dataset):
    """Single samples, with labels of any kind."""

    def __init__(self, labels: list[Any], factor: float = 1.0) -> None:
        self.labels, self.factor = labels, factor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        return self.factor * X[row], self.labels[row]


KINDS: dict[str, tuple[Any, Any]] = {
    "tuples": (("cat", 1), ("dog", 2)),
    "strings": ("cat", "dog"),
    "enum": (Colour.RED, Colour.BLUE),
    "dataclass": (Breed("cat", 1), Breed("dog", 2)),
    "bool": (False, True),
    "bytes": (b"cat", b"dog"),
    "mixed": ("cat", 7),
    "numbers of numpy": (np.int64(3), np.int64(5)),
    "tensors": (torch.tensor(3), torch.tensor(5)),
    "frozen sets": (frozenset({1}), frozenset({1, 2})),
}


@each_estimator
@pytest.mark.parametrize("kind", KINDS)
def test_labels_may_be_of_any_hashable_kind(kind, name):
    """What the labels are changes no score, and they come back as they were; the table prints them."""
    pair = KINDS[kind]
    labels = [pair[label] for label in LABELS]
    scores = scores_of(Items(labels), Items(labels, 2.0), name)
    expected = scores_of(Items(LABELS), Items(LABELS, 2.0), name)
    assert len(scores.classes) == 2
    assert set(scores.classes) == {label.item() if hasattr(label, "item") else label for label in pair}
    order = [scores.classes.index(label.item() if hasattr(label, "item") else label) for label in pair]
    np.testing.assert_allclose(scores.values, expected.values, rtol=1e-6)
    np.testing.assert_allclose(scores.per_class[order], expected.per_class, rtol=1e-6)
    assert all(str(label) in str(scores) for label in scores.classes)


@each_estimator
@pytest.mark.parametrize("label", [None, float("nan"), ["a list"]], ids=["None", "NaN", "list"])
def test_labels_that_are_none_are_refused(label, name):
    """None, NaN and what cannot be told apart are no labels."""
    model, data = Net(), Items([*LABELS[:-1], label])
    message = r"The known labels must be hashable, not None and not NaN. Got (None|nan|\['a list'\])"
    with unchanged(model), pytest.raises(InvalidDataError, match=message):
        ESTIMATORS[name](model).fit(data)


# Very many classes, and very small ones


def test_very_many_classes():
    """A thousand classes fit: fewer features are drawn, the table shows twelve of them and says so."""
    n_classes, model = 1000, Net(width=512)
    inputs = torch.randn(4 * n_classes, 4, generator=torch.Generator().manual_seed(1))
    labels = [f"class {row % n_classes}" for row in range(len(inputs))]
    with unchanged(model):
        spread = rs.ActivationSpread(model, random_state=0).fit((inputs, labels))
        scores = spread.score_layers((2 * inputs[:400], [f"new {row % 50}" for row in range(400)]))
    assert {moments.sums.size <= 2**22 for moments in spread.moments_.values()} == {True}
    assert spread.moments_["one"].sums.shape[-1] < 512
    assert spread.moments_["two"].sums.shape[-1] == 5
    text = str(scores)
    assert "1,000 known classes of 4 samples; 50 unknown classes of 8 samples" in text
    assert "shown are the 12 of the greatest need" in text
    assert len(re.findall(r"new \d+", text)) == 12
    assert np.isfinite(scores.values).all()


@each_estimator
def test_class_of_three_samples(name):
    """Of three samples no half varies, so the spread has no interval, and says so; means of errors have one."""
    labels = [0] * 10 + [1] * 7 + [2] * 3
    scores = scores_of((X, LABELS), (2 * X, labels), name)
    assert scores.class_sizes[1] == (3, 5 if name == "inverter" else 10)
    assert np.isfinite(scores.values).all()
    assert np.isfinite(scores.per_class).all()
    assert ("a class of fewer than 4 samples leaves no interval" in str(scores)) == (name == "spread")
    assert np.isnan(scores.per_class_interval[2]).all() == (name == "spread")
    assert np.isnan(scores.interval).all() == (name == "spread")


def test_class_of_one_sample_is_refused():
    """One sample has no variance: the class is named."""
    model = Net()
    with unchanged(model), pytest.raises(InvalidDataError, match="The unknown class 'rare' has 1 sample;"):
        rs.ActivationSpread(model).fit((X, LABELS)).score_layers((X, ["rare"] + ["often"] * (N - 1)))


def test_samples_that_do_not_fit_together_are_refused():
    """What torch cannot put into one batch is refused with its reason and the way out."""
    samples = [(torch.zeros(length), 0) for length in (3, 4, 3, 4)]
    with pytest.raises(InvalidDataError, match=r"samples of the known data cannot be put into one batch .*collate_fn"):
        rs.ActivationSpread(Net()).fit(Samples(samples))


class Samples(Dataset):
    """Samples as they are given."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, place):
        return self.samples[place]
