"""Twenty networks with batch normalizations whose parameters and statistics look trained."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from support import third_party


class Network(NamedTuple):
    """A network and the shape of its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _torchvision(name: str, **options) -> Callable[[], nn.Module]:
    return lambda: third_party.torchvision().models.get_model(name, weights=None, **options)


def _timm(name: str, **options) -> Callable[[], nn.Module]:
    return lambda: third_party.timm().create_model(name, pretrained=False, **options)


def _unet3d() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    return nets.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=1, norm="batch")


def _unet() -> nn.Module:
    return UNet()


def _conformer() -> nn.Module:
    transformers = third_party.transformers()
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        conv_dim=(32, 32), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, conv_depthwise_kernel_size=15,
        position_embeddings_type="rotary",
    )  # fmt: skip
    return transformers.Wav2Vec2ConformerModel(config)


class UNet(nn.Module):
    """Two levels; transposed convolutions on the way up, and a norm behind the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _double(3, 16), _double(16, 32), _double(32, 32)
        self.up = nn.Sequential(nn.ConvTranspose2d(32, 32, 2, 2, bias=False), nn.BatchNorm2d(32))
        self.last = nn.Sequential(nn.ConvTranspose2d(32, 16, 2, 2, bias=False), nn.BatchNorm2d(16))
        self.d, self.e = _double(64, 32), _double(32, 16)
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(self.pool(a))
        c = self.c(self.pool(b))
        d = self.d(torch.cat([b, self.up(c).relu()], 1))
        return self.head(self.e(torch.cat([a, self.last(d).relu()], 1)))


def _double(inputs: int, outputs: int) -> nn.Sequential:
    one = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    two = [nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*one, *two)


class Yolo(nn.Module):
    """Blocks of a YOLO: convolution, norm and SiLU; split in two, bottlenecks, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_unit(3, 16, 3, 2), _unit(16, 32, 3, 2))
        self.split, self.join = _unit(32, 32, 1), _unit(64, 32, 1)
        self.inner = nn.ModuleList(nn.Sequential(_unit(16, 16, 3), _unit(16, 16, 3)) for _ in "ab")
        self.pools, self.spp = nn.MaxPool2d(5, 1, 2), _unit(128, 32, 1)
        self.up, self.down = nn.Upsample(scale_factor=2), _unit(32, 32, 3, 2)
        self.head = nn.Sequential(_unit(64, 32, 3), nn.Conv2d(32, 9, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.split(self.stem(x))
        parts = list(x.chunk(2, 1))
        for inner in self.inner:
            parts.append(parts[-1] + inner(parts[-1]))
        x = self.join(torch.cat(parts, 1))
        y = self.down(x)
        pooled = [y]
        for _ in range(3):
            pooled.append(self.pools(pooled[-1]))
        return self.head(torch.cat([self.up(self.spp(torch.cat(pooled, 1))), x], 1))


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=1e-3), nn.SiLU(inplace=True))


class Waves(nn.Module):
    """One-dimensional residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 16, 7, padding=3, bias=False), nn.BatchNorm1d(16))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(16, 16, 3, padding=2**n, dilation=2**n), nn.BatchNorm1d(16), nn.ReLU(),
                nn.Conv1d(16, 16, 3, padding=1, bias=False), nn.BatchNorm1d(16),
            )
            for n in range(3)
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean(2))


def _input_norm() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.Flatten(),
        nn.Linear(32 * 14 * 14, 10),
    )  # fmt: skip


def _embedding() -> nn.Module:
    """A head for faces: norm, dropout, flattening, linear, norm."""
    body = third_party.torchvision().models.resnet18(weights=None)
    body.avgpool, body.fc = nn.Identity(), nn.Identity()
    head = nn.Sequential(
        nn.Unflatten(1, (512, 2, 2)), nn.BatchNorm2d(512), nn.Dropout(0.4), nn.Flatten(),
        nn.Linear(512 * 4, 128), nn.BatchNorm1d(128),
    )  # fmt: skip
    return nn.Sequential(body, head)


def _mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.BatchNorm1d(20)]
    for inputs in (20, 64, 64):
        layers += [nn.Linear(inputs, 64, bias=False), nn.BatchNorm1d(64), nn.GELU()]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.BatchNorm1d(64), nn.Linear(64, 3))


SMALL = (1, 3, 64, 64)
NETWORKS = {
    "ResNet-50": Network(_torchvision("resnet50"), SMALL),
    "RegNetY": Network(_timm("regnety_002"), SMALL),
    "EfficientNet": Network(_timm("tf_efficientnet_b0"), SMALL),
    "MobileNetV3": Network(_timm("mobilenetv3_small_050"), SMALL),
    "DenseNet-121": Network(_torchvision("densenet121"), SMALL),
    "LeViT": Network(_timm("levit_128s"), (1, 3, 224, 224)),
    "U-Net": Network(_unet, SMALL),
    "RepVGG": Network(_timm("repvgg_a0"), SMALL),
    "MobileOne": Network(_timm("mobileone_s0"), SMALL),
    "GhostNet": Network(_timm("ghostnet_050"), SMALL),
    "HRNet": Network(_timm("hrnet_w18_small"), SMALL),
    "input norm": Network(_input_norm, SMALL),
    "embedding head": Network(_embedding, SMALL),
    "MLP": Network(_mlp, (8, 20)),
    "YOLO": Network(Yolo, SMALL),
    "Conformer": Network(_conformer, (1, 1600)),
    "3-D U-Net": Network(_unet3d, (1, 1, 16, 16, 16)),
    "1-D": Network(Waves, (2, 2, 128)),
    "VGG-BN": Network(_torchvision("vgg11_bn"), SMALL),
    "ShuffleNet": Network(_torchvision("shufflenet_v2_x0_5"), SMALL),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode, as after training, and an example input."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.build().eval()
    x = torch.randn(network.shape)
    norms = [m for m in model.modules() if hasattr(m, "running_mean")]
    with torch.no_grad():
        for norm in norms:
            if norm.weight is not None:
                norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
                norm.bias.copy_(torch.randn_like(norm.bias) * 0.2)
        # Running statistics of random inputs, so that activations keep their scale.
        for norm in norms:
            norm.momentum, norm.training = None, True
            norm.reset_running_stats()
        given = [torch.randn(8 if len(network.shape) > 2 else 64, *network.shape[1:]) for _ in "a"]
        for batch in given:
            model(batch)
        for norm in norms:
            norm.momentum, norm.training = 0.1, False
            norm.running_mean += torch.randn_like(norm.running_mean) * norm.running_var.sqrt() * 0.1
            norm.running_var *= torch.rand_like(norm.running_var) * 0.4 + 0.8
    return model, x
