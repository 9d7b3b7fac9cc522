"""Views of training crops: where they look, what they change, and that they can be had again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from service.vision.alignment import align
from service.vision.detector import FaceDetector
from training.augment import AugmentConfig, resized, views
from training.prepare import TRAINING_SIZE, TRAINING_VIEW, Target

MODELS = Path(__file__).resolve().parents[2] / "models"

EVERYTHING = AugmentConfig(
    turn=15, shift=0.1, scale=0.2, brightness=0.2, contrast=0.3, saturation=0.3, grey=0.5,
    coarse=0.5, blur=0.5, noise=0.5, dark=0.5, jpeg=0.5, occlusion=0.5,
)  # fmt: skip


def crops(count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randint(0, 256, (count, 3, 12, 12), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, size=TRAINING_SIZE, mode="bicubic").clamp(0, 255)
    return smooth.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def test_a_plain_view_is_the_embedders_crop(portraits):
    """The way through the training crop shows the same as the crop that the service cuts."""
    image = portraits["obama"][0]
    landmarks = FaceDetector.load(MODELS / "centerface").detect(image)[0].landmarks
    direct, training = Target.of(MODELS / "dlib-resnet"), Target.for_training(MODELS / "dlib-resnet")
    wide = align(image, landmarks, training.points, training.size)
    seen = views(torch.from_numpy(wide[None]), TRAINING_VIEW)[0].permute(1, 2, 0).numpy()
    cut = align(image, landmarks, (direct.points + 0.5) * TRAINING_VIEW / direct.size - 0.5, TRAINING_VIEW)
    assert np.abs(seen - cut).mean() < 1.5


def test_views_without_changes_keep_a_crops_middle():
    margin = (TRAINING_SIZE - TRAINING_VIEW) // 2
    middle = crops()[:, margin:-margin, margin:-margin].permute(0, 3, 1, 2).float()
    assert torch.allclose(views(crops(), TRAINING_VIEW), middle, atol=0.01)
    still = views(crops(), TRAINING_VIEW, AugmentConfig(mirror=0), torch.Generator().manual_seed(0))
    assert torch.allclose(still, middle, atol=0.01)
    mirrored = views(crops(), TRAINING_VIEW, AugmentConfig(mirror=1), torch.Generator().manual_seed(0))
    assert torch.allclose(mirrored, middle.flip(3), atol=0.01)


def test_views_can_be_had_again_and_differ_between_seeds():
    first, again, other = (views(crops(), 80, EVERYTHING, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "name", ["turn", "shift", "scale", "brightness", "contrast", "saturation", "grey", "coarse", "blur", "noise",
             "dark", "jpeg", "occlusion", "tight"],
)  # fmt: skip
def test_each_change_changes_and_stays_in_range(name):
    amount = {"turn": 15, "shift": 0.1, "scale": 0.2}.get(name, 1.0)
    config = AugmentConfig.model_validate({"mirror": 0, name: amount})
    changed = views(crops(), 80, config, torch.Generator().manual_seed(0))
    plain = views(crops(), 80)
    assert (changed - plain).abs().mean() > 0.5
    assert changed.min() >= 0
    assert changed.max() <= 255
    assert changed.is_contiguous(memory_format=torch.channels_last)


def test_a_tight_view_repeats_its_edge_pixels_and_keeps_its_middle():
    columns = torch.arange(TRAINING_SIZE, dtype=torch.uint8).view(1, 1, -1, 1).expand(8, TRAINING_SIZE, -1, 3)
    plain = views(columns, TRAINING_VIEW, AugmentConfig(mirror=0))
    tight = views(columns, TRAINING_VIEW, AugmentConfig(mirror=0, tight=1), torch.Generator().manual_seed(0))
    edge = round(TRAINING_VIEW * 0.15)
    assert torch.allclose(tight[..., edge:-edge], plain[..., edge:-edge], atol=1e-3)
    assert tight.amin(dim=(1, 2, 3)).gt(plain.amin()).sum() >= 6
    assert tight.amax(dim=(1, 2, 3)).lt(plain.amax()).sum() >= 6


def test_crops_are_not_changed():
    before = crops()
    given = before.clone()
    views(given, 64, EVERYTHING, torch.Generator().manual_seed(0))
    assert torch.equal(given, before)


def test_other_crops_are_refused():
    with pytest.raises(ValueError, match="crops must be"):
        views(torch.zeros(1, 112, 112, 3, dtype=torch.uint8), 80)


def test_resizing_averages():
    board = (torch.arange(96)[:, None] + torch.arange(96)) % 2 * 255.0
    assert (resized(board.expand(1, 3, 96, 96), 48) - 127.5).abs().max() < 5
