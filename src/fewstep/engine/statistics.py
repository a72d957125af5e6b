"""What a service tells of itself: counts since it began, and how long its answers take."""

import bisect
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fewstep.decode.requests import Output

DURATIONS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the buckets in which durations are counted."""

NUM_RECENT = 1024
"""Percentiles are those of this many latest values."""

RECENT_S = 10.0
"""`tokens_per_second` is that of this many latest seconds."""


@dataclass(frozen=True)
class Summary:
    """Durations in seconds. `buckets`: upper bound -> how many were no longer, as Prometheus counts; since the start.

    The percentiles are those of the latest `NUM_RECENT`; 0 where there are none.
    """

    count: int
    total_s: float
    buckets: Mapping[float, int]
    p50_s: float
    p90_s: float
    p99_s: float


class Durations:
    """Collects durations; its memory does not grow."""

    def __init__(self) -> None:
        self._count, self._total_s = 0, 0.0
        self._in_bucket = [0] * (len(DURATIONS_S) + 1)
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)

    def add(self, seconds: float) -> None:
        self._count += 1
        self._total_s += seconds
        self._in_bucket[bisect.bisect_left(DURATIONS_S, seconds)] += 1
        self._recent.append(seconds)

    def summary(self) -> Summary:
        percentiles = np.percentile(self._recent, (50, 90, 99)) if self._recent else np.zeros(3)
        cumulative = np.cumsum(self._in_bucket).tolist()
        return Summary(
            self._count,
            self._total_s,
            dict(zip((*DURATIONS_S, float("inf")), cumulative, strict=True)),
            *percentiles.tolist(),
        )


@dataclass(frozen=True, kw_only=True)
class GroupStatistics:
    """Requests of one model that one decoder decodes together, now."""

    model: str
    decoder: str
    queued: int
    running: int
    slots: int
    cache_bytes: int


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A service at a moment.

    Now: `queued`, `running`, `slots` (free ones among them), `cache_bytes` of `memory_bytes`; of each group in
    `groups`. Since the start: `requests` by how they ended (`submitted`, `completed`, `cancelled`, `timed_out`,
    `failed`, `refused`), tokens of prompts and of answers, `passes` of networks, positions that were prefilled, and
    those that were taken over from an earlier request. `accepted`: tokens that a pass finalised in a request -> how
    many passes did, of completed requests. Durations: in the queue, from submission to the first token, for each
    further token, from submission to the end. `tokens_per_second`: of all requests, in the last ten seconds.
    """

    queued: int
    running: int
    slots: int
    cache_bytes: int
    memory_bytes: int
    groups: Sequence[GroupStatistics]
    requests: Mapping[str, int]
    prompt_tokens: int
    tokens: int
    passes: int
    prefilled: int
    reused: int
    accepted: Mapping[int, int]
    queue_s: Summary
    first_token_s: Summary
    per_token_s: Summary
    request_s: Summary
    tokens_per_second: float


@dataclass
class Recorder:
    """Collects what `Statistics` tells; one thread writes, others read."""

    memory_bytes: int
    groups: Sequence[GroupStatistics] = ()
    requests: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    tokens: int = 0
    passes: int = 0
    prefilled: int = 0
    reused: int = 0
    accepted: Counter[int] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.queue_s, self.first_token_s, self.per_token_s, self.request_s = (Durations() for _ in range(4))
        self._ends_s: deque[float] = deque(maxlen=NUM_RECENT)
        self._recent: deque[tuple[float, int]] = deque()
        self._recent_tokens = 0

    def ended(self, how: str) -> None:
        """A request ended, or began if `how` is "submitted"."""
        with self._lock:
            self.requests[how] += 1
            if how not in ("submitted", "refused"):
                self._ends_s.append(time.monotonic())

    def begun(self, num_given: int, queue_s: float) -> None:
        """A request got a slot."""
        with self._lock:
            self.prompt_tokens += num_given
            self.queue_s.add(queue_s)

    def worked(self, *, passes: int, prefilled: int, reused: int, tokens: int) -> None:
        """A round of a loop."""
        now_s = time.monotonic()
        with self._lock:
            self.passes += passes
            self.prefilled += prefilled
            self.reused += reused
            self.tokens += tokens
            self._recent.append((now_s, tokens))
            self._recent_tokens += tokens
            self._forget(now_s)

    def completed(self, output: Output, first_token_s: float) -> None:
        """An answer is whole; `first_token_s` after its submission it began."""
        steps = output.step_G[output.step_G > 0].bincount().tolist()[1:]
        with self._lock:
            self.first_token_s.add(first_token_s)
            if output.num_tokens > 1:
                self.per_token_s.add((output.seconds - first_token_s) / (output.num_tokens - 1))
            self.request_s.add(output.seconds)
            self.accepted.update(steps)

    def seconds_per_end(self) -> float | None:
        """Between the ends of recent requests; None before the second."""
        with self._lock:
            ends = list(self._ends_s)
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None

    def snapshot(self, queued: int) -> Statistics:
        """`queued`: requests that wait for a slot."""
        now_s = time.monotonic()
        with self._lock:
            self._forget(now_s)
            since_s = RECENT_S if not self._recent else max(now_s - self._recent[0][0], 1.0)
            return Statistics(
                queued=queued,
                running=sum(group.running for group in self.groups),
                slots=sum(group.slots for group in self.groups),
                cache_bytes=sum(group.cache_bytes for group in self.groups),
                memory_bytes=self.memory_bytes,
                groups=tuple(replace(group) for group in self.groups),
                requests=dict(self.requests),
                prompt_tokens=self.prompt_tokens,
                tokens=self.tokens,
                passes=self.passes,
                prefilled=self.prefilled,
                reused=self.reused,
                accepted=dict(sorted(self.accepted.items())),
                queue_s=self.queue_s.summary(),
                first_token_s=self.first_token_s.summary(),
                per_token_s=self.per_token_s.summary(),
                request_s=self.request_s.summary(),
                tokens_per_second=self._recent_tokens / since_s,
            )

    def _forget(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] < now_s - RECENT_S:
            self._recent_tokens -= self._recent.popleft()[1]
