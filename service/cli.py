"""The ``vultus`` command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from pydantic import ValidationError

from service.api.auth import ALL_GALLERIES, KeysFile, RoleName, add_key, remove_key
from service.app import StartError, configure_logging, create_app, load_embedder, open_parts, open_repository
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
    except (StartError, ModelError, OSError, ValueError) as exc:
        typer.echo(f"vultus: {exc}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
