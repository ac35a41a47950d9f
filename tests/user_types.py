"""What a type checker tells a user of the public names: `make lint` checks it, nothing runs it."""

from typing import assert_type

from torch import Tensor, nn

import retrainscope as rs
from retrainscope import criteria


def use(model: nn.Module, X: Tensor, y: Tensor) -> None:
    """Use them as a training script does."""
    rec = rs.recommend_layers(model, (X, y), (X, y), budget={"parameters": 0.5}, random_state=0)
    assert_type(rec, rs.Recommendation)
    assert_type(rec.layers, tuple[str, ...])
    assert_type(rec.verdict, str)
    assert_type(rec.head, rs.LayerAdvice)
    assert_type(rec.forecast, rs.Forecast | None)
    with rs.train_only(model, rec) as parameters:
        assert_type(parameters, list[nn.Parameter])
    assert_type(rs.ActivationSpread(model).fit((X, y)), rs.ActivationSpread)
    assert_type(criteria.LogME(model).fit((X, y)).score_layers((X, y)), rs.LayerScores)
    assert_type(rs.sweep_layers(model, (X, y), (X, y)), rs.LayerSweep)
    assert_type(rs.find_layers(model, X), rs.Layers)
    assert_type(rs.invert_layers(model, X, ["0"])["0"].inputs, Tensor)
