"""The public names."""

import retrainscope


def test_public_names():
    """The public names are these, sorted, and every one of them is there and has a docstring."""
    assert retrainscope.__all__ == [
        "ActivationSpread",
        "Descent",
        "Forecast",
        "GradientInverter",
        "InputSpace",
        "Inversion",
        "LayerAdvice",
        "LayerDecoderProbe",
        "LayerScores",
        "LayerSweep",
        "Layers",
        "Recommendation",
        "TangentProbe",
        "find_layers",
        "freeze_rest",
        "invert_layers",
        "param_groups",
        "recommend_layers",
        "replace_head",
        "sweep_layers",
        "trace_layers",
        "train_only",
        "unfreeze",
    ]
    for name in retrainscope.__all__:
        assert getattr(retrainscope, name).__doc__
