"""New people for a finished network, without forgetting the others.

ArcFace on the new people pulls their photos together; the network's own earlier embeddings of the same views, as a
teacher, keep everything else where it was (Li & Hoiem 2016, "Learning without forgetting", ECCV, arXiv:1606.09282).
Nothing of the photos of the first training is needed.
"""

from __future__ import annotations

from pathlib import Path

from training.data import DataError, Role
from training.distill import DistillConfig
from training.export import export
from training.losses import ArcFaceConfig
from training.prepare import load_prepared
from training.train import CHECKPOINT, RunConfig, load_network, train

LEARNING_RATE = 0.005
EPOCHS = 30
KEEP = 10.0
"""Weight of the distance to the earlier embeddings, 1 − cosine, beside ArcFace's loss."""

_BATCH = 32


def finetune(
    final: Path,
    crops: Path,
    out: Path,
    *,
    template: Path,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    keep: float = KEEP,
    progress: bool = True,
) -> Path:
    """Fine-tune a network on the people of role ``further`` in a folder of training crops; return final weights.

    ``final``: a run's final weights, or the folder of an exported network. ``out``: folder of the new run, with the
    old network as ``before`` in it. ``template``: as in :func:`training.export.export`. What was begun in ``out``
    goes on. Raises :class:`~training.data.DataError`.
    """
    config = load_network(final).origin.config
    photos = len(load_prepared(crops).where(Role.FURTHER))
    if not photos:
        raise DataError(f"{crops} has no people of role further: prepare them with --layout folders --role further")
    before = out / "before"
    resume = (out / CHECKPOINT).exists()
    if not resume:
        export(final, before, template=template)
    steps = max(1, round(epochs * photos / _BATCH))
    given = RunConfig(
        seed=config.seed,
        people=(Role.FURTHER,),
        size=config.size,
        batch=_BATCH,
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=config.weight_decay,
        # So few photos would spoil the statistics of many.
        frozen_statistics=True,
        measure_every=max(1, steps // 4),
        backbone=config.backbone,
        loss=ArcFaceConfig(kind="arcface", margin=0.3, scale=32.0, warm_up=0.3, neck=True),
        distill=DistillConfig(teacher=before, named_weight=1.0, cosine_weight=keep),
        augment=config.augment,
    )
    return train(given, [crops], out, init=final, resume=resume, progress=progress)
