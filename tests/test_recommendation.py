"""recommend_layers: verdicts, pooling and cost by hand, and what is refused."""

import importlib.metadata
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from forecasts import forecast_of
from helpers import Apply, Counted, Read, unchanged
from networks import Failing, TokenNet, classifier, samples
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import retrainscope as rs
from retrainscope import criteria
from retrainscope.choice import DEFAULT_TOLERANCE, Choice
from retrainscope.exceptions import (
    InvalidDataError,
    LayerNotFoundError,
    MissingExtraError,
    NonFiniteError,
    ResultFormatError,
    UnsupportedModelError,
)
from retrainscope.recommendation import DEFAULT_THRESHOLD
from retrainscope.verdicts import advise, combine

NAN = float("nan")


def layers_named(*names, n_parameters=None, flops=None):
    """Make the description of a network of these layers and a head."""
    every = (*names, "head")
    return rs.Layers(
        names=names,
        shapes=dict.fromkeys(names, (3,)),
        head="head",
        parameters={name: (f"{name}.weight",) for name in every},
        buffers={name: (f"{name}.running_mean",) for name in every},
        n_parameters=dict(zip(every, n_parameters or [10] * len(every), strict=True)),
        flops=dict(zip(every, flops or [100] * len(every), strict=True)),
        unused=(),
    )


def scores_of(intervals, *, values=None, per_class=None, estimator="Ruler", one_sided=False):
    """Make scores with these intervals, and with needs in their middle."""
    interval = np.array(intervals, dtype=float)
    n_layers, classes = len(interval), tuple(per_class or {})
    class_intervals = np.array([per_class[label] for label in classes], dtype=float).reshape(-1, n_layers, 2)
    raw, by_class = np.ones(n_layers), np.ones((len(classes), n_layers))
    return rs.LayerScores(
        estimator=estimator,
        measure="length",
        unit="cm",
        reference_name="input",
        layers=tuple(f"l{i}" for i in range(n_layers)),
        values=interval.mean(axis=1) if values is None else np.array(values, dtype=float),
        interval=interval,
        classes=classes,
        per_class=class_intervals.mean(axis=2),
        per_class_interval=class_intervals,
        known=raw,
        unknown=raw,
        known_reference=raw,
        unknown_reference=raw,
        known_classes=("k",),
        known_per_class=np.ones((1, n_layers)),
        unknown_per_class=by_class,
        known_per_class_reference=np.ones((1, n_layers)),
        unknown_per_class_reference=by_class,
        n_samples=(20, 30),
        one_sided=one_sided,
    )


HIGH, LOW, ACROSS, NONE = (1.5, 2.5), (-0.5, 0.5), (0.5, 1.5), (NAN, NAN)


def advice_on(*intervals, novel=True, threshold=1.0, **options):
    """Combine the scores of one estimator on as many layers as there are intervals."""
    names = tuple(f"l{i}" for i in range(len(intervals)))
    return combine([scores_of(intervals)], layers_named(*names, **options), novel=novel, threshold=threshold)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (HIGH, "retrain"),
        (LOW, "keep"),
        (ACROSS, "undecided"),
        (NONE, "undecided"),
        ((1.0, 2.0), "undecided"),
        ((0.0, 1.0), "undecided"),
    ],
)
def test_verdict_of_a_layer(interval, verdict):
    """A layer is to be retrained if its whole interval lies above the threshold, to be kept if it lies below."""
    assert advice_on(interval).table[0].verdict == verdict


@pytest.mark.parametrize(
    ("intervals", "novel", "whole", "head"),
    [
        # Nothing to retrain: the head depends on whether there are new classes.
        ([LOW, LOW, LOW], False, "none", "keep"),
        ([LOW, LOW, LOW], True, "head", "retrain"),
        ([LOW, LOW, LOW], None, "none", "undecided"),
        # Where, by the mean place.
        ([HIGH, LOW, LOW, LOW], True, "lower", "retrain"),
        ([HIGH, LOW, LOW], False, "lower", "retrain"),
        ([LOW, HIGH, LOW], None, "middle", "retrain"),
        ([LOW, LOW, HIGH], False, "upper", "retrain"),
        ([LOW, HIGH, HIGH], True, "upper", "retrain"),
        ([LOW, HIGH, HIGH, LOW], True, "middle", "retrain"),
        ([HIGH, LOW, HIGH], True, "middle", "retrain"),
        ([LOW, HIGH, LOW, LOW], True, "middle", "retrain"),  # a third of the way is no longer low
        ([LOW, LOW, HIGH, LOW], True, "middle", "retrain"),
        ([HIGH, HIGH, HIGH], False, "all", "retrain"),
        ([HIGH], False, "all", "retrain"),
        # Undecided only where nothing is decided upon.
        ([ACROSS, LOW, LOW], True, "undecided", "retrain"),
        ([LOW, NONE, LOW], False, "undecided", "undecided"),
        ([ACROSS, ACROSS], None, "undecided", "undecided"),
        ([ACROSS, LOW, HIGH], False, "upper", "retrain"),
    ],
)
def test_verdict_of_the_whole(intervals, novel, whole, head):
    """The verdict names the region of the layers to retrain; the head follows from new classes and from the layers."""
    rec = advice_on(*intervals, novel=novel)
    assert rec.verdict == whole
    assert rec.head.verdict == head
    assert rec.layers == tuple(f"l{i}" for i, interval in enumerate(intervals) if interval is HIGH)


def test_threshold_moves_the_verdict():
    """The same needs call for less retraining under a higher threshold; the threshold is kept with the advice."""
    verdicts = [advice_on((0.2, 0.4), (0.6, 0.8), threshold=t).verdict for t in (0.1, 0.5, 0.9)]
    assert verdicts == ["all", "upper", "head"]
    assert advice_on(HIGH, threshold=0.5).threshold == 0.5


def test_estimators_are_pooled_by_their_precision():
    """Needs and intervals are means, each weighted by one over the squared width of its interval.

    The first interval is 1 wide and the second 2, so the weights are 1 and 1/4: (1 * 1 + 2 / 4) / (5 / 4) = 1.2.
    """
    rec = combine(
        [scores_of([(0.5, 1.5)], values=[1.0], estimator="A"), scores_of([(1.0, 3.0)], values=[2.0], estimator="B")],
        layers_named("l0"),
        novel=True,
        threshold=1.0,
    )
    row = rec.table[0]
    np.testing.assert_allclose(row.need, 1.2)
    np.testing.assert_allclose(row.interval, ((0.5 + 1.0 / 4) / 1.25, (1.5 + 3.0 / 4) / 1.25))
    assert row.needs == {"A": 1.0, "B": 2.0}
    assert row.intervals == {"A": (0.5, 1.5), "B": (1.0, 3.0)}


@pytest.mark.parametrize("missing", [(NAN, NONE), (1.0, NONE), (NAN, HIGH), (1.0, (NAN, 2.0))])
def test_an_estimator_without_a_value_has_no_say(missing):
    """Where one estimator has no need or no whole interval, the others decide alone."""
    value, interval = missing
    rec = combine(
        [scores_of([(1.5, 2.5)], values=[2.0]), scores_of([interval], values=[value])],
        layers_named("l0"),
        novel=True,
        threshold=1.0,
    )
    assert rec.table[0].need == 2.0
    assert rec.table[0].interval == (1.5, 2.5)
    assert rec.layers == ("l0",)


def test_no_estimator_with_a_value():
    """Where no estimator has a value the need is NaN and the verdict undecided, without a warning."""
    rec = combine([scores_of([NONE]), scores_of([NONE])], layers_named("l0"), novel=False, threshold=1.0)
    assert np.isnan(rec.table[0].need)
    assert rec.verdict == "undecided"


def test_intervals_without_width_count_alike():
    """Estimators that are both sure beyond doubt are averaged, not divided by zero."""
    rec = combine(
        [scores_of([(1.0, 1.0)], values=[1.0]), scores_of([(3.0, 3.0)], values=[3.0])],
        layers_named("l0"),
        novel=True,
        threshold=1.0,
    )
    np.testing.assert_allclose(rec.table[0].need, 2.0)


def test_layers_of_each_class():
    """Each class has the layers whose interval for that class alone lies above the threshold."""
    scores = scores_of([ACROSS, ACROSS], per_class={"a": [HIGH, LOW], "b": [HIGH, HIGH], 3: [LOW, NONE]})
    rec = combine([scores], layers_named("l0", "l1"), novel=True, threshold=1.0)
    assert rec.per_class == {"a": ("l0",), "b": ("l0", "l1"), 3: ()}
    assert advice_on(HIGH).per_class == {}


@pytest.mark.parametrize(
    ("intervals", "novel", "parameters", "backward"),
    [
        # Parameters 1, 2, 3 and 4 (head) of 10; forward work 10, 20, 30 and 40. Everything: 100 for the weights and
        # 90 for the gradients above the first layer.
        ([LOW, LOW, LOW], False, 0.0, 0.0),
        ([LOW, LOW, LOW], True, 0.4, 40 / 190),
        ([LOW, LOW, HIGH], True, 0.7, (30 + 40 + 40) / 190),
        ([HIGH, LOW, LOW], True, 0.5, (10 + 40 + 90) / 190),
        ([HIGH, HIGH, HIGH], True, 1.0, 1.0),
        ([LOW, HIGH, LOW], False, 0.6, (20 + 40 + 70) / 190),
    ],
)
def test_cost_by_hand(intervals, novel, parameters, backward):
    """Trained layers cost their weights' gradients, and all above the lowest of them the gradient that passes."""
    rec = advice_on(*intervals, novel=novel, n_parameters=[1, 2, 3, 4], flops=[10, 20, 30, 40])
    np.testing.assert_allclose(rec.cost["parameters"], parameters)
    np.testing.assert_allclose(rec.cost["backward"], backward)
    assert rec.head_cost == pytest.approx({"parameters": 0.4, "backward": 40 / 190})


def test_cost_without_countable_work():
    """Where no operation was counted the share of the work is 0, not a division by zero."""
    assert advice_on(HIGH, flops=[0, 0]).cost["backward"] == 0.0


def test_rows_tell_what_each_layer_owns():
    """Each row has its layer's parameters, buffers and share; the head has no need of its own."""
    rec = advice_on(HIGH, LOW, n_parameters=[1, 2, 5])
    assert [row.name for row in rec.table] == ["l0", "l1"]
    assert [row.n_parameters for row in (*rec.table, rec.head)] == [1, 2, 5]
    assert [row.share for row in (*rec.table, rec.head)] == [1 / 8, 2 / 8, 5 / 8]
    assert rec.table[0].parameters == ("l0.weight",)
    assert rec.table[0].buffers == ("l0.running_mean",)
    assert np.isnan(rec.head.need)
    assert rec.head.needs == {}


@pytest.mark.parametrize(
    ("intervals", "novel", "text"),
    [
        ([LOW, LOW], False, "Verdict: none. Nothing needs retraining for this data."),
        (
            [LOW, LOW],
            None,
            "Verdict: none. No layer needs retraining; whether the head does cannot be told without labels.",
        ),
        (
            [LOW, LOW],
            True,
            "Verdict: head. Retrain head: 33.3% of the parameters, 20% of the backward work of training everything.",
        ),
        (
            [LOW, HIGH],
            True,
            "Verdict: upper. Retrain l1, head: 66.7% of the parameters, 60% of the backward work of training "
            "everything.",
        ),
        (
            [ACROSS, LOW],
            True,
            "Verdict: undecided. No layer's need is clearly above the threshold and at least one may be: give more "
            "samples (an interval takes at least four of every class), or try the layers marked undecided.",
        ),
    ],
)
def test_summary(intervals, novel, text):
    """The summary says in words what to do, and what it costs."""
    rec = advice_on(*intervals, novel=novel)
    assert rec.summary() == text
    assert str(rec).endswith(text)


def test_text_has_a_row_a_layer_and_the_head():
    """The table shows parameters, need, interval and verdict of every layer, and the head as such."""
    lines = str(advice_on(HIGH, LOW, n_parameters=[1000, 2, 1])).split("\n")
    assert lines[0].split() == ["layer", "parameters", "share", "need", "90", "%", "interval", "verdict"]
    assert lines[2].split() == ["l0", "1,000", "99.7%", "2.00", "[1.50,", "2.50]", "retrain"]
    assert lines[4].split() == ["head", "(head)", "1", "0.1%", "-", "-", "retrain"]


def test_estimators_of_one_class_are_told_apart():
    """Two estimators of the same class have two names, and the table shows the needs of both."""
    scores = [scores_of([HIGH], values=[v], estimator=name) for v, name in ((2.0, "A"), (1.75, "B"), (2.25, "A"))]
    rec = combine(scores, layers_named("l0"), novel=True, threshold=1.0)
    assert rec.table[0].needs == {"A-1": 2.0, "B": 1.75, "A-3": 2.25}
    lines = str(rec).split("\n")
    assert lines[0].split()[3:6] == ["A-1", "B", "A-3"]
    assert lines[2].split()[3:6] == ["2.00", "1.75", "2.25"]
    assert rec.to_frame()[["need[A-1]", "need[A-3]"]].iloc[0].tolist() == [2.0, 2.25]


def test_html_escapes():
    """A layer's name cannot bring markup into a notebook."""
    rec = combine([scores_of([HIGH])], layers_named("<script>"), novel=True, threshold=1.0)
    page = rec._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Verdict: all" in page


def test_frame_has_a_row_a_layer_and_the_head():
    """The frame has the layers in order and the head last, which has no need."""
    frame = advice_on(HIGH, LOW).to_frame()
    assert frame["layer"].tolist() == ["l0", "l1", "head"]
    assert frame["verdict"].tolist() == ["retrain", "keep", "retrain"]
    np.testing.assert_array_equal(frame["need"], [2.0, 0.0, NAN])
    np.testing.assert_array_equal(frame["need[Ruler]"], [2.0, 0.0, NAN])
    np.testing.assert_array_equal(frame[["need_low", "need_high"]], [HIGH, LOW, NONE])


def test_frame_without_pandas_names_the_extra(monkeypatch):
    """Without pandas the error says how to install it."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"retrainscope\[frame\]"):
        advice_on(HIGH).to_frame()


def test_what_each_estimator_took(tmp_path):
    """Seconds, passes and memory are there by estimator, and are not saved: equal advice makes equal files."""
    model, known, unknown = classifier(), samples(80), samples(80, classes=(5, 6), seed=1)
    files = []
    for name in ("first", "second"):
        began = time.perf_counter()
        rec = rs.recommend_layers(model, known, unknown, random_state=0)
        assert sum(rec.seconds.values()) < time.perf_counter() - began
        assert [*rec.seconds] == ["TangentProbe", "ActivationSpread"]
        assert all(took > 0 for took in rec.seconds.values())
        assert [*rec.passes] == [*rec.peak_memory] == [*rec.seconds]
        assert 1 < rec.passes["ActivationSpread"] < 1.1  # the first batches are looked at before
        rec.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    loaded = rs.Recommendation.load(tmp_path / "first")
    assert loaded.seconds == loaded.passes == loaded.peak_memory == {}


def test_a_saved_recommendation_comes_back(tmp_path):
    """What was saved is loaded again: every field, with NaN and labels as they were, and the same text."""
    scores = scores_of([HIGH, NONE], per_class={"a": [HIGH, LOW], 3: [LOW, NONE]})
    rec = combine([scores], layers_named("l0", "l1"), novel=True, threshold=1.0, estimators=("Ruler()",))
    rec.save(tmp_path / "rec.json")
    back = rs.Recommendation.load(tmp_path / "rec.json")
    assert str(back) == str(rec)
    assert back.per_class == {"a": ("l0",), 3: ()}
    assert repr([*map(asdict, back.table)]) == repr([*map(asdict, rec.table)])  # NaN does not equal itself
    assert repr(asdict(back.head)) == repr(asdict(rec.head))
    for name in ("layers", "verdict", "cost", "head_cost", "threshold", "estimators", "versions"):
        assert getattr(back, name) == getattr(rec, name)
    np.testing.assert_array_equal(back.scores[0].per_class_interval, scores.per_class_interval)


def test_scores_are_no_recommendation(tmp_path):
    """A file of scores is not read as a recommendation."""
    scores_of([HIGH]).save(tmp_path / "scores.json")
    with pytest.raises(ResultFormatError, match=r"holds no Recommendation \(found: LayerScores\)"):
        rs.Recommendation.load(tmp_path / "scores.json")


def test_made_by_is_kept():
    """The advice keeps the estimators with their settings, and the versions that made it."""
    model, known = classifier(), samples()
    rec = rs.recommend_layers(model, known, known, layers=["2"], batch_size=9, random_state=3)
    assert rec.estimators == (
        "TangentProbe(batch_size=9, calls=None, device=None, head=None, input_layer=None, layers=['2'], "
        "max_features=512, n_directions=16, random_state=3, samples_per_class=50)",
        "ActivationSpread(batch_size=9, calls=None, device=None, head=None, input_layer=None, layers=['2'], "
        "max_features=4096, random_state=3)",
    )
    assert set(rec.versions) == {"retrainscope", "torch", "numpy", "scikit-learn", "python"}
    assert rec.versions["torch"] == importlib.metadata.version("torch")
    assert rec.threshold == DEFAULT_THRESHOLD == 0.15


def test_default_is_the_forecast_with_the_spread_beside_it():
    """Without estimators the needs are those of TangentProbe, and ActivationSpread measures the same layers too."""
    model, known, unknown = classifier(), samples(), samples(seed=1)
    rec = rs.recommend_layers(model, known, unknown, random_state=0)
    probe = rs.TangentProbe(model, random_state=0).fit(known)
    spread = rs.ActivationSpread(model, random_state=0).fit(known).score_layers(unknown)
    scores = probe.score_layers(unknown)
    assert [s.estimator for s in rec.scores] == ["TangentProbe", "ActivationSpread"]
    np.testing.assert_array_equal(rec.scores[0].interval, scores.interval)
    np.testing.assert_array_equal(rec.scores[1].interval, spread.interval)
    np.testing.assert_array_equal([row.need for row in rec.table], scores.values)
    assert [row.interval for row in rec.table] == [tuple(pair) for pair in scores.interval.tolist()]
    np.testing.assert_array_equal(rec.forecast.draws, probe.forecast_.draws)


def test_an_estimator_that_is_given_decides_alone():
    """The advice of one estimator has its needs, and no forecast, also where that estimator could make one."""
    model, known, unknown = classifier(), samples(), samples(seed=1)
    for kind in (rs.ActivationSpread, rs.TangentProbe):
        rec = rs.recommend_layers(model, known, unknown, estimators=[kind(model, random_state=0)])
        scores = kind(model, random_state=0).fit(known).score_layers(unknown)
        assert [s.estimator for s in rec.scores] == [kind.__name__]
        np.testing.assert_array_equal(rec.scores[0].interval, scores.interval)
        np.testing.assert_allclose([row.need for row in rec.table], scores.values, rtol=1e-12)
        assert rec.forecast is None


def test_known_data_again_needs_nothing():
    """Data of the known distribution calls for nothing: no layer's interval of the spread lies above the threshold."""
    model = classifier()
    estimators = [rs.ActivationSpread(model, random_state=0)]
    rec = rs.recommend_layers(model, samples(400), samples(400, seed=1), estimators=estimators, threshold=0.5)
    assert rec.verdict == "none"
    assert rec.layers == ()
    assert rec.head.verdict == "keep"
    assert rec.cost == {"parameters": 0.0, "backward": 0.0}


@pytest.mark.parametrize(
    ("known", "unknown", "head"),
    [
        (samples(400), samples(400, classes=(0, 5), seed=1), "retrain"),
        (samples(400), samples(400, classes=(0,), seed=1), "undecided"),
        (samples(400), samples(400, seed=1), "keep"),
        (samples(400)[0], samples(400, seed=1), "undecided"),
        (samples(400), samples(400, seed=1)[0], "undecided"),
    ],
)
def test_the_head_follows_from_new_classes(known, unknown, head):
    """The head is to be retrained if the unknown data has a class that the known data lacks; without labels who knows.

    The threshold is beyond every need, so that the layers say nothing.
    """
    model = classifier()
    for kind in (rs.ActivationSpread, rs.TangentProbe)[: 2 if head == "retrain" else 1]:
        rec = rs.recommend_layers(model, known, unknown, threshold=9.0, estimators=[kind(model, random_state=0)])
        assert rec.head.verdict == head


def test_several_estimators():
    """Estimators of different kinds are fitted, scored and pooled, and each is named."""
    model, known, unknown = classifier(), samples(), samples(seed=1)
    estimators = [
        rs.ActivationSpread(model, random_state=0),
        rs.GradientInverter(model, max_iter=2, random_state=0),
        rs.LayerDecoderProbe(model, max_epochs=1, random_state=0),
    ]
    rec = rs.recommend_layers(model, known, unknown, estimators=estimators)
    assert list(rec.table[0].needs) == ["ActivationSpread", "GradientInverter", "LayerDecoderProbe"]
    assert len(rec.estimators) == len(rec.scores) == 3


@pytest.mark.parametrize("form", ["tensors", "dataset", "loader", "mapping"])
def test_every_form_of_data(form):
    """The same samples give the same needs in whatever form they come."""
    model = classifier(dtype=torch.float64)
    (X, y), (Z, w) = samples(), samples(classes=(0, 7), seed=1)
    forms = {
        "tensors": lambda X, y: (X, torch.tensor(y)),
        "dataset": lambda X, y: TensorDataset(X, torch.tensor(y)),
        "loader": lambda X, y: DataLoader(TensorDataset(X, torch.tensor(y)), batch_size=7),
        "mapping": lambda X, y: {"input": X, "labels": y},
    }
    rec = rs.recommend_layers(model, forms[form](X, y), forms[form](Z, w), random_state=0)
    expected = rs.recommend_layers(model, (X, y), (Z, w), random_state=0)
    np.testing.assert_allclose(rec.scores[0].values, expected.scores[0].values, rtol=1e-9)
    assert str(rec.head) == str(expected.head)  # which has no need: NaN


def test_token_ids_with_an_input_layer():
    """Token ids are measured from their embedding on, and refused without one."""
    model, ids, y = TokenNet(), torch.randint(0, 10, (40, 3)), torch.arange(40) % 2
    rec = rs.recommend_layers(model, (ids, y), (ids, y), layers=["mix"], input_layer="embedding", random_state=0)
    assert [row.name for row in rec.table] == ["mix"]
    with pytest.raises(InvalidDataError, match="name the embedding with input_layer="):
        rs.recommend_layers(model, (ids, y), (ids, y))


def test_model_and_random_states_are_given_back():
    """After the advice the model and the global random states are bit for bit what they were."""
    model = classifier()
    model[0].weight.grad = torch.ones(8, 4)
    with unchanged(model):
        rs.recommend_layers(model, samples(), samples(seed=1), random_state=0)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_model_is_given_back_after_an_error(at):
    """Wherever the model fails, it is given back as it was."""
    model = nn.Sequential(nn.Linear(4, 8), Failing(at, RuntimeError("boom")), nn.Linear(8, 3), nn.Linear(3, 2))
    with unchanged(model), pytest.raises(RuntimeError, match="boom"):
        rs.recommend_layers(model, samples(), samples(seed=1), batch_size=20, random_state=0)


@pytest.mark.parametrize(
    ("estimators", "message"),
    [
        ([], r"^The 'estimators' parameter is empty. Give at least one estimator, or None\.$"),
        ([nn.Linear(1, 1)], r"must hold estimators such as ActivationSpread\(model\). Got Linear instead"),
        ([rs.ActivationSpread], r"must hold estimators such as ActivationSpread\(model\). Got ABCMeta instead"),
        (rs.ActivationSpread(nn.Linear(1, 1)), r"must be a list of estimators. Got ActivationSpread instead"),
        ((e for e in ()), r"must be a list of estimators. Got generator instead"),
        ([rs.ActivationSpread(nn.Linear(1, 1))], r"ActivationSpread was made for another model than the one given"),
    ],
)
def test_estimators_that_do_not_fit(estimators, message):
    """The estimators must be a list of estimators, made for the same model."""
    with pytest.raises(InvalidDataError, match=message):
        rs.recommend_layers(classifier(), samples(), samples(), estimators=estimators)


def test_estimators_of_different_layers():
    """Estimators that measure different layers cannot be pooled."""
    model = classifier()
    with pytest.raises(
        InvalidDataError, match=r"^The estimators measure different layers: 2 and 0, 2\. Give them the same layers=\.$"
    ):
        rs.recommend_layers(
            model,
            samples(),
            samples(),
            estimators=[rs.ActivationSpread(model, layers=["2"]), rs.ActivationSpread(model)],
        )


def test_different_layers_are_refused_before_any_fit():
    """Estimators of different layers, or of one that is not there, are refused before the first is fitted."""
    model = classifier()
    first = rs.ActivationSpread(model)
    for other, kind, message in (
        (rs.LayerDecoderProbe(model, layers=["2"]), InvalidDataError, "measure different layers: 0, 2 and 2"),
        (rs.LayerDecoderProbe(model, layers=["conv"]), LayerNotFoundError, "The model has no layer named 'conv'"),
    ):
        with pytest.raises(kind, match=message):
            rs.recommend_layers(model, samples(), samples(), estimators=[first, other])
        assert not hasattr(first, "layers_")


def test_layers_by_an_iterator_are_found_once():
    """An estimator whose layers come from an iterator is pooled with others."""
    model = classifier()
    found = [rs.ActivationSpread(model, layers=iter(["2"])), rs.ActivationSpread(model, layers=["2"])]
    advice = rs.recommend_layers(model, samples(), samples(), estimators=found)
    assert [row.name for row in advice.table] == ["2"]


@pytest.mark.parametrize(
    ("kind", "side", "message"),
    [
        (criteria.LogME, "known", r"LogME needs labels, and the known data has none\. Give \(X, y\), or take a"),
        (criteria.LogME, "unknown", r"LogME needs labels, and the unknown data has none\. Give \(X, y\), or take a"),
        (criteria.EmpiricalFisher, "unknown", r"EmpiricalFisher needs labels, and the unknown data has none\. Give"),
        (rs.TangentProbe, "unknown", r"The unknown data has no labels, and this needs them\. Give \(X, y\)\."),
    ],
)
def test_missing_labels_are_refused_before_any_fit(kind, side, message):
    """That an estimator needs labels is said before the first is fitted."""
    model = classifier()
    first = rs.ActivationSpread(model)
    data = {"known": samples(), "unknown": samples(seed=1)} | {side: samples()[0]}
    with pytest.raises(InvalidDataError, match=f"^{message}"):
        rs.recommend_layers(model, **data, estimators=[first, kind(model)])
    assert not hasattr(first, "layers_")


@pytest.mark.parametrize("option", [{"layers": ["2"]}, {"head": "4"}, {"input_layer": "0"}, {"calls": "last"}])
def test_layers_beside_estimators(option):
    """What to measure is said once: with estimators, to them."""
    model = classifier()
    with pytest.raises(InvalidDataError, match="give layers, head, input_layer and calls to the"):
        rs.recommend_layers(model, samples(), samples(), estimators=[rs.ActivationSpread(model)], **option)


@pytest.mark.parametrize("threshold", [NAN, float("inf")])
def test_threshold_must_be_finite(threshold):
    """A threshold that no need can be compared with is refused."""
    with pytest.raises(InvalidDataError, match=r"'threshold' parameter must be a finite number of nats. Got"):
        rs.recommend_layers(classifier(), samples(), samples(), threshold=threshold)


def test_shapes_must_agree():
    """Known and unknown samples of different shape are refused before the model is run."""
    (X, y), counted = samples(), Counted()
    with pytest.raises(InvalidDataError, match=r"must have the same shape. Got \(4,\) and \(3,\)"):
        rs.recommend_layers(nn.Sequential(counted, *classifier()), (X, y), (X[:, :3], y))
    assert counted.calls == 0


def test_errors_of_data_and_model():
    """Errors of the parts come through: layers, models and data that do not fit."""
    with pytest.raises(LayerNotFoundError, match="no layer named '9'"):
        rs.recommend_layers(classifier(), samples(), samples(), layers=["9"])
    with pytest.raises(UnsupportedModelError, match="no parameters"):
        rs.recommend_layers(nn.ReLU(), samples(), samples())
    X, y = samples()
    X[3] = NAN
    with pytest.raises(NonFiniteError, match=r"^The unknown data has NaN or infinity in batch 0"):
        rs.recommend_layers(classifier(), samples(), (X, y), batch_size=5)
    with pytest.raises(NonFiniteError, match=r"^The known data has NaN or infinity in batch 0"):
        rs.recommend_layers(classifier(), (X, y), samples(), batch_size=5)
    X[7], X[3] = NAN, 0
    with pytest.raises(NonFiniteError, match=r"^The unknown data has NaN or infinity in batch 1"):
        rs.recommend_layers(classifier(), samples(), (X, y), batch_size=5)


def test_a_low_need_that_tells_nothing_keeps_no_layer():
    """Where only a high need speaks, a low one leaves the layer undecided and a high one still retrains."""
    scores = scores_of([LOW, HIGH], one_sided=True)
    rec = combine([scores], layers_named("l0", "l1"), novel=True, threshold=1.0)
    assert [row.verdict for row in rec.table] == ["undecided", "retrain"]
    both_kinds = [scores_of([LOW, HIGH]), scores]
    rec = combine(both_kinds, layers_named("l0", "l1"), novel=True, threshold=1.0)
    assert [row.verdict for row in rec.table] == ["keep", "retrain"]


def test_estimators_that_contradict_each_other_decide_nothing():
    """A layer that one estimator would keep and another retrain is undecided, however sure each is."""
    scores = [scores_of([HIGH, HIGH]), scores_of([LOW, HIGH])]
    rec = combine(scores, layers_named("l0", "l1"), novel=True, threshold=1.0)
    assert [row.verdict for row in rec.table] == ["undecided", "retrain"]


def test_a_contradiction_is_said():
    """More samples do not settle a contradiction of estimators, so they are not asked for."""
    scores = [scores_of([HIGH, LOW]), scores_of([LOW, LOW])]
    summary = combine(scores, layers_named("l0", "l1"), novel=True, threshold=1.0).summary()
    assert summary.startswith("Verdict: undecided. The estimators contradict each other on l0 (")
    assert "give more samples" not in summary


def test_unlabelled_data_never_needs_nothing():
    """Without labels the spread cannot show that a layer may be kept."""
    rec = rs.recommend_layers(classifier(), samples(400)[0], samples(400, seed=1)[0], random_state=0)
    assert rec.verdict == "undecided"
    assert {row.verdict for row in rec.table} == {"undecided"}


def test_labels_of_different_types_are_refused():
    """Known classes 0 and 1 and unknown classes "0" and "1" are not taken for novel ones."""
    whole = (
        r"^The known labels are float and int, the unknown ones bool and str, so it cannot be told which classes are "
        r"novel\. Give labels of one type\.$"
    )
    with pytest.raises(InvalidDataError, match=whole):
        rs.recommend_layers(classifier(), samples(classes=(0, 1.5)), samples(classes=("0", True)))


def test_some_known_classes_in_another_domain_are_compared_with_themselves():
    """Held-out samples of some known classes need nothing, although classes differ by themselves."""
    torch.manual_seed(0)
    wide = torch.tensor([[0.1], [1.0], [3.0]])
    y = torch.arange(6000) % 3
    X = torch.randn(6000, 4) * wide[y] + 4 * y[:, None]
    known, held_out = (X[:3000], y[:3000]), (X[3000:][y[3000:] > 0], y[3000:][y[3000:] > 0])
    model = classifier()
    rec = rs.recommend_layers(model, known, held_out, estimators=[rs.ActivationSpread(model, random_state=0)])
    assert rec.scores[0].known_classes == (1, 2)
    assert all(abs(row.need) < 0.1 for row in rec.table)
    assert rec.head.verdict == "keep"


@pytest.mark.parametrize("threshold", [NAN, "0.1"])
def test_threshold_must_be_a_number(threshold):
    """A threshold that is no finite number is refused."""
    with pytest.raises(InvalidDataError, match="'threshold' parameter must be a finite number"):
        rs.recommend_layers(classifier(), samples(), samples(), threshold=threshold)


# The forecast decides


def decided():
    """Return advice on two well parted new classes."""
    X, y = samples(80, classes=(5, 6), seed=1)
    X[:, 1] += 6 * torch.tensor(y) - 33
    return rs.recommend_layers(classifier(), samples(), (X, y), random_state=0)


def test_what_the_forecast_chooses_is_advised():
    """The advice is the policy that the forecast speaks for, in the layers, the verdict, the cost and the words."""
    rec = decided()
    assert [s.estimator for s in rec.scores] == ["TangentProbe", "ActivationSpread"]
    policy = rec.forecast.best_within(DEFAULT_TOLERANCE)
    assert rec.layers == rec.forecast.trained[rec.forecast.row_of(policy)]
    assert [row.verdict for row in rec.table] == ["retrain" if row.name in rec.layers else "keep" for row in rec.table]
    assert rec.head.verdict == "retrain"
    assert rec.cost["parameters"] == rec.forecast.share(policy)
    assert "Forecast accuracy: " in rec.summary()
    assert "by the head alone" in rec.summary() or policy == "head"
    assert rec.reason == ""


def test_agreement_is_that_of_the_second_opinion():
    """Agreement is whether the spread alone would say the same, by the threshold; the head has none."""
    rec = decided()
    for place, row in enumerate(rec.table):
        low, high = rec.scores[1].interval[place]
        alone = "retrain" if low > rec.threshold else "keep" if high < rec.threshold else "undecided"
        assert row.agreement == float(alone == row.verdict)
        assert list(row.needs) == ["TangentProbe", "ActivationSpread"]
    assert np.isnan(rec.head.agreement)


def test_advice_with_a_forecast_comes_back(tmp_path):
    """Saved and loaded, the advice has its forecast, notes and reason, and says the same."""
    rec = replace(decided(), notes=("Mind the gap.",), reason="None.")
    rec.save(tmp_path / "rec.json")
    back = rs.Recommendation.load(tmp_path / "rec.json")
    assert str(back) == str(rec)
    assert back.summary().endswith("Mind the gap.")
    assert (back.notes, back.reason) == (rec.notes, rec.reason)
    np.testing.assert_array_equal(back.forecast.draws, rec.forecast.draws)


@pytest.mark.parametrize(
    ("needs", "sizes", "noted"),
    [
        ([0.1, 0.2, 0.3, 0.4], [10, 20, 30, 40, 5], True),
        ([0.4, 0.1, 0.3, 0.2], [40, 10, 30, 20, 5], True),
        ([0.4, 0.3, 0.2, 0.1], [10, 20, 30, 40, 5], False),
        ([0.2, 0.1, 0.3, 0.4], [10, 20, 30, 40, 5], False),
        ([0.1, 0.2, 0.3, 0.4], [10, 20, 30, 30, 5], False),  # of equal sizes there is no order
        ([0.1, 0.2, 0.3], [10, 20, 30, 5], False),  # of three layers an order means nothing
    ],
)
def test_needs_that_rank_as_sizes_are_noted(needs, sizes, noted):
    """Where needs put four layers or more in the order of their parameter counts, the advice says so."""
    names = tuple(f"l{i}" for i in range(len(needs)))
    scores = scores_of([(need - 0.01, need + 0.01) for need in needs], values=needs)
    rec = advise(
        [scores],
        layers_named(*names, n_parameters=sizes),
        forecast_of({"head": 0.2, "all": 0.1}),
        Choice("all"),
        novel=True,
        threshold=0.15,
    )
    assert any("rank the layers exactly as their parameter counts do" in note for note in rec.notes) is noted
    assert ("parameter counts" in rec.summary()) is noted


@pytest.mark.parametrize(
    ("policy", "novel", "layers", "verdict", "head"),
    [
        ("none", False, (), "none", "keep"),
        ("head", False, (), "head", "retrain"),
        ("head + c1", True, ("c1",), "lower", "retrain"),
        ("c2 and up", True, ("c2", "f1"), "upper", "retrain"),
        ("all", False, ("c1", "c2", "f1"), "all", "retrain"),
        (None, True, (), "undecided", "retrain"),
        (None, False, (), "undecided", "undecided"),
    ],
)
def test_a_choice_becomes_advice(policy, novel, layers, verdict, head):
    """Each choice has its layers and verdict; the head is retrained with any, and for new classes always."""
    scores = replace(scores_of([LOW, LOW, LOW]), layers=("c1", "c2", "f1"))
    forecast = forecast_of({"none": NAN, "head": 0.3, "head + c1": 0.2, "c2 and up": 0.2, "all": 0.1})
    choice = Choice(policy, "" if policy else "Too few.")
    described = layers_named("c1", "c2", "f1")
    rec = advise([scores, scores], described, forecast, choice, novel=novel, threshold=0.15)
    assert (rec.layers, rec.verdict, rec.head.verdict) == (layers, verdict, head)
    assert rec.summary().startswith(f"Verdict: {verdict}. {choice.reason}")
    words = "undecided" if policy is None else None
    assert [row.verdict for row in rec.table] == [
        words or ("retrain" if name in layers else "keep") for name in ("c1", "c2", "f1")
    ]


def test_a_budget_is_kept():
    """Advised is the best set that trains no more than the budget, of parameters, of work, or of both."""
    X, y = samples(80, classes=(5, 6), seed=1)
    X[:, 1] += 6 * torch.tensor(y) - 33
    free = rs.recommend_layers(classifier(), samples(), (X, y), random_state=0, tolerance=0.0)
    for budget in ({"parameters": 0.5}, {"backward": 0.4}, {"parameters": 0.6, "backward": 0.6}):
        rec = rs.recommend_layers(classifier(), samples(), (X, y), random_state=0, tolerance=0.0, budget=budget)
        assert rec.verdict != "undecided"
        assert all(rec.cost[name] <= most for name, most in budget.items())
        np.testing.assert_array_equal(rec.forecast.error, free.forecast.error)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"parameters": 0.01}, r"leaves nothing to train: the head alone takes 18\.\d+% of the parameters\. Give"),
        ({"backward": 0.01}, r"leaves nothing to train: the head alone takes \d+\.\d+% of the backward work\. Give"),
        ({"params": 0.5}, r"mapping with 'parameters', 'backward' or both.*Got {'params': 0.5} instead"),
        ({}, "mapping with 'parameters', 'backward' or both"),
        (0.5, "mapping with 'parameters', 'backward' or both"),
        ({"parameters": 0}, r"budget for 'parameters' must be a share .*above 0 and at most 1. Got 0"),
        ({"backward": 20}, r"budget for 'backward' must be a share .* Got 20"),
        ({"backward": True}, r"budget for 'backward' must be a share .* Got True"),
        ({"backward": NAN}, r"budget for 'backward' must be a share .* Got nan"),
        ({"backward": "half"}, r"budget for 'backward' must be a share .* Got 'half'"),
    ],
)
def test_budgets_that_cannot_be_kept(budget, message):
    """A budget that leaves nothing, or is no share of parameters or work, is refused."""
    with pytest.raises(InvalidDataError, match=message):
        rs.recommend_layers(classifier(), samples(), samples(classes=(5, 6)), budget=budget, random_state=0)


@pytest.mark.parametrize("tolerance", [-0.1, NAN, "0.1", True])
def test_tolerance_must_be_a_number(tolerance):
    """A tolerance is zero or a positive number."""
    with pytest.raises(InvalidDataError, match="'tolerance' parameter must be zero or a positive number"):
        rs.recommend_layers(classifier(), samples(), samples(), tolerance=tolerance)


@pytest.mark.parametrize(
    "option", [{"tolerance": 0.1}, {"budget": {"parameters": 0.5}}, {"groups": [0] * 40}, {"trial": {}}]
)
def test_options_of_the_forecast_beside_estimators(option):
    """Tolerance, budget and groups are for the forecast, and refused where estimators decide."""
    model = classifier()
    with pytest.raises(InvalidDataError, match=r"are for the forecast\. Leave them out with estimators="):
        rs.recommend_layers(model, samples(), samples(), estimators=[rs.ActivationSpread(model)], **option)


def test_one_pass_serves_the_spread_and_the_forecast():
    """The known samples are read once, the unknown ones once and those that are drawn again; results are as alone."""
    model, known, unknown = classifier(), Read(*samples(700)), Read(*samples(700, classes=(5, 6), seed=1))
    rec = rs.recommend_layers(model, known, unknown, random_state=0)
    assert set(known.times[10:].tolist()) == {1}
    assert set(unknown.times[10:].tolist()) == {1, 2}
    assert int((unknown.times == 2).sum()) <= 100
    alone = [kind(model, random_state=0) for kind in (rs.TangentProbe, rs.ActivationSpread)]
    for estimator, found in zip(alone, rec.scores, strict=True):
        expected = estimator.fit(known).score_layers(unknown)
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_array_equal(found.interval, expected.interval)
    assert rec.forecast.known_accuracy == alone[0].forecast_.known_accuracy


def test_a_loader_that_comes_in_another_order_is_gone_through_again():
    """Without a random state the forecast meets the samples of a loader that shuffles in an order of its own."""
    X, y = samples(200)
    X[:, 0] += 20 * torch.tensor(y)
    loader = DataLoader(TensorDataset(X, torch.tensor(y)), batch_size=20, shuffle=True)
    forecast = rs.recommend_layers(classifier(), (X, y), loader).forecast
    assert forecast.accuracy[forecast.row_of("head")] > 0.95


@pytest.mark.parametrize("unknown", [samples(seed=1)[0], samples(classes=(5,), seed=1)])
def test_without_labels_the_spread_decides(unknown):
    """Without labels, or with one unknown class, there is no forecast; a budget or groups are then refused."""
    model = classifier()
    rec = rs.recommend_layers(model, samples(), unknown, random_state=0)
    spread = rs.recommend_layers(
        model, samples(), unknown, estimators=[rs.ActivationSpread(model, random_state=0)], random_state=0
    )
    assert rec.forecast is None
    assert [s.estimator for s in rec.scores] == ["ActivationSpread"]
    assert str(rec.as_table()) == str(spread.as_table())
    assert rec.summary() == (
        f"{spread.summary()} There is no forecast, which needs unknown data with labels of at least two classes."
    )
    for option in ({"budget": {"parameters": 0.5}}, {"groups": [0, 1]}):
        with pytest.raises(InvalidDataError, match="labels of at least two classes and a model that returns one row"):
            rs.recommend_layers(model, samples(), unknown, random_state=0, **option)


def test_classes_that_come_one_after_the_other():
    """That there are two classes is seen where the first batches are of one alone."""
    X, labels = samples(80, classes=(5, 6), seed=1)
    order = sorted(range(80), key=lambda row: labels[row])
    unknown = (X[order], [labels[row] for row in order])
    rec = rs.recommend_layers(classifier(), samples(), unknown, random_state=0, batch_size=20)
    assert rec.forecast is not None
    assert rec.forecast.n_classes == 2


def test_few_groups_leave_it_undecided():
    """Samples in fewer than five groups a class are too few to decide by, however many they are."""
    X, y = samples(classes=(5, 6), seed=1)
    rec = rs.recommend_layers(classifier(), samples(), (X, y), groups=[n % 4 for n in range(len(y))], random_state=0)
    assert rec.verdict == "undecided"
    assert "2 independent samples; at least 5" in rec.summary()


def test_unlabelled_known_data_leaves_a_forecast():
    """Known data without labels is no hindrance for the forecast; whether classes are novel is then not known."""
    rec = rs.recommend_layers(classifier(), samples()[0], samples(classes=(5, 6), seed=1), random_state=0)
    assert rec.forecast is not None
    assert "none" not in rec.forecast.policies
    assert set(rec.per_class) == {5, 6}


class PerToken(nn.Module):
    """Returns scores for every part of a sample."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(2, 5), nn.Linear(5, 2)

    def forward(self, x):
        """Return scores of shape (n_samples, 2, 2)."""
        return self.head(torch.relu(self.mix(x.reshape(len(x), 2, 2))))


def test_a_model_without_class_scores_is_measured_by_the_spread():
    """Where the model returns no row of class scores a sample the spread decides, and the advice says why."""
    rec = rs.recommend_layers(PerToken(), samples(), samples(classes=(5, 6), seed=1), random_state=0)
    assert rec.forecast is None
    assert rec.notes[0].startswith("There is no forecast: The model must return one row of class scores a sample")
    assert rec.notes[0] in rec.summary()


def test_a_probe_that_is_given_does_not_take_known_classes_for_new():
    """With the forecast's estimator given for its needs, known classes are known and the head follows from them."""
    model = classifier()
    rec = rs.recommend_layers(
        model, samples(), samples(seed=1), estimators=[rs.TangentProbe(model, random_state=0)], threshold=9.0
    )
    assert rec.head.verdict == "keep"


def test_few_samples_are_undecided():
    """With four samples of a class nothing is decided, with the reason; new classes need a head all the same."""
    rec = rs.recommend_layers(classifier(), samples(), samples(8, classes=(5, 6), seed=1), random_state=0)
    assert rec.verdict == "undecided"
    assert "has 4 independent samples; at least 5 of every class" in rec.summary()
    assert rec.head.verdict == "retrain"
    assert all(np.isnan(row.agreement) for row in rec.table)
    with pytest.raises(InvalidDataError, match=r"undecided, so there is nothing to verify\. See for yourself"):
        rec.verify(classifier(), samples(), samples(8, classes=(5, 6), seed=1))


@pytest.mark.parametrize("classes", [(0, 1), (5, 6)])
def test_random_labels_are_never_decided_on(classes):
    """Labels that have nothing to do with the samples get no confident answer, known classes or new."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        X, places = torch.randn(100, 4, generator=generator), torch.randint(0, 2, (100,), generator=generator)
        unknown = X, [classes[place] for place in places.tolist()]
        rec = rs.recommend_layers(classifier(seed=seed), samples(), unknown, random_state=seed)
        assert rec.verdict == "undecided"
        assert "better than by chance" in rec.summary() or "too uncertain" in rec.summary()


def test_advice_is_verified_by_retraining():
    """Verifying retrains by every policy, the advised among them, and tells the regret of the advice."""
    X, y = samples(80, classes=(5, 6), seed=1)
    X[:, 1] += 6 * torch.tensor(y) - 33
    model = classifier()
    rec = rs.recommend_layers(model, samples(), (X, y), random_state=0)
    options = {"steps": 10, "n_seeds": 1, "learning_rates": (1e-3,), "random_state": 0}
    with unchanged(model):
        sweep = rec.verify(model, samples(), (X, y), **options)
    assert isinstance(sweep, rs.LayerSweep)
    assert sweep.advised == sweep.policy_of(rec.layers)
    assert sweep.layers == tuple(row.name for row in rec.table)
    assert f"Regret of the advice ({sweep.advised}): " in sweep.summary()
    assert f"{sweep.advised} (advised)" in str(sweep)
    few = rec.verify(model, samples(), (X, y), policies=[], **options)
    assert few.policies == (("head",) if not rec.layers else ("head", sweep.advised))


def test_advice_of_nothing_is_verified():
    """That the model is good as it is can be verified too: what is advised is then the model as it is."""
    model, (X, y) = classifier(), samples(200)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    X[:, 0] += 4 * torch.tensor(y)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), torch.tensor(y)).backward()
        optimizer.step()
    known, unknown = (X[:100], y[:100]), (X[100:], y[100:])
    rec = rs.recommend_layers(model, known, unknown, random_state=0)
    assert rec.verdict == "none"
    sweep = rec.verify(model, known, unknown, policies=[], steps=5, n_seeds=1, learning_rates=(1e-3,), random_state=0)
    assert sweep.advised == "none"
    assert "Regret of the advice (none): " in sweep.summary()


def test_an_estimator_that_was_fitted_before_is_fitted_again():
    """Given estimators are fitted to the known data that is given, whatever they were fitted to before."""
    model = classifier()
    known, unknown = samples(), samples(classes=(3, 4), seed=1)
    used = rs.ActivationSpread(model, random_state=0).fit(samples(classes=("a", "b", "c"), seed=5))
    fresh = rs.ActivationSpread(model, random_state=0)
    recs = [rs.recommend_layers(model, known, unknown, estimators=[one], random_state=0) for one in (used, fresh)]
    assert str(recs[0]) == str(recs[1])
    assert recs[0].scores[0].known_classes == recs[1].scores[0].known_classes


def test_layers_may_be_a_generator():
    """Layers that can be gone through once are named to both estimators."""
    model = classifier()
    names = (name for name in ("0", "2"))
    found = rs.recommend_layers(model, samples(), samples(classes=(5, 6), seed=1), layers=names, random_state=0)
    assert [row.name for row in found.table] == ["0", "2"]


def test_images_of_bytes_are_refused_before_the_model_is_run():
    """What goes into the model must be floating-point numbers, and that is said in our words."""
    X, y = torch.randint(0, 255, (40, 4), dtype=torch.uint8), [0, 1] * 20
    with pytest.raises(InvalidDataError, match=r"must be floating-point numbers. Got torch.uint8 instead"):
        rs.recommend_layers(classifier(), (X, y), (X, y), random_state=0)


def test_a_batch_of_one_that_loses_its_axis():
    """Where a last batch alone gives no class scores, there is no forecast, and the spread decides."""
    model = nn.Sequential(*classifier(), Apply(lambda x: x.squeeze(0)))
    known, unknown = samples(33), samples(40, seed=1)
    rec = rs.recommend_layers(model, known, unknown, batch_size=32, random_state=0)
    assert rec.forecast is None
    assert rec.notes[0].startswith("There is no forecast: The model must return one row of class scores a sample")
    # of as many that are drawn too: the gradients are computed 32 at a time
    rec = rs.recommend_layers(model, samples(40), samples(33, seed=1), batch_size=64, random_state=0)
    assert (rec.forecast is None) == bool(rec.notes)


def test_a_budget_is_refused_after_the_first_pass():
    """What the head alone takes is known as soon as its layers are: no forecast is made for nothing."""
    unknown = Read(*samples(40, seed=1))
    with pytest.raises(InvalidDataError, match=r"leaves nothing to train: the head alone takes"):
        rs.recommend_layers(classifier(), samples(), unknown, budget={"parameters": 0.001}, random_state=0)
    assert unknown.times.sum() <= 5


def test_data_sorted_by_class_is_not_read_to_the_second():
    """Whether there are two classes is asked of the last sample too, before all are gone through."""
    X, y = samples(60)
    order = np.argsort(y, kind="stable")
    unknown = Read(X[order], torch.tensor(y)[order])
    rs.recommend_layers(classifier(), samples(), unknown, random_state=0)
    assert unknown.times[5:59].unique().tolist() == [2]  # by the spread, and by what is drawn of them
