"""Figures and pages from results."""

import io
import sys
from dataclasses import replace
from xml.dom import minidom

import numpy as np
import pytest
import torch
from networks import classifier
from sweeping import apart
from test_trying_out import moved

import retrainscope as rs
from retrainscope import plotting
from retrainscope.exceptions import MissingExtraError
from retrainscope.report import Picture, Section, advice_section, render, write_report
from retrainscope.tables import Table

HOSTILE = "<script>alert('x')</script> $\\frac{1}{2}$ \U0001f600"


@pytest.fixture(scope="module")
def advice():
    """Advice for a small network, with a class name that would do harm in a page."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6), torch.nn.Linear(6, 2))
    X, y = torch.randn(80, 4), [HOSTILE, "b"] * 40
    shift = torch.tensor([[3.0 if label == HOSTILE else 0.0] for label in y])
    return rs.recommend_layers(model, (X + shift, y), (X - shift, y), random_state=0)


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]


def test_needs_are_drawn(advice):
    """Every layer has its place, and the axis says the unit."""
    figure = plotting.plot_needs(advice)
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [row.name for row in advice.table]
    assert ax.get_xlabel() == "need (nats), with 90 % interval"
    assert advice.verdict in ax.get_title()
    drawn = {float(x) for line in ax.lines for x in np.atleast_1d(line.get_xdata())}
    assert all(any(abs(x - row.need) < 1e-9 for x in drawn) for row in advice.table)


def test_class_needs_are_drawn(advice):
    """The heat map shows the need of every class at every layer, whatever the classes are called."""
    figure = plotting.plot_class_needs(advice.scores[0])
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == [f"{need:.2f}" for need in advice.scores[0].per_class.ravel()]
    figure.canvas.draw()


def test_estimators_are_drawn_side_by_side(advice):
    """Every estimator has a panel with a need for every layer; the layers are named once."""
    figure = plotting.plot_estimators(advice)
    assert [ax.get_title() for ax in figure.axes] == ["TangentProbe", "ActivationSpread"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [row.name for row in advice.table]
    assert {label.get_text() for label in figure.axes[1].get_yticklabels()} == {""}
    for ax, name in zip(figure.axes, advice.table[0].needs, strict=True):
        drawn = next(line for line in ax.lines if len(line.get_xdata()) == len(advice.table)).get_xdata()
        np.testing.assert_allclose(drawn, [row.needs[name] for row in advice.table])


def test_cost_is_drawn(advice):
    """Every layer and the head have a bar of their share of the parameters, and what is trained is said."""
    figure = plotting.plot_cost(advice)
    widths = sorted(bar.get_width() for bar in figure.axes[0].patches)
    np.testing.assert_allclose(widths, sorted(100 * row.share for row in (*advice.table, advice.head)))
    assert f"{advice.cost['parameters']:.1%} of the parameters" in figure.get_suptitle()


def test_many_layers_have_no_numbers(advice):
    """A heat map of many layers is drawn without numbers, in which they could not be read."""
    scores = replace(
        advice.scores[0], layers=tuple(f"layer {n}" for n in range(24)), per_class=np.ones((2, 24)), classes=("a", "b")
    )
    figure = plotting.plot_class_needs(scores)
    assert len(figure.axes[0].texts) == 0
    assert figure.get_figwidth() < 12


def test_names_that_cannot_be_printed(advice):
    """Control characters in names are written as escapes, so that the picture stays a picture."""
    table = tuple(replace(row, name="a\x1b\n\x00") for row in advice.table)
    figure = plotting.plot_cost(replace(advice, table=table))
    assert figure.axes[0].get_yticklabels()[0].get_text() == r"a\x1b\n\x00"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    minidom.parseString(buffer.getvalue())


def test_reconstructions_in_colour():
    """Images with three colours are drawn as they are."""
    images = np.random.default_rng(0).uniform(0, 1, size=(2, 4, 4, 3))
    figure = plotting.plot_reconstructions(images, {"conv1": images + 0.5}, ["a", "b"], ["a"])
    drawn = [ax.images[0].get_array() for ax in figure.axes]
    np.testing.assert_allclose(drawn[0], images[0])
    assert drawn[2].max() <= 1


def test_maps_tell_known_from_unknown():
    """Known classes are rings, unknown ones are filled."""
    points = np.arange(12.0).reshape(6, 2)
    figure = plotting.plot_maps({"a": points, "b": points}, ["k", "u", "k", "u", "k", "u"], ["k"])
    known, unknown = figure.axes[0].collections
    assert len(known.get_facecolors()) == 0
    assert len(unknown.get_facecolors()) > 0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["k (known)", "u (unknown)"]
    assert len(figure.axes) == 2


def test_reconstructions_share_a_grey_scale():
    """Originals and reconstructions are drawn on one scale, labelled by class and by method."""
    images = np.stack([np.zeros((3, 3)), np.ones((3, 3))])
    figure = plotting.plot_reconstructions(images, {"method": images / 2}, ["k", "u"], ["k"])
    assert {ax.images[0].get_clim() for ax in figure.axes} == {(0.0, 1.0)}
    assert figure.axes[0].get_title() == "k\nknown"
    assert figure.axes[2].get_ylabel() == "method"


def test_losses_are_drawn():
    """Every curve is drawn, also where there are more than colours."""
    curves = {f"curve {i}": np.linspace(2, 1, 5) for i in range(10)}
    figure = plotting.plot_losses(curves, x_label="step", y_label="loss (no unit)")
    assert len(figure.axes[0].lines) == 10
    assert texts(figure)[1:] == ["step", "loss (no unit)"]


def test_figures_are_saved_twice(advice, tmp_path):
    """A figure is written as PNG and as SVG."""
    png, svg = plotting.save_figure(plotting.plot_needs(advice), tmp_path, "needs")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()


def test_page_escapes_every_text(advice):
    """Layer, class and other names stand in the page as text, never as markup."""
    table = Table(HOSTILE, [HOSTILE], [[HOSTILE]], note=HOSTILE)
    section = Section(HOSTILE, [HOSTILE], [table], [Picture("p", HOSTILE, plotting.plot_needs(advice))])
    page = render(HOSTILE, [section, advice_section(advice)], footer=HOSTILE)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 9


def test_page_is_self_contained(advice, tmp_path):
    """The page holds its pictures and asks no other host for anything."""
    page = write_report(tmp_path / "page.html", "Advice", [advice_section(advice)]).read_text()
    # One of the policies, one of all layers, and by each of two estimators one by class.
    assert page.count("<img") == page.count('src="data:image/svg+xml;base64,') == 4
    assert "http" not in page.replace("http-equiv", "")
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_unlabelled_advice_has_no_class_picture():
    """Without labels there is no picture by class."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    advice = rs.recommend_layers(model, torch.randn(40, 4), torch.randn(40, 4), random_state=0)
    assert len(advice_section(advice).pictures) == 1


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("matplotlib.figure", "plot", lambda: plotting.new_figure(1, 1)),
        ("jinja2", "report", lambda: render("", [])),
    ],
)
def test_missing_extra_is_named(monkeypatch, module, extra, call):
    """Without the optional library the error names the extra that brings it."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'retrainscope\[{extra}\]'"):
        call()


def sections_of(page):
    return [title.split("</h2>")[0] for title in page.split("<h2 ")[1:]]


def test_report_of_a_recommendation(advice, tmp_path):
    """One page has the advice, the forecast, the estimators, the cost, and how it was made; every text is escaped."""
    page = advice.report(tmp_path / "advice.html", title=HOSTILE).read_text(encoding="utf-8")
    assert [title.split(">")[1] for title in sections_of(page)] == [
        "The advice",
        "The forecast",
        "The estimators side by side",
        "The cost",
        "What it does not know, and how it was made",
    ]
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    assert advice.versions["torch"] in page
    assert page.count("data:image/svg+xml;base64,") == 6
    assert [file.name for file in tmp_path.iterdir()] == ["advice.html"]


def test_report_with_a_sweep_and_a_trial(tmp_path):
    """What was tried out, and a sweep that is given, have sections of their own."""
    model, known, unknown = classifier(), apart(), moved()
    options = {"steps": 5, "learning_rates": (1e-2,)}
    rec = rs.recommend_layers(model, known, unknown, random_state=0, trial=options)
    assert rec.trial is not None
    sweep = rec.verify(model, known, unknown, n_seeds=1, random_state=0, **options)
    page = rec.report(tmp_path / "advice.html", sweep=sweep).read_text(encoding="utf-8")
    assert "Tried out" in " ".join(sections_of(page))
    assert "Retrained and tested" in " ".join(sections_of(page))


def test_report_without_a_forecast(tmp_path):
    """Without labels, and by one estimator, the page is shorter."""
    model = classifier()
    X = torch.randn(60, 4)
    rec = rs.recommend_layers(model, X, X + 1, random_state=0)
    page = rec.report(tmp_path / "advice.html").read_text(encoding="utf-8")
    assert not {"The forecast", "Tried out", "The estimators side by side"} & {
        title.split(">")[1] for title in sections_of(page)
    }


def test_report_of_many_classes(tmp_path):
    """Of many classes those of greatest need are drawn, and how many there are is said."""
    X, y = torch.randn(120, 4), [f"class {n % 30}" for n in range(120)]
    rec = rs.recommend_layers(classifier(), (X, y), (X + torch.randn(120, 4), y), random_state=0)
    section = advice_section(rec)
    assert "the 20 neediest of 30 classes" in section.pictures[-1].caption
    labels = [label.get_text() for label in section.pictures[-1].figure.axes[0].get_yticklabels()]
    assert len(labels) == 20
    needs = dict(zip(rec.scores[-1].classes, rec.scores[-1].per_class.max(axis=1), strict=True))
    assert min(needs[label] for label in labels) >= sorted(needs.values())[9]
