"""Pages and notebooks: what people see of results."""

import json
import math
import sys
from dataclasses import replace
from html import escape

import numpy as np
import pytest
import torch
from jinja2 import UndefinedError
from networks import classifier, samples
from sweeping import apart
from test_trials import sweep_of
from test_trying_out import moved

import retrainscope as rs
from retrainscope import plotting
from retrainscope.exceptions import MissingExtraError, OutputError
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


def titles_of(page):
    """Return the titles of a page's sections."""
    return [part.split(">", 1)[1].split("</h2>")[0] for part in page.split("<h2 ")[1:]]


def test_report_of_a_recommendation(advice, tmp_path):
    """One page has the advice, the forecast, the estimators, the cost, and how it was made; every text is escaped."""
    page = advice.report(tmp_path / "advice.html", title=HOSTILE).read_text(encoding="utf-8")
    assert titles_of(page) == [
        "The advice",
        "Class by class",
        "The forecast",
        "What was measured",
        "The cost",
        "What it does not know, and how it was made",
    ]
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    assert advice.versions["torch"] in page
    assert all(escape(text) in page for text in (advice.summary(), *advice.estimators))
    assert page.count("data:image/svg+xml;base64,") == 6
    assert "The forecast is that of a short training" in page
    assert "A need tells that" not in page
    assert [file.name for file in tmp_path.iterdir()] == ["advice.html"]


def test_report_replaces_an_older_one(advice, tmp_path):
    """A page that is there is replaced; where the new one cannot be made, it stays."""
    path = tmp_path / "advice.html"
    path.write_text("old")
    with pytest.raises(UndefinedError, match="paragraphs"):
        advice.report(path, sections=["no section"])
    assert path.read_text() == "old"
    assert advice.report(str(path)) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_missing_folder_is_named_before_anything_is_drawn(advice, tmp_path):
    """Where the folder of the page is not there, that is said before its sections are looked at."""
    path = tmp_path / "reports" / "page.html"
    with pytest.raises(OutputError, match=r"^There is no folder .*reports to write page\.html to\. Make it, or name"):
        advice.report(path, sections=(1 / 0 for _ in range(1)))
    with pytest.raises(OutputError, match=r"^There is no folder .*reports to write page\.html to"):
        sweep_of().report(path)


def test_report_with_sections_of_ones_own(advice, tmp_path):
    """Sections that are given stand at the end, escaped as all are."""
    mine = Section("My data", [HOSTILE], [Table("", ["name"], [["<b>"]])])
    page = advice.report(tmp_path / "advice.html", sections=[mine]).read_text(encoding="utf-8")
    assert titles_of(page)[-1] == "My data"
    assert "<script" not in page
    assert "&lt;b&gt;" in page


def test_report_with_a_sweep_and_a_trial(tmp_path):
    """What was tried out, and a sweep that is given, have sections of their own."""
    model, known, unknown = classifier(), apart(), moved()
    options = {"steps": 5, "learning_rates": (1e-2,)}
    rec = rs.recommend_layers(model, known, unknown, random_state=0, trial=options)
    assert rec.trial is not None
    sweep = rec.verify(model, known, unknown, n_seeds=1, random_state=0, **options)
    page = rec.report(tmp_path / "advice.html", sweep=sweep).read_text(encoding="utf-8")
    assert {"Tried out", "Retrained and tested"} <= {*titles_of(page)}
    assert escape(sweep.summary()) in page


def test_report_of_a_sweep(tmp_path):
    """A sweep has a page of its own, with its summary, table and figure; a title is text."""
    model, known, unknown = classifier(), apart(), moved()
    sweep = rs.sweep_layers(model, known, unknown, steps=5, learning_rates=(1e-2,), n_seeds=1, random_state=0)
    page = sweep.report(tmp_path / "sweep.html", title=HOSTILE).read_text(encoding="utf-8")
    assert "<script" not in page
    assert escape(sweep.summary()) in page
    assert page.count("<img") == 1
    assert all(f">{policy}</td>" in page for policy in sweep.policies)


def test_report_without_a_forecast(tmp_path):
    """Without labels there is no forecast, nothing class by class, and no word of what a forecast leaves open."""
    X = torch.randn(60, 4)
    rec = rs.recommend_layers(classifier(), X, X + 1, random_state=0)
    page = rec.report(tmp_path / "advice.html").read_text(encoding="utf-8")
    ends = ["The cost", "What it does not know, and how it was made"]
    assert titles_of(page) == ["The advice", "What was measured", *ends]
    assert "The forecast is that of" not in page
    assert "A need tells that" in page


def test_report_of_one_layer_and_estimators(tmp_path):
    """One layer, measured by estimators that were given, has a page, with the measures of each."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    known, unknown = samples(), samples(seed=1)
    estimators = [kind(model, random_state=0) for kind in (rs.ActivationSpread, rs.TangentProbe)]
    rec = rs.recommend_layers(model, known, unknown, estimators=estimators)
    page = rec.report(tmp_path / "advice.html").read_text(encoding="utf-8")
    assert len(rec.table) == 1
    assert "The forecast" not in titles_of(page)
    assert all(escape(scores.as_table().title) in page for scores in rec.scores)


def test_report_of_many_classes(tmp_path):
    """Of many classes those of greatest need are drawn and listed, and how many there are is said."""
    X, y = torch.randn(800, 4), [f"class {n % 200}" for n in range(800)]
    rec = rs.recommend_layers(classifier(), (X, y), (X + torch.randn(800, 4), y), random_state=0)
    scores = rec.scores[-1]
    section = advice_section(rec)
    assert "the 20 neediest of 200 classes" in section.pictures[-1].caption
    labels = [label.get_text() for label in section.pictures[-1].figure.axes[0].get_yticklabels()]
    assert len(labels) == 20
    needs = dict(zip(scores.classes, np.nan_to_num(scores.per_class, nan=-np.inf).max(axis=1), strict=True))
    assert min(needs[label] for label in labels) >= sorted(needs.values())[-20]
    page = rec.report(tmp_path / "advice.html").read_text(encoding="utf-8")
    assert "Shown are 20 of 200 classes, those of the greatest need." in page
    by_class = page.split("Class by class</h2>")[1].split("</table>")[0]
    assert by_class.count("<tr>") == 21


# What version 0.1 wrote, without what came later.
OLDEST = {
    "retrainscope": "Recommendation",
    "schema": 1,
    "result": {
        "layers": ["0"],
        "head": {
            "name": "2",
            "verdict": "retrain",
            "need": None,
            "interval": [None, None],
            "needs": [],
            "intervals": [],
            "n_parameters": 18,
            "share": 0.25,
            "parameters": ["2.weight", "2.bias"],
            "buffers": [],
        },
        "verdict": "all",
        "per_class": [[7, ["0"]], ["eight", []]],
        "table": [
            {
                "name": "0",
                "verdict": "retrain",
                "need": 0.5,
                "interval": [0.25, 0.75],
                "needs": [["ActivationSpread", 0.5]],
                "intervals": [["ActivationSpread", [0.25, 0.75]]],
                "n_parameters": 54,
                "share": 0.75,
                "parameters": ["0.weight", "0.bias"],
                "buffers": [],
            }
        ],
        "scores": [
            {
                "estimator": "ActivationSpread",
                "measure": "within-class share of the variance",
                "unit": "no unit",
                "reference_name": "input",
                "layers": ["0"],
                "values": {"shape": [1], "values": [0.5]},
                "interval": {"shape": [1, 2], "values": [0.25, 0.75]},
                "classes": [7, "eight"],
                "per_class": {"shape": [2, 1], "values": [0.75, None]},
                "per_class_interval": {"shape": [2, 1, 2], "values": [0.5, 1.0, None, None]},
                **{
                    name: {"shape": [1], "values": [0.5]}
                    for name in ("known", "unknown", "known_reference", "unknown_reference")
                },
                "known_classes": [1, 2],
                **{
                    f"{side}_per_class{what}": {"shape": [2, 1], "values": [0.5, 0.5]}
                    for side in ("known", "unknown")
                    for what in ("", "_reference")
                },
                "n_samples": [80, 90],
                "one_sided": False,
            }
        ],
        "cost": [["parameters", 1.0], ["backward", 1.0]],
        "threshold": 0.15,
        "estimators": ["ActivationSpread()"],
        "versions": [["retrainscope", "0.1.0"]],
    },
}


def test_advice_of_an_older_version(tmp_path):
    """Advice that was saved before results had all that they have now can be loaded, read and reported."""
    (tmp_path / "old.json").write_text(json.dumps(OLDEST))
    rec = rs.Recommendation.load(tmp_path / "old.json")
    assert (rec.forecast, rec.trial, rec.reason, rec.notes) == (None, None, "", ())
    assert math.isnan(rec.table[0].agreement)
    assert rec.scores[0].class_sizes == ((0, 0), (0, 0))
    assert rec.per_class == {7: ("0",), "eight": ()}
    assert rec.summary().startswith("Verdict: all. Retrain 0, 2: 100.0% of the parameters")
    page = rec.report(tmp_path / "advice.html").read_text(encoding="utf-8")
    assert "Made by retrainscope 0.1.0." in page
    assert '<td data-name="class">eight</td><td data-name="layers">none</td>' in page
    rec.save(tmp_path / "new.json")
    assert str(rs.Recommendation.load(tmp_path / "new.json")) == str(rec)


def test_no_result_is_dumped_in_a_notebook(advice):
    """Every public result shows itself as a table, with names escaped."""
    model, X = classifier(), torch.rand(5, 4)
    inverted = rs.invert_layers(model, X, ["0"], random_state=0)["0"]
    results = [advice, *advice.scores, advice.forecast, advice.table[0], rs.find_layers(model, X), inverted]
    for result in results:
        page = result._repr_html_()
        assert page.startswith("<table>")
        assert "<script" not in page
        assert "tensor(" not in page + str(result)
        assert repr(result) == str(result)


def test_advice_for_a_layer_is_a_table(advice):
    """The advice for one layer shows its verdict, needs, interval and parameters."""
    row = replace(
        advice.table[0],
        name="<b>",
        verdict="keep",
        need=0.5,
        interval=(0.25, 1.0),
        needs={"A": 0.125},
        n_parameters=1200,
        share=0.5,
    )
    assert [line.split("  ")[-1].strip() for line in str(row).splitlines()] == [
        "<b>",
        "-" * len("0.50, 90 % interval [0.25, 1.00]"),
        "keep",
        "0.50, 90 % interval [0.25, 1.00]",
        "0.12",
        "1,200, 50.0% of all",
    ]
    assert "<th>&lt;b&gt;</th>" in row._repr_html_()


def test_inversion_is_a_table():
    """What was rebuilt shows the lowest, the median and the highest error, and how many samples diverged."""
    error = torch.tensor([0.25, 1.0, 4.0])
    found = rs.Inversion(
        inputs=torch.zeros(3, 1, 2),
        input_error=error,
        feature_error=error / 100,
        losses=torch.zeros(3, 9),
        n_iter=torch.tensor([3, 9, 9]),
        diverged=torch.tensor([True, False, False]),
    )
    title, _, _, *rows, note = str(found).splitlines()
    assert title == "3 inputs of shape (1, 2)"
    assert [row.split()[-3:] for row in rows] == [["0.25", "1", "4"], ["0.0025", "0.01", "0.04"], ["3", "9", "9"]]
    assert note == "1 of them diverged."
