"""A remote scorer that does what the option ``behave`` says. Run as a script: it prints its port."""

from __future__ import annotations

import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from mint_api.v1 import scorer_service_pb2, scorer_service_pb2_grpc

__all__ = ["main"]


class MisbehavingScorer(scorer_service_pb2_grpc.ScorerServiceServicer):
    """Answers the number of samples in the call for each, unless told otherwise."""

    def __init__(self) -> None:
        self._num_calls = 0

    def ScoreSamples(
        self, request: scorer_service_pb2.ScoreSamplesRequest, context: Any
    ) -> scorer_service_pb2.ScoreSamplesResponse:
        self._num_calls += 1
        values = [float(len(request.samples))] * len(request.samples)
        match request.options["behave"]:
            case "short":
                values.pop()
            case "long":
                values.append(1.0)
            case "strange":
                values = [math.nan, math.inf, 1.0]
            case "hang":
                time.sleep(100)
            case "refuse":
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "option behave is 'refuse': not again")
            case "away":
                context.abort(grpc.StatusCode.UNAVAILABLE, "behind 10.0.0.1 all judges are away")
            case "late" if self._num_calls < 8:  # more often than gRPC itself tries again
                context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
            case "bug":
                raise RuntimeError("a bug in the judge")
            case "errors":
                scores = [scorer_service_pb2.Score(error=f"cannot judge\n{s.completion}") for s in request.samples]
                return scorer_service_pb2.ScoreSamplesResponse(scores=scores)
        return scorer_service_pb2.ScoreSamplesResponse(
            scores=[scorer_service_pb2.Score(value=value) for value in values]
        )


def main() -> None:
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    scorer_service_pb2_grpc.add_ScorerServiceServicer_to_server(MisbehavingScorer(), server)
    port = server.add_insecure_port(sys.argv[1])
    server.start()
    print(port, flush=True)  # noqa: T201 - whoever starts it reads the port
    server.wait_for_termination()


if __name__ == "__main__":
    main()
