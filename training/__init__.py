"""Vultus, the offline half: prepare, train, measure, export."""

import os

# See ``service/__init__.py``; some of the tools here import ONNX Runtime before anything of the service.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
