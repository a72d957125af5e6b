"""GET /metrics: what the service counts, in the format of Prometheus."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from fewstep.engine.service import Service
from fewstep.engine.statistics import Summary
from fewstep.serve.server import HttpCounts, Server


class Collector:
    """Reads the statistics whenever it is asked."""

    def __init__(self, service: Service, counts: HttpCounts) -> None:
        self._service, self._counts = service, counts

    def collect(self) -> Iterator[Metric]:
        now = self._service.statistics()
        for name, help_text, value in (
            ("queued", "Requests that wait for a slot.", now.queued),
            ("running", "Requests in a slot.", now.running),
            ("slots", "Slots, free ones among them.", now.slots),
            ("cache_bytes", "What the slots take up.", now.cache_bytes),
            ("memory_limit_bytes", "What they may take up.", now.memory_bytes),
            ("tokens_per_second", "Tokens of all requests, in the last ten seconds.", now.tokens_per_second),
        ):
            yield GaugeMetricFamily(f"fewstep_{name}", help_text, value=value)
        for name, help_text, value in (
            ("prompt_tokens", "Tokens of prompts that got a slot.", now.prompt_tokens),
            ("tokens", "Tokens that became final.", now.tokens),
            ("passes", "Passes of networks.", now.passes),
            ("prefilled_positions", "Positions that were prefilled.", now.prefilled),
            ("reused_positions", "Positions that were taken over from an earlier request.", now.reused),
            ("cut_responses", "Responses whose client closed the connection before their end.", self._counts.cut),
        ):
            yield CounterMetricFamily(f"fewstep_{name}", help_text, value=value)
        yield _by_label("requests", "Requests by what became of them.", "outcome", now.requests)
        yield _by_label("accepted_passes", "Passes by the tokens that they finalised.", "tokens", now.accepted)
        yield from self._groups(now.groups)
        responses = CounterMetricFamily("fewstep_http_responses", "Responses.", labels=["path", "status"])
        for (path, status), count in sorted(self._counts.responses.items()):
            responses.add_metric([path, str(status)], count)
        yield responses
        for name, help_text, summary in (
            ("queue_seconds", "In the queue.", now.queue_s),
            ("first_token_seconds", "From submission to the first final token.", now.first_token_s),
            ("per_token_seconds", "For each further token.", now.per_token_s),
            ("request_seconds", "From submission to the end.", now.request_s),
        ):
            yield _histogram(name, help_text, summary)

    def _groups(self, groups: Any) -> Iterator[Metric]:
        for name, help_text in (("queued", "Requests of a group that wait."), ("running", "Requests of a group.")):
            gauge = GaugeMetricFamily(f"fewstep_group_{name}", help_text, labels=["model", "decoder"])
            sums: Counter[tuple[str, str]] = Counter()
            for group in groups:
                sums[group.model, group.decoder] += getattr(group, name)
            for labels, value in sums.items():
                gauge.add_metric(list(labels), value)
            yield gauge


def _by_label(name: str, help_text: str, label: str, values: Any) -> Metric:
    counter = CounterMetricFamily(f"fewstep_{name}", help_text, labels=[label])
    for key, value in values.items():
        counter.add_metric([str(key)], value)
    return counter


def _histogram(name: str, help_text: str, summary: Summary) -> Metric:
    buckets = [("+Inf" if bound == float("inf") else str(bound), count) for bound, count in summary.buckets.items()]
    histogram = HistogramMetricFamily(f"fewstep_{name}", help_text)
    histogram.add_metric([], buckets=buckets, sum_value=summary.total_s)
    return histogram


async def metrics(server: Server, request: Request) -> Response:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(server.service, server.counts))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
