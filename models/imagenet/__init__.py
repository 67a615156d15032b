"""The l_* networks for ImageNet: one ResNet, which is ResNeXt by its groups and width."""
