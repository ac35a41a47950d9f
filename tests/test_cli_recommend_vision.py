"""`retrainscope recommend` for the networks of torchvision, timm and transformers, and for folders of images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import retrainscope as rs
from retrainscope.cli import main

pytestmark = [pytest.mark.vision, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]

KNOWN, UNKNOWN = ["cat", "dog"], ["<b>owl", 'it\'s "a" cow']


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Work in a folder with images of two known and of two unknown classes."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, classes in (("known", KNOWN), ("unknown", UNKNOWN)):
        for place, label in enumerate(classes):
            (Path(name) / label).mkdir(parents=True)
            for number in range(6):
                picture = rng.integers(0, 200, (40, 48, 3), dtype=np.uint8)
                picture[:, :, place] += 50
                Image.fromarray(picture).save(Path(name) / label / f"{number}.png")


def data_of(name, transform):
    """Return the images as the model takes them, read by torchvision, and the names of their classes."""
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(name, transform=transform)
    samples = [(image, folder.classes[place]) for image, place in folder]
    return torch.stack([image for image, _ in samples]), [label for _, label in samples]


def arguments(model, *more):
    return ["recommend", model, "--known", "known", "--unknown", "unknown", "--quiet", "--format", "json", *more]


def scores_of(capsys, model, *more):
    """Run the command, and return what the spread measured at two layers."""
    assert main(arguments(model, "--estimators", "spread", *more)) == 0
    return json.loads(capsys.readouterr().out)["result"]["scores"][0]


def assert_same(found, model, data, layers):
    """Fail unless the same was measured as by the library, given the model and the tensors."""
    known, unknown = data
    spread = rs.ActivationSpread(model, layers=layers, random_state=0).fit(known)
    expected = spread.score_layers(unknown)
    assert found["classes"] == list(expected.classes) == sorted(UNKNOWN)
    assert found["layers"] == list(expected.layers) == layers
    assert found["values"]["values"] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_torchvision(capsys):
    """A network of torchvision takes images as its weights want them, with weights drawn by the seed, or a file's."""
    from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

    layers = ["features.0", "features.6"]
    options = ["--layers", ",".join(layers), "--out", "advice"]
    found = scores_of(capsys, "torchvision:mobilenet_v3_small", "--weights", "random", *options)
    torch.manual_seed(0)
    model = mobilenet_v3_small(weights=None)
    transform = MobileNet_V3_Small_Weights.DEFAULT.transforms()
    data = [data_of(name, transform) for name in ("known", "unknown")]
    assert_same(found, model, data, layers)
    page = Path("advice/advice.html").read_text(encoding="utf-8")
    assert "Advice for torchvision:mobilenet_v3_small" in page
    assert "<b>" not in page

    torch.manual_seed(1)
    other = mobilenet_v3_small(weights=None)
    torch.save(other.state_dict(), "weights.pt")
    found = scores_of(capsys, "torchvision:mobilenet_v3_small", "--weights", "weights.pt", *options, "--force")
    assert_same(found, other, data, layers)


def test_timm(capsys):
    """A network of timm takes images as its configuration says."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    layers = ["layer1", "layer3"]
    found = scores_of(capsys, "timm:test_resnet", "--weights", "random", "--layers", ",".join(layers))
    assert_same(found, model, [data_of(name, transform) for name in ("known", "unknown")], layers)


def test_image_classifier_of_transformers(capsys):
    """An image classifier of Hugging Face takes images as its own processor makes them."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained("vit")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained("vit")
    layers = [f"vit.layers.{number}" for number in range(2)]
    if layers[0] not in dict(model.named_modules()):  # their name before transformers 5
        layers = [f"vit.encoder.layer.{number}" for number in range(2)]

    def transform(image):
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    found = scores_of(capsys, "hf:vit", "--layers", ",".join(layers))
    data = [({"pixel_values": X}, labels) for X, labels in (data_of(name, transform) for name in ("known", "unknown"))]
    assert_same(found, model, data, layers)

    for file in Path("vit").glob("*processor*.json"):
        file.unlink()
    assert main(arguments("hf:vit")) == 2
    assert "The image processor of hf:vit cannot be loaded or fetched" in capsys.readouterr().err


def test_forecast(capsys):
    """Without --estimators there is a forecast; classes by name always need a new head."""
    options = ["--weights", "random", "--layers", "features.6", "--head", "classifier.3"]
    assert main(arguments("torchvision:mobilenet_v3_small", *options)) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["head"]["verdict"] == "retrain"
    assert result["forecast"]["policies"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("torchvision:resnet81", [], "torchvision has no model 'resnet81'. Did you mean 'resnet18'"),
        ("timm:resnet-18", [], "timm has no model 'resnet-18'. Did you mean 'resnet18'"),
        (
            "torchvision:alexnet",
            ["--weights", "random", "--image-size", "64"],
            "--image-size is for models of your own",
        ),
    ],
)
def test_bad_names(model, options, message, capsys):
    """An unknown network is an error with the names that are near, and the size of a known one is its own."""
    assert main(arguments(model, *options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("model", ["torchvision:mobilenet_v3_small", "timm:test_resnet", "timm:hf-hub:nobody/none"])
def test_weights_that_cannot_be_fetched(model, tmp_path):
    """Without a network, pretrained weights are an error that says what else there is."""
    nowhere = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    nowhere |= dict.fromkeys(("https_proxy", "HTTPS_PROXY", "http_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "retrainscope", *arguments(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **nowhere})
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"retrainscope: {model} cannot be loaded or fetched (")
    assert last.endswith("Give its weights with --weights FILE, or --weights random.")
    assert "Traceback" not in done.stderr
