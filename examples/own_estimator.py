"""An estimator of your own, ``python examples/own_estimator.py``: how far new data lies from all that a layer has seen.

An estimator measures the known data in ``_measure_known`` and compares the unknown with it in ``_score``; all else (the
model lent and given back, data of any form, layers by name, seeds) is inherited.
"""

import numpy as np
import torch
from digits import digits, network
from torch import nn

import retrainscope as rs
from retrainscope.base import LayerEstimator
from retrainscope.batches import Batches
from retrainscope.comparing import N_RESAMPLES
from retrainscope.scores import Measured, score
from retrainscope.tracing import call_model


class NearestKnown(LayerEstimator):
    """Score layers by the distance to the nearest activations of known data (Y. Sun et al. 2022, arXiv 2204.06507).

    need = log(mean distance of the unknown data) - log(mean distance of other known data), in nats.
    """

    def __init__(self, model, *, layers=None, head=None, input_layer=None, calls=None, batch_size=256, device=None,
                 random_state=None, progress=None):  # fmt: skip
        self.model = model
        self.layers = layers
        self.head = head
        self.input_layer = input_layer
        self.calls = calls
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def _measure_known(self, model: nn.Module, batches: Batches) -> None:
        rows = self._activations(model, batches)
        self._seen = {name: values[::2] for name, values in rows.items()}
        self._held_out = {name: values[1::2] for name, values in rows.items()}

    def _score(self, model: nn.Module, batches: Batches, rng: np.random.Generator) -> rs.LayerScores:
        return score(
            self._measured(self._held_out, rng),
            self._measured(self._activations(model, batches), rng),
            layers=self.layers_.names,
            labelled=False,
            estimator=type(self).__name__,
            measure="mean distance to the nearest known activation",
            unit="of activations",
            reference_name="",
        )

    def _activations(self, model: nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in self.layers_.names}
        with torch.no_grad(), rs.trace_layers(model, self.layers_.names) as outputs:
            for batch in batches:
                call_model(model, batch.inputs)
                for name in rows:
                    rows[name].append(outputs[name].flatten(1))
        return {name: torch.cat(parts) for name, parts in rows.items()}

    def _measured(self, rows: dict[str, torch.Tensor], rng: np.random.Generator) -> Measured:
        """Return the measure and bootstrap draws of it, of shape (n_draws, 1 + n_classes, n_layers)."""
        nearest = [torch.cdist(rows[name], seen).min(dim=1).values for name, seen in self._seen.items()]
        distances = torch.stack(nearest).double().cpu().numpy()
        n = distances.shape[1]
        weights = np.concatenate([np.full((1, n), 1 / n), rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n])
        draws = (weights @ distances.T)[:, None, :].repeat(2, axis=1)  # all samples together, and their only class
        return Measured(values=draws, reference=None, classes=(None,), counts=np.array([n]))


def main() -> None:
    """Hold new digits against known ones, and known ones against known ones."""
    model = network()
    known = digits(range(5), start=300)
    estimator = NearestKnown(model, random_state=0)
    scores = estimator.fit(known).score_layers(digits(range(5, 10)))
    print(scores)
    print(rs.recommend_layers(model, known, digits(range(5, 10)), estimators=[estimator], threshold=0.1))

    again = estimator.score_layers(digits(range(5), start=400))
    print(f"\nDigits that the network knows: {np.round(again.values, 2)}")
    assert (scores.values > 0.1).all()
    assert (again.values < 0.1).all()


if __name__ == "__main__":
    main()
