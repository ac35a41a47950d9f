"""The networks of the advice benchmark: small ones, whose blocks are equal in size or not, the largest at any place.

Each takes images of one channel and of 16 by 16 pixels. ``BLOCKS`` names what is measured and retrained.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["BLOCKS", "BUILD", "damaged"]


def _conv(n_in: int, n_out: int, size: int = 3, *, stride: int = 1, pool: bool = False) -> nn.Sequential:
    parts = [nn.Conv2d(n_in, n_out, size, stride=stride, padding=size // 2), nn.ReLU()]
    return nn.Sequential(*parts, *([nn.MaxPool2d(2)] if pool else []))


def _dense(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(n_in, n_out), nn.ReLU())


def mlp(n_classes: int) -> nn.Module:
    """Four dense layers; the first is the largest."""
    return nn.Sequential(
        OrderedDict(
            f1=_dense(256, 128), f2=_dense(128, 64), f3=_dense(64, 64), f4=_dense(64, 64), head=nn.Linear(64, n_classes)
        )
    )


def cnn(n_classes: int) -> nn.Module:
    """Four convolutions and a dense layer, which is the largest."""
    return nn.Sequential(
        OrderedDict(
            c1=_conv(1, 8, pool=True),
            c2=_conv(8, 16, pool=True),
            c3=_conv(16, 32),
            c4=_conv(32, 32, pool=True),
            f1=_dense(32 * 4, 96),
            head=nn.Linear(96, n_classes),
        )
    )


def _normed(layer: nn.Module, norm: nn.Module, *, pool: bool = False) -> nn.Sequential:
    return nn.Sequential(layer, norm, nn.ReLU(), *([nn.MaxPool2d(2)] if pool else []))


def cnn_bn(n_classes: int) -> nn.Module:
    """Four convolutions and a dense layer, each with batch normalisation; the second convolution is the largest."""
    return nn.Sequential(
        OrderedDict(
            c1=_normed(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), pool=True),
            c2=_normed(nn.Conv2d(12, 32, 5, padding=2), nn.BatchNorm2d(32)),
            c3=_normed(nn.Conv2d(32, 20, 3, padding=1), nn.BatchNorm2d(20), pool=True),
            c4=_normed(nn.Conv2d(20, 20, 3, padding=1), nn.BatchNorm2d(20), pool=True),
            flat=nn.Flatten(),
            f1=_normed(nn.Linear(20 * 4, 64), nn.BatchNorm1d(64)),
            head=nn.Linear(64, n_classes),
        )
    )


def wide_middle(n_classes: int) -> nn.Module:
    """Three convolutions and two dense layers; the second convolution is the largest."""
    return nn.Sequential(
        OrderedDict(
            c1=_conv(1, 12, 5, pool=True),
            c2=_conv(12, 48, 5, pool=True),
            c3=_conv(48, 12),
            f1=_dense(12 * 16, 48),
            f2=_dense(48, 48),
            head=nn.Linear(48, n_classes),
        )
    )


class _Residual(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = norm(n_out)
        changes = stride > 1 or n_in != n_out
        self.short = nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(inner)) + self.short(x)).relu()


def _residual(widths: list[int], strides: list[int], norm: Callable[[int], nn.Module], n_classes: int) -> nn.Module:
    first = widths[0]
    stem = nn.Sequential(nn.Conv2d(1, first, 3, stride=2, padding=1, bias=False), norm(first), nn.ReLU())
    blocks = [
        _Residual(n_in, n_out, stride, norm)
        for n_in, n_out, stride in zip([first, *widths[:-1]], widths, strides, strict=True)
    ]
    named = {f"b{number}": block for number, block in enumerate(blocks, start=1)}
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(stem=stem, **named, pool=pool, head=nn.Linear(widths[-1], n_classes)))


class _Separable(nn.Module):
    """Widens, filters each channel alone, narrows; with a shortcut where the size stays."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        inner = 3 * n_in
        self.parts = nn.Sequential(
            *(nn.Conv2d(n_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, n_out, 1, bias=False), nn.BatchNorm2d(n_out)),
        )
        self.shortcut = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts(x) if self.shortcut else self.parts(x)


def separable(n_classes: int) -> nn.Module:
    """A stem and six blocks of separable convolutions with batch normalisation, as in networks for phones."""
    widths, strides = [16, 16, 24, 24, 32, 32], [1, 1, 2, 1, 1, 1]
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    blocks = {
        f"b{number}": _Separable(n_in, n_out, stride)
        for number, (n_in, n_out, stride) in enumerate(zip([16, *widths[:-1]], widths, strides, strict=True), start=1)
    }
    top = nn.Sequential(nn.Conv2d(32, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6())
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(stem=stem, **blocks, top=top, pool=pool, head=nn.Linear(96, n_classes)))


def residual_gn(n_classes: int) -> nn.Module:
    """A stem and four residual blocks of equal width, with group normalisation."""
    return _residual([20, 20, 20, 20], [1, 2, 1, 1], lambda n: nn.GroupNorm(4, n), n_classes)


def residual_bn(n_classes: int) -> nn.Module:
    """A stem and four residual blocks that widen, with batch normalisation; the last block is the largest."""
    return _residual([12, 16, 24, 40], [1, 2, 1, 1], nn.BatchNorm2d, n_classes)


class _Vit(nn.Module):
    def __init__(self, n_classes: int, *, width: int = 40, depth: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def vit(n_classes: int) -> nn.Module:
    """A vision transformer of four equal blocks on 16 patches."""
    return _Vit(n_classes)


BUILD: dict[str, Callable[[int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "cnn_bn": cnn_bn,
    "residual_gn": residual_gn,
    "separable": separable,
    "wide_middle": wide_middle,
    "residual_bn": residual_bn,
    "vit": vit,
}
BLOCKS = {
    "mlp": ("f1", "f2", "f3", "f4"),
    "cnn": ("c1", "c2", "c3", "c4", "f1"),
    "cnn_bn": ("c1", "c2", "c3", "c4", "f1"),
    "residual_gn": ("stem", "b1", "b2", "b3", "b4"),
    "separable": ("stem", "b1", "b2", "b3", "b4", "b5", "b6", "top"),
    "wide_middle": ("c1", "c2", "c3", "f1", "f2"),
    "residual_bn": ("stem", "b1", "b2", "b3", "b4"),
    "vit": ("patch", "blocks.0", "blocks.1", "blocks.2", "blocks.3"),
}


@torch.no_grad()
def damaged(model: nn.Module, block: str, seed: int) -> nn.Module:
    """Shuffle the entries of a block's weights: what it learnt goes, the norm of every tensor stays."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.get_submodule(block).parameters():
        if weight.ndim > 1:
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return model
