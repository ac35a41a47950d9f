"""Published criteria for choosing layers, under the same contract as the estimators of this library."""

from retrainscope.criteria.features import HiddenStateVariability, HScore, LogME, TransRate
from retrainscope.criteria.gradient_statistics import relative_norm, signal_to_noise
from retrainscope.criteria.gradients import EmpiricalFisher, GradientSignalToNoise, RelativeGradientNorm
from retrainscope.criteria.probes import KNNProbe, LinearProbe
from retrainscope.criteria.similarity import LayerSimilarity, compare_layers, unbiased_hsic
from retrainscope.criteria.transferability import h_score, hidden_variability, log_me, trans_rate
from retrainscope.criteria.weights import SpectrumSNR, spectrum_snr

__all__ = [
    "EmpiricalFisher",
    "GradientSignalToNoise",
    "HScore",
    "HiddenStateVariability",
    "KNNProbe",
    "LayerSimilarity",
    "LinearProbe",
    "LogME",
    "RelativeGradientNorm",
    "SpectrumSNR",
    "TransRate",
    "compare_layers",
    "h_score",
    "hidden_variability",
    "log_me",
    "relative_norm",
    "signal_to_noise",
    "spectrum_snr",
    "trans_rate",
    "unbiased_hsic",
]
