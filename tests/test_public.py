"""The public names."""

import retrainscope


def test_public_names():
    """The public names are these, sorted, and every one of them is there and has a docstring."""
    assert retrainscope.__all__ == [
        "ActivationSpread",
        "Descent",
        "GradientInverter",
        "InputSpace",
        "Inversion",
        "LayerAdvice",
        "LayerDecoderProbe",
        "LayerScores",
        "Layers",
        "Recommendation",
        "find_layers",
        "invert_layers",
        "recommend_layers",
        "trace_layers",
        "train_only",
    ]
    for name in retrainscope.__all__:
        assert getattr(retrainscope, name).__doc__
