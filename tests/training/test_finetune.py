"""New people are learned, and the others' embeddings stay where they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.test_train import config, learn, lines
from training.data import DataError, Role
from training.export import export
from training.finetune import finetune
from training.prepare import load_prepared
from training.train import load_final
from training.validation import embed

DLIB = Path(__file__).resolve().parents[2] / "models" / "dlib-resnet"


def test_new_people_are_learned_and_others_stay(learnable, tmp_path):
    base = learn(config(tmp_path, steps=30), [learnable], tmp_path / "base", progress=False)
    prepared = load_prepared(learnable)
    others = prepared.where(Role.CLASS)

    def unit(final: Path) -> torch.Tensor:
        return torch.nn.functional.normalize(embed(load_final(final)[0].backbone, prepared, others, 32))

    moved = {}
    for keep in (0.0, 20.0):
        out = tmp_path / f"keep{keep}"
        options = {"template": DLIB, "epochs": 60, "learning_rate": 0.02, "progress": False}
        final = finetune(base, learnable, out, keep=keep, **options)
        told = lines(out)
        assert told[-1]["loss_named"] < told[0]["loss_named"]
        moved[keep] = 1 - float((unit(base) * unit(final)).sum(dim=1).mean())
        with pytest.raises(DataError, match="another configuration"):
            finetune(base, learnable, out, keep=keep, **options | {"epochs": 61, "learning_rate": 0.01})
    assert 0 < moved[20.0] < 0.7 * moved[0.0]


def test_an_exported_model_is_learned_from(learnable, tmp_path):
    base = learn(config(tmp_path, steps=30), [learnable], tmp_path / "base", progress=False)
    export(base, tmp_path / "model", template=DLIB)
    prepared = load_prepared(learnable)
    new = prepared.where(Role.FURTHER)
    for name, start in (("run", base), ("exported", tmp_path / "model")):
        out = tmp_path / name
        final = finetune(start, learnable, out, template=DLIB, epochs=20, learning_rate=0.02, progress=False)
        told = lines(out)
        assert told[-1]["loss_named"] < 0.1 * told[0]["loss_named"]
        network = load_final(final).learner.backbone
        assert torch.isfinite(embed(network, prepared, new, 32)).all()
        assert load_final(final).lessons[0].layout == "celeba"


def test_people_are_needed(learnable, tmp_path):
    base = learn(config(tmp_path, steps=1), [learnable], tmp_path / "base", progress=False)
    other = load_prepared(learnable)
    assert len(other.where(Role.FURTHER))
    with pytest.raises(DataError):
        finetune(base, tmp_path / "nothing", tmp_path / "out", template=DLIB, progress=False)
