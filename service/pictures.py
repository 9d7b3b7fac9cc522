"""The curve of an evaluation as a picture. Needs matplotlib, which is asked for only when something is drawn."""

from __future__ import annotations

import base64
import io
import threading
from importlib.util import find_spec
from typing import Literal

from service.domain import Evaluation

MISSING = "Pictures need matplotlib; install it with `pip install 'vultus[pictures]'`."

# Its font cache is shared by all threads.
_drawing = threading.Lock()


def available() -> bool:
    """Whether there is anything to draw with."""
    return find_spec("matplotlib") is not None


def det(found: Evaluation, kind: Literal["png", "svg"]) -> bytes:
    """Draw FNIR over FPIR (DET, Martin et al. 1997), both axes logarithmic, as a PNG or SVG file.

    A rate of 0 has no place on such an axis and is left out. The bars are the intervals at the asked rates. Raises
    ``ModuleNotFoundError`` where matplotlib is missing.
    """
    with _drawing:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter

        figure = Figure(figsize=(7, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        shown = [(point.fpir, point.fnir) for point in found.det if point.fpir > 0 and point.fnir]
        if shown:
            axes.plot(*zip(*shown, strict=True), lw=1.5)
        for point in found.points:
            fpir, fnir = point.fpir, point.fnir
            if fpir.rate and fnir.rate and fnir.low is not None and fnir.high is not None:
                errors = [[fnir.rate - fnir.low], [fnir.high - fnir.rate]]
                axes.errorbar(
                    [fpir.rate], [fnir.rate], yerr=errors, fmt="o", ms=5, capsize=3, label=f"fpr={point.fpr:g}"
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=None))
            axis.set_minor_formatter("")
        axes.set_xlabel("FPIR: strangers who are answered with somebody")
        axes.set_ylabel("FNIR: enrolled people who are not found")
        axes.set_title(
            f"{found.model_id}: {found.gallery_size:,} people enrolled, {found.probes.photos:,} photos of them, "
            f"{found.strangers.photos:,} of {found.stranger_people:,} strangers",
            fontsize=9,
        )
        axes.grid(visible=True, which="both", alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=9)
        out = io.BytesIO()
        # Without dates and random names the same figures are the same bytes.
        with matplotlib.rc_context({"svg.hashsalt": "vultus"}):
            figure.savefig(out, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return out.getvalue()


def data_url(found: Evaluation, kind: Literal["png", "svg"]) -> str:
    """:func:`det` as a ``data:`` URL."""
    media = {"png": "image/png", "svg": "image/svg+xml"}[kind]
    return f"data:{media};base64,{base64.b64encode(det(found, kind)).decode()}"
