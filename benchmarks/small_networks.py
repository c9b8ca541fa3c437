"""ResNet-50 and an EfficientNet-like net, written out, for machines without torchvision or timm.

He et al. 2016, "Deep residual learning for image recognition", table 1 (stride in the 3x3
convolution, as torchvision has it); Tan and Le 2019, "EfficientNet", table 1.
"""

import torch
from torch import Tensor, nn


def norm(channels: int, act: type[nn.Module] | None) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), *([] if act is None else [act(inplace=True)])]


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.short = None
        if stride != 1 or inside != outside:
            conv = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.short is None else self.short(x)
        return self.relu(y)


def resnet50(scale: float = 1.0) -> nn.Module:
    """ResNet-50; ``scale`` multiplies its widths."""
    width = max(8, int(64 * scale))
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), *norm(width, nn.ReLU)]
    layers: list[nn.Module] = [*stem, nn.MaxPool2d(3, 2, 1)]
    inside = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Bottleneck(inside, width << stage, stride))
            inside = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000))


class Squeeze(nn.Module):
    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, inside, 1), nn.Conv2d(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(nn.functional.silu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class Inverted(nn.Module):
    def __init__(self, inside: int, outside: int, grow: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inside * grow
        grown = [nn.Conv2d(inside, wide, 1, bias=False), *norm(wide, nn.SiLU)] if grow > 1 else []
        depth = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        squeeze = Squeeze(wide, max(1, inside // 4))
        last = [nn.Conv2d(wide, outside, 1, bias=False), *norm(outside, None)]
        self.body = nn.Sequential(*grown, depth, *norm(wide, nn.SiLU), squeeze, *last)
        self.adds = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x if self.adds else self.body(x)


# expansion, channels, blocks, stride, kernel size
STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip


def efficient(scale: float = 1.0) -> nn.Module:
    """Like EfficientNet-B0, without dropout; ``scale`` multiplies its widths."""
    width = lambda channels: max(8, int(channels * scale))  # noqa: E731
    inside = width(32)
    layers: list[nn.Module] = [
        nn.Conv2d(3, inside, 3, 2, 1, bias=False), *norm(inside, nn.SiLU)
    ]  # fmt: skip
    for grow, channels, blocks, stride, kernel in STAGES:
        for block in range(blocks):
            outside = width(channels)
            layers.append(Inverted(inside, outside, grow, kernel, stride if block == 0 else 1))
            inside = outside
    last = width(1280)
    layers += [nn.Conv2d(inside, last, 1, bias=False), *norm(last, nn.SiLU)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 1000))
