"""LayerScores: the formula of the need, and how scores are printed, framed and kept."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

import retrainscope as rs
from retrainscope.exceptions import MissingExtraError, ResultFormatError
from retrainscope.scores import CONFIDENCE, LayerScores, Measured, score

HOSTILE = "<script>alert(1)</script>"


def measured(seed, *, classes=("a", "b"), n_layers=3, n_resamples=50, reference_layers=1, n_samples=20, floor=0.0):
    """Draw a positive measure."""
    rng = np.random.default_rng(seed)
    shape = (1 + n_resamples, 1 + len(classes))
    return Measured(
        values=rng.uniform(0.5, 2.0, (*shape, n_layers)),
        reference=rng.uniform(0.5, 2.0, (*shape, reference_layers)),
        classes=classes,
        counts=np.full(len(classes), n_samples / len(classes)),
        floor=floor,
    )


def scored(known=None, unknown=None, *, labelled=True, n_layers=3, reference_name="input", **options):
    """Score two measures of layers named l0, l1, and so on."""
    return score(
        known or measured(0, n_layers=n_layers),
        unknown or measured(1, classes=("b", "c", "d"), n_layers=n_layers, n_samples=30),
        layers=tuple(f"l{i}" for i in range(n_layers)),
        labelled=labelled,
        estimator="Ruler",
        measure="length",
        unit="cm",
        reference_name=reference_name,
        **options,
    )


@pytest.mark.parametrize("reference_layers", [1, 3])
def test_need_is_the_contrast_less_that_of_the_reference(reference_layers):
    """Need = log(unknown / known) - log(unknown / known) at the reference, floors added, for all and by class."""
    known = measured(0, reference_layers=reference_layers, floor=0.1)
    unknown = measured(1, classes=("b", "c", "d"), reference_layers=reference_layers, floor=0.3)
    got = scored(known, unknown)
    for column in range(4):
        for layer in range(3):
            place = layer if reference_layers == 3 else 0
            need = np.log(
                ((unknown.values[:, column, layer] + 0.3) / (known.values[:, 0, layer] + 0.1))
                / ((unknown.reference[:, column, place] + 0.3) / (known.reference[:, 0, place] + 0.1))
            )
            value = got.values[layer] if column == 0 else got.per_class[column - 1, layer]
            interval = got.interval[layer] if column == 0 else got.per_class_interval[column - 1, layer]
            np.testing.assert_allclose(value, need[0], rtol=1e-12)
            np.testing.assert_allclose(interval, np.quantile(need[1:], [0.05, 0.95]), rtol=1e-12)


def test_without_a_reference_a_need_is_a_plain_contrast():
    """A measure that has no reference gives log(unknown / known); its table names none, its raw reference is NaN."""
    known, unknown = (replace(measured(seed, floor=floor), reference=None) for seed, floor in ((0, 0.1), (1, 0.3)))
    got = scored(known, unknown, reference_name="")
    np.testing.assert_allclose(got.values, np.log((unknown.values[0, 0] + 0.3) / (known.values[0, 0] + 0.1)))
    contrast = np.log((unknown.values[0, 1:] + 0.3) / (known.values[0, :1] + 0.1))
    np.testing.assert_allclose(got.per_class, contrast)
    for raw in (got.known_reference, got.unknown_per_class_reference):
        assert np.isnan(raw).all()
    assert got.unknown_per_class_reference.shape == (2, 3)
    assert str(got).split("\n")[0].endswith("need in nats")


@pytest.mark.parametrize("without", [False, True], ids=["reference", "no reference"])
def test_a_measure_in_nats_is_taken_as_it_is(without):
    """The need from a measure that is a logarithm already is the difference, whatever its sign and floor."""
    known, unknown = (
        replace(found, values=found.values - 1, reference=None if without else found.reference - 1, in_nats=True)
        for found in (measured(0, floor=9.0), measured(1, floor=9.0))
    )
    got = scored(known, unknown)
    need = unknown.values[0, 0] - known.values[0, 0]
    if not without:
        need = need - (unknown.reference[0, 0] - known.reference[0, 0])
    np.testing.assert_allclose(got.values, need)


@pytest.mark.parametrize("options", [{}, {"one_sided": True}])
def test_one_sided_is_what_was_said(options):
    """A need counts on both sides unless it was said to count on one."""
    assert scored(**options).one_sided is bool(options)


def test_interval_is_a_90_percent_one():
    """Ninety of a hundred resampled needs lie in the interval."""
    assert CONFIDENCE == 0.9
    known, unknown = measured(0, n_resamples=100), measured(1, n_resamples=100)
    needs = (
        np.log(unknown.values[1:, 0] / known.values[1:, 0]) - np.log(unknown.reference[1:, 0] / known.reference[1:, 0])
    )[:, 0]
    low, high = scored(known, unknown).interval[0]
    assert ((needs >= low) & (needs <= high)).sum() == 90


def test_raw_measures_are_kept():
    """The raw measures of both sets, at the layers and at the reference, overall and by class, are in the result."""
    known, unknown = measured(0), measured(1, classes=("b", "c", "d"))
    got = scored(known, unknown)
    np.testing.assert_array_equal(got.known, known.values[0, 0])
    np.testing.assert_array_equal(got.unknown, unknown.values[0, 0])
    np.testing.assert_array_equal(got.known_per_class, known.values[0, 1:])
    np.testing.assert_array_equal(got.unknown_per_class, unknown.values[0, 1:])
    np.testing.assert_array_equal(got.known_reference, np.repeat(known.reference[0, 0], 3))
    np.testing.assert_array_equal(got.unknown_reference, np.repeat(unknown.reference[0, 0], 3))
    np.testing.assert_array_equal(got.known_per_class_reference, np.repeat(known.reference[0, 1:], 3, axis=1))
    np.testing.assert_array_equal(got.unknown_per_class_reference, np.repeat(unknown.reference[0, 1:], 3, axis=1))
    assert got.known_classes == ("a", "b")
    assert got.classes == ("b", "c", "d")
    assert got.n_samples == (20, 20)


def test_without_labels_there_is_no_table_by_class():
    """Without the user's labels every field by class is empty, and keeps the axis of the layers."""
    got = scored(measured(0, classes=(None,)), measured(1, classes=(None,)), labelled=False)
    assert got.classes == got.known_classes == ()
    for name in (
        "per_class",
        "known_per_class",
        "unknown_per_class",
        "known_per_class_reference",
        "unknown_per_class_reference",
    ):
        assert getattr(got, name).shape == (0, 3)
    assert got.per_class_interval.shape == (0, 3, 2)
    assert len(str(got).split("\n")) == 6  # title, header, rule and three layers: no note under them


@pytest.mark.parametrize("bad", [np.nan, 0.0, np.inf, -1.0])
def test_what_cannot_be_measured_is_nan(bad):
    """A measure that is not a positive number gives the need NaN there, and nowhere else."""
    unknown = measured(1)
    unknown.values[0, 0, 1] = bad
    got = scored(measured(0), unknown)
    assert np.isnan(got.values).tolist() == [False, True, False]
    assert np.isfinite(got.interval).all()


def test_what_is_infinite_everywhere_is_nan():
    """Infinite measures of both sets have no contrast."""
    known, unknown = measured(0), measured(1)
    known.values[0, 0, 1] = unknown.values[0, 0, 1] = np.inf
    assert np.isnan(scored(known, unknown).values).tolist() == [False, True, False]


def test_one_resample_without_a_value_leaves_no_interval():
    """An interval from resamples of which one has no value is none."""
    unknown = measured(1)
    unknown.values[7, 0, 1] = np.nan
    got = scored(measured(0), unknown)
    assert np.isnan(got.interval).tolist() == [[False, False], [True, True], [False, False]]
    assert np.isfinite(got.values).all()


def test_floor_calms_what_is_next_to_nothing():
    """Two measures far below the floor count as equal, though one is a thousand times the other."""
    known, unknown = measured(0, floor=1.0), measured(0, floor=1.0)
    known.values[..., 0], unknown.values[..., 0] = 1e-9, 1e-6
    np.testing.assert_allclose(scored(known, unknown).values[0], 0.0, atol=1e-5)


def test_scores_are_frozen():
    """A result cannot be assigned to."""
    with pytest.raises(AttributeError, match="cannot assign"):
        scored().layers = ()


def test_text_shows_every_layer_and_class():
    """The text says who measured what, and has a row a layer and a column a class."""
    got = scored()
    caption, header, _, *rows = str(got).split("\n")
    assert caption == ("Ruler: length (cm); 20 known and 30 unknown samples; need in nats against the input")
    assert header.split() == ["layer", "known", "unknown", "need", "90", "%", "interval", "b", "c", "d"]
    assert rows.pop() == "2 known classes of 10 samples; 3 unknown classes of 10 samples."
    assert [row.split()[0] for row in rows] == ["l0", "l1", "l2"]
    assert rows[1].split()[3] == f"{got.values[1]:.2f}"
    assert rows[1].split()[-3:] == [f"{need:.2f}" for need in got.per_class[:, 1]]


def test_of_many_classes_those_of_the_greatest_need_are_shown():
    """More than 12 classes would not fit: the table has those of the greatest need, and says so."""
    got = scored(unknown=measured(2, classes=tuple(range(1000)), n_samples=5000))
    _, header, *_, note = str(got).split("\n")
    shown = [int(label) for label in header.split()[7:]]
    greatest = got.per_class.max(axis=1)
    assert len(shown) == 12
    assert min(greatest[shown]) >= max(np.delete(greatest, shown))
    assert note == (
        "2 known classes of 10 samples; 1,000 unknown classes of 5 samples; shown are the 12 of the greatest need."
    )


def test_classes_without_a_need_come_last():
    """Of many classes one that has no need is not shown, and among equal ones the first are."""
    unknown = measured(2, classes=tuple(range(200)))
    unknown.values[0], unknown.values[0, 2::2] = 1e-9, 1e-6  # below the known: every need is negative
    unknown.reference[0] = 1.0
    unknown.values[0, 1 + 5] = np.nan
    _, header, *_ = str(scored(unknown=unknown)).split("\n")
    assert [int(label) for label in header.split()[7:]] == [1, 3, *range(7, 27, 2)]


@pytest.mark.parametrize(("size", "said"), [(1, True), (3, True), (4, False)])
def test_classes_too_small_for_an_interval_are_said(size, said):
    """Where a class of fewer than four samples leaves no interval, the table says why."""
    few = measured(1, n_samples=2 * size)
    sizes = f"2 unknown classes of {size} samples"
    assert str(scored(unknown=few)).endswith(f"{sizes}.")
    few.values[1:] = np.nan
    why = "; a class of fewer than 4 samples leaves no interval" if said else ""
    assert str(scored(unknown=few)).endswith(f"{sizes}{why}.")


def test_sizes_of_unequal_classes_are_said():
    """Of classes that are not of one size the table says the fewest and the most samples."""
    unequal = replace(measured(1), counts=np.array([7.0, 13.0]))
    assert str(scored(unknown=unequal)).endswith("2 unknown classes of 7 to 13 samples.")
    assert scored(unknown=unequal).class_sizes == ((10, 10), (7, 13))


def test_scores_of_a_version_without_class_sizes_are_read(tmp_path):
    """What an older version did not write is taken as not known."""
    unknown = measured(1)
    unknown.values[1:] = np.nan
    scored(unknown=unknown).save(tmp_path / "scores.json")
    document = json.loads((tmp_path / "scores.json").read_text())
    del document["result"]["class_sizes"]
    (tmp_path / "scores.json").write_text(json.dumps(document))
    got = LayerScores.load(tmp_path / "scores.json")
    assert got.class_sizes == ((0, 0), (0, 0))
    assert "leaves no interval" not in str(got)


def test_html_escapes_class_and_layer_names():
    """A class label cannot bring markup into a notebook."""
    got = scored(unknown=measured(1, classes=(HOSTILE,)))
    page = got._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<tr>") == 4
    assert "Ruler: length" in page


def test_frame_has_a_row_a_layer():
    """The frame has the needs, their intervals, the raw measures, and a column a class."""
    got = scored()
    frame = got.to_frame()
    assert frame["layer"].tolist() == ["l0", "l1", "l2"]
    assert frame.columns.tolist() == [
        *("layer", "need", "need_low", "need_high", "known", "unknown", "known_reference", "unknown_reference"),
        *("need[b]", "need[c]", "need[d]"),
    ]
    np.testing.assert_array_equal(frame[["need_low", "need_high"]], got.interval)
    np.testing.assert_array_equal(frame["need[c]"], got.per_class[1])
    np.testing.assert_array_equal(frame["need"], got.values)


def test_frame_without_pandas_names_the_extra(monkeypatch):
    """Without pandas the error says how to install it, and is an ImportError too."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pandas is needed.*pip install 'retrainscope\[frame\]'"):
        scored().to_frame()
    assert issubclass(MissingExtraError, ImportError)


@pytest.mark.parametrize("classes", [("a", "b"), (1, 2.5), (True, None), (("a", 1), ("b", (2, "c")))])
def test_saved_scores_come_back(tmp_path, classes):
    """What was saved is loaded again to the last bit: NaN, and labels of whatever type."""
    unknown = measured(1, classes=classes)
    unknown.values[:, 1, 2] = np.nan
    got = scored(unknown=unknown)
    got.save(tmp_path / "scores.json")
    back = rs.LayerScores.load(tmp_path / "scores.json")
    assert np.isnan(back.per_class[0, 2])
    for name in got.__dataclass_fields__:
        before, after = getattr(got, name), getattr(back, name)
        if isinstance(before, np.ndarray):
            np.testing.assert_array_equal(after, before, strict=True)
        else:
            assert after == before
            assert repr(after) == repr(before)
    assert str(back) == str(got)


def test_empty_fields_keep_their_shape(tmp_path):
    """Arrays without a class come back with the axis of the layers."""
    got = scored(measured(0, classes=(None,)), measured(1, classes=(None,)), labelled=False)
    got.save(tmp_path / "scores.json")
    assert rs.LayerScores.load(str(tmp_path / "scores.json")).per_class_interval.shape == (0, 3, 2)


def test_saved_scores_are_plain_json(tmp_path):
    """The file is JSON by the standard: no NaN, and its kind and schema stand at the top."""
    unknown = measured(1)
    unknown.values[:, 0, 0] = np.nan
    scored(unknown=unknown).save(tmp_path / "scores.json")

    def refuse(word):
        raise AssertionError(word)

    document = json.loads((tmp_path / "scores.json").read_text(), parse_constant=refuse)
    assert document["retrainscope"] == "LayerScores"
    assert document["schema"] == 1
    assert document["result"]["values"]["values"][0] is None


def test_labels_that_are_no_plain_values_cannot_be_saved(tmp_path):
    """A label that JSON has no type for is refused by name, and no file is left."""
    got = scored(unknown=measured(1, classes=(frozenset({1}),)))
    with pytest.raises(ResultFormatError, match=r"frozenset.*cannot be saved: class labels must be"):
        got.save(tmp_path / "scores.json")
    assert not (tmp_path / "scores.json").exists()
