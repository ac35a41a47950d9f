"""The advice for timm: what `timm.utils.freeze` is told to freeze, and what it leaves."""

import re
from pathlib import Path

import pytest
import torch
from advised import advise, assert_trained_by, contents, owned, trainable
from torch import Tensor, nn

import retrainscope as rs
from retrainscope.exceptions import UnsupportedModelError
from retrainscope.export import timm_frozen

pytestmark = [pytest.mark.vision, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


def resnet() -> nn.Module:
    """Return timm's smallest residual network, with batch normalisation throughout."""
    import timm

    return timm.create_model("resnet10t", num_classes=3)


def images() -> Tensor:
    return torch.randn(6, 3, 64, 64)


def train(model: nn.Module) -> None:
    """Train as a user does, in training mode and with weight decay."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01, weight_decay=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()


LAYERS = ["conv1", "layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize(
    ("layers", "head", "names"),
    [
        (("layer4",), "retrain", ["conv1", "bn1", "layer1", "layer2", "layer3"]),
        (("conv1", "layer3"), "keep", ["layer1", "layer2", "layer4", "fc"]),
        ((), "retrain", ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_timm_freezes_the_rest(layers, head, names):
    """After training, what timm froze by these names is bit for bit what it was, batch statistics too."""
    import timm

    model = resnet()
    rec = advise(model, images(), layers, LAYERS, head=head)
    assert timm_frozen(rec, model) == names
    timm.utils.freeze(model, timm_frozen(rec, model))
    before = contents(model)  # of the batch normalisation that timm puts in
    train(model)
    assert_trained_by(rec, model, before)


def test_position_embeddings_are_refused():
    """A vision transformer's position embedding lies in no module of its own, which freeze_rest does not mind."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=2)
    rec = advise(model, images(), ("blocks.1",), ["patch_embed", "blocks.0", "blocks.1"])
    with pytest.raises(UnsupportedModelError, match=r"'(cls_token|pos_embed)' is to be frozen in one that is trained"):
        timm_frozen(rec, model)
    rs.freeze_rest(model, rec)
    assert trainable(model) == owned(rec)[0]


def test_the_page_runs():
    """The example on the page freezes what is not advised, and its optimizer gets what is."""
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    codes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    for code in (codes[0], next(code for code in codes if "import timm" in code)):
        exec(compile(code, "docs/export.md", "exec"), names)
    model, rec = names["model"], names["rec"]
    assert rec.layers == ("0",)
    assert trainable(model) == owned(rec)[0]
    given = {id(parameter) for group in names["optimizer"].param_groups for parameter in group["params"]}
    assert given == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
