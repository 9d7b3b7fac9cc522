"""Vultus, the online half: a face-recognition service."""

import os

__version__ = "0.1.0"

# ONNX Runtime's builds for Linux leave an identifier in the home directory and report models and runs to their maker.
# It reads this once, when it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
