"""Tables: the layout of text and HTML, and how numbers are written."""

import math

import pytest

from retrainscope.tables import Table, html_table, interval_text, number_text, text_table


def test_text_table_aligns():
    """The first column is flush left, the others flush right, and no line ends in a blank."""
    assert text_table(["layer", "n"], [["a", "12345"], ["longer", "7"]]).split("\n") == [
        "layer       n",
        "------  -----",
        "a       12345",
        "longer      7",
    ]


def test_zero_has_no_sign():
    """What is rounded to zero is zero."""
    assert (number_text(-0.004), interval_text((-0.004, -0.006)), number_text(-0.005001)) == (
        "0.00",
        "[0.00, -0.01]",
        "-0.01",
    )


def test_text_table_without_rows():
    """A table without rows is its header and a rule."""
    assert text_table(["layer", "n"], []) == "layer  n\n-----  -"


def test_ragged_rows_are_refused():
    """A row of another length than the header is an error, not a crooked table."""
    with pytest.raises(ValueError, match="zip"):
        text_table(["layer", "n"], [["a", "1", "2"]])


def test_html_table():
    """The HTML table has a head, a body and, if there is one, a caption."""
    table = html_table(["layer", "n"], [["a", "1"]], caption="known & unknown")
    assert table == (
        "<table><caption>known &amp; unknown</caption><thead><tr><th>layer</th><th>n</th></tr></thead>"
        "<tbody><tr><td>a</td><td>1</td></tr></tbody></table>"
    )
    assert "<caption>" not in html_table(["layer"], [])


@pytest.mark.parametrize("where", ["header", "cell", "caption"])
def test_html_table_escapes(where):
    """Text from the user cannot become markup, wherever it stands."""
    hostile = '<script>alert("x")</script>'
    table = html_table(
        [hostile if where == "header" else "h"],
        [[hostile if where == "cell" else "c"]],
        caption=hostile if where == "caption" else "k",
    )
    assert "<script" not in table
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in table


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(1.005, 1, "1.0"), (-0.25, 2, "-0.25"), (3, 0, "3"), (math.nan, 2, "-"), (math.inf, 2, "-")],
)
def test_number_text(value, digits, text):
    """A number has fixed digits; what is not finite is a dash."""
    assert number_text(value, digits) == text


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ((-0.126, 1.0), "[-0.13, 1.00]"),
        ((math.nan, 1.0), "-"),
        ((0.0, math.nan), "-"),
        ((-math.inf, 1.0), "-"),
    ],
)
def test_interval_text(interval, text):
    """An interval is written with both ends, and as a dash where one of them is missing."""
    assert interval_text(interval) == text


def test_interval_text_digits():
    """The digits of an interval can be chosen."""
    assert interval_text((0.0, 0.5), digits=1) == "[0.0, 0.5]"


def test_table_is_data_for_text_and_html():
    """A table has a title above its cells and a note below; a notebook shows both."""
    table = Table("Title", ["layer", "n"], [["a", "1"]], note="A note.")
    assert str(table) == f"Title\n{text_table(['layer', 'n'], [['a', '1']])}\nA note."
    assert table._repr_html_() == html_table(["layer", "n"], [["a", "1"]], caption="Title") + "<p>A note.</p>"


def test_table_without_title_and_note():
    """Title and note leave no empty line where there is none."""
    assert str(Table("", ["layer"], [["a"]])) == text_table(["layer"], [["a"]])


def test_wordy_table_wraps():
    """Sentences stand below each other, wrapped, each with the name of its column."""
    words = " ".join(["word"] * 40)
    lines = str(Table("T", ["id", "topic", "claim", "found"], [["1", "x", words, "short"]], wordy=True)).split("\n")
    assert lines[:2] == ["T", "1  x"]
    assert lines[2].startswith("   claim: word word")
    assert lines[3].startswith("     word")
    assert lines[-1] == "   found: short"
    assert max(map(len, lines)) <= 100
    assert " ".join(lines).split().count("word") == 40
