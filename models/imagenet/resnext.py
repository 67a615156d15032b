"""ResNeXt: the ResNet of resnet.py with ``cardinality`` groups of ``base_width`` channels (Xie et al., 1611.05431)."""

from .resnet import Bottleneck, ResNet


def l_resnext50(*, cardinality: int = 32, base_width: int = 4, **options) -> ResNet:
    """ResNeXt-50, 32x4d by default; the other options are :class:`ResNet`'s keywords."""
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=cardinality, base_width=base_width, **options)


def l_resnext101(*, cardinality: int = 32, base_width: int = 4, **options) -> ResNet:
    """ResNeXt-101, 32x4d by default; the other options are :class:`ResNet`'s keywords."""
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=cardinality, base_width=base_width, **options)


def l_resnext152(*, cardinality: int = 32, base_width: int = 4, **options) -> ResNet:
    """ResNeXt-152, 32x4d by default; the other options are :class:`ResNet`'s keywords."""
    return ResNet(Bottleneck, (3, 8, 36, 3), groups=cardinality, base_width=base_width, **options)
