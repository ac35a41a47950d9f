"""New heads of torchvision's and timm's classifiers; needs the extra vision."""

import pytest
import torch
from torch import nn

from retrainscope.exceptions import UnsupportedModelError
from retrainscope.new_head import replace_head

pytestmark = [pytest.mark.vision, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

TORCHVISION = {
    "alexnet": "classifier.6",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "googlenet": "fc",
    "inception_v3": "fc",
    "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "resnet18": "fc",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_1": "classifier.1",
    "swin_t": "head",
    "vgg11": "classifier.6",
    "vit_b_16": "heads.head",
}
TIMM = {
    "convnext_atto": "head.fc",
    "cpubone_nano": "head.classifier.linear",
    "efficientnet_lite0": "classifier",
    "iformer_t": "head.head.l",
    "mobilenetv3_small_050": "classifier",
    "resnet10t": "fc",
    "resnetv2_50x1_bit": "head.fc",
    "sequencer2d_s": "head.fc",
    "vit_tiny_patch16_224": "head",
    "volo_d1_224": None,
    "caformer_s18": "head.fc.fc2",
}


def torchvision_model(name: str) -> nn.Module:
    """Build a classifier of ten classes with random weights."""
    import torchvision

    settings = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=10, **settings)


@pytest.mark.parametrize(("name", "expected"), TORCHVISION.items())
def test_heads_of_torchvision(name, expected):
    """The last layer is found by itself in each family, and a number of classes that is told is brought in line."""
    with torch.device("meta"):
        model = torchvision_model(name)
    head = replace_head(model, 7)
    assert head is model.get_submodule(expected)
    assert len(head.weight) == 7
    assert getattr(model, "num_classes", 7) == 7


@pytest.mark.parametrize("name", ["regnet_y_400mf", "squeezenet1_1"])
def test_torchvision_keeps_outputs(name):
    """The model puts out the new classes, and for kept ones what it put out before."""
    model, images = torchvision_model(name).eval(), torch.randn(2, 3, 64, 64)
    before = model(images)
    replace_head(model, 12, keep="all")
    after = model(images)
    assert after.shape == (2, 12)
    torch.testing.assert_close(after[:, :10], before)


@pytest.mark.parametrize(("name", "expected"), TIMM.items())
def test_heads_of_timm(name, expected):
    """The head is the last layer of what timm calls the classifier; its number of classes is brought in line."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    if expected is None:
        with pytest.raises(UnsupportedModelError, match=r"2 layers have one output .* 'aux_head', 'head'"):
            replace_head(model, 7)
        return
    whole = [*model.get_classifier().modules()]
    assert model.get_submodule(expected) in whole
    head = replace_head(model, 7)
    assert head is model.get_submodule(expected)
    assert (len(head.weight), model.num_classes) == (7, 7)


def test_timm_keeps_outputs():
    """The model puts out the new classes, and for kept ones what it put out before."""
    import timm

    model = timm.create_model("resnetv2_50x1_bit", num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    nn.init.normal_(model.head.fc.weight)
    before = model(images)
    head = replace_head(model, 3, keep=[9, 4])
    assert isinstance(head, nn.Conv2d)
    after = model(images)
    assert after.shape == (2, 3)
    torch.testing.assert_close(after[:, :2], before[:, [9, 4]])


def test_heads_that_work_together():
    """Two heads of a distilled model are replaced in turn, and it runs in both modes."""
    import timm

    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, img_size=32, depth=1)
    with pytest.raises(UnsupportedModelError, match=r"Candidates: 'head', 'head_dist'.*replace each in turn"):
        replace_head(model, 7)
    for name in ("head", "head_dist"):
        replace_head(model, 7, head=name)
    for training in (True, False):
        assert model.train(training)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert model.num_classes == 7


def test_timm_without_a_head():
    """A model made without a head is refused, and told to have none."""
    import timm

    model = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(UnsupportedModelError, match=r"tells of 0 classes, and no layer has as many outputs"):
        replace_head(model, 3)
