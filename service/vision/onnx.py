"""The only door to ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.vision.manifest import ModelError

_ERRORS_ONLY = 3


class OnnxModel:
    """One network on the CPU. :meth:`run` may be called from several threads at once.

    ``threads``: how many cores one call may use, at least 1. Raises
    :class:`~service.vision.manifest.ModelError` if the file is not a network that ONNX Runtime can load.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _ERRORS_ONLY
        # A memory plan would be kept for every new input shape, and photos and batches have many.
        options.enable_mem_pattern = False
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Detector and embedder share the cores: threads that spin while they wait cost a third of the whole
        # when both are busy.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(f"{path} cannot be loaded: {error}") from error

    @property
    def inputs(self) -> dict[str, tuple[int | None, ...]]:
        """Name and shape of each input; a free dimension is None."""
        return {value.name: _shape(value) for value in self._session.get_inputs()}

    @property
    def outputs(self) -> dict[str, tuple[int | None, ...]]:
        """Name and shape of each output, in the order of :meth:`run`'s answer; a free dimension is None."""
        return {value.name: _shape(value) for value in self._session.get_outputs()}

    def run(self, inputs: Mapping[str, NDArray[Any]], *, release: bool = False) -> list[NDArray[np.float32]]:
        """Every output of the network, in its own order. The arrays are the caller's to keep.

        ``release``: give what the arena holds and nobody uses back to the system afterwards. For inputs so large and
        rare that what they needed should not be kept; small runs would pay more for it than it is worth.
        """
        options = _releasing() if release else None
        results: list[NDArray[np.float32]] = self._session.run(None, dict(inputs), options)
        return results


@cache
def _share_arena() -> None:
    """Give all networks of the process one arena, which grows by what is missing and not to the next power of two.

    It stays as large as the largest inputs in use at one time need, but for those that release it. To give memory back
    after each run would cost half as much again as the run.
    """
    where = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(where, onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1}))


@cache
def _releasing() -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _shape(value: Any) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value.shape)
