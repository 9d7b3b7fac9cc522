"""Nothing is reported to anybody: ONNX Runtime's telemetry, which its builds for Linux have on, is off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SERVICE = """
from pathlib import Path
from service.vision.embedder import Embedder
Embedder.load(Path("models/dlib-resnet-int8")).warm_up()
"""
TRAINING = """
import training.quantise
import onnxruntime
onnxruntime.InferenceSession("models/dlib-resnet-int8/model.onnx", providers=["CPUExecutionProvider"])
"""
BENCH = "import bench.harness"


@pytest.mark.parametrize("code", [SERVICE, TRAINING, BENCH], ids=["service", "training", "bench"])
def test_onnx_runtime_leaves_no_identifier_behind(code: str, tmp_path: Path) -> None:
    # With these it would be off by itself.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ORT_") and name != "CI"}
    home = {name: str(tmp_path) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**ours, **home}, check=True, timeout=120)
    assert [path for path in tmp_path.rglob("*") if "onnx" in path.name.lower()] == []
