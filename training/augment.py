"""Views of training crops as tensors, plain or changed as cameras and people change a face, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Final, TypeAlias

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from training.prepare import TRAINING_SIZE, TRAINING_VIEW

Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Amount: TypeAlias = Annotated[float, Field(ge=0)]

MEAN: Final = 127.5
DIVISOR: Final = 128.0
"""A network sees (x − MEAN) / DIVISOR of x in 0…255."""

TIGHT: Final = 0.15
"""Largest share of the side that a photo cut too close lacks at an edge."""

GREY: Final = (0.299, 0.587, 0.114)
"""Luma of ITU-R BT.601."""


class AugmentConfig(BaseModel):
    """How far a view may differ from its crop. All zero: not at all.

    ``mirror``: the share of views that are mirrored. ``turn``: degrees either way. ``shift``: of the view's side.
    ``scale``: 0.1 is from 1/1.1 to 1.1. ``brightness``: of 255; ``contrast``, ``saturation``: 0.2 is 0.8 to 1.2.
    The others are shares of the views: ``grey`` without colour; ``coarse`` seen with 20 to 60 px; ``blur`` with a
    Gaussian of 0.5 to 2.5 % of the side; ``noise`` of 4 to 25 grey levels; ``dark``, a fifth to three quarters of the
    light; ``jpeg`` of quality 15 to 70; ``occlusion``, a rectangle of 10 to 50 % of the side each way; ``tight``, as of
    a photo cut close to the face: up to 15 % of the side at each edge repeats what lies inside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mirror: Share = 0.5
    turn: Amount = 0.0
    shift: Amount = 0.0
    scale: Amount = 0.0
    brightness: Amount = 0.0
    contrast: Amount = 0.0
    saturation: Amount = 0.0
    grey: Share = 0.0
    coarse: Share = 0.0
    blur: Share = 0.0
    noise: Share = 0.0
    dark: Share = 0.0
    jpeg: Share = 0.0
    occlusion: Share = 0.0
    tight: Share = 0.0


def views(
    crops: Tensor, size: int, config: AugmentConfig | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """What a network is shown of training crops.

    ``crops``: ``uint8[N, T, T, 3]``, RGB, T = :data:`~training.prepare.TRAINING_SIZE`. Returns
    ``float32[N, 3, size, size]`` in channels_last order, 0…255. Without ``config`` it is the middle of each crop, which
    is what the service cuts. The same ``generator`` state gives the same views.
    """
    if crops.ndim != 4 or crops.shape[1:] != (TRAINING_SIZE, TRAINING_SIZE, 3) or crops.dtype != torch.uint8:
        raise ValueError(f"crops must be uint8[N, {TRAINING_SIZE}, {TRAINING_SIZE}, 3], not {list(crops.shape)}")
    images = crops.permute(0, 3, 1, 2).float()
    placed = _placed(images, size, config, generator)
    if config is not None:
        placed = _changed(placed, config, generator)
    return placed.contiguous(memory_format=torch.channels_last)


def resized(images: Tensor, size: int) -> Tensor:
    """Views ``float32[N, 3, S, S]`` at another size, averaged where they shrink."""
    if images.shape[-1] == size:
        return images
    shrunk = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return shrunk.contiguous(memory_format=torch.channels_last)


def normalised(images: Tensor) -> Tensor:
    """0…255 to what :class:`~training.backbone.Backbone` takes."""
    return (images - MEAN) / DIVISOR


def _placed(images: Tensor, size: int, config: AugmentConfig | None, generator: torch.Generator | None) -> Tensor:
    count = len(images)
    middle = TRAINING_VIEW / TRAINING_SIZE
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = middle
    if config is not None:
        angle = _between(count, -config.turn, config.turn, generator) * math.pi / 180
        factor = torch.exp(_between(count, -1, 1, generator) * math.log1p(config.scale)) * middle
        side = 1 - 2 * (torch.rand(count, generator=generator) < config.mirror).float()
        transform[:, 0, 0] = factor * angle.cos() * side
        transform[:, 0, 1] = -factor * angle.sin()
        transform[:, 1, 0] = factor * angle.sin() * side
        transform[:, 1, 1] = factor * angle.cos()
        transform[:, :, 2] = 2 * middle * _between(count * 2, -config.shift, config.shift, generator).view(count, 2)
    grid = F.affine_grid(transform, [count, 3, size, size], align_corners=False)
    if config is not None and config.tight:
        # Upright in the photo, whatever the view's turn: the grid's coordinates are the photo's.
        cut = torch.rand(count, generator=generator) < config.tight
        low, high = (middle * (1 - 2 * _between(count * 2, 0, TIGHT, generator)) for _ in range(2))
        edge = torch.where(cut.repeat_interleave(2), torch.stack([low, high]), math.inf).view(2, count, 1, 1, 2)
        grid = grid.clamp(min=-edge[0], max=edge[1])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _changed(images: Tensor, config: AugmentConfig, generator: torch.Generator | None) -> Tensor:
    count, size = len(images), images.shape[-1]

    def some(share: float, change: Callable[[Tensor], Tensor]) -> None:
        chosen = torch.nonzero(torch.rand(count, generator=generator) < share)[:, 0]
        if len(chosen):
            images[chosen] = change(images[chosen])

    def number(low: float, high: float) -> float:
        return float(_between(1, low, high, generator))

    some(config.occlusion, lambda part: _occluded(part, generator))
    if config.saturation or config.contrast or config.brightness:
        luma = _luma(images)
        saturation = 1 + _between(count, -config.saturation, config.saturation, generator).view(-1, 1, 1, 1)
        contrast = 1 + _between(count, -config.contrast, config.contrast, generator).view(-1, 1, 1, 1)
        brightness = 255 * _between(count, -config.brightness, config.brightness, generator).view(-1, 1, 1, 1)
        middle = luma.mean(dim=(2, 3), keepdim=True)
        images = (luma + (images - luma) * saturation - middle) * contrast + middle + brightness
    some(config.grey, lambda part: _luma(part).expand_as(part))
    some(config.dark, lambda part: part * _between(len(part), 0.2, 0.75, generator).view(-1, 1, 1, 1))
    some(config.blur, lambda part: _blurred(part, number(0.005, 0.025) * size))
    # One size, and one width of the blur, for the part of a batch that gets it: the batches are many.
    some(config.coarse, lambda part: _coarse(part, round(number(20, 60))))
    some(
        config.noise,
        lambda part: (
            part
            + torch.randn(part.shape, generator=generator) * _between(len(part), 4, 25, generator).view(-1, 1, 1, 1)
        ),
    )
    images = images.clamp(0, 255)
    some(config.jpeg, lambda part: _compressed(part, _between(len(part), 15, 70, generator)))
    return images


def _between(count: int, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def _luma(images: Tensor) -> Tensor:
    return (images * torch.tensor(GREY).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def _coarse(images: Tensor, pixels: int) -> Tensor:
    size = images.shape[-1]
    if pixels >= size:
        return images
    small = F.interpolate(images, size=(pixels, pixels), mode="bilinear", align_corners=False, antialias=True)
    return F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    reach = max(1, math.ceil(2.5 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / max(sigma, 1e-3)) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    rows = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="replicate"), kernel[:, :, None, :], groups=3)
    return F.conv2d(F.pad(rows, (0, 0, reach, reach), mode="replicate"), kernel[:, :, :, None], groups=3)


def _occluded(images: Tensor, generator: torch.Generator | None) -> Tensor:
    size = images.shape[-1]
    count = len(images)
    width = _between(count, 0.1, 0.5, generator) * size
    height = _between(count, 0.1, 0.5, generator) * size
    left = torch.rand(count, generator=generator) * (size - width)
    top = torch.rand(count, generator=generator) * (size - height)
    place = torch.arange(size).view(1, -1)
    across = (place >= left.view(-1, 1)) & (place < (left + width).view(-1, 1))
    down = (place >= top.view(-1, 1)) & (place < (top + height).view(-1, 1))
    hidden = down[:, None, :, None] & across[:, None, None, :]
    colour = torch.rand(count, 3, 1, 1, generator=generator) * 255
    return torch.where(hidden, colour, images)


def _compressed(images: Tensor, quality: Tensor) -> Tensor:
    pixels = images.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    out = np.empty(pixels.shape, dtype=np.uint8)
    for place, (image, level) in enumerate(zip(pixels, quality.tolist(), strict=True)):
        _, coded = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, int(level)])
        out[place] = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))[..., ::-1]
    return torch.from_numpy(out).permute(0, 3, 1, 2).float()
