"""Scorers behind gRPC: ``mint.v1.ScorerService``, served by whoever operates a verifier or a reward model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence

from mint_api.v1 import scorer_service_pb2, scorer_service_pb2_grpc
from mint_core import channel, log
from mint_core.clock import Deadline
from mint_core.errors import DeadlineExceeded, MintError, Unavailable
from mint_runs.scoring.outcome import Scored, Scoring, seconds, unscored
from mint_scorers import Sample

__all__ = ["remote_scoring"]

_log = log.get_logger(__name__)

_MAX_BATCH_SAMPLES = 64
_MAX_BATCH_BYTES = 1024 * 1024
"""Of the samples in one call. A server that sets nothing takes 4 MiB; a larger sample goes alone."""
_MAX_CONCURRENT_BATCHES = 4
_MAX_PAUSE_S = 5.0


@contextlib.asynccontextmanager
async def remote_scoring(
    name: str, options: Mapping[str, str], *, address: str, timeout_s: float, max_message_bytes: int
) -> AsyncIterator[Scoring]:
    """The remote scorer ``name`` at ``address``; nothing is asked of it before the first batch."""
    async with channel.connect(address, max_message_bytes=max_message_bytes) as connection:
        yield _RemoteScoring(scorer_service_pb2_grpc.ScorerServiceStub(connection), name, options, timeout_s)


class _RemoteScoring:
    """Cuts samples into batches and makes a call for each, some at the same time."""

    def __init__(
        self,
        stub: scorer_service_pb2_grpc.ScorerServiceStub,
        name: str,
        options: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        self._stub = stub
        self._name = name
        self._options = options
        self._timeout_s = timeout_s
        self._free = asyncio.Semaphore(_MAX_CONCURRENT_BATCHES)

    async def score(self, samples: Sequence[Sample]) -> list[Scored]:
        """See :class:`Scoring`. A call may take ``timeout_s`` for each sample in it."""
        outcomes: dict[int, Scored] = {}
        batches: list[dict[int, scorer_service_pb2.ScoredSample]] = []
        num_bytes = 0
        for place, sample in enumerate(samples):
            try:
                message = _encode(sample)
            except (TypeError, ValueError, RecursionError) as error:
                outcomes[place] = unscored(f"the sample cannot be sent: {error}")
                continue
            num_bytes += message.ByteSize()
            if not batches or num_bytes > _MAX_BATCH_BYTES or len(batches[-1]) == _MAX_BATCH_SAMPLES:
                batches.append({})
                num_bytes = message.ByteSize()
            batches[-1][place] = message
        for scored in await asyncio.gather(*map(self._score_batch, batches)):
            outcomes |= scored
        return [outcomes[place] for place in range(len(samples))]

    async def _score_batch(self, batch: Mapping[int, scorer_service_pb2.ScoredSample]) -> dict[int, Scored]:
        request = scorer_service_pb2.ScoreSamplesRequest(samples=batch.values(), options=self._options)
        async with self._free:
            try:
                response = await self._call(request)
            except MintError as error:
                _log.warning("a remote scorer failed", extra={"fields": {"scorer": self._name, "error": str(error)}})
                return dict.fromkeys(batch, unscored(self._explain(error, len(batch))))
        if len(response.scores) != len(batch):
            error_text = (
                f"remote scorer {self._name!r} answered {len(response.scores)} scores for {len(batch)} samples: "
                "it must answer one for each, in order"
            )
            return dict.fromkeys(batch, unscored(error_text))
        return {place: self._decode(score) for place, score in zip(batch, response.scores, strict=True)}

    async def _call(self, request: scorer_service_pb2.ScoreSamplesRequest) -> scorer_service_pb2.ScoreSamplesResponse:
        """A scorer that is away is waited for as long as the call may take: it may be restarting."""
        deadline = Deadline.after(self._timeout_s * len(request.samples))
        pause_s = 0.2
        while True:
            try:
                return await channel.call(self._stub.ScoreSamples, request, timeout_s=deadline.remaining_s)
            except Unavailable as error:
                pause_s = min(max(pause_s * 2, error.retry_after_s or 0.0), _MAX_PAUSE_S)
                if deadline.remaining_s <= pause_s:
                    raise
                await asyncio.sleep(pause_s)

    def _explain(self, error: MintError, num_samples: int) -> str:
        """For the tenant: the scorer's own words, but not those of the transport, which name addresses."""
        if isinstance(error, Unavailable):
            return f"remote scorer {self._name!r} is not available"
        if isinstance(error, DeadlineExceeded):
            total = seconds(self._timeout_s * num_samples)
            return f"remote scorer {self._name!r} timed out after {total} for {num_samples} samples"
        return f"remote scorer {self._name!r} refused {num_samples} samples: {error.reason}: {error.message}"

    def _decode(self, score: scorer_service_pb2.Score) -> Scored:
        if score.error:
            return unscored(score.error)
        if not math.isfinite(score.value):
            return unscored(f"remote scorer {self._name!r} answered {score.value}, not a finite number")
        return Scored(score.value)


def _encode(sample: Sample) -> scorer_service_pb2.ScoredSample:
    """Raises :class:`ValueError` for text that is no Unicode and for NaN, which JSON does not have."""
    return scorer_service_pb2.ScoredSample(
        prompt=sample.prompt,
        completion=sample.completion,
        example_json=json.dumps(dict(sample.example), ensure_ascii=False, allow_nan=False),
    )
