"""The user's data, in every form it may come in."""

import random
import re

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import random_states
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from retrainscope.batches import Batch, as_batches, input_shapes
from retrainscope.exceptions import InvalidDataError, NonFiniteError
from retrainscope.sources import items_of

N = 10
X = torch.arange(N * 3, dtype=torch.float32).reshape(N, 3)
LABELS = tuple("abcabcabca")
NUMBERS = torch.arange(N) % 3


class Items(Dataset):
    """Single samples with a label in words."""

    def __len__(self):
        return N

    def __getitem__(self, row):
        return X[row], LABELS[row]


class Dicts(Dataset):
    """Single samples as mappings, the label among them."""

    def __len__(self):
        return N

    def __getitem__(self, row):
        return {"x": X[row], "labels": LABELS[row]}


class Stream(IterableDataset):
    """Single samples, one after the other."""

    def __iter__(self):
        return iter(zip(X, LABELS, strict=True))


class Rereadable:
    """Batches without a length that can be run through again."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def batches_of(data, *, batch_size=4, device="cpu", dtype=torch.float32, seed=0, name="known"):
    return as_batches(data, name=name, batch_size=batch_size, device=torch.device(device), dtype=dtype, seed=seed)


def rows_of(batches):
    """Return inputs, labels and positions of one pass, the batches put together."""
    passed = list(batches)
    inputs = [b.inputs["x"] if isinstance(b.inputs, dict) else b.inputs for b in passed]
    labels = None if passed[0].labels is None else sum((b.labels for b in passed), ())
    return torch.cat(inputs), labels, np.concatenate([b.positions for b in passed])


def in_batches(*parts):
    """Cut sequences into batches of four, four and two."""
    return [tuple(part[start : start + 4] for part in parts) for start in (0, 4, 8)]


FORMS = {
    "tensor": (X, None),
    "array": (X.numpy(), None),
    "X and y": ((X, LABELS), LABELS),
    "X alone in a tuple": ((X,), None),
    "X and a list": ((X, list(LABELS)), LABELS),
    "X and an array": ((X.numpy(), np.array(LABELS)), LABELS),
    "X and a tensor": ((X, NUMBERS), tuple(NUMBERS.tolist())),
    "mapping": ({"x": X}, None),
    "mapping with labels": ({"x": X, "labels": NUMBERS}, tuple(NUMBERS.tolist())),
    "mapping and y": (({"x": X.numpy()}, LABELS), LABELS),
    "data set of tensors": (TensorDataset(X, NUMBERS), tuple(NUMBERS.tolist())),
    "data set without labels": (TensorDataset(X), None),
    "data set of items": (Items(), LABELS),
    "data set of mappings": (Dicts(), LABELS),
    "loader": (DataLoader(Items(), batch_size=4), LABELS),
    "loader of mappings": (DataLoader(Dicts(), batch_size=4), LABELS),
    "list of batches": (in_batches(X, LABELS), LABELS),
    "list of lists": ([list(batch) for batch in in_batches(X, LABELS)], LABELS),
    "list of tensors": (list(X.split(4)), None),
    "list of mappings": ([{"x": part} for part in X.split(4)], None),
    "re-iterable": (Rereadable(in_batches(X, NUMBERS)), tuple(NUMBERS.tolist())),
    "stream of samples": (Stream(), LABELS),
}


@pytest.mark.parametrize(("data", "labels"), FORMS.values(), ids=FORMS.keys())
def test_every_form_gives_the_same_batches(data, labels):
    """Whatever form the data comes in, the samples, labels and batches are the same, pass after pass."""
    batches = batches_of(data)
    for _ in range(2):
        assert [len(batch) for batch in batches] == [4, 4, 2]
        inputs, found, positions = rows_of(batches)
        assert torch.equal(inputs, X)
        assert found == labels
        assert positions.tolist() == list(range(N))


@pytest.mark.parametrize(("data", "labels"), FORMS.values(), ids=FORMS.keys())
def test_every_form_may_be_subset(data, labels):
    """A subset has the samples at the positions asked for, in the order of the data, with their labels."""
    inputs, found, positions = rows_of(batches_of(data).subset(np.array([9, 2, 3])))
    assert positions.tolist() == [2, 3, 9]
    assert torch.equal(inputs, X[[2, 3, 9]])
    assert found == (None if labels is None else tuple(labels[row] for row in (2, 3, 9)))


@pytest.mark.parametrize(
    ("data", "n_batches", "of_subset"),
    [
        (X, 3, 2),
        (Items(), 3, 2),
        (DataLoader(Items(), batch_size=4), 3, 3),
        (Rereadable([X]), None, None),
        (Stream(), None, None),
    ],
    ids=["tensor", "data set", "loader", "re-iterable", "stream of samples"],
)
def test_number_of_batches_is_told_where_it_is_known(data, n_batches, of_subset):
    """The number of batches is told before a pass, or None where only the pass can tell."""
    batches = batches_of(data)
    assert batches.n_batches == n_batches
    assert batches.subset(np.arange(5)).n_batches == of_subset


@pytest.mark.parametrize("data", [X, Items()], ids=["tensor", "data set"])
def test_subset_with_a_seed_is_shuffled(data):
    """A seed shuffles the subset of data that can be indexed: another order for another seed, the same each pass."""
    chosen = np.arange(1, N)
    first = batches_of(data).subset(chosen, order_seed=1)
    inputs, _, order = rows_of(first)
    assert sorted(order) == chosen.tolist()
    assert order.tolist() != chosen.tolist()
    assert torch.equal(inputs, X[order])
    assert order.tolist() == rows_of(first)[2].tolist()
    assert order.tolist() != rows_of(batches_of(data).subset(chosen, order_seed=2))[2].tolist()


def test_shuffled_labels_stay_with_their_samples():
    """Shuffling moves samples and labels together."""
    _, labels, order = rows_of(batches_of((X, LABELS)).subset(np.arange(N), order_seed=3))
    assert labels == tuple(LABELS[row] for row in order)


def test_stream_comes_as_it_comes():
    """A stream cannot be shuffled: a subset of it with a seed keeps the order."""
    batches = batches_of(in_batches(X, LABELS))
    assert not batches.indexed
    assert rows_of(batches.subset(np.array([1, 8]), order_seed=1))[2].tolist() == [1, 8]


def test_stream_leaves_out_batches_without_chosen_samples():
    """A batch of a stream that has none of the chosen samples is not passed on."""
    assert [len(batch) for batch in batches_of(in_batches(X)).subset(np.array([0, 1, 9]))] == [2, 1]


@given(data=st.data())
def test_batch_size_changes_no_sample(data):
    """For any batch size a pass over any subset gives its samples once each, in batches as full as can be."""
    batch_size = data.draw(st.integers(1, N + 1))
    chosen = data.draw(st.sets(st.integers(0, N - 1), min_size=1))
    batches = batches_of((X, LABELS), batch_size=batch_size).subset(np.array(list(chosen)))
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == batches.n_batches
    assert set(sizes[:-1]) <= {batch_size}
    inputs, labels, positions = rows_of(batches)
    assert positions.tolist() == sorted(chosen)
    assert torch.equal(inputs, X[sorted(chosen)])
    assert labels == tuple(LABELS[row] for row in sorted(chosen))


def loader_with(what, generator):
    """Make a loader that draws from a generator of its own, held in different places."""
    if what == "loader":
        return DataLoader(TensorDataset(X), batch_size=4, shuffle=True, generator=generator)
    sampler = RandomSampler(X, generator=generator)
    if what == "sampler":
        return DataLoader(TensorDataset(X), batch_size=4, sampler=sampler)
    return DataLoader(TensorDataset(X), batch_sampler=BatchSampler(sampler, 4, drop_last=False))


PLACES = ["loader", "sampler", "batch sampler"]


@pytest.mark.parametrize("place", PLACES)
def test_loader_with_a_generator_repeats_itself(place):
    """A loader that shuffles with a generator of its own has the same order in every pass."""
    batches = batches_of(loader_with(place, torch.Generator().manual_seed(7)))
    first = rows_of(batches)[0]
    assert not torch.equal(first, X)
    assert torch.equal(first, rows_of(batches)[0])


def test_loader_that_shuffles_repeats_itself():
    """A loader that shuffles with the global generator has the same order in every pass."""
    batches = batches_of(DataLoader(TensorDataset(X), batch_size=4, shuffle=True))
    first = rows_of(batches)[0]
    assert not torch.equal(first, X)
    assert torch.equal(first, rows_of(batches)[0])


def test_seed_decides_the_order_of_a_loader():
    """Another seed shuffles a loader differently."""
    loader = DataLoader(TensorDataset(X), batch_size=4, shuffle=True)
    assert not torch.equal(rows_of(batches_of(loader, seed=1))[0], rows_of(batches_of(loader, seed=2))[0])


def test_subset_of_a_shuffling_loader_is_of_the_same_samples():
    """Positions in a loader that shuffles mean the same samples in every pass."""
    batches = batches_of(DataLoader(TensorDataset(X), batch_size=4, shuffle=True))
    whole = rows_of(batches)[0]
    assert torch.equal(rows_of(batches.subset(np.array([0, 5])))[0], whole[[0, 5]])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("use", ["whole pass", "first batch", "error"])
def test_generator_of_a_loader_is_given_back(place, use):
    """A loader's own generator has its state back after a pass, after a look at one batch, and after an error."""
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    batches = batches_of(loader_with(place, generator))
    if use == "whole pass":
        list(batches)
    elif use == "first batch":
        batches.first()
    else:

        def stop_at_the_second():
            for number, _ in enumerate(batches):
                if number == 1:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stop_at_the_second()
    assert torch.equal(generator.get_state(), before)


def test_taking_data_draws_no_random_numbers():
    """Random states change in a pass only, which is for borrowers to undo, and not when the data is given."""
    loader = DataLoader(TensorDataset(X), batch_size=4, shuffle=True)
    before = random_states()
    batches_of(loader)
    assert random_states() == before


def test_random_data_set_repeats_itself():
    """A stream that draws from the global generators of torch, numpy and Python is the same in every pass."""

    class Noisy(IterableDataset):
        def __iter__(self):
            for _ in range(4):
                drawn = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
                yield torch.tensor(drawn)

    batches = batches_of(Noisy())
    assert torch.equal(rows_of(batches)[0], rows_of(batches)[0])


def test_first_batch_is_that_of_a_pass():
    """The first batch for a dry run is the one that a pass starts with."""
    batches = batches_of(DataLoader(TensorDataset(X, NUMBERS), batch_size=4, shuffle=True))
    first, again = batches.first(), next(iter(batches))
    assert torch.equal(first.inputs, again.inputs)
    assert first.labels == again.labels


@pytest.mark.parametrize(
    "labels",
    [
        ["a", "b"],
        [np.str_("a"), np.str_("b")],
        np.array(["a", "b"]),
        np.array(["a", "b"], dtype=object),
    ],
    ids=["list", "numpy scalars", "array", "array of objects"],
)
def test_labels_in_words_are_plain(labels):
    """Labels in words come as plain strings whatever held them."""
    (batch,) = batches_of((X[:2], labels))
    assert batch.labels == ("a", "b")
    assert {type(label) for label in batch.labels} == {str}


@pytest.mark.parametrize(
    "labels",
    [[4, 5], np.array([4, 5]), [np.int64(4), np.int8(5)], torch.tensor([4, 5]), [torch.tensor(4), torch.tensor(5)]],
    ids=["list", "array", "numpy scalars", "tensor", "tensors"],
)
def test_labels_in_numbers_are_plain(labels):
    """Labels in numbers come as plain integers whatever held them."""
    (batch,) = batches_of((X[:2], labels))
    assert batch.labels == (4, 5)
    assert {type(label) for label in batch.labels} == {int}


def test_given_labels_outdo_those_in_the_mapping():
    """Labels given beside a mapping are taken instead of those inside it."""
    (batch,) = batches_of(({"x": X[:2], "labels": [0, 0]}, [1, 2]))
    assert batch.labels == (1, 2)
    assert list(batch.inputs) == ["x"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floating_inputs_get_the_type_of_the_model(dtype):
    """Floating inputs are cast to the model's type; whole numbers and truth values stay as they are."""
    data = {"x": X.numpy(), "ids": np.arange(N), "mask": np.ones((N, 2), dtype=bool)}
    batch = batches_of(data, dtype=dtype).first()
    assert {key: tensor.dtype for key, tensor in batch.inputs.items()} == {
        "x": dtype,
        "ids": torch.int64,
        "mask": torch.bool,
    }


def test_numbers_too_large_for_the_model_are_told():
    """What is finite in the data and not in the model's type is refused, with that type."""
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in batch 0, first in sample 0 \(as float16\)"):
        batches_of(torch.full((4, 2), 1e5), dtype=torch.float16).first()


@pytest.mark.parametrize("data", [X, {"x": X}, [(X, None)]], ids=["tensor", "mapping", "stream"])
def test_inputs_are_copies(data):
    """What a model does to its inputs in place is not done to the user's data."""
    before = X.clone()
    for _, tensor in items_of(batches_of(data).first().inputs):
        tensor.zero_()
    assert torch.equal(X, before)


def test_inputs_carry_no_gradient():
    """Inputs that are part of a graph are cut off from it."""
    assert not batches_of((X * 1).requires_grad_()).first().inputs.requires_grad


@pytest.mark.parametrize(
    "array",
    [X.numpy()[::-1], X.numpy().astype(">f4"), np.asfortranarray(X.numpy()), np.arange(20)[::-2].reshape(-1, 1)],
    ids=["backwards", "other byte order", "by columns", "whole numbers backwards"],
)
def test_array_may_lie_in_memory_as_it_likes(array):
    """An array's strides and byte order do not matter."""
    assert np.array_equal(rows_of(batches_of(array))[0].numpy(), array)


def test_array_that_is_read_only_is_not_written_to():
    """An array that may not be written to is copied, without a warning."""
    array = X.numpy().copy()
    array.flags.writeable = False
    batches = batches_of(array)
    for batch in batches:
        batch.inputs.zero_()
    assert torch.equal(rows_of(batches)[0], X)


def test_samples_of_indexed_data_are_copies():
    """What a model writes into its input does not reach data that is given as one tensor."""
    data = X.clone()
    for batch in batches_of(data):
        batch.inputs.zero_()
    assert torch.equal(data, X)


def test_token_ids_may_be_one_a_sample():
    """Whole numbers may come one a sample, as a single token id does."""
    assert rows_of(batches_of(torch.arange(N)))[0].tolist() == list(range(N))


def test_rows_of_a_batch():
    """Rows taken from a batch keep their inputs, labels and positions together."""
    batch = Batch({"x": X[:4]}, LABELS[:4], np.arange(20, 24))
    taken = batch.take(np.array([3, 0]))
    assert torch.equal(taken.inputs["x"], X[[3, 0]])
    assert taken.labels == ("a", "a")
    assert taken.positions.tolist() == [23, 20]
    assert Batch(X[:4], None, np.arange(4)).take(np.array([1])).labels is None


def test_shapes_are_of_one_sample():
    """Input shapes leave the number of samples out, and a single tensor's key is empty."""
    assert input_shapes(torch.zeros(5, 1, 28, 28)) == {"": (1, 28, 28)}
    assert input_shapes({"ids": torch.zeros(5, 7), "age": torch.zeros(5)}) == {"ids": (7,), "age": ()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("streamed", [False, True], ids=["tensor", "list of batches"])
def test_non_finite_inputs_are_named_by_batch(value, streamed):
    """NaN or infinity is refused with its batch and first sample, and the batches before it are passed on."""
    data = X.clone()
    data[9:, 1] = value
    iterator = iter(batches_of(list(data.split(4)) if streamed else data, name="unknown"))
    assert [len(next(iterator)), len(next(iterator))] == [4, 4]
    with pytest.raises(
        NonFiniteError,
        match=re.escape("The unknown data has NaN or infinity in batch 2, first in sample 9 (as float32). Remove"),
    ):
        next(iterator)


def test_non_finite_inputs_are_named_by_key():
    """Among several inputs the one that has NaN is named."""
    bad = X.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"in batch 0, first in sample 0 \(input 'b', as float32\)"):
        list(batches_of({"a": X, "b": bad}))


ONE_SHOT = {
    "generator": (batch for batch in [X]),
    "iterator": iter([X]),
    "map": map(torch.clone, [X]),
}


@pytest.mark.parametrize(("kind", "data"), ONE_SHOT.items(), ids=ONE_SHOT.keys())
def test_data_for_one_pass_is_refused(kind, data):
    """Data that can be run through only once is refused by the name of its type."""
    with pytest.raises(
        InvalidDataError, match=rf"The known data is a (list_)?{kind}, which can be run through only once.*DataLoader"
    ):
        batches_of(data)


@pytest.mark.parametrize(
    "data",
    [X[:0], X.numpy()[:0], (X[:0], []), {"x": X[:0]}, TensorDataset(X[:0]), torch.tensor(3)],
    ids=["tensor", "array", "X and y", "mapping", "data set", "a single number"],
)
def test_empty_data_is_refused(data):
    """Data without samples is refused as soon as it is given."""
    with pytest.raises(InvalidDataError, match=r"The known data is empty\. Give at least two samples a class"):
        batches_of(data)


@pytest.mark.parametrize("data", [[], DataLoader(TensorDataset(X[:0])), Rereadable([])])
def test_empty_stream_is_refused(data):
    """A stream without batches is refused in the first pass."""
    batches = batches_of(data)
    with pytest.raises(InvalidDataError, match="The known data is empty"):
        batches.first()


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "4", None])
def test_batch_size_must_be_a_positive_integer(batch_size):
    """A batch size that is no positive integer is refused with what was got."""
    with pytest.raises(
        InvalidDataError, match=f"The 'batch_size' parameter must be a positive integer. Got {batch_size!r}"
    ):
        batches_of(X, batch_size=batch_size)


class NoLength(Dataset):
    def __getitem__(self, row):
        return X[row]


@pytest.mark.parametrize(
    ("data", "kind"), [(None, "NoneType"), (3, "int"), ("mnist", "str"), (b"mnist", "bytes"), (NoLength(), "NoLength")]
)
def test_data_of_no_known_form_is_refused(data, kind):
    """Data of no known form is refused with the forms there are and the type it got."""
    with pytest.raises(InvalidDataError, match=rf"must be a tensor, an array, a tuple \(X, y\).*Got {kind} instead"):
        batches_of(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, NUMBERS, NUMBERS), r"must come as X or \(X, y\). Got a tuple of 3 parts; put several inputs into a map"),
        ((), r"Got a tuple of 0 parts"),
        ({"labels": NUMBERS}, "The known data is a mapping without inputs"),
        ({}, "The known data is a mapping without inputs"),
        ({"a": X, "b": X[:4]}, r"must have equally many samples. Got {'a': 10, 'b': 4}"),
        (X + 1j, "The known inputs are complex, which is not supported. Give real numbers"),
        (X.numpy() + 1j, "must be tensors or numeric arrays. Got array of complex64 instead"),
        (np.array(["a", "b"]), "must be tensors or numeric arrays. Got array of <U1 instead"),
        (([[1.0, 2.0]], [0]), "must be tensors or numeric arrays. Got list instead"),
        (X[:, 0], r"must have the shape \(n_samples, ...\). Got shape \(10,\); reshape a single feature to"),
        (torch.tensor(1.5), r"Got shape \(\)"),
        ((X, NUMBERS[:4]), "The known data has 10 samples but 4 labels"),
        ((X, X), r"The known labels must have the shape \(n_samples,\). Got shape \(10, 3\)"),
        ((X, np.array(3)), r"Got shape \(\)"),
        ((X, set(LABELS)), "The known labels must be a sequence. Got set instead"),
        ((X, "abcabcabca"), "The known labels must be a sequence. Got str instead"),
        ((X, b"abcabcabca"), "The known labels must be a sequence. Got bytes instead"),
        ((X, [float("nan")] * N), "The known labels must be hashable, not None and not NaN. Got nan"),
        ((X, [[0]] * N), r"The known labels must be hashable, not None and not NaN. Got \[0\]"),
    ],
)
def test_data_that_does_not_fit_is_refused(data, message):
    """What is wrong with the data is said at once, with what was got."""
    with pytest.raises(InvalidDataError, match=message):
        batches_of(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            pd.DataFrame(X.numpy()),
            r"re-iterable of batches. Got DataFrame instead\. Give its values, by \.to_numpy\(\)\.$",
        ),
        (pd.Series([1.0, 2.0]), r"Got Series instead\. Give its values, by \.to_numpy\(\)\.$"),
        ((pd.DataFrame(X.numpy()), LABELS), r"arrays. Got DataFrame instead\. Give its values, by \.to_numpy\(\)\.$"),
        (({"x": pd.Series(range(N))}, LABELS), r"arrays. Got Series instead\. Give its values, by \.to_numpy\(\)\.$"),
        ((X, pd.Series(LABELS)), r"a sequence. Got Series instead\. Give its values, by \.to_numpy\(\)\.$"),
        ((X, torch.eye(N)), r"Got shape \(10, 10\)\. Turn one-hot labels into classes, by argmax\(1\)\.$"),
        ((X, [*np.eye(N)]), r"Got shape \(10, 10\)\. Turn one-hot labels into classes, by argmax\(1\)\.$"),
        (
            [X, NUMBERS],
            r"a list of inputs and labels, and a list is a re-iterable of batches\. Give the tuple \(X, y\)",
        ),
        ([X.numpy(), list(LABELS)], "a list of inputs and labels"),
    ],
)
def test_a_hint_tells_what_to_give(data, message):
    """Frames, one-hot labels and a list of inputs and labels are refused with what to give instead."""
    with pytest.raises(InvalidDataError, match=message):
        batches_of(data)


def test_a_list_of_two_batches_is_data():
    """Two batches of as many axes are no inputs and labels, also where they are equally long."""
    ids = torch.arange(8).reshape(4, 2)
    for batches in ([ids, ids], [ids[:, 0], ids[:, 1]], [(ids, [0, 1, 0, 1]), (ids, [0, 1, 0, 1])]):
        assert [len(batch) for batch in batches_of(batches)] == [4, 4]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, NUMBERS[:4]), "has 10 samples but 4 labels"),
        ((X, NUMBERS, NUMBERS), "Got a tuple of 3 parts"),
        ([X, NUMBERS, NUMBERS], "Got a list of 3 parts"),
        (X[:, 0], "reshape a single feature"),
        ("images", "must be tensors or numeric arrays. Got str instead"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, message):
    """What is wrong with a batch of a stream is said in the pass that meets it."""
    batches = batches_of([batch])
    with pytest.raises(InvalidDataError, match=message):
        list(batches)


def test_data_set_with_labels_that_do_not_fit_is_refused():
    """What is wrong with the samples of a data set is said in the pass that meets it."""
    batches = batches_of(TensorDataset(X, X))
    with pytest.raises(InvalidDataError, match=r"labels must have the shape \(n_samples,\). Got shape \(4, 3\)"):
        batches.first()


def test_samples_of_different_shapes_are_refused():
    """A later batch of another shape is refused by number, not by a broadcasting error."""
    with pytest.raises(InvalidDataError, match=r"same shape. Got \(4,\) in the first batch and \(3,\) in batch 1"):
        list(batches_of([torch.zeros(2, 4), torch.zeros(2, 3)]))


def test_labels_in_some_batches_only_are_refused():
    """Labels that are there for some samples only are not dropped in silence."""
    with pytest.raises(InvalidDataError, match=r"labels in some batches only .batch 1 differs"):
        list(batches_of([(torch.zeros(2, 4), [0, 1]), torch.zeros(2, 4)]))
    with pytest.raises(InvalidDataError, match=r"not None and not NaN. Got None"):
        batches_of((torch.zeros(2, 4), [0, None]))


def test_a_named_tuple_is_inputs_and_labels():
    """A named tuple of two is (X, y), as a plain one is."""
    from typing import NamedTuple

    class Pair(NamedTuple):
        X: torch.Tensor
        y: list

    (batch,) = batches_of(Pair(torch.zeros(2, 4), ["a", "b"]))
    assert batch.labels == ("a", "b")


class Sentences(Dataset):
    """Sequences of unequal length, as lists."""

    def __len__(self):
        return 10

    def __getitem__(self, place):
        return {"ids": list(range(1, place % 4 + 2)), "label": "abc"[place % 3]}


def padded(samples):
    """Pad a batch to its longest sample."""
    longest = max(len(sample["ids"]) for sample in samples)
    rows = [sample["ids"] + [0] * (longest - len(sample["ids"])) for sample in samples]
    ids = torch.tensor(rows)
    return {"ids": ids, "attention_mask": (ids > 0).long(), "labels": [sample["label"] for sample in samples]}


@pytest.mark.parametrize("n_workers", [0, 2])
def test_loader_keeps_its_own_workers_and_collate(n_workers):
    """A loader is taken as it is: its processes, its order, and batches padded to different lengths."""
    loader = DataLoader(Sentences(), batch_size=4, collate_fn=padded, num_workers=n_workers, shuffle=True)
    first, second = (list(batches_of(loader)) for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert all(torch.equal(a.inputs["ids"], b.inputs["ids"]) for a, b in zip(first, second, strict=True))
    assert sum(int(batch.mask.sum()) for batch in first) == sum(place % 4 + 1 for place in range(10))
    assert input_shapes(first[0].inputs) == {"ids": (None,), "attention_mask": (None,)}
