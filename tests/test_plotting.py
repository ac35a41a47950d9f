"""Figures: what is drawn of results made by hand, and names and numbers that would spoil them."""

import io
import math
import xml.dom.minidom
from dataclasses import replace

import numpy as np
import pytest
from forecasts import forecast_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_trials import lost, sweep_of

import retrainscope as rs
from retrainscope import plotting
from retrainscope.exceptions import InvalidDataError
from retrainscope.figures import short_name, short_names

NAN = math.nan
DEEP = tuple(f"model.encoder.layers.{n}.attention.self.output.dense" for n in range(26))


def scores_of(layers, per_class=((0.5,), (-0.25,)), classes=("a", "b")):
    """Make scores of these needs by class; a column is a layer."""
    per_class = np.broadcast_to(np.array(per_class, dtype=float), (len(classes), len(layers)))
    n, zeros = len(layers), np.zeros((len(classes), len(layers)))
    return rs.LayerScores(
        estimator="Maker",
        measure="what",
        unit="no unit",
        reference_name="",
        layers=tuple(layers),
        values=np.zeros(n),
        interval=np.zeros((n, 2)),
        classes=tuple(classes),
        per_class=per_class,
        per_class_interval=np.zeros((len(classes), n, 2)),
        known=np.zeros(n),
        unknown=np.zeros(n),
        known_reference=np.zeros(n),
        unknown_reference=np.zeros(n),
        known_classes=(),
        known_per_class=zeros[:0],
        unknown_per_class=zeros,
        known_per_class_reference=zeros[:0],
        unknown_per_class_reference=zeros,
        n_samples=(9, 9),
        one_sided=False,
    )


def advice_of(needs, verdicts, *, intervals=None, estimators=("A", "B"), layers=None, forecast=None):
    """Make advice of these needs; every estimator has the same, and the head half of the parameters."""
    layers = layers or tuple(f"layer{place}" for place in range(len(needs)))
    intervals = intervals or [(need - 0.1, need + 0.1) for need in needs]
    rows = tuple(
        rs.LayerAdvice(
            name, verdict, need, ends, dict.fromkeys(estimators, need), dict.fromkeys(estimators, ends), 10,
            0.5 / len(needs), (), (),
        )
        for name, verdict, need, ends in zip(layers, verdicts, needs, intervals, strict=True)
    )  # fmt: skip
    retrained = tuple(row.name for row in rows if row.verdict == "retrain")
    return rs.Recommendation(
        layers=retrained,
        head=rs.LayerAdvice("out", "retrain", NAN, (NAN, NAN), {}, {}, 10 * len(needs), 0.5, (), ()),
        verdict="middle",
        per_class={},
        table=rows,
        scores=(),
        cost={"parameters": 0.5 + 0.5 * len(retrained) / len(needs), "backward": 0.625},
        head_cost={"parameters": 0.5, "backward": 0.125},
        threshold=0.15,
        estimators=estimators,
        versions={},
        forecast=forecast,
    )


ADVICE = advice_of([-0.5, 0.125, 1.0], ["keep", "undecided", "retrain"])


def texts(ax):
    return [text.get_text() for text in ax.texts]


def names_of(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def overlapping(figure):
    """Return pairs of texts that are drawn over each other, and texts that the edge cuts off."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    shown = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        (left, right), (bottom, top) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
        shown += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        # Labels of ticks beyond the axis are not drawn; boxes around slanted ones say nothing.
        shown += [label for label in ax.get_yticklabels() if bottom <= label.get_position()[1] <= top]
        shown += [
            label
            for label in ax.get_xticklabels()
            if left <= label.get_position()[0] <= right and label.get_rotation() % 90 == 0
        ]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in shown if t.get_visible() and t.get_text()]
    page = figure.bbox
    cut = [
        text
        for text, box in boxes
        if box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y0 < page.y0 - 1 or box.y1 > page.y1 + 1
    ]
    return cut + [
        (a, b)
        for place, (a, one) in enumerate(boxes)
        for b, other in boxes[place + 1 :]
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
    ]


HARD = {
    "three layers": ADVICE,
    "one layer": advice_of([0.5], ["retrain"]),
    "26 deep layers": advice_of(np.linspace(-2, 2, 26).tolist(), ["keep", "retrain"] * 13, layers=DEEP),
    "300 letters": advice_of([0.1, 0.2], ["keep", "undecided"], layers=(300 * "x", "<b>$\\frac{1}{2}$" + 40 * "y")),
    "nothing measured": advice_of([NAN, NAN], ["undecided"] * 2, intervals=[(NAN, NAN)] * 2),
    "six estimators": advice_of([0.5, 1], ["keep", "retrain"], estimators=[f"LayerDecoderProbe {n}" for n in range(6)]),
}


@pytest.mark.parametrize("advice", HARD.values(), ids=HARD)
@pytest.mark.parametrize("plot", [plotting.plot_needs, plotting.plot_estimators, plotting.plot_cost])
def test_texts_of_advice_can_be_read(plot, advice):
    """No text is drawn over another one or beyond the edge, whatever the layers are called and however many."""
    assert overlapping(plot(advice)) == []


def test_texts_of_policies_can_be_read():
    """The policies of 26 layers have names that stay apart, and no text is over another or beyond the edge."""
    policies = {"none": (), "head": (), **{f"head + {name}": (name,) for name in DEEP}, "all": DEEP}
    sweep = sweep_of(np.full((29, 2), 0.5), policies=policies, advised=f"head + {DEEP[3]}")
    sweep = replace(sweep, layers=DEEP, n_parameters=dict.fromkeys([*DEEP, "head"], 10))
    figure = plotting.plot_policies(sweep)
    assert overlapping(figure) == []
    names = names_of(figure.axes[0])
    assert len(set(names)) == 29
    assert [name for name in names if "(advised)" in name] == [names[5]]


@pytest.mark.parametrize("layers", [("0",), DEEP[:3], DEEP], ids=["one", "few", "many"])
def test_texts_of_classes_can_be_read(layers):
    """Class and layer names of a heat map are neither over each other nor cut off."""
    classes = [f"class {n} with a name that is long and ends alike" for n in range(20)]
    per_class = np.linspace(-1, 1, 20 * len(layers)).reshape(20, -1)
    assert overlapping(plotting.plot_class_needs(scores_of(layers, per_class, classes))) == []


def test_needs_are_drawn():
    """Every layer has its place, need and verdict, and the axis says the unit."""
    (ax,) = (figure := plotting.plot_needs(ADVICE)).axes
    assert names_of(ax) == ["layer0", "layer1", "layer2"]
    assert ax.get_xlabel() == "need (nats), with 90 % interval"
    assert ax.get_title() == "Verdict: middle"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["retrain", "undecided", "keep", "threshold 0.15"]
    drawn = {(float(x), float(y)) for line in ax.lines for x, y in zip(*line.get_data(), strict=True)}
    assert {(-0.5, 0), (0.125, 1), (1.0, 2)} <= drawn


def test_verdicts_differ_without_colour():
    """Every verdict has a marker of its own in the needs, and a hatch of its own in the cost."""
    markers = {line.get_label(): line.get_marker() for line in plotting.plot_needs(ADVICE).axes[0].lines}
    assert len({markers[verdict] for verdict in ("keep", "retrain", "undecided")}) == 3
    bars = plotting.plot_cost(ADVICE).axes[1].containers
    assert {bar.get_label(): bar.patches[0].get_hatch() for bar in bars} == {
        "retrain": "",
        "undecided": "..",
        "keep": "//",
    }


def test_intervals_are_drawn_where_they_are():
    """An interval that does not hold the need, which a bootstrap can give, is drawn where it is."""
    advice = advice_of([1.0], ["retrain"], intervals=[(1.25, 2.0)])
    (bars,) = plotting.plot_needs(advice).axes[0].collections
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [1.25, 2.0])


def test_what_was_not_measured():
    """A need without an interval is hollow; where there is no need, that is said."""
    advice = advice_of([0.5, NAN, 1.0], ["undecided"] * 3, intervals=[(NAN, NAN), (NAN, NAN), (0.5, 1.5)])
    (ax,) = plotting.plot_needs(advice).axes
    hollow, filled = (line for line in ax.lines if line.get_marker() == "s")
    assert hollow.get_markerfacecolor() == "white"
    np.testing.assert_array_equal(hollow.get_xdata(), [0.5, NAN, 1.0])
    np.testing.assert_array_equal(filled.get_xdata(), [NAN, NAN, 1.0])
    assert texts(ax) == ["not measured"]
    assert len(ax.collections[0].get_segments()) == 1


def test_estimators_are_drawn_side_by_side():
    """Every estimator has a panel with a need for every layer, and the advice the last; the layers are named once."""
    figure = plotting.plot_estimators(ADVICE)
    assert [ax.get_title() for ax in figure.axes] == ["A", "B", "the advice"]
    assert names_of(figure.axes[0]) == ["layer0", "layer1", "layer2"]
    assert {name for ax in figure.axes[1:] for name in names_of(ax)} == {""}
    for ax in figure.axes[:2]:
        np.testing.assert_allclose(ax.lines[0].get_xdata(), [-0.5, 0.125, 1.0])
        assert ax.get_xlabel() == "need (nats)"
    assert {"keep", "retrain", "undecided"} <= {line.get_label() for line in figure.axes[2].lines}


def test_a_threshold_that_decides_nothing_is_not_drawn():
    """Where a forecast decides, there is no line at the threshold."""
    forecast = forecast_of({"head": 0.5, "all": 0.25})
    for plot in (plotting.plot_needs, plotting.plot_estimators):
        labels = [t.get_text() for t in plot(replace(ADVICE, forecast=forecast)).legends[0].get_texts()]
        assert labels == ["retrain", "undecided", "keep"]


def test_cost_is_drawn():
    """The advice stands beside the head alone and everything; every layer and the head have their share."""
    costs, shares = plotting.plot_cost(ADVICE).axes
    assert names_of(costs) == ["the head alone", "the advice", "everything"]
    assert texts(costs) == [
        "50.0% of the parameters",
        "12.5% of the backward work",
        "66.7% of the parameters",
        "62.5% of the backward work",
        "100.0% of the parameters",
        "100.0% of the backward work",
    ]
    np.testing.assert_allclose([bar.get_width() for bar in costs.patches], [50, 12.5, 200 / 3, 62.5, 100, 100])
    assert names_of(shares) == ["layer0", "layer1", "layer2", "out (head)"]
    by_place = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in shares.patches}
    assert by_place == pytest.approx({0: 50 / 3, 1: 50 / 3, 2: 50 / 3, 3: 50})


def test_cost_of_the_head_alone():
    """Where the advice is the head alone, it is not drawn twice."""
    costs, _ = plotting.plot_cost(advice_of([0.0], ["keep"])).axes
    assert names_of(costs) == ["the advice", "everything"]


def test_policies_are_drawn():
    """Accuracies are in percent, with what is trained; what diverged is said, and what was advised is marked."""
    figure = plotting.plot_policies(sweep_of(lost("head + c1"), advised="c2 and up"))
    (ax,) = figure.axes
    assert names_of(ax)[0] == "none, 0%"
    assert names_of(ax)[5] == "c2 and up (advised), 90%"
    assert texts(ax) == ["diverged"]
    marked = [line for line in ax.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(marked[0].get_xdata(), [90.0])
    assert ax.get_xlabel() == "accuracy (%), with 90 % interval"


def test_forecasts_are_drawn():
    """A forecast's accuracy and its interval are drawn in percent."""
    (ax,) = plotting.plot_policies(forecast_of({"head": 0.5, "all": 0.25}, spread=0.1)).axes
    assert ax.get_xlabel() == "forecast accuracy (%), with 90 % interval"
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [50, 75])
    np.testing.assert_allclose([s[:, 0] for s in ax.collections[0].get_segments()], [[41, 59], [66, 84]])


def test_class_needs_are_drawn():
    """The heat map shows the need of every class at every layer, and a dash where there is none."""
    figure = plotting.plot_class_needs(scores_of(("x", "y"), [[0.5, NAN], [-0.25, 1.0]]))
    ax = figure.axes[0]
    assert texts(ax) == ["0.50", "-", "-0.25", "1.00"]
    assert ax.get_xlabel() == "layer (grey: not measured)"
    assert figure.axes[1].get_ylabel() == "need (nats)"
    assert ax.images[0].get_clim() == (-1, 1)


def test_needs_without_classes_are_not_drawn():
    """Scores of data without labels have no need by class, which the message says."""
    with pytest.raises(InvalidDataError, match=r"^The scores of Maker have no classes: .*\. Score labelled data\.$"):
        plotting.plot_class_needs(scores_of(("x", "y"), classes=(), per_class=np.zeros((0, 2))))


def test_many_layers_have_signs_for_numbers():
    """A heat map of many layers has no numbers, which could not be read, but a minus sign where the need is below 0."""
    figure = plotting.plot_class_needs(scores_of(DEEP))
    assert texts(figure.axes[0]) == 26 * ["−"]
    assert figure.get_figwidth() < 14


def test_names_that_cannot_be_printed():
    """Control characters in names are written as escapes, so that the picture stays a picture."""
    figure = plotting.plot_cost(advice_of([0.5], ["keep"], layers=("a\x1b\n\x00",)))
    assert names_of(figure.axes[1])[0] == r"a\x1b\n\x00"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    xml.dom.minidom.parseString(buffer.getvalue())


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["conv1", "fc"], ["conv1", "fc"]),
        (["a.b.c", "a.b.d"], ["a.b.c", "a.b.d"]),
        (["net.blocks.0.linear", "net.blocks.1.linear"], ["…0.linear", "…1.linear"]),
        (["net.blocks", "net.blocks.1.linear"], ["…blocks", "…blocks.1.linear"]),
        (["abcdefgh1abcdefghi", "abcdefgh2abcdefghi"], ["1: abcdefg…bcdefghi", "2: abcdefg…bcdefghi"]),
        (["$x$"], [r"\$x\$"]),
        ([], []),
    ],
)
def test_short_names_stay_apart(names, short):
    """Of long names what all begin with is left out first, then the middle; what is alike then is numbered."""
    assert short_names(names, 16) == short


def test_short_name():
    """A name is cut in the middle to the letters there are."""
    assert short_name("abcdefghij", 8) == "abc…ghij"
    assert short_name(17, 8) == "17"


POINTS = np.arange(12.0).reshape(6, 2)


def test_maps_tell_known_from_unknown():
    """Known classes are rings, unknown ones are filled."""
    figure = plotting.plot_maps({"a": POINTS, "b": POINTS}, ["k", "u", "k", "u", "k", "u"], ["k"])
    known, unknown = figure.axes[0].collections
    assert len(known.get_facecolors()) == 0
    assert len(unknown.get_facecolors()) > 0
    np.testing.assert_array_equal(unknown.get_offsets(), POINTS[1::2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["k (known)", "u (unknown)"]
    assert len(figure.axes) == 2


def test_many_maps_and_classes():
    """Maps stand in rows of three, and the legend of long class names fits below them."""
    labels = [f"a class with a long name, number {n}" for n in range(24)]
    points = np.arange(48.0).reshape(24, 2)
    figure = plotting.plot_maps(dict.fromkeys(DEEP[:5], points), labels, labels[:12])
    assert len(figure.axes) == 5
    assert figure.get_figwidth() <= 12
    assert [ax.get_title() for ax in figure.axes] == [f"…{n}.attention.self.output.dense" for n in range(5)]
    assert overlapping(figure) == []


def test_maps_of_too_many_classes():
    """Of more classes than can be told apart only known and unknown are."""
    labels = [n % 30 for n in range(60)]
    figure = plotting.plot_maps({"a": np.arange(120.0).reshape(60, 2)}, labels, [*range(10)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["known", "unknown"]
    assert [len(group.get_offsets()) for group in figure.axes[0].collections] == [20, 40]


def test_reconstructions_share_a_grey_scale():
    """Originals and reconstructions are drawn on one scale, labelled by class and by method."""
    images = np.stack([np.zeros((3, 3)), np.ones((3, 3))])
    figure = plotting.plot_reconstructions(images, {"method": images / 2}, ["k", "u"], ["k"])
    assert {ax.images[0].get_clim() for ax in figure.axes} == {(0.0, 1.0)}
    assert figure.axes[0].get_title() == "k\nknown"
    assert figure.axes[2].get_ylabel() == "method"


@pytest.mark.parametrize("first", [True, False], ids=["colours first", "colours last"])
def test_reconstructions_in_colour(first):
    """Images with three colours, wherever these stand, are drawn as they are, and cut at 0 and 1."""
    images = np.random.default_rng(0).uniform(0, 1, size=(2, 4, 5, 3))
    given = np.moveaxis(images, -1, 1) if first else images
    figure = plotting.plot_reconstructions(given, {"conv1": given + 0.5}, ["a", "b"], ["a"])
    drawn = [ax.images[0].get_array() for ax in figure.axes]
    np.testing.assert_allclose(drawn[0], images[0])
    np.testing.assert_allclose(drawn[2], (images[0] + 0.5).clip(0, 1))


def test_standardised_colours_are_scaled():
    """Colours beyond 0 and 1 are scaled by the originals: their lowest value is black, their highest white."""
    images = np.array([[[[-2.0, 2.0]]] * 3])
    figure = plotting.plot_reconstructions(images, {"half": images / 2}, ["a"], [])
    assert [ax.images[0].get_array()[0, :, 0].tolist() for ax in figure.axes] == [[0, 1], [0.25, 0.75]]


def test_one_colour_is_grey():
    """Images of shape (n, 1, height, width) are drawn in grey."""
    images = np.arange(8.0).reshape(2, 1, 2, 2)
    figure = plotting.plot_reconstructions(images, {}, ["a", "b"], [])
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), [[4, 5], [6, 7]])


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 6, 6), (2, 1, 4, 4, 4)])
def test_what_is_no_image_is_refused(shape):
    """What has no shape of images is refused with the shapes that there are."""
    with pytest.raises(InvalidDataError, match=r"Images must have the shape .* with 1 or 3 colours\. Got \(2, "):
        plotting.plot_reconstructions(np.zeros(shape), {}, ["a", "b"], [])


def test_long_labels_of_reconstructions():
    """Long names of classes and methods are neither over each other nor cut off."""
    images = np.random.default_rng(0).uniform(size=(4, 4, 4))
    labels = [f"a long class name, {n}" for n in range(4)]
    figure = plotting.plot_reconstructions(images, {f"inversion of {DEEP[0]}": images}, labels, labels[:2])
    assert overlapping(figure) == []


def test_losses_are_drawn():
    """Every curve is drawn, and where there are more than colours, no two look the same."""
    curves = {f"curve {i}": np.linspace(2, 1, 5) for i in range(20)}
    figure = plotting.plot_losses(curves, x_label="step", y_label="loss (no unit)")
    (ax,) = figure.axes
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 20
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss (no unit)")
    assert overlapping(figure) == []


def test_figures_are_saved_twice(tmp_path):
    """A figure is written as PNG and as SVG."""
    png, svg = plotting.save_figure(plotting.plot_needs(ADVICE), tmp_path, "needs")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
