"""Saving: results as versioned JSON, and what is refused on the way back."""

import json
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retrainscope.exceptions import OutputError, ResultFormatError
from retrainscope.saving import SCHEMA_VERSION, from_plain, import_pandas, load_json, save_json, to_plain, write_text


@dataclass(frozen=True)
class Inner:
    """A part of a result."""

    name: str
    pair: tuple[float, float]


@dataclass(frozen=True)
class Outer:
    """A result with a field of every kind that results have."""

    number: float
    maybe: float | None
    array: NDArray[np.float64]
    parts: tuple[Inner, ...]
    table: dict[str, tuple[str, ...]]


def outer(**changes):
    """Build a result."""
    fields = {
        "number": 0.1,
        "maybe": None,
        "array": np.arange(6.0).reshape(2, 3),
        "parts": (Inner("a", (1.0, 2.0)),),
        "table": {"x": ("a", "b")},
    }
    return Outer(**(fields | changes))


def write(path, document):
    """Write a document as it is."""
    path.write_text(json.dumps(document))
    return path


def test_round_trip(tmp_path):
    """Nested results, arrays, mappings, optional fields and NaN come back as they were."""
    save_json(outer(maybe=2.5), tmp_path / "r.json")
    back = load_json(Outer, tmp_path / "r.json")
    assert back.maybe == 2.5
    assert back.parts == (Inner("a", (1.0, 2.0)),)
    assert back.table == {"x": ("a", "b")}
    np.testing.assert_array_equal(back.array, np.arange(6.0).reshape(2, 3), strict=True)


def test_missing_values_come_back(tmp_path):
    """NaN comes back as NaN in a number, in a tuple and in an array; None as None where it may be."""
    result = outer(number=math.nan, array=np.array([1.0, np.nan]), parts=(Inner("a", (math.nan, 0.0)),))
    save_json(result, tmp_path / "r.json")
    back = load_json(Outer, tmp_path / "r.json")
    assert math.isnan(back.number)
    assert math.isnan(back.parts[0].pair[0])
    assert back.maybe is None
    np.testing.assert_array_equal(back.array, [1.0, np.nan])


@given(
    st.dictionaries(
        st.one_of(st.text(), st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False)),
        st.lists(st.text()).map(tuple),
    )
)
@settings(deadline=None, max_examples=50)
def test_keys_keep_their_types(table):
    """A mapping by labels comes back with labels of the same types, not as strings."""
    back = from_plain(dict[object, tuple[str, ...]], json.loads(json.dumps(to_plain(table))))
    assert back == table
    assert [type(key) for key in back] == [type(key) for key in table]


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j, np.int64(3)])
def test_what_json_cannot_hold_is_refused(value):
    """Only plain values can be saved, and the error shows what was found."""
    with pytest.raises(ResultFormatError, match=rf"A {type(value).__name__} .*cannot be saved"):
        to_plain(value)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"schema: 1"])
def test_no_json(tmp_path, content):
    """A file that is no JSON is refused by name."""
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ResultFormatError, match=r"r\.json is not a JSON file"):
        load_json(Outer, tmp_path / "r.json")


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"retrainscope": "Inner", "schema": 1}, "Inner"),
        ({"other": 1}, "something else"),
        ([1, 2], "something else"),
        ("Outer", "something else"),
    ],
)
def test_another_kind(tmp_path, document, found):
    """A file that holds something else is refused, and the error says what it holds."""
    path = write(tmp_path / "r.json", document)
    with pytest.raises(ResultFormatError, match=rf"holds no Outer \(found: {found}\)"):
        load_json(Outer, path)


@pytest.mark.parametrize("schema", [SCHEMA_VERSION + 1, "2.0", None])
def test_newer_schema(tmp_path, schema):
    """A file of a newer version is refused with the advice to update."""
    path = write(tmp_path / "r.json", {"retrainscope": "Outer", "schema": schema, "result": {}})
    with pytest.raises(ResultFormatError, match=r"newer version \(schema .*reads up to 1\)\. Update retrainscope"):
        load_json(Outer, path)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("result"),
        lambda d: d.update(result=[]),
        lambda d: d["result"].pop("table"),
        lambda d: d["result"].update(number="many"),
        lambda d: d["result"].update(array={"shape": [7], "values": [1.0]}),
        lambda d: d["result"].update(array={"shape": [1], "values": ["x"]}),
        lambda d: d["result"].update(parts=[{"name": "a", "pair": [1.0]}]),
        lambda d: d["result"].update(parts=5),
        lambda d: d["result"].update(table=[["x"]]),
        lambda d: d["result"].update(table=[[{}, []]]),
    ],
)
def test_damaged_file(tmp_path, change):
    """A file of the right kind with missing or wrong parts is refused, never half read."""
    save_json(outer(), tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    change(document)
    path = write(tmp_path / "r.json", document)
    with pytest.raises(ResultFormatError, match=r"r\.json is damaged"):
        load_json(Outer, path)


def test_missing_file(tmp_path):
    """A file that is not there is the usual error."""
    with pytest.raises(FileNotFoundError):
        load_json(Outer, tmp_path / "none.json")


def test_missing_folder(tmp_path):
    """A folder that is not there is named by itself, and what was to be written."""
    folder = tmp_path / "results"
    with pytest.raises(OutputError, match=rf"^There is no folder {re.escape(str(folder))} to write r\.json to\. Make"):
        save_json(outer(), folder / "r.json")


def test_pandas_is_imported():
    """Where pandas is installed it is what is returned."""
    assert import_pandas().__name__ == "pandas"


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    """A file that is there is replaced at once, nothing is left beside it, and if writing fails it stays as it was."""
    path = tmp_path / "r.json"
    write_text(path, "old")
    write_text(str(path), "né")
    assert path.read_text(encoding="utf-8") == "né"
    assert list(tmp_path.iterdir()) == [path]

    def full(*_args, **_options):
        raise OSError("No space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "newer")
    assert path.read_bytes() == "né".encode()
