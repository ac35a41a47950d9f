"""One self-contained HTML page from results: text, tables and figures, nothing from elsewhere."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrainscope.advice import Recommendation
from retrainscope.exceptions import MissingExtraError
from retrainscope.plotting import (
    new_figure,
    plot_class_needs,
    plot_cost,
    plot_estimators,
    plot_needs,
    plot_policies,
)
from retrainscope.saving import write_text
from retrainscope.scores import LayerScores
from retrainscope.tables import Table
from retrainscope.trials import LayerSweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Picture",
    "Section",
    "advice_section",
    "advice_sections",
    "check_extras",
    "render",
    "sweep_section",
    "write_report",
]

_MOST_CLASSES = 20  # in a table or heat map
_FITS_A_PHONE = 7.2  # inches
_REM_AN_INCH = 4.5  # of wider figures, so that their letters can be read
_FORECAST_LIMIT = (
    "The forecast is that of a short training near the start, on as many samples as were given; with much new data and "
    "long training, retraining more wins in the end."
)
_NEED_LIMIT = (
    "A need tells that the unknown data looks other to a layer than the known does, and not how much retraining it "
    "would gain."
)
_LIMITS = (
    "Intervals are about samples, taken as independent unless groups were given, and say nothing about other classes.",
    "rec.verify(model, known, unknown) retrains by every choice of layers, and proves or refutes the advice.",
)


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure, the name of its file and the words under it."""

    name: str
    caption: str
    figure: "Figure"

    @property
    def least_width(self) -> float:
        """How wide the figure is at least, in rem; it is scrolled where the page is narrower. 0: as the page is."""
        width = float(self.figure.get_figwidth())
        return _REM_AN_INCH * width if width > _FITS_A_PHONE else 0.0

    @property
    def source(self) -> str:
        """The picture as a data URI, to stand in a page."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="svg")
        return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True, eq=False)
class Section:
    """A part of a page: a title, then paragraphs, tables and pictures."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def advice_section(advice: Recommendation, *, title: str = "The advice") -> Section:
    """Show a recommendation: its table, the needs by layer and by class.

    Parameters
    ----------
    advice : Recommendation
    title : str

    Returns
    -------
    Section
    """
    pictures = [
        Picture(
            "needs",
            "Need of every layer with its 90 % interval (hollow: there is none), and the verdict.",
            plot_needs(advice),
        )
    ]
    if advice.forecast is not None:
        words = "Forecast accuracy of every choice of layers, with its 90 % interval."
        pictures.append(Picture("forecast", words, plot_policies(advice.forecast)))
    pictures += [
        Picture(
            f"class-needs-{place + 1}",
            f"Need of {_some('every class', scores)} of the unknown data, layer by layer: {scores.estimator}.",
            plot_class_needs(_neediest(scores)),
        )
        for place, scores in enumerate(advice.scores)
        if scores.classes
    ]
    return Section(title, [advice.summary()], [advice.as_table()], pictures)


def advice_sections(advice: Recommendation, *, sweep: LayerSweep | None = None) -> list[Section]:
    """Show all that a recommendation holds, and the sweep that it was held against.

    Parameters
    ----------
    advice : Recommendation
    sweep : LayerSweep, optional

    Returns
    -------
    list of Section
    """
    sections = [advice_section(advice)]
    if advice.per_class:
        sections.append(_class_section(advice))
    if advice.forecast is not None:
        sections.append(Section("The forecast", tables=[advice.forecast.as_table()]))
    sections += [
        sweep_section(tried, title=title)
        for title, tried in (("Tried out", advice.trial), ("Retrained and tested", sweep))
        if tried is not None
    ]
    if advice.scores:
        words = "Need of every layer by each estimator, on a scale of its own, and what the advice goes by."
        pictures = [Picture("estimators", words, plot_estimators(advice))] if len(advice.scores) > 1 else []
        tables = [scores.as_table() for scores in advice.scores]
        sections.append(Section("What was measured", tables=tables, pictures=pictures))
    words = "What is trained, against the head alone and everything; and where the parameters are."
    sections.append(Section("The cost", pictures=[Picture("cost", words, plot_cost(advice))]))
    limits = [_NEED_LIMIT if advice.forecast is None else _FORECAST_LIMIT, *_LIMITS]
    made_by = Table("", ["what", "value"], [["estimator", text] for text in advice.estimators]
                    + [[f"{name} took", _cost_text(advice, name)] for name in advice.seconds]
                    + [["threshold (nats)", f"{advice.threshold:g}"]]
                    + [[name, version] for name, version in advice.versions.items()], wordy=True)  # fmt: skip
    sections.append(Section("What it does not know, and how it was made", limits, [made_by]))
    return sections


def _cost_text(advice: Recommendation, name: str) -> str:
    """Say what an estimator has cost."""
    parts = [f"{advice.seconds[name]:.1f} seconds", f"{advice.passes[name]:.1f} passes over its samples"]
    if not math.isnan(advice.peak_memory[name]):
        parts.append(f"{advice.peak_memory[name] / 1e6:.0f} MB")
    return ", ".join(parts)


def sweep_section(sweep: LayerSweep, *, title: str = "Retrained and tested") -> Section:
    """Show what retraining by every policy gave.

    Parameters
    ----------
    sweep : LayerSweep
    title : str

    Returns
    -------
    Section
    """
    words = "Accuracy by choice of layers, with its 90 % interval."
    picture = Picture(title.lower().replace(" ", "-"), words, plot_policies(sweep))
    return Section(title, [sweep.summary()], [sweep.as_table()], [picture])


def _class_section(advice: Recommendation) -> Section:
    """Show for each class which layers it stands out at."""
    scores = next((s for s in advice.scores if s.classes == tuple(advice.per_class)), None)
    shown = [*advice.per_class][:_MOST_CLASSES] if scores is None else _neediest(scores).classes
    rows = [[str(label), ", ".join(advice.per_class[label]) or "none"] for label in shown]
    n = len(advice.per_class)
    note = f"Shown are {len(rows)} of {n} classes, those of the greatest need." if n > len(rows) else ""
    words = (
        f"Layers at which the need for a class of the unknown data lies above {advice.threshold:g} nats with its whole "
        "interval. Classes differ by themselves, known ones too, so this tells which class stands out, not what it "
        "alone would need."
    )
    return Section("Class by class", [words], [Table("", ["class", "layers"], rows, note=note, wordy=True)])


def _neediest(scores: LayerScores) -> LayerScores:
    """Keep the classes of greatest need, where there are too many to be drawn."""
    if len(scores.classes) <= _MOST_CLASSES:
        return scores
    needs = np.nan_to_num(scores.per_class, nan=-np.inf).max(axis=1)
    rows = np.sort(np.argsort(-needs, kind="stable")[:_MOST_CLASSES])
    return replace(scores, classes=tuple(scores.classes[row] for row in rows), per_class=scores.per_class[rows])


def _some(words: str, scores: LayerScores) -> str:
    n = len(scores.classes)
    return words if n <= _MOST_CLASSES else f"the {_MOST_CLASSES} neediest of {n} classes"


def check_extras() -> None:
    """Raise MissingExtraError if a library that reports need is not installed: before long work, not after."""
    new_figure(1, 1)
    try:
        import jinja2  # noqa: F401 -- only whether it is there
    except ImportError as error:
        raise MissingExtraError.for_package("jinja2", "report") from error


def render(title: str, sections: Sequence[Section], *, footer: str = "") -> str:
    """Write sections as one HTML page; every text is escaped.

    Parameters
    ----------
    title : str
    sections : sequence of Section
    footer : str

    Returns
    -------
    str
        The page: styles and pictures inside, no script, light and dark.

    Raises
    ------
    MissingExtraError
        If jinja2 or matplotlib is not installed.
    """
    check_extras()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(_PAGE)
    return template.render(title=title, sections=sections, footer=footer)


def write_report(path: str | Path, title: str, sections: Sequence[Section], *, footer: str = "") -> Path:
    """Render sections into a file and return its path."""
    path = Path(path)
    write_text(path, render(title, sections, footer=footer))
    return path


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --page: #ffffff; --line: #d0d7de;
  --band: #f6f8fa; --link: #0550ae; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b3; --page: #0d1117; --line: #30363d; --band: #161b22; --link: #79b8ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 66rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
a { color: var(--link); }
nav ul { padding-left: 1.2rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { min-width: 7rem; max-width: 18rem; }
.words td:first-child { min-width: 0; }
.words td:nth-child(2):last-child { max-width: 40rem; }
thead th { border-bottom: 2px solid var(--line); }
tbody tr:nth-child(even) { background: var(--band); }
th, td { overflow-wrap: normal; white-space: nowrap; } .words td { white-space: normal; overflow-wrap: anywhere; }
thead th { max-width: 12rem; overflow: hidden; text-overflow: ellipsis; }
tbody td:first-child { white-space: normal; overflow-wrap: anywhere; max-width: 18rem; }
figure { overflow-x: auto; }
@media (max-width: 44rem) {
  .words thead { display: none; }
  .words, .words tbody, .words tr, .words td { display: block; max-width: none; border: 0; }
  .words tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  .words td::before { content: attr(data-name) ": "; color: var(--soft); }
}
figure { margin: 1.4rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
.title { margin: 1.4rem 0 -.4rem; font-weight: 600; font-size: .9rem; }
figcaption, footer, .note { color: var(--soft); font-size: .9rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<nav aria-label="Contents"><ul>
{% for section in sections %}
<li><a href="#part-{{ loop.index }}">{{ section.title }}</a></li>
{% endfor %}
</ul></nav>
{% for section in sections %}
<section>
<h2 id="part-{{ loop.index }}">{{ section.title }}</h2>
{% for paragraph in section.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for table in section.tables %}
{% if table.title %}
<p class="title">{{ table.title }}</p>
{% endif %}
<div class="table" tabindex="0" role="region" aria-label="{{ table.title or section.title }}">
{% set longest = (table.rows | map("first") | map("length") | list + [0]) | max %}
<table{% if table.wordy %} class="words"{% endif %}>
<thead><tr>
{% for cell in table.header %}
<th scope="col"{% if loop.first %} style="min-width: min({{ longest }}ch, 13rem)"{% endif %}>{{ cell }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td data-name="{{ table.header[loop.index0] }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}

{% endfor %}
{% for picture in section.pictures %}
<figure{% if picture.least_width %} tabindex="0"{% endif %}>
<img src="{{ picture.source }}" alt="{{ picture.caption }}"
{% if picture.least_width %}style="min-width: {{ picture.least_width }}rem"{% endif %}>
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</section>
{% endfor %}
<footer>{{ footer }}</footer>
</body>
</html>
"""
