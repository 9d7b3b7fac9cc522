"""The ``vultus-train`` command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from service.errors import FprUnsupported
from service.evaluation import FPRS as IDENTIFICATION_FPRS
from service.evaluation import STRANGERS, Plan
from service.evaluation import table as identification_table
from service.vision.manifest import MANIFEST_NAME, ModelError
from training.calibrate import Origin
from training.calibrate import calibrate as calibrate_model
from training.convert import ConversionError, convert_centerface, convert_dlib
from training.data import DataError, Layout, Role, celeba_photos, folder_photos, unlabelled_photos
from training.evaluate import EvaluationSet, asked_table, draw, read_figures, table, update_document, write_figures
from training.evaluate import evaluate as evaluate_model
from training.guards import guards as measure_guards
from training.identification import identification as count_identification
from training.metrics import RESAMPLES
from training.open_set import REPEATS, write_trial
from training.open_set import draw as draw_trial
from training.open_set import name_of as trial_name
from training.open_set import open_set as open_set_trial
from training.open_set import table as trial_table
from training.prepare import Alignment, Counts, Target
from training.prepare import prepare as prepare_crops
from training.quantise import quantise as quantise_model

app = typer.Typer(no_args_is_help=True, help="Convert, prepare, calibrate and evaluate models. See docs/training.md.")
convert = typer.Typer(no_args_is_help=True, help="Rewrite other people's weights as models that the service loads.")
app.add_typer(convert, name="convert")

_MODELS = Path("models")

Source = Annotated[Path | None, typer.Option(help="The weights file; without it, it is fetched.")]
Model = Annotated[Path, typer.Option(help="Folder of the embedder.")]
Crops = Annotated[Path, typer.Option(help="Folder that `prepare` has filled for this embedder.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Cores to use. Default: all.")]


@convert.command("centerface")
def centerface(
    source: Source = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = _MODELS / "centerface",
) -> None:
    """The CenterFace detector (MIT)."""
    with _explained():
        manifest = convert_centerface(source, out)
    typer.echo(f"{out}: {manifest.model_id}, {manifest.license.spdx}")


@convert.command("dlib")
def dlib(
    source: Source = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = _MODELS / "dlib-resnet",
) -> None:
    """dlib's face network (public domain)."""
    with _explained():
        manifest = convert_dlib(source, out)
    typer.echo(f"{out}: {manifest.model_id}, {manifest.license.spdx}")


@app.command()
def prepare(
    data: Annotated[Path, typer.Option(help="The data-set folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the crops. Photos of people go there: keep it private.")],
    layout: Annotated[
        Layout,
        typer.Option(
            help="celeba: CelebA-500 and celebA_ir; folders: one folder for each person; utkface: photos without names."
        ),
    ] = Layout.CELEBA,
    role: Annotated[
        list[Role] | None,
        typer.Option(help="celeba: only people of this role, repeatable, default all. folders: the role of all."),
    ] = None,
    model: Model = _MODELS / "dlib-resnet",
    training: Annotated[
        bool, typer.Option("--training", help="Crops to train on: the model's, smaller and with room around them.")
    ] = False,
    detector: Annotated[Path, typer.Option(help="Folder of the detector.")] = _MODELS / "centerface",
    alignment: Annotated[Alignment, typer.Option(help="The service uses eye-line.")] = Alignment.EYE_LINE,
    like_queries: Annotated[
        bool, typer.Option("--like-queries", help="Cut 178×218 photos as tight as celebA_ir's first.")
    ] = False,
    like_service: Annotated[
        bool, typer.Option("--like-service", help="Take the same faces as the service, for evaluate --identification.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Photos at a time, one core each. Default: all cores.")
    ] = None,
) -> None:
    """Find the faces of a data set and cut the crops of one embedder. Can be interrupted and repeated."""
    with _explained():
        if layout is Layout.CELEBA:
            photos = celeba_photos(data, role or tuple(Role))
        elif layout is Layout.UTKFACE:
            photos = [photo for photo in unlabelled_photos(data) if not role or photo.role in role]
        else:
            if role is None or len(role) != 1:
                raise DataError("say with one --role what these people are for, such as --role calibration")
            photos = folder_photos(data, role[0])
        summary = prepare_crops(
            photos,
            data,
            out,
            layout=layout,
            target=Target.for_training(model) if training else Target.of(model),
            detector=detector,
            alignment=alignment,
            like_queries=like_queries,
            like_service=like_service,
            jobs=jobs or _cores(),
        )
    for name, counts in summary.acquired.items():
        typer.echo(f"{name}: {_told(counts)}")


@app.command()
def calibrate(
    crops: Annotated[
        list[Path], typer.Option(help="Folder that `prepare` has filled; repeat it for other looks of the same people.")
    ],
    model: Model = _MODELS / "dlib-resnet",
    source: Annotated[str | None, typer.Option(help="What the photos are; needed unless they are CelebA's.")] = None,
    terms: Annotated[str | None, typer.Option(help="What terms apply to them; needed with --source.")] = None,
    threads: Threads = None,
) -> None:
    """Write calibration.json for an embedder, from the people of role calibration."""
    with _explained():
        if (source is None) != (terms is None):
            raise DataError("--source and --terms go together")
        origin = Origin(source, terms) if source is not None and terms is not None else None
        path = calibrate_model(model, crops, origin=origin, threads=threads or _cores())
    typer.echo(f"{path} written")


@app.command()
def evaluate(
    crops: Crops,
    model: Model = _MODELS / "dlib-resnet",
    role: Annotated[
        EvaluationSet, typer.Option(help="celebA_ir reports a final model; validation compares choices.")
    ] = EvaluationSet.CELEBA_IR,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the figures as JSON and the curves of all figures in it as PNG.")
    ] = None,
    document: Annotated[
        Path | None, typer.Option(help="Markdown file whose table is written anew from --out; see docs/training.md.")
    ] = None,
    flip: Annotated[
        bool | None, typer.Option("--flip/--no-flip", help="Overrule the manifest, on validation only.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=0, help="Draws of people for the intervals.")] = RESAMPLES,
    identification: Annotated[
        bool,
        typer.Option(
            "--identification", help="Count as `vultus evaluate` does, on crops prepared with --like-service."
        ),
    ] = False,
    fpr: Annotated[list[float] | None, typer.Option(help="With --identification: a rate; repeatable.")] = None,
    enrol: Annotated[int, typer.Option(min=1, help="With --identification: photos of each person to enrol.")] = 1,
    strangers: Annotated[str, typer.Option(help="With --identification: the strangers' folder.")] = STRANGERS,
    json: Annotated[Path | None, typer.Option(help="With --identification: file for every figure.")] = None,
    threads: Threads = None,
) -> None:
    """True-positive rates of an embedder at false-positive rates from 0.5 to 0.001."""
    if identification:
        with _explained():
            plan = Plan(tuple(dict.fromkeys(fpr or IDENTIFICATION_FPRS)), enrol, resamples=resamples)
            counted = count_identification(model, crops, plan, strangers=strangers, threads=threads or _cores())
            if json is not None:
                json.write_text(dumps(asdict(counted), indent=2) + "\n", encoding="utf-8")
        typer.echo(identification_table(counted))
        return
    with _explained():
        if document is not None and out is None:
            raise DataError("--document needs --out, from which it is written")
        figures = evaluate_model(model, crops, role, flip=flip, resamples=resamples, threads=threads or _cores())
        if out is not None:
            write_figures(figures, out)
            everything = read_figures(out, role)
            draw(everything, out / f"{role}.png")
            if document is not None:
                update_document(document, role, table(everything))
    typer.echo(table([figures]))
    if figures.asked:
        typer.echo(f"\n{asked_table(figures)}")


@app.command("open-set")
def open_set(
    crops: Annotated[list[Path], typer.Option(help="Folder that `prepare` has filled; repeatable.")],
    model: Model = _MODELS / "dlib-resnet",
    role: Annotated[
        EvaluationSet, typer.Option(help="celebA_ir reports a final version; validation compares choices.")
    ] = EvaluationSet.CELEBA_IR,
    fillers: Annotated[
        Path | None, typer.Option(help="Folder with validation and class people, prepared with --like-queries.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures as JSON and the picture.")] = None,
    document: Annotated[
        Path | None, typer.Option(help="Markdown file whose table is written anew; see docs/training.md.")
    ] = None,
    degrade: Annotated[
        bool, typer.Option("--degrade", help="Give every photo the look of a cheap camera first; see docs/accuracy.md.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Random choices of the photos that are enrolled.")] = REPEATS,
    threads: Threads = None,
) -> None:
    """False-positive and false-negative identification rates at asked rates, as the gallery grows."""
    with _explained():
        trial = open_set_trial(
            model, crops, role, fillers=fillers, degrade=degrade, repeats=repeats, threads=threads or _cores()
        )
        if out is not None:
            write_trial(trial, out)
            draw_trial(trial, out / f"{trial_name(trial)}.open-set.png")
        if document is not None:
            update_document(document, f"{trial_name(trial)}.open-set", trial_table(trial))
    typer.echo(trial_table(trial))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file; those of the reported runs are in training/configs.")],
    crops: Annotated[
        list[Path], typer.Option(help="Folder that `prepare --training` has filled; repeat it for further data sets.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run: its metrics, checkpoint and final weights.")],
    init: Annotated[
        Path | None, typer.Option(help="Final weights, or folder of an exported model, to begin with.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="In place of the configuration's.")] = None,
    seed: Annotated[int | None, typer.Option(help="In place of the configuration's.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard logs.")] = None,
    threads: Threads = None,
) -> None:
    """Train an embedder. Can be killed and resumed; under `torchrun` the processes share each batch."""
    import torch

    from training.train import read_config
    from training.train import train as train_embedder

    with _explained():
        torch.set_num_threads(threads or _cores())
        final = train_embedder(
            read_config(config), crops, out, init=init, resume=resume, steps=steps, seed=seed, tensorboard=tensorboard
        )
    typer.echo(f"{final} written")


@app.command()
def finetune(
    base: Annotated[Path, typer.Option("--from", help="Folder of an exported model, or a run's final.pt.")],
    data: Annotated[Path, typer.Option(help="Folder with a folder of photos for each new person.")],
    out: Annotated[Path, typer.Option(help="Folder of the new run. Crops of people go there: keep it private.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of the embedder for whose template the network was trained.")
    ] = None,
    detector: Annotated[Path, typer.Option(help="Folder of the detector.")] = _MODELS / "centerface",
    epochs: Annotated[int, typer.Option(min=1, help="How often each photo is learned from.")] = 30,
    threads: Threads = None,
) -> None:
    """Improve a network on new people without forgetting the others. Can be repeated to go on."""
    import torch

    from training.finetune import finetune as finetune_embedder

    with _explained():
        torch.set_num_threads(threads or _cores())
        template = model or (base if base.is_dir() else _MODELS / "dlib-resnet")
        prepare_crops(
            folder_photos(data, Role.FURTHER),
            data,
            out / "crops",
            layout=Layout.FOLDERS,
            target=Target.for_training(template),
            detector=detector,
            jobs=threads or _cores(),
        )
        final = finetune_embedder(base, out / "crops", out, template=template, epochs=epochs)
    typer.echo(f"{final} written")


@app.command()
def test(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a finished run, for which test.json is written, or of an exported model."),
    ],
    crops: Annotated[Path, typer.Option(help="Training crops with the class people.")],
    threads: Threads = None,
) -> None:
    """Accuracy on the official test split: once for each run, when nothing is left to be chosen."""
    import torch

    from training.train import test as test_run
    from training.train import test_exported

    with _explained():
        torch.set_num_threads(threads or _cores())
        found = test_exported(run, crops) if (run / MANIFEST_NAME).exists() else test_run(run, crops).score
    accuracy = "no classifier" if found.accuracy is None else f"{found.accuracy:.4f}"
    typer.echo(f"{found.photos} photos: {accuracy}; nearest centroid {found.centroid_accuracy:.4f}")


@app.command()
def report(
    runs: Annotated[Path, typer.Option(help="Folder with a folder for each run.")] = Path("training/runs"),
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("docs/accuracy"),
    document: Annotated[Path, typer.Option(help="Markdown file with marked places.")] = Path("docs/accuracy.md"),
) -> None:
    """Tables and pictures of all runs, from their metrics.jsonl and test.json."""
    from training.report import report as write_report

    with _explained():
        paths = write_report(runs, out, document)
    for path in paths:
        typer.echo(f"{path} written")


@app.command()
def export(
    final: Annotated[Path, typer.Argument(help="A run's final.pt, or the folder of an exported model.")],
    out: Annotated[Path, typer.Option(help="Folder to write; its name becomes the model_id.")],
    model: Annotated[
        Path, typer.Option(help="Folder of the embedder for which the training crops were prepared.")
    ] = _MODELS / "dlib-resnet",
    crops: Annotated[
        Path | None, typer.Option(help="Training crops: for --int8, and to compare with torch on faces.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit integers.")] = False,
) -> None:
    """Write a run's network as ONNX with its manifest. Calibrate it next: see docs/training.md."""
    from training.export import export as export_embedder

    with _explained():
        written = export_embedder(final, out, template=model, crops=crops, int8=int8)
    typer.echo(
        f"{out}: {written.manifest.model_id}, {written.megabytes:.1f} MB, "
        f"at most {written.angle:.5f} rad from torch at batch 1, 5 and 32"
    )


@app.command()
def quantise(
    crops: Annotated[Path, typer.Option(help="Folder that `prepare --role further` has filled for this embedder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; its name becomes the model_id.")],
    model: Model = _MODELS / "dlib-resnet",
) -> None:
    """Write an embedder in 8-bit integers. Calibrate it next: see docs/training.md."""
    with _explained():
        written = quantise_model(model, out, crops)
    typer.echo(
        f"{out}: {written.manifest.model_id}, {written.megabytes:.1f} MB, cosine to {model} "
        f"{written.similarity[0]:.4f} on average, {written.similarity[1]:.4f} at least"
    )


@app.command()
def guards(
    crops: Annotated[Path, typer.Option(help="Folder with validation and class people, prepared with --like-queries.")],
    model: Model = _MODELS / "dlib-resnet",
    repeats: Annotated[int, typer.Option(min=1, help="Random galleries and choices of photos.")] = REPEATS,
    threads: Threads = None,
) -> None:
    """What the guards of enrolment and the warning of drift cost and catch, on validation people."""
    with _explained():
        typer.echo(measure_guards(model, crops, repeats=repeats, threads=threads or _cores()))


def _told(counts: Counts) -> str:
    return (
        f"{counts.photos} photos, {counts.detector} faces found by the detector, "
        f"{counts.fallback} cut by the fallback, {counts.none} left out"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _explained() -> Iterator[None]:
    """What the user can mend ends in one line and exit status 2."""
    try:
        yield
    except (DataError, ModelError, ConversionError, FprUnsupported, OSError) as error:
        typer.echo(f"vultus-train: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
