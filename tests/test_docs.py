"""What the docs list is what there is: routes, settings, error codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel

from service.api import schemas
from service.api.examples import ANSWERS
from service.api.routes import router
from service.errors import error_classes
from service.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")


def test_every_route_is_documented() -> None:
    routes = {
        f"{method} {route.path.replace(':path', '')}"
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert set(re.findall(r"^\| `((?:GET|POST|PATCH|DELETE) [^`]+)` \|", API, re.M)) == routes | {"GET /docs"}


def test_every_error_code_is_documented_with_its_status() -> None:
    codes = {(error.code, str(error.status)) for error in error_classes()}
    assert len({code for code, _ in codes}) == len(error_classes())
    assert set(re.findall(r"^\| `([a-z_]+)` \| (\d{3}) \|", API, re.M)) == codes


def test_every_setting_is_documented() -> None:
    settings = {f"VULTUS_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"^\| `(VULTUS_[A-Z_]+)` \|", OPERATIONS, re.M)) == settings


def test_documented_defaults_are_the_defaults() -> None:
    documented = dict(re.findall(r"^\| `VULTUS_([A-Z_]+)` \| `([^`]+)` \|", OPERATIONS, re.M))
    for name, value in documented.items():
        default = Settings.model_fields[name.lower()].default
        assert str(default).lower() == value.lower(), name


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("model", sorted(ANSWERS))
def test_examples_are_answers(model: str) -> None:
    schema: type[BaseModel] = getattr(schemas, model)
    assert set(schema.model_validate(ANSWERS[model]).model_dump()) == set(ANSWERS[model])
