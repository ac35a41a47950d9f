"""A ResNet of torchvision and images in folders, one for each class: ``python examples/resnet_folder.py``.

To run without any download it makes its folders itself, from handwritten digits, and trains the ResNet on the digits 0
to 4 first. With photographs of your own begin at ``advise``, with ``resnet18(weights="DEFAULT")`` and its transforms.
"""

import tempfile
from pathlib import Path

import torch
from digits import digits, fit
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

import retrainscope as rs

TRANSFORM = v2.Compose([v2.Resize(40), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def main() -> None:
    """Make the folders and the ResNet, advise, and retrain."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, classes, start, n, test in (
            ("train", range(5), 0, 100, False),
            ("known", range(5), 300, 40, False),
            ("unknown", range(5, 10), 0, 40, False),
            ("test", range(5, 10), 0, 60, True),
        ):
            write_folder(folder / part, classes, start=start, n=n, test=test)
        model = resnet18(num_classes=5)
        torch.manual_seed(0)
        fit(model, tensors(ImageFolder(folder / "train", TRANSFORM)), list(model.parameters()), epochs=3, lr=1e-3)
        advise(model, folder)


def advise(model: nn.Module, folder: Path) -> None:
    """Retrain what is advised, and for comparison the head alone."""
    known, unknown = (ImageFolder(folder / part, TRANSFORM) for part in ("known", "unknown"))
    # Of a folder the labels are places in its own list of classes; names tell which of the unknown ones are new.
    rec = rs.recommend_layers(
        model, named(known), named(unknown), layers=["layer1", "layer2", "layer3", "layer4"], random_state=0
    )
    print(rec)

    rs.replace_head(model, len(unknown.classes), head=rec, random_state=0)
    state, results = {k: v.clone() for k, v in model.state_dict().items()}, {}
    test = DataLoader(ImageFolder(folder / "test", TRANSFORM), batch_size=64)
    for what, layers in (("head only", [rec.head.name]), ("advised", rec)):
        model.load_state_dict(state)
        torch.manual_seed(0)
        with rs.train_only(model, layers) as parameters:
            fit(model, tensors(unknown), parameters, epochs=6, lr=1e-3)
        with torch.no_grad():
            hits = torch.cat([model(X).argmax(dim=1) == y for X, y in test])
        results[what] = float(hits.float().mean())
        print(f"{what}: {results[what]:.1%} of the new classes' images right")
    assert results["advised"] > results["head only"] + 0.05


def write_folder(folder: Path, classes: range, **which: object) -> None:
    """Write digits as images, into one folder for each class."""
    for number, (image, label) in enumerate(zip(*digits(classes, **which), strict=True)):
        (folder / f"digit {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image[0]).byte().numpy()).save(folder / f"digit {label}" / f"{number}.png")


def tensors(data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Read all images of a small folder."""
    X, y = next(iter(DataLoader(data, batch_size=len(data))))
    return X, y


def named(data: ImageFolder) -> tuple[torch.Tensor, list[str]]:
    """Return images with the names of their classes."""
    X, y = tensors(data)
    return X, [data.classes[label] for label in y]


if __name__ == "__main__":
    main()
