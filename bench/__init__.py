"""What Vultus takes of time and memory, measured; see README.md here."""

import os

# See ``service/__init__.py``; some of the measurements import ONNX Runtime before anything of the service.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
