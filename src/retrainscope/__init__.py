"""Which layers must be retrained for data a network does not know, and which can stay frozen?"""

from retrainscope.advice import LayerAdvice, Recommendation
from retrainscope.decoding import LayerDecoderProbe
from retrainscope.descent import Descent
from retrainscope.finetuning import freeze_rest, train_only, unfreeze
from retrainscope.forecast import Forecast
from retrainscope.inversion import GradientInverter
from retrainscope.layers import Layers, find_layers
from retrainscope.new_head import replace_head
from retrainscope.optimising import param_groups
from retrainscope.rebuilding import InputSpace, Inversion
from retrainscope.recommendation import recommend_layers
from retrainscope.reconstruction import invert_layers
from retrainscope.scores import LayerScores
from retrainscope.spread import ActivationSpread
from retrainscope.sweep import sweep_layers
from retrainscope.tangent import TangentProbe
from retrainscope.tracing import trace_layers
from retrainscope.trials import LayerSweep

__all__ = [
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
