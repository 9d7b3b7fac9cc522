"""The losses against pytorch-metric-learning, an independent source."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers

from training.losses import (
    NOBODY,
    ArcFace,
    ArcFaceConfig,
    CrossEntropy,
    CrossEntropyConfig,
    Triplet,
    TripletConfig,
    make_objective,
)

SQUARED = distances.LpDistance(normalize_embeddings=True, p=2, power=2)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(6).repeat_interleave(4)
    # People are somewhat apart, so that hard, semi-hard and easy triplets all occur.
    embeddings = torch.randn(6, 16, generator=generator).repeat_interleave(4, dim=0)
    return embeddings + 1.2 * torch.randn(24, 16, generator=generator), labels


@pytest.mark.parametrize("margin", [0.1, 0.3, 0.7])
def test_arcface_is_that_of_pytorch_metric_learning(batch, margin):
    embeddings, labels = batch
    ours = ArcFace(ArcFaceConfig(kind="arcface", margin=margin, scale=20, warm_up=0), 16, 6)
    with torch.no_grad():
        ours.centres.copy_(torch.randn(6, 16, generator=torch.Generator().manual_seed(1)))
    theirs = losses.ArcFaceLoss(6, 16, margin=math.degrees(margin), scale=20)
    theirs.W = torch.nn.Parameter(ours.centres.detach().T.clone())
    with torch.no_grad():
        assert float(ours(embeddings, labels, 1.0)) == pytest.approx(float(theirs(embeddings, labels)), rel=1e-4)


def test_the_margin_of_arcface_warms_up(batch):
    embeddings, labels = batch
    loss = ArcFace(ArcFaceConfig(kind="arcface", margin=0.5, scale=20, warm_up=0.4), 16, 6)
    softmax = torch.nn.functional.cross_entropy(loss.scores(embeddings), labels)
    at = [float(loss(embeddings, labels, progress)) for progress in (0.0, 0.2, 0.4, 1.0)]
    assert at[0] == pytest.approx(float(softmax), rel=1e-5)
    assert at[0] < at[1] < at[2] == at[3]


@pytest.mark.parametrize(
    "config",
    [
        CrossEntropyConfig(kind="cross-entropy", neck=True),
        ArcFaceConfig(kind="arcface", scale=20, warm_up=0, neck=True),
    ],
)
def test_a_neck_shows_the_classifier_embeddings_around_their_mean(batch, config):
    embeddings, labels = batch
    cone = embeddings + 30
    unit = torch.nn.functional.normalize(cone)
    spread = (unit - unit.mean(dim=0)) / torch.sqrt(unit.var(dim=0, unbiased=False) + 1e-5)
    torch.manual_seed(0)
    with_neck = make_objective(config, 16, 6)
    plain = make_objective(config.model_copy(update={"neck": False}), 16, 6)
    plain.load_state_dict({k: v for k, v in with_neck.state_dict().items() if not k.startswith("neck")})
    assert float(with_neck(cone, labels, 1.0)) == pytest.approx(float(plain(spread, labels, 1.0)), rel=1e-4)
    assert float(with_neck(cone, labels, 1.0)) != pytest.approx(float(plain(cone, labels, 1.0)), rel=1e-2)


def test_batch_hard_triplets_are_those_of_pytorch_metric_learning(batch):
    embeddings, labels = batch
    ours = Triplet(TripletConfig(kind="triplet", margin=0.4, mining="batch-hard"))
    hardest = miners.BatchHardMiner(distance=SQUARED)(embeddings, labels)
    theirs = losses.TripletMarginLoss(margin=0.4, distance=SQUARED, reducer=reducers.MeanReducer())(
        embeddings, labels, hardest
    )
    assert float(ours(embeddings, labels, 0.0)) == pytest.approx(float(theirs), rel=1e-4)


def test_semi_hard_triplets_are_those_of_the_paper(batch):
    embeddings, labels = batch
    unit = torch.nn.functional.normalize(embeddings).double()
    losses_by_pair = []
    for anchor in range(24):
        for partner in range(24):
            if anchor == partner or labels[anchor] != labels[partner]:
                continue
            own = float((unit[anchor] - unit[partner]).square().sum())
            others = [float((unit[anchor] - unit[i]).square().sum()) for i in range(24) if labels[i] != labels[anchor]]
            farther = [distance for distance in others if distance > own]
            losses_by_pair.append(max(0.0, own - (min(farther) if farther else max(others)) + 0.4))
    ours = Triplet(TripletConfig(kind="triplet", margin=0.4, mining="semi-hard"))
    assert float(ours(embeddings, labels, 0.0)) == pytest.approx(sum(losses_by_pair) / len(losses_by_pair), rel=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        CrossEntropyConfig(kind="cross-entropy", smoothing=0.1),
        ArcFaceConfig(kind="arcface"),
        TripletConfig(kind="triplet"),
        TripletConfig(kind="triplet", mining="semi-hard"),
    ],
)
def test_faces_without_a_name_do_not_count(batch, config):
    embeddings, labels = batch
    torch.manual_seed(0)
    objective = make_objective(config, 16, 6)
    more = torch.cat([embeddings, torch.randn(5, 16)])
    unnamed = torch.cat([labels, torch.full((5,), NOBODY)])
    alone = objective(embeddings, labels, 1.0)
    assert float(objective(more, unnamed, 1.0)) == pytest.approx(float(alone), rel=1e-5)
    nobody = objective(embeddings.requires_grad_(), torch.full((24,), NOBODY), 1.0)
    nobody.backward()
    assert float(nobody) == 0
    assert not embeddings.grad.any()


def test_arcface_has_finite_gradients_where_a_face_is_its_centre():
    loss = ArcFace(ArcFaceConfig(kind="arcface", warm_up=0), 4, 2)
    embeddings = loss.centres.detach().clone().requires_grad_()
    loss(torch.cat([embeddings, -embeddings]), torch.tensor([0, 1, 0, 1]), 1.0).backward()
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(loss.centres.grad).all()


def test_cross_entropy_smooths_labels(batch):
    embeddings, labels = batch
    objective = CrossEntropy(CrossEntropyConfig(kind="cross-entropy", smoothing=0.2), 16, 6)
    logs = torch.log_softmax(objective.scores(embeddings), dim=1)
    wanted = torch.full((24, 6), 0.2 / 6).scatter(1, labels[:, None], 1 - 0.2 + 0.2 / 6)
    assert float(objective(embeddings, labels, 0.0)) == pytest.approx(float(-(wanted * logs).sum(dim=1).mean()))
