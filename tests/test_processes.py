"""Several processes under torch.distributed share the work: real ones, on the CPU."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sharing
import torch
from helpers import needs_pieces

from retrainscope.exceptions import InvalidDataError, NonFiniteError, ProcessError, UnsupportedModelError
from retrainscope.processes import gather, n_processes, rank

Found = dict[int, list[dict[str, Any]]]


def case(name: str) -> Any:
    """Return a parameter of the tests, marked where it is about a model in pieces."""
    return pytest.param(name, marks=needs_pieces if name.endswith("in pieces") else ())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Return what each process found, by the number of processes."""
    folder = tmp_path_factory.mktemp("group")
    script = str(Path(sharing.__file__))
    commands = {
        (n, number): [sys.executable, script, str(folder), str(number), str(n), what]
        for n, what in ((2, "told"), (3, "same"))
        for number in range(n)
    }
    sharing.FOLDER = folder
    results: Found = {1: [], 2: [], 3: []}
    started = {key: subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for key, c in commands.items()}
    try:  # all at the same time, as much of it is waiting
        results[1].append(dict(sharing.outcomes(sharing.SAME)))
        told = {key: process.communicate(timeout=240)[1] for key, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
            process.wait()
    for n in (2, 3):
        group, errors = ([each[n, number] for number in range(n)] for each in (started, told))
        for number, error in enumerate(errors):
            assert group[number].returncode == (-9 if number == 1 else 0), error
            results[n].append(torch.load(folder / f"{n}-{number}.pt", weights_only=False))
    return results


def test_without_a_group_there_is_one_process() -> None:
    """Nothing is asked of torch.distributed where it was not initialised."""
    assert (n_processes(), rank(), gather("anything", 5)) == (1, 0, [5])


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", [case(name) for name in sharing.SAME])
def test_the_result_is_that_of_one_process(found: Found, name: str, n: int) -> None:
    """However many share the work, all return what one would, but for rounding."""
    expected = found[1][0][name]
    assert not isinstance(expected, tuple), expected
    for mine in found[n]:
        assert not isinstance(mine[name], tuple), mine[name]
        for got, one in zip(mine[name], expected, strict=True):
            if isinstance(one, np.ndarray):
                np.testing.assert_allclose(got, one, rtol=1e-5, atol=1e-5)
            else:
                assert got == one


@pytest.mark.parametrize("name", ["sampler", "seed"])
def test_all_processes_return_the_same(found: Found, name: str) -> None:
    """Shares that a DistributedSampler deals, and seeds that nobody gave, leave all with one result."""
    mine, others = (one[name] for one in found[2])
    assert not isinstance(mine, tuple), mine
    for got, other in zip(mine, others, strict=True):
        np.testing.assert_array_equal(got, other)


def test_a_sampler_leaves_the_forecast_what_it_is(found: Found) -> None:
    """Where a DistributedSampler deals the samples, they are still the same samples."""
    got, expected = found[2][0]["sampler"], sharing.advice(*map(sharing.sampled, (sharing.KNOWN, sharing.UNKNOWN)))
    np.testing.assert_allclose(got[0], expected[0], rtol=0.02)  # a batch has other samples: batch statistics differ
    np.testing.assert_allclose(got[3], expected[3], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weights", "parameter '3.bias'"),
        ("precision", "torch.autocast .'torch.bfloat16' in process 0; 'None' in process 1."),
        ("statistics", "buffer '1.running_mean' .*broadcast"),
        ("size", "number of known samples .83 in process 0; 67 in process 1."),
        ("content", "first unknown batch"),
        ("setting", "batch_size .16 in process 0; 8 in process 1."),
        ("state", "random_state"),
        ("threshold", "threshold .0.2 in process 0; 0.1 in process 1."),
        ("groups", "groups"),
        ("policies", "the policies"),
        ("steps", "options"),
        ("layers", "layers .0, 3 in process 0; 0 in process 1."),
        ("sampler and groups", "which the sampler of the unknown data changes"),
    ],
)
def test_what_differs_is_named_in_all_processes(found: Found, name: str, words: str) -> None:
    """Another model, other data and other settings are refused everywhere, with where they are."""
    for one in found[2]:
        _check(one[name], InvalidDataError, words)


@pytest.mark.parametrize(
    ("name", "failing", "kind", "other"),
    [
        ("model fails", 1, ZeroDivisionError, ProcessError),
        ("model fails again", 1, ZeroDivisionError, ProcessError),
        ("data fails", 0, KeyError, ProcessError),
        ("parameter fails", 1, InvalidDataError, InvalidDataError),
        ("checkpoint", 0, InvalidDataError, InvalidDataError),
        pytest.param("infinity in pieces", 1, NonFiniteError, NonFiniteError, marks=needs_pieces),
    ],
)
def test_nobody_waits_for_a_process_that_fails(
    found: Found, name: str, failing: int, kind: type[Exception], other: type[Exception]
) -> None:
    """It raises its own error, the others one that names it, and the next call works."""
    _check(found[2][failing][name], kind, "")
    _check(found[2][1 - failing][name], other, f"Process {failing} failed: ")


@needs_pieces
def test_a_model_in_pieces_comes_back_after_an_error_half_way(found: Found) -> None:
    """An error of the model in all processes leaves each with its pieces, and with a model that runs."""
    for one in found[2]:
        _check(one["error in pieces"], ZeroDivisionError, "of the model")


def test_different_calls_are_told(found: Found) -> None:
    """Processes that make different calls raise an error rather than mix them up."""
    for one in found[2]:
        _check(one["apart"], ProcessError, "come apart: process 0 is at .*, process 1 is at ")


def test_a_process_that_is_killed_ends_the_call(found: Found) -> None:
    """All others raise an error that tells what has likely happened, also those not next to it, while all live on."""
    for one in (found[2][0], found[3][0], found[3][2]):
        _check(one["killed"], ProcessError, "lost touch .* ended from outside")
        assert one["seconds"] < 60
    assert "killed" not in found[2][1]


def test_an_interruption_ends_the_call(found: Found) -> None:
    """Of a process that its user has interrupted the others learn; they can meet again."""
    assert found[2][1]["interrupted"] == "interrupted"
    _check(found[2][0]["interrupted"], ProcessError, "lost touch")


def test_a_call_in_one_process_alone_is_told(found: Found) -> None:
    """It waits for the others, not for long, and says which are missing; then all can meet again."""
    _check(found[2][0]["alone"], ProcessError, "waited for 2 seconds, and process 1 has not made the same call")
    for one in found[2]:
        np.testing.assert_array_equal(one["together again"][0], found[2][0]["spread"][0])


def test_a_sampler_of_another_process_is_refused(found: Found) -> None:
    """One that deals each process the same share is no share."""
    _check(found[2][1]["another's sampler"], InvalidDataError, "is for process 0 of 2, and this is process 1 of 2")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrapped", "model.module"),
        pytest.param("decoders in pieces", "full_state_dict", marks=needs_pieces),
        pytest.param("gradients in pieces", "full_state_dict", marks=needs_pieces),
        pytest.param("pieces elsewhere", "without device=", marks=needs_pieces),
    ],
)
def test_what_cannot_be_shared_is_refused(found: Found, name: str, words: str) -> None:
    """Nothing is silently done by every process on its own."""
    for one in found[2]:
        _check(one[name], UnsupportedModelError, words)


@pytest.mark.parametrize("name", ["trial with a checkpoint", "kept decoders", "kept inversions"])
def test_one_process_goes_on_with_what_two_have_done(found: Found, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is kept does not tell how many processes there were."""
    monkeypatch.setattr(sharing, "FOLDER", sharing.FOLDER / "checkpoints-2")
    for got, expected in zip(sharing.SAME[name](), found[1][0][name], strict=True):
        if isinstance(expected, np.ndarray):
            np.testing.assert_allclose(got, expected, rtol=1e-6)
        else:
            assert got == expected


def test_only_the_first_process_shows_progress(found: Found) -> None:
    """There is one bar, not one for each process."""
    first, second = (one["bars"] for one in found[2])
    assert "spread of known" in first
    assert second == ""


def _check(outcome: Any, kind: type[Exception], words: str) -> None:
    assert isinstance(outcome, tuple), outcome
    assert outcome[0] is kind, outcome
    assert re.search(words, outcome[1]), outcome[1]
