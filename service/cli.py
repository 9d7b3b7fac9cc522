"""The ``vultus`` command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from pydantic import ValidationError

from service import pictures
from service.api.auth import ALL_GALLERIES, KeysFile, RoleName, add_key, remove_key
from service.api.schemas import evaluation as evaluation_answer
from service.app import (
    StartError,
    configure_logging,
    create_app,
    load_embedder,
    load_models,
    open_parts,
    open_repository,
)
from service.client import Client, ClientError, Refused
from service.domain import DEFAULT_GALLERY, MAX_ENROLL_PHOTOS
from service.errors import FprUnsupported
from service.evaluation import FPRS, STRANGERS, Plan, laid_out, read_groups, table
from service.evaluation import evaluate as evaluate_shots
from service.layout import lots, people
from service.recognizer import acquire
from service.recognizer import reembed as reembed_templates
from service.settings import Settings
from service.vision.manifest import ModelError

app = typer.Typer(no_args_is_help=True, help="Face recognition that keeps the false-positive rate you ask for.")
keys = typer.Typer(no_args_is_help=True, help="API keys: make, list, remove.")
app.add_typer(keys, name="keys")


@app.command()
def serve() -> None:
    """Start the service. Settings are environment variables; see docs/operations.md."""
    with _explained():
        settings = Settings()
        configure_logging(settings.log_level)
        with open_parts(settings) as parts:
            uvicorn.run(
                create_app(settings, parts),
                host=settings.host.strip("[]"),
                port=settings.port,
                access_log=False,
                log_level="warning",
                server_header=False,
            )


@app.command()
def reembed() -> None:
    """Move every enrolled face to the model of VULTUS_MODEL, from the kept crops.

    Stop the service first. It can be interrupted and repeated.
    """
    with _explained():
        settings = Settings()
        configure_logging(settings.log_level)
        embedder = load_embedder(settings)
        with open_repository(settings) as repository:
            total = repository.count_templates(embedder.model_id)
            with typer.progressbar(length=total, label=f"to {embedder.model_id}") as bar:
                left = reembed_templates(repository, embedder, bar.update)
    typer.echo(f"{total - left} faces moved to {embedder.model_id}.")
    if left:
        typer.echo(
            f"{left} faces were enrolled without keeping crops and stay with their model; enrol them again from "
            "photos, or delete them.",
            err=True,
        )
        raise typer.Exit(1)


@app.command()
def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="A folder with photos for each person, and one of strangers.",
        ),
    ],
    fpr: Annotated[
        list[float] | None, typer.Option(help="A false-positive rate to ask for; repeatable. Default: 0.1 to 0.001.")
    ] = None,
    enrol: Annotated[int, typer.Option(min=1, help="Photos of each person to enrol, the first by name.")] = 1,
    strangers: Annotated[str, typer.Option(help="Name of the strangers' folder.")] = STRANGERS,
    groups: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="CSV of person-or-file,group, for a table by group."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for every figure as JSON.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json, det.png and det.svg.")] = None,
) -> None:
    """Measure the rates on your own photos. Nothing of them is stored, and a running service is not needed."""
    with _explained():
        fprs = tuple(dict.fromkeys(fpr or FPRS))
        if not all(0 < one < 1 for one in fprs):
            raise ValueError("--fpr lies between 0 and 1")
        if out is not None and not pictures.available():
            raise ValueError(pictures.MISSING)
        settings = Settings()
        try:
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            placed, ignored = laid_out(files, strangers)
        except ValueError as exc:
            raise ValueError(f"In {folder} {exc}.") from None
        named = None if groups is None else read_groups(groups.read_text(encoding="utf-8"))
        detector, embedder, calibration = load_models(settings)
        for one in fprs:
            # Before minutes of work: a rate that the calibration cannot support.
            calibration.identification_point(one, 1, 1)
        # Only what is read at a time is in memory.
        photos = ((photo, (folder / photo.file).read_bytes()) for photo in placed)
        with typer.progressbar(
            acquire(photos, detector, embedder, settings), len(placed), label="photos", file=sys.stderr
        ) as shots:
            found = evaluate_shots(list(shots), calibration, Plan(fprs, enrol, named, ignored))
        report = evaluation_answer(found, None).model_dump_json(indent=2, exclude={"picture"}) + "\n"
        if json is not None:
            json.write_text(report, encoding="utf-8")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "report.json").write_text(report, encoding="utf-8")
            (out / "det.png").write_bytes(pictures.det(found, "png"))
            (out / "det.svg").write_bytes(pictures.det(found, "svg"))
    typer.echo(table(found))


@app.command()
def enroll(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", exists=True, file_okay=False, help="A folder with photos for each person."),
    ],
    url: Annotated[str, typer.Option(envvar="VULTUS_URL", help="Where the service runs.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(envvar="VULTUS_KEY", help="Its key of role write; better given by the variable.")
    ] = None,
    gallery: Annotated[str, typer.Option(help="The gallery to enrol into.")] = DEFAULT_GALLERY,
    allow_conflict: Annotated[bool, typer.Option(help="Enrol even if photos show another subject.")] = False,
    jobs: Annotated[int, typer.Option(min=1, max=32, help="Requests at once.")] = 4,
) -> None:
    """Enrol everybody in a folder at a running service. It can be interrupted and repeated.

    The photos that were not enrolled are printed with the reason: file, code and detail, separated by tabs. The exit
    status is 1 if there are any, and 2 if the service could not be used.
    """
    with _explained():
        found, ignored = people(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if not found:
            raise ValueError(f"In {folder} there are no photos in folders: each person needs one.")
        refused: list[Refused] = []
        enrolled = 0
        try:
            with (
                Client(url, key) as client,
                typer.progressbar(length=len(found), label="photos", file=sys.stderr) as bar,
            ):
                waiting = list(lots(found, MAX_ENROLL_PHOTOS))
                for result in client.enroll(folder, waiting, gallery, allow_conflict=allow_conflict, jobs=jobs):
                    enrolled += result.enrolled
                    refused += result.refused
                    bar.update(result.enrolled + len(result.refused))
        finally:
            for photo in sorted(refused, key=lambda photo: photo.file):
                typer.echo(f"{photo.file}\t{photo.code}\t{photo.detail}")
            left = len(found) - enrolled - len(refused)
            typer.echo(
                f"{enrolled} photos are enrolled, {len(refused)} are not"
                + (f", and {left} are left: run the same again" if left else "")
                + (f"; {ignored} other files" if ignored else "")
                + ".",
                err=True,
            )
    if refused:
        raise typer.Exit(1)


@keys.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="What the key is for; shown in `vultus keys list`.")],
    role: Annotated[
        RoleName, typer.Option(help="What it may do: read asks, write enrols, admin makes galleries.")
    ] = "read",
    gallery: Annotated[
        list[str] | None, typer.Option(help="A gallery that it opens; repeatable. Default: all.")
    ] = None,
) -> None:
    """Make a key in VULTUS_API_KEYS_FILE and print it. It is shown this once; the file holds its SHA-256."""
    with _explained():
        secret = add_key(_keys_file(), name, role, tuple(gallery) if gallery else (ALL_GALLERIES,))
    typer.echo(secret)


@keys.command("list")
def keys_list() -> None:
    """Show the keys' names, roles and galleries."""
    with _explained():
        for key in KeysFile.read(_keys_file()).keys:
            typer.echo(f"{key.name}\t{key.role}\t{', '.join(key.galleries)}")


@keys.command("remove")
def keys_remove(name: Annotated[str, typer.Argument(help="The key's name.")]) -> None:
    """Remove a key. The running service refuses it from the next request on."""
    with _explained():
        remove_key(_keys_file(), name)


def _keys_file() -> Path:
    path = Settings().api_keys_file
    if path is None:
        raise StartError("Set VULTUS_API_KEYS_FILE to the path of the keys file.")
    return path


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what a user can mend into one line and exit status 2."""
    try:
        yield
    except ValidationError as exc:
        for error in exc.errors(include_input=False):
            typer.echo(f"VULTUS_{'_'.join(map(str, error['loc'])).upper()}: {error['msg']}", err=True)
        raise typer.Exit(2) from None
    except (StartError, ModelError, FprUnsupported, ClientError, OSError, ValueError) as exc:
        typer.echo(f"vultus: {exc}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
