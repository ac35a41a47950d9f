"""`Recommendation`: the advice, as a person reads it and as it is kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from retrainscope.batches import Label
from retrainscope.exceptions import InvalidDataError
from retrainscope.forecast import Forecast
from retrainscope.policies import ALL, HEAD, NONE, policy_name, policy_sets
from retrainscope.saving import check_place, import_pandas, load_json, save_json
from retrainscope.scores import LayerScores
from retrainscope.tables import Shown, Table, interval_text, number_text
from retrainscope.trials import LayerSweep

if TYPE_CHECKING:
    import pandas as pd

    from retrainscope.report import Section

__all__ = ["KEEP", "RETRAIN", "UNDECIDED", "LayerAdvice", "Recommendation"]

KEEP, RETRAIN, UNDECIDED = "keep", "retrain", "undecided"


@dataclass(frozen=True, repr=False)
class LayerAdvice(Shown):
    """The advice for one layer, or for the head.

    Attributes
    ----------
    name : str
    verdict : str
        ``"keep"``, ``"retrain"`` or ``"undecided"``.
    need : float
        In nats. By default that of the forecast (`TangentProbe`); of estimators that are given the mean, each weighted
        by one over its interval's squared width, so that an estimator counts less where it is less sure. NaN for the
        head, which is not measured.
    interval : tuple of (float, float)
        The 90 % interval: that of the forecast, or the same mean of the estimators' intervals.
    needs : dict of str to float
        Need by estimator.
    intervals : dict of str to tuple
        Interval by estimator.
    n_parameters : int
        Scalars in the parameters it owns.
    share : float
        That number as a share of all parameters that are used.
    parameters, buffers : tuple of str
        The names of what it owns.
    agreement : float
        The share of the estimators whose own need, against the threshold, speaks for the same, not counting the
        forecast where it decides; NaN for the head, where no estimator is left, and where the verdict is undecided.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> X, y = torch.randn(90, 4), torch.arange(90) % 3
    >>> X[:, 0] += 3.0 * y
    >>> rec = rs.recommend_layers(model, (X, y), (X.roll(1, dims=1), y + 3), random_state=0)
    >>> row = rec.table[0]
    >>> row.name, row.verdict, row.n_parameters, row.parameters
    ('0', 'retrain', 40, ('0.weight', '0.bias'))
    >>> bool(row.interval[0] < row.need < row.interval[1])
    True
    """

    name: str
    verdict: str
    need: float
    interval: tuple[float, float]
    needs: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    n_parameters: int
    share: float
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    agreement: float = math.nan

    def as_table(self) -> Table:
        """Return one row for each thing that is known of the layer."""
        rows = [
            ["verdict", self.verdict],
            ["need (nats)", f"{number_text(self.need)}, 90 % interval {interval_text(self.interval)}"],
            *([f"need by {name} (nats)", number_text(need)] for name, need in self.needs.items()),
            ["parameters", f"{self.n_parameters:,}, {self.share:.1%} of all"],
        ]
        return Table("", ["layer", self.name], rows)


@dataclass(frozen=True, eq=False, repr=False)
class Recommendation(Shown):
    """Which layers to retrain, and why.

    Attributes
    ----------
    layers : tuple of str
        The layers to retrain, in the order of execution; the head is not among them.
    head : LayerAdvice
        The module that produces the output. With novel classes it is always to be retrained.
    verdict : str
        ``"none"``, ``"head"``, ``"upper"``, ``"middle"``, ``"lower"``, ``"all"`` or ``"undecided"``.
    per_class : dict of label to tuple of str
        The layers whose need for a class of the unknown data lies above the threshold. Classes differ by
        themselves, known ones too, so this tells which class stands out, not what it alone would need.
    table : tuple of LayerAdvice
        One a layer, in the order of execution.
    scores : tuple of LayerScores
        What the estimators measured.
    cost : dict of str to float
        ``"parameters"``: the share of all parameters that the advice trains; ``"backward"``: the share of the
        backward pass's work, against training everything.
    threshold : float
        The need, in nats, from which a layer is to be retrained.
    estimators : tuple of str
        The estimators and their settings, as text.
    versions : dict of str to str
        Of retrainscope, torch, numpy, scikit-learn and Python.
    forecast : Forecast, optional
        What retraining by every policy is expected to give, where the advice comes from one.
    reason : str
        Why it is undecided, and what helps; else empty.
    notes : tuple of str
        What to know about the advice.
    trial : LayerSweep, optional
        What the advice and its alternatives gave where they were tried out.
    head_cost : dict of str to float
        `cost` of training the head alone; empty where it was saved by a version that did not tell.
    seconds, passes, peak_memory : dict of str to float
        What each estimator took: seconds as on a clock; forward passes over the samples that it measured, cut-off ones
        counted whole and passes back not counted apart, of all processes together; bytes of memory above what was in
        use when the estimator began (on a GPU what torch allocates there, on a CPU the resident memory of the
        process), NaN where the system does not tell. Seconds and memory are those of the first process. Memory that
        is in use for less than a hundredth of a second can be missed. Not saved, so that equal advice makes equal
        files, but for the seconds that a trial took; what an earlier run left in a checkpoint is not in them.

    Examples
    --------
    >>> import torch
    >>> import retrainscope as rs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> X, y = torch.randn(90, 4), torch.arange(90) % 3
    >>> X[:, 0] += 3.0 * y
    >>> rec = rs.recommend_layers(model, (X, y), (X.roll(1, dims=1), y + 3), random_state=0)
    >>> rec.verdict, rec.layers, rec.head.name
    ('all', ('0',), '2')
    >>> print(rec.summary())
    Verdict: all. Retrain 0, 2: 100.0% of the parameters, ...
    """

    layers: tuple[str, ...]
    head: LayerAdvice
    verdict: str
    per_class: dict[Label, tuple[str, ...]]
    table: tuple[LayerAdvice, ...]
    scores: tuple[LayerScores, ...]
    cost: dict[str, float]
    threshold: float
    estimators: tuple[str, ...]
    versions: dict[str, str]
    forecast: Forecast | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    trial: LayerSweep | None = None
    head_cost: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict, metadata={"saved": False})
    passes: dict[str, float] = field(default_factory=dict, metadata={"saved": False})
    peak_memory: dict[str, float] = field(default_factory=dict, metadata={"saved": False})

    def summary(self) -> str:
        """Say the advice in a few sentences."""
        return " ".join([self._advice(), *self.notes])

    def _advice(self) -> str:
        trained = [*self.layers, *([self.head.name] if self.head.verdict == RETRAIN else [])]
        text = f"Verdict: {self.verdict}. "
        if self.verdict == UNDECIDED:
            return text + self.reason
        if not trained and self.head.verdict == UNDECIDED:
            return text + "No layer needs retraining; whether the head does cannot be told without labels."
        if not trained:
            return text + "Nothing needs retraining for this data."
        text += (
            f"Retrain {', '.join(trained)}: {self.cost['parameters']:.1%} of the parameters, "
            f"{self.cost['backward']:.0%} of the backward work of training everything."
        )
        if self.forecast is None:
            return text
        accuracy = dict(zip(self.forecast.policies, self.forecast.accuracy, strict=True))
        policy = self.forecast.policy_of(self.layers) or HEAD
        shown = {policy: "this", HEAD: "the head alone", ALL: "everything"}
        parts = [f"{accuracy[name]:.1%} by {words}" for name, words in shown.items() if name in accuracy]
        text += f" Forecast accuracy: {', '.join(parts)}."
        if policy != HEAD and accuracy.get(HEAD, -1) >= accuracy[policy]:
            error = dict(zip(self.forecast.policies, self.forecast.error, strict=True))
            text += (
                f" What speaks for it is the squared error, which is finer: {error[policy]:.3f}, and {error[HEAD]:.3f} "
                "by the head alone."
            )
        return text

    def verify(self, model: nn.Module, known: Any, unknown: Any, **options: Any) -> LayerSweep:
        """Retrain by every policy and by the advice, and see what the advice leaves lying.

        Parameters
        ----------
        model, known, unknown
            As given to `recommend_layers`.
        **options
            Of `sweep_layers`; ``layers``, ``head`` and ``policies`` are those of the advice unless given. What
            `recommend_layers` was told of ``input_layer``, ``calls`` and ``groups`` has to be told again.

        Returns
        -------
        LayerSweep
            With ``advised`` set, and the regret of the advice beside that of trivial rules in its summary.

        Raises
        ------
        InvalidDataError
            If the advice is undecided, or as `sweep_layers`.
        """
        from retrainscope.sweep import sweep_layers

        if self.verdict == UNDECIDED:
            raise InvalidDataError(
                "The advice is undecided, so there is nothing to verify. See for yourself instead: "
                "sweep_layers(model, known, unknown)."
            )
        names = tuple(row.name for row in self.table)
        policies = options.pop("policies", None)
        sets = [*policy_sets(names, policies), self.layers]
        options = {"layers": names, "head": self.head.name, **options}
        sweep = sweep_layers(model, known, unknown, policies=sets, **options)
        advised = NONE if self.head.verdict == KEEP else policy_name(self.layers, names)
        return replace(sweep, advised=advised)

    def report(
        self,
        path: str | Path,
        *,
        title: str = "Which layers to retrain",
        sweep: LayerSweep | None = None,
        sections: Sequence["Section"] = (),
    ) -> Path:
        """Write one self-contained HTML page: the advice in words, tables and figures, and how it was made.

        Parameters
        ----------
        path : path
            A file, written whole or not at all.
        title : str
        sweep : LayerSweep, optional
            Of `verify`, to be shown beside the advice.
        sections : sequence of retrainscope.report.Section
            Your own, to stand at the end: paragraphs, tables and figures.

        Returns
        -------
        Path
            Of the file.

        Raises
        ------
        MissingExtraError
            If jinja2 or matplotlib is not installed.
        OutputError
            If the folder of the file is not there; before anything is drawn.
        """
        from retrainscope.report import advice_sections, write_report

        check_place(path)
        footer = f"Made by retrainscope {self.versions.get('retrainscope', '')}".rstrip() + "."
        return write_report(path, title, [*advice_sections(self, sweep=sweep), *sections], footer=footer)

    def to_frame(self) -> "pd.DataFrame":
        """Return one row a layer, the head last, as a pandas DataFrame.

        Raises
        ------
        MissingExtraError
            If pandas is not installed.
        """
        rows = [
            {
                "layer": row.name,
                "parameters": row.n_parameters,
                "share": row.share,
                **{f"need[{name}]": need for name, need in row.needs.items()},
                "need": row.need,
                "need_low": row.interval[0],
                "need_high": row.interval[1],
                "agreement": row.agreement,
                "verdict": row.verdict,
            }
            for row in (*self.table, self.head)
        ]
        frame: pd.DataFrame = import_pandas().DataFrame(rows)
        return frame

    def save(self, path: str | Path) -> None:
        """Write the recommendation to a JSON file.

        Raises
        ------
        ResultFormatError
            If a class label is no string, number, boolean, None or tuple of these.
        """
        save_json(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recommendation that `save` wrote.

        Raises
        ------
        ResultFormatError
            If the file holds something else, or was written by a newer version.
        """
        return load_json(cls, path)

    def as_table(self) -> Table:
        """Return one row a layer, the head last."""
        several = list(self.table[0].needs) if len(self.scores) > 1 else []
        agreed = ["agreement"] if several else []
        header = ["layer", "parameters", "share", *several, "need", "90 % interval", *agreed, "verdict"]
        rows = [
            [
                row.name,
                f"{row.n_parameters:,}",
                f"{row.share:.1%}",
                *(number_text(row.needs.get(name, math.nan)) for name in several),
                number_text(row.need),
                interval_text(row.interval),
                *([f"{row.agreement:.0%}" if math.isfinite(row.agreement) else "-"] if several else []),
                row.verdict,
            ]
            for row in (*self.table, self.head)
        ]
        rows[-1][0] += " (head)"
        return Table("", header, rows)
