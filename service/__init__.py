"""Vultus, the online half: a face-recognition service."""

__version__ = "0.1.0"
