"""Figures and pages from results."""

import sys

import numpy as np
import pytest
import torch

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
