"""Runs of the loop: they learn, end as they would have without interruption, and refuse what cannot work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from service.vision.embedder import Embedder
from training.backbone import Backbone, BackboneConfig, parameters
from training.batches import training_set
from training.data import DataError, Role, Split
from training.distill import DistillConfig, Hint, Hints, Teacher, distance
from training.prepare import load_prepared
from training.report import Tested
from training.train import CHECKPOINT, FINAL, METRICS, load_final, read_config, train
from training.train import test as measure
from training.validation import embedded, score

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.toml"))

TINY = """
people = ["class"]
size = 32
batch = 20
steps = 12
learning_rate = 0.05
measure_every = 6

[backbone]
layers = [1, 1, 1, 1]
groups = 4
group_width = 4
stem = "dense"
dimension = 32

[augment]
mirror = 0.0
shift = 0.05
"""
LOSSES = {
    "ce": '[loss]\nkind = "cross-entropy"\n',
    "arcface": '[loss]\nkind = "arcface"\nmargin = 0.2\nscale = 16\n',
    "triplet": '[loss]\nkind = "triplet"\n',
    "semi-hard": '[loss]\nkind = "triplet"\nmining = "semi-hard"\n',
}


def config(folder: Path, loss: str = "ce", **changes: object) -> Path:
    text = TINY
    if loss in ("triplet", "semi-hard"):
        text = text.replace("batch = 20", "batch = 20\npeople_in_batch = 5")
    for name, value in changes.items():
        lines = [line for line in text.splitlines() if not line.startswith(f"{name} =")]
        text = f"{name} = {value}\n" + "\n".join(lines) + "\n"
    path = folder / f"{loss}{len(list(folder.iterdir()))}.toml"
    path.write_text(text + LOSSES[loss])
    return path


def learn(given: Path, *args: object, **options: object) -> Path:
    return train(read_config(given), *args, **options)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_to_tell_people_apart(learnable, tmp_path, loss):
    run = tmp_path / "run"
    final = learn(config(tmp_path, loss, steps=40, measure_every=20), [learnable], run, progress=False)
    first, last = lines(run)
    assert last["loss_named"] < first["loss_named"]
    assert last["validation"]["centroid_accuracy"] >= 0.5
    assert (last["validation"]["accuracy"] is None) == (loss in ("triplet", "semi-hard"))
    learner, saved, people, _ = load_final(final)
    assert saved.loss.kind in LOSSES[loss]
    assert people == tuple(sorted(f"c{n}" for n in range(10)))
    assert not learner.training
    prepared = load_prepared(learnable)
    scores = getattr(learner.objective, "scores", None)
    found = score(embedded(learner.backbone, prepared, 32, Split.VALIDATION), scores, people)
    assert found.model_dump(mode="json") == last["validation"]
    assert score(embedded(learner.backbone, prepared, 32, Split.TEST), scores, people).photos == 20


def test_the_test_split_is_looked_at_once(learnable, tmp_path):
    run = tmp_path / "run"
    learn(config(tmp_path, steps=2), [learnable], run, progress=False)
    found = measure(run, learnable)
    assert (found.score.split, found.score.photos) == (Split.TEST, 20)
    assert found.analysis.errors == round((1 - found.score.accuracy) * 20)
    assert Tested.model_validate_json((run / "test.json").read_bytes()) == found
    with pytest.raises(DataError, match="once"):
        measure(run, learnable)


def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(learnable, tmp_path):
    given = config(tmp_path, steps=24, measure_every=4)
    whole = load_final(learn(given, [learnable], tmp_path / "whole", progress=False))[0]
    run = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "training.cli",
        "train",
        given,
        "--crops",
        learnable,
        "--out",
        run,
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / FINAL).exists()
    resumed = load_final(learn(given, [learnable], run, resume=True, progress=False))[0]
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert [line["step"] for line in lines(run)] == [4, 8, 12, 16, 20, 24]
    for one, other in zip(lines(tmp_path / "whole"), lines(run), strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_two_processes_learn_as_one_does(learnable, tmp_path):
    """With frozen batch statistics and no random views, the mean of two halves' gradients is the whole's."""
    given = config(tmp_path, steps=10, measure_every=2, frozen_statistics="true", learning_rate=0.02)
    given.write_text(given.read_text().replace("shift = 0.05", "shift = 0.0"))
    learn(given, [learnable], tmp_path / "one", progress=False)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = ["training.cli", "train", given, "--crops", learnable, "--out", tmp_path / "two", "--threads", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*torchrun, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, shared = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in shared] == [2, 4, 6, 8, 10]
    assert shared[-1]["validation"]["tpr"]["0.1"] == pytest.approx(alone[-1]["validation"]["tpr"]["0.1"], abs=0.1)
    # Of the whole batch, not of the half that one of them saw.
    for one, two in zip(alone, shared, strict=True):
        assert two["loss_named"] == pytest.approx(one["loss_named"], abs=2e-5)
    first, second = (load_final(tmp_path / name / FINAL)[0].state_dict() for name in ("one", "two"))
    for name, weight in first.items():
        if weight.is_floating_point():
            assert torch.allclose(weight, second[name], rtol=0.05, atol=5e-3), name


def test_other_weights_can_be_begun_with(learnable, tmp_path):
    base = learn(config(tmp_path, steps=2), [learnable], tmp_path / "base", progress=False)
    run = tmp_path / "run"
    final = learn(config(tmp_path, "arcface", steps=1, learning_rate=1e-9), [learnable], run, init=base, progress=False)
    before, after = load_final(base)[0].backbone, load_final(final)[0].backbone
    assert [(one.layout, one.role, one.teacher) for one in load_final(final).lessons] == [("celeba", "class", None)]
    assert torch.allclose(before.embed[0].weight, after.embed[0].weight, atol=1e-6)
    broad = config(tmp_path, steps=1)
    broad.write_text(broad.read_text().replace("layers = [1, 1, 1, 1]", "layers = [1, 1, 2, 1]"))
    learn(broad, [learnable], tmp_path / "broad", init=base, progress=False)
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        learn(broad, [learnable], tmp_path / "other", init=tmp_path / "empty.pt", progress=False)


def test_distillation_brings_the_learner_to_its_teacher(learnable, tmp_path):
    given = config(tmp_path, people='["class", "unlabelled"]', steps=16, measure_every=8)
    text = given.read_text().replace("dimension = 32", "dimension = 128")
    teacher = (ROOT / "models" / "dlib-resnet").as_posix()
    given.write_text(f'{text}\n[distill]\nteacher = "{teacher}"\nnamed_weight = 0.1\nrelation_weight = 1.0\n')
    final = learn(given, [learnable], tmp_path / "run", progress=False)
    first, last = lines(tmp_path / "run")
    assert last["loss_cosine"] < first["loss_cosine"]
    assert set(last) >= {"loss_named", "loss_cosine", "loss_relation"}
    assert load_final(final)[2] == tuple(sorted(f"c{n}" for n in range(10)))
    plain, heir = config(tmp_path, steps=4, measure_every=2), tmp_path / "heir"
    for options in ({"init": final}, {"resume": True, "steps": 6}):
        path = learn(plain, [learnable], heir, progress=False, **options)
        assert [(one.role, one.teacher) for one in load_final(path).lessons] == [
            ("class", "dlib-resnet"),
            ("unlabelled", "dlib-resnet"),
            ("class", None),
        ]


def test_the_teacher_sees_what_the_learner_sees():
    given = DistillConfig(teacher=ROOT / "models" / "dlib-resnet")
    images = torch.randint(0, 256, (2, 3, 150, 150), generator=torch.Generator().manual_seed(0)).float()
    targets = Teacher.load(given).targets(images).embeddings
    embedder = Embedder.load(given.teacher)
    plain = Embedder(embedder.manifest.model_copy(update={"flip": False}), embedder.network)
    expected = torch.from_numpy(plain.embed(images.permute(0, 2, 3, 1).to(torch.uint8).numpy()))
    assert torch.allclose(targets, expected, atol=1e-5)
    flipping = Teacher.load(given.model_copy(update={"flip": True}))
    both, mirrored = flipping.targets(images).embeddings, flipping.targets(images.flip(3)).embeddings
    assert torch.allclose(both, mirrored, atol=1e-5)
    assert all(float(part) == pytest.approx(0, abs=1e-6) for part in distance(targets * 3, targets, given).values())


def test_a_learner_told_of_the_teachers_maps_learns_to_tell_them(learnable, tmp_path):
    given = config(tmp_path, people='["class", "unlabelled"]', steps=16, measure_every=8)
    text = given.read_text().replace("dimension = 32", "dimension = 128")
    teacher = (ROOT / "models" / "dlib-resnet").as_posix()
    hints = '[{ stage = 2, map = "relu_56" }, { stage = 3, map = "relu_74" }]'
    given.write_text(f'{text}\n[distill]\nteacher = "{teacher}"\nhint_weight = 1.0\nhints = {hints}\n')
    final = learn(given, [learnable], tmp_path / "run", progress=False)
    first, last = lines(tmp_path / "run")
    assert last["loss_hint_2"] < first["loss_hint_2"]
    assert last["loss_hint_3"] < first["loss_hint_3"]
    load_final(final)
    given.write_text(given.read_text().replace("relu_74", "relu_1000"))
    with pytest.raises(DataError, match="no map 'relu_1000'"):
        learn(given, [learnable], tmp_path / "other", progress=False)


def test_hints_are_the_share_of_the_teachers_map_that_cannot_be_told():
    generator = torch.Generator().manual_seed(0)
    own, theirs = torch.randn(8, 6, 4, 4, generator=generator), torch.randn(8, 3, 4, 4, generator=generator)
    hints = Hints(DistillConfig(hints=(Hint(stage=1, map="x"),), hint_weight=2.0), (5, 6, 7, 8), (3,))
    (read,) = hints.read
    torch.nn.init.zeros_(read.weight)
    torch.nn.init.zeros_(read.bias)
    theirs -= theirs.mean(dim=0)
    (part,) = hints([own, own], (theirs,)).values()
    assert part.item() == pytest.approx(2.0, rel=1e-5)
    read.weight.data[:, :3, 0, 0] = torch.eye(3)
    (part,) = hints([own, own], (own[:, :3],)).values()
    assert part.item() == pytest.approx(0.0, abs=1e-6)


def test_sizes_change_while_a_run_goes_on(learnable, tmp_path):
    given = config(tmp_path, sizes="[[0.0, 32], [0.5, 48]]", size=48, measure_every=6)
    learn(given, [learnable], tmp_path / "run", progress=False)
    assert [line["size"] for line in lines(tmp_path / "run")] == [32, 48]


def test_a_run_is_neither_overwritten_nor_mixed_with_another(learnable, tmp_path):
    given, run = config(tmp_path, steps=2), tmp_path / "run"
    with pytest.raises(DataError, match="no checkpoint"):
        learn(given, [learnable], run, resume=True, progress=False)
    learn(given, [learnable], run, progress=False)
    with pytest.raises(DataError, match="holds a run"):
        learn(given, [learnable], run, progress=False)
    with pytest.raises(DataError, match="another configuration"):
        learn(config(tmp_path, steps=2, seed=9), [learnable], run, resume=True, progress=False)
    learn(given, [learnable], run, resume=True, steps=4, progress=False)
    assert lines(run)[-1]["step"] == 4


def test_a_run_that_diverges_says_so(learnable, tmp_path):
    given = config(tmp_path, "arcface", steps=50, learning_rate=1e30, clip=1e30)
    with pytest.raises(DataError, match="lower the learning rate"):
        learn(given, [learnable], tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("changes", "loss", "message"),
    [
        ({"people_in_batch": 7}, "ce", "multiple"),
        ({"people": '["class", "unlabelled"]'}, "ce", "without a name"),
        ({"people": '["query"]'}, "ce", "nothing is learned from"),
        ({"sizes": "[[0.2, 32]]"}, "ce", "begin at 0"),
        ({"sizes": "[[0.0, 64]]"}, "ce", "end with size"),
        ({"people_in_batch": 0}, "triplet", "people_in_batch"),
        ({"colour": 1}, "ce", "colour"),
        ({"batch": "'many'"}, "ce", "batch"),
    ],
)
def test_wrong_configurations_are_refused(learnable, tmp_path, changes, loss, message):
    with pytest.raises(DataError, match=message):
        learn(config(tmp_path, loss, **changes), [learnable], tmp_path / "run", progress=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configurations_can_be_read_and_built(path):
    read = read_config(path)
    network = Backbone(read.backbone, read.size)
    assert parameters(network) > 1_000_000
    assert read.learning_rate_at(0) < read.learning_rate
    assert read.learning_rate_at(read.steps - 1) < 0.01 * read.learning_rate
    assert f"`{path.stem}`" in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("stem", ["imagenet", "small", "dense"])
@pytest.mark.parametrize("head", ["average", "places"])
def test_the_network_is_a_resnext(stem, head):
    network = Backbone(BackboneConfig(layers=(1, 1, 1, 1), groups=4, group_width=4, stem=stem, head=head), 48).eval()
    with torch.no_grad():
        assert network(torch.zeros(3, 3, 48, 48)).shape == (3, 256)
    grouped = [m for m in network.stages.modules() if isinstance(m, torch.nn.Conv2d) and m.groups == 4]
    assert len(grouped) == 4


def test_tensorboard_gets_the_measurements(learnable, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn(config(tmp_path), [learnable], tmp_path / "run", tensorboard=tmp_path / "board", progress=False)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss_named")] == [6, 12]
    assert {"learning_rate", "validation_accuracy", "tpr_0.01"} <= set(events.Tags()["scalars"])


def test_a_training_set_without_its_folder_is_told(tmp_path):
    with pytest.raises(DataError):
        training_set([load_prepared(tmp_path)], [Role.CLASS])
