"""ResNet with excited convolutions and GroupNorm(32); with groups and a base width, the same class is ResNeXt.

He et al., arXiv 1512.03385, with the stride in the bottleneck's 3x3 convolution; Xie et al., arXiv 1611.05431. Names of
parameters are torchvision's, norms included, so published GN+WS checkpoints load and folded weights go back.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..layers import excite, group_norm

conv = partial(nn.Conv2d, bias=False)
Norm = Callable[[int], nn.Module]  # from a number of channels


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        groups: int = 1,
        base_width: int = 64,
        norm_layer: Norm = group_norm,
    ):
        super().__init__()
        if (groups, base_width) != (1, 64):
            raise ValueError("a basic block has one group of width 64")
        self.conv1 = conv(in_channels, channels, 3, stride, padding=1)
        self.bn1 = norm_layer(channels)
        self.conv2 = conv(channels, channels, 3, padding=1)
        self.bn2 = norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample(in_channels, channels, stride, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1 to the inner width, 3x3 in groups, 1x1 to four times the channels, and a shortcut."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        groups: int = 1,
        base_width: int = 64,
        norm_layer: Norm = group_norm,
    ):
        super().__init__()
        width = int(channels * base_width / 64) * groups
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = norm_layer(width)
        self.conv2 = conv(width, width, 3, stride, padding=1, groups=groups)
        self.bn2 = norm_layer(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample(in_channels, out_channels, stride, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def downsample(in_channels: int, out_channels: int, stride: int, norm_layer: Norm) -> nn.Sequential | None:
    """The shortcut's projection, where the block changes the shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), norm_layer(out_channels))


def use_small_stem(model: nn.Module) -> None:
    """Give a ResNet the stem for images of 28 to 64 pixels: 3x3, stride 1, no pooling (arXiv 1512.03385, on CIFAR)."""
    model.conv1 = conv(3, 64, 3, padding=1)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def begin_as_shortcuts(model: nn.Module) -> None:
    """Let each residual block of a ResNet begin as its shortcut: the scale of its last norm is 0 (arXiv 1706.02677)."""
    for module in model.modules():
        if hasattr(module, "downsample"):
            last = module.bn3 if hasattr(module, "bn3") else module.bn2
            nn.init.zeros_(last.weight)


class ResNet(nn.Module):
    """ResNet or ResNeXt.

    Input (N, 3, H, W), output logits (N, num_classes).

    Args:
        block: BasicBlock (which has one group, of width 64) or Bottleneck.
        depths: blocks in each of the four stages.
        groups, base_width: ResNeXt's cardinality, and the width of a group in the first stage.
        small_stem: whether it begins with :func:`use_small_stem`'s layers.
        zero_init_residual: whether it begins by :func:`begin_as_shortcuts`.
        num_classes: of the classifier.
        drop: probability of dropout before the classifier.
        norm_layer: makes a norm of so many channels.
        **excitation: ``excitation``, ``formulation`` and ``standardize`` of :func:`models.layers.excite`.

    Raises:
        ValueError: 32 doesn't divide a layer's channels, or an unknown excitation or formulation.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        groups: int = 1,
        base_width: int = 64,
        small_stem: bool = False,
        zero_init_residual: bool = False,
        num_classes: int = 1000,
        drop: float = 0.0,
        norm_layer: Norm = group_norm,
        **excitation,
    ):
        super().__init__()
        self.conv1 = conv(3, 64, 7, stride=2, padding=3)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        if small_stem:
            use_small_stem(self)
        in_channels = 64
        for stage, depth in enumerate(depths):
            channels = 64 * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(in_channels, channels, stride, groups, base_width, norm_layer))
                in_channels = channels * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(drop)
        self.fc = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            begin_as_shortcuts(self)
        # Last, so that networks of one seed begin with the same weights, whatever gates they have. A norm follows each.
        excite(self, select=lambda name, conv: True, **excitation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(self.dropout(x))


def l_resnet18(**options) -> ResNet:
    """ResNet-18; the options are :class:`ResNet`'s keywords."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def l_resnet34(**options) -> ResNet:
    """ResNet-34; the options are :class:`ResNet`'s keywords."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def l_resnet50(**options) -> ResNet:
    """ResNet-50; the options are :class:`ResNet`'s keywords."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def l_resnet101(**options) -> ResNet:
    """ResNet-101; the options are :class:`ResNet`'s keywords."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def l_resnet152(**options) -> ResNet:
    """ResNet-152; the options are :class:`ResNet`'s keywords."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)
