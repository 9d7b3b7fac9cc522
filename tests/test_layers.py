"""Who may import whom: api → recognizer → {vision, gallery, store, decision, calibration, drift} → {domain, errors}."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BOTTOM = {"service.domain", "service.errors"}
MIDDLE = (
    "service.vision",
    "service.gallery",
    "service.store",
    "service.decision",
    "service.calibration",
    "service.drift",
    "service.evaluation",
    "service.archive",
    "service.layout",
    "service.own_calibration",
)

ALLOWED: dict[str, set[str]] = {
    "service": set(),
    "service.domain": set(),
    "service.errors": set(),
    "service.settings": set(),
    "service.int_map": set(),
    "service.vision": BOTTOM | {"service.vision"},
    "service.gallery": BOTTOM | {"service.gallery", "service.int_map"},
    "service.store": BOTTOM | {"service.store"},
    "service.decision": BOTTOM,
    "service.calibration": BOTTOM,
    "service.drift": BOTTOM,
    "service.evaluation": BOTTOM | {"service.calibration", "service.layout", "service.own_calibration"},
    "service.own_calibration": BOTTOM | {"service.calibration", "service.int_map"},
    "service.archive": BOTTOM,
    "service.layout": set(),
    "service.client": {"service.layout"},
    "service.pictures": BOTTOM,
    "service.recognizer": BOTTOM | set(MIDDLE),
    "service.api": BOTTOM
    | {"service.api", "service.recognizer", "service.drift", "service.evaluation", "service.pictures"},
    "training": BOTTOM
    | {
        "training",
        "service.vision",
        "service.decision",
        "service.calibration",
        "service.own_calibration",
        "service.drift",
        "service.evaluation",
        "service.layout",
    },
}
# The two that put the parts together.
EVERYTHING = {"service.app", "service.cli"}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("service", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "migrations" not in path.parts:
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module that a file imports, as deep as it can be told; relative imports are not in use."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names if module in ("service", "training"))
    return names


def layer(module: str) -> str:
    """The entry of ALLOWED, or the name itself, that a module belongs to."""
    parts = module.split(".")
    return parts[0] if parts[0] == "training" else ".".join(parts[:2])


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_one_way(module: str) -> None:
    if layer(module) in EVERYTHING:
        return
    ours = {name for name in imports(modules()[module]) if name.split(".")[0] in ("service", "training")}
    used = {layer(name) for name in ours if name != "service" and name != "service.__version__"}
    assert used <= ALLOWED[layer(module)], f"{module} imports {sorted(used - ALLOWED[layer(module)])}"


@pytest.mark.parametrize("module", sorted(name for name in modules() if name.startswith("service")))
def test_serving_needs_nothing_of_training(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(modules()[module])}
    unwanted = {"torch", "torchvision", "training", "onnx", "sklearn", "matplotlib", "dlib"}
    # An option of the serving environment, which the next test holds to be imported late.
    assert not roots & (unwanted - {"matplotlib"} if module == "service.pictures" else unwanted)


def test_serving_starts_without_matplotlib() -> None:
    code = "import sys, service.cli; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_few_modules_know_the_runtime_the_index_and_the_database() -> None:
    for package, owners in {
        "onnxruntime": {"service.vision.onnx"},
        "faiss": {"service.gallery.cores", "service.gallery.exact", "service.gallery.inverted"},
        "sqlalchemy": {"service.store.repository", "service.store.tables"},
    }.items():
        users = {
            name
            for name, path in modules().items()
            if name.startswith("service") and any(used.split(".")[0] == package for used in imports(path))
        }
        assert users == owners


def test_only_app_and_cli_read_the_settings() -> None:
    users = {name for name, path in modules().items() if "service.settings" in imports(path)}
    assert users == EVERYTHING
