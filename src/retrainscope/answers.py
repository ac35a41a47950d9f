"""What a pass over data tells besides what it is for: labels, and the classes that a model takes samples for."""

from torch import Tensor

from retrainscope.batches import Batch, Batches, Label
from retrainscope.shares import Told

__all__ = ["Answers"]


class Answers:
    """Labels of data, and a classifier's answers, noted in one pass over it.

    An estimator that needs no more of a pass takes them from that of another one.

    Parameters
    ----------
    of_model : bool
        Whether the model's answers are wanted, or the labels alone.

    Attributes
    ----------
    labels : list of n_samples labels
        Of all processes, in the order in which the samples come; None each where there are none.
    positions : list of n_samples int
        The place of each sample in the whole data.
    own : list of n labels
        Of those samples that this process has run.
    guesses : list of n int
        Of these the place of the largest output.
    n_outputs : int
        Of the model; 0 where this process has run no sample.
    """

    def __init__(self, *, of_model: bool) -> None:
        self.of_model = of_model
        self._data: tuple[str, int] | None = None
        self._forget()

    def begin(self, batches: Batches) -> None:
        """Start a pass; what was noted in one that was broken off is forgotten."""
        self._forget()
        self._data = (batches.name, batches.seed)

    def give_up(self) -> None:
        """Forget a pass in which the model's answers are no class scores: whoever needs them makes one and says so."""
        self._forget()
        self._data = None

    def are_of(self, batches: Batches) -> bool:
        """Tell whether a pass over this data was noted, with its samples in the same order."""
        return self._data == (batches.name, batches.seed)

    def note_labels(self, told: list[Told]) -> None:
        """Note what all processes tell of their next batches."""
        for one in told:
            self.labels += one.labels
            self.positions += one.positions.tolist()

    def note_outputs(self, piece: Batch, outputs: Tensor) -> None:
        """Note what the model puts out for some samples, of shape (n, n_outputs)."""
        self.own += piece.labels or (None,) * len(piece)
        self.guesses += outputs.argmax(dim=1).tolist()
        self.n_outputs = outputs.shape[1]

    def _forget(self) -> None:
        self.labels, self.positions, self.own = list[Label](), list[int](), list[Label]()
        self.guesses, self.n_outputs = list[int](), 0
