"""What `/metrics` tells of probes, and to whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from service.api.auth import Principal
from service.drift import EDGES, Histogram


class ProbeMetrics(Collector):
    """The best similarities of probes. A gallery that is gone has no series."""

    def __init__(self, similarities: Callable[[], Mapping[tuple[str, str], Histogram]]) -> None:
        self._similarities = similarities

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "vultus_probe_similarity",
            "Similarity of each probe's best candidate, since the start.",
            labels=["gallery", "decision"],
        )
        for labels, held in self._similarities().items():
            below, buckets = 0, []
            for edge, count in zip((*map(str, EDGES), "+Inf"), held.counts, strict=True):
                below += count
                buckets.append((edge, float(below)))
            family.add_metric(labels, buckets, held.total)
        yield family


class VisibleMetrics(CollectorRegistry):
    """The metrics of a registry without the galleries that a key does not open."""

    def __init__(self, registry: CollectorRegistry, key: Principal) -> None:
        super().__init__()
        self._all, self._key = registry, key

    def collect(self) -> Iterator[Metric]:
        for metric in self._all.collect():
            metric.samples = [
                sample
                for sample in metric.samples
                if "gallery" not in sample.labels or self._key.sees(sample.labels["gallery"])
            ]
            yield metric
