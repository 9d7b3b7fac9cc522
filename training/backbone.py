"""The embedder's network: torchvision's ResNet class as a ResNeXt, with a stem and a head for small aligned faces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet


class BackboneConfig(BaseModel):
    """Shape of the network.

    ``layers``: bottleneck blocks of the four stages, (3, 4, 6, 3) is ResNeXt-50. ``groups`` × ``group_width``:
    cardinality and width of the first stage's grouped convolutions, 32 × 4 in Xie et al. 2017, "Aggregated residual
    transformations for deep neural networks", CVPR (arXiv:1611.05431). ``stem``: ``imagenet`` is the 7×7 convolution
    with stride 2 and a maximum of 3×3 with stride 2; ``small`` is a 3×3 convolution with stride 1 and that maximum;
    ``dense`` is a 3×3 convolution with stride 2 and no maximum. ``head``: how the last map becomes a vector,
    ``average`` over all places, or ``places``: one weight for each channel and place, since the parts of an aligned
    face keep their places (global depthwise convolution, Chen et al. 2018, "MobileFaceNets", arXiv:1804.07573); it
    ties the network to the size it is trained on. ``dimension``: D of the embedding. ``dropout``: share of the pooled
    features that are left out while training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, int, int, int] = (2, 2, 2, 2)
    groups: Annotated[int, Field(ge=2)] = 32
    group_width: Annotated[int, Field(ge=1)] = 4
    stem: Literal["imagenet", "small", "dense"] = "small"
    head: Literal["average", "places"] = "average"
    dimension: Annotated[int, Field(ge=2)] = 256
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Backbone(nn.Module):
    """Crops to embeddings.

    Takes ``float32[N, 3, S, S]``, RGB, (x − 127.5) / 128, and gives ``float32[N, D]``, not of unit length. ``size``: S,
    in pixels, that the head is made for. ``widths``: channels of what each stage gives.
    """

    def __init__(self, config: BackboneConfig, size: int) -> None:
        super().__init__()
        net = ResNet(Bottleneck, list(config.layers), groups=config.groups, width_per_group=config.group_width)
        if config.stem != "imagenet":
            net.conv1 = nn.Conv2d(3, 64, 3, stride=2 if config.stem == "dense" else 1, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        if config.stem == "dense":
            net.maxpool = nn.Identity()
        # Each block begins as the identity (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        for module in net.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.Sequential(net.layer1, net.layer2, net.layer3, net.layer4)
        with torch.no_grad():
            was_training = self.training
            self.eval()
            maps = self.maps(torch.zeros(1, 3, size, size))
            self.train(was_training)
        self.widths = tuple(int(one.shape[1]) for one in maps)
        side, width = maps[-1].shape[-1], self.widths[-1]
        self.pool = (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            if config.head == "average"
            else nn.Sequential(
                nn.Conv2d(width, width, side, groups=width, bias=False), nn.BatchNorm2d(width), nn.Flatten()
            )
        )
        self.dropout = nn.Dropout(config.dropout)
        # The last normalisation spreads embeddings over all dimensions; its shift would be one direction common to all.
        self.embed = nn.Sequential(nn.Linear(width, config.dimension, bias=False), nn.BatchNorm1d(config.dimension))
        self.dimension = config.dimension

    def forward(self, crops: Tensor) -> Tensor:
        """``float32[N, 3, S, S]`` to ``float32[N, D]``."""
        return self.embeddings(self.maps(crops)[-1])

    def maps(self, crops: Tensor) -> list[Tensor]:
        """What each of the four stages makes of ``float32[N, 3, S, S]``: ``[N, widths[stage], side, side]``."""
        found = [self.stem(crops)]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found[1:]

    def embeddings(self, last: Tensor) -> Tensor:
        """``float32[N, D]`` of the last stage's map."""
        embeddings: Tensor = self.embed(self.dropout(self.pool(last)))
        return embeddings


def unfolded(config: BackboneConfig, size: int, weights: Mapping[str, NDArray[np.float32]]) -> Backbone:
    """A network from its exported weights, among which each normalisation has become part of the layer before it.

    ``weights``: ``NAME.weight`` and ``NAME.weight_bias`` of each layer. What is returned has normalisations with the
    statistics 0 and 1 stored, not those of any photos, and must go on with them. Raises :class:`KeyError` or
    :class:`RuntimeError` if the weights are another network's.
    """
    network = Backbone(config, size)
    state = network.state_dict()
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    normalisations = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    for name, (follower, normalisation) in zip(layers, normalisations, strict=True):
        bias = torch.from_numpy(weights[f"{name}.weight_bias"].copy())
        state[f"{name}.weight"] = torch.from_numpy(weights[f"{name}.weight"].copy())
        state[f"{follower}.weight"] = torch.ones_like(bias)
        state[f"{follower}.bias"] = bias
        state[f"{follower}.running_mean"] = torch.zeros_like(bias)
        state[f"{follower}.running_var"] = torch.full_like(bias, 1 - normalisation.eps)
    network.load_state_dict(state)
    return network


def parameters(network: nn.Module) -> int:
    """How many weights are learned."""
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
