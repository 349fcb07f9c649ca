"""Failures that were written down as ``REASON: sentence``, as errors again."""

from __future__ import annotations

from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from mint_core.errors import MintError
from mint_core.status import DOMAIN, error_from_status

__all__ = ["error_of"]


def error_of(text: str) -> MintError:
    """The error of a run's ``error`` field, or of a start that failed."""
    reason, colon, message = text.partition(": ")
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    status = status_pb2.Status(code=code_pb2.INTERNAL, message=message if colon else text)
    status.details.append(info)
    return error_from_status(status)
