"""What the call being served knows about itself: who asked, for what, and until when an answer is of use.

Set by the server's interceptor, read by domain code and by outgoing calls, which inherit the deadline.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from mint_core import clock

__all__ = ["ANONYMOUS", "PRINCIPAL_KEY", "inbound_call", "method", "principal", "remaining_s"]

PRINCIPAL_KEY = "mint-principal"
"""Metadata key that names the caller between services."""

ANONYMOUS = "anonymous"

_principal: contextvars.ContextVar[str] = contextvars.ContextVar("mint_principal", default=ANONYMOUS)
_method: contextvars.ContextVar[str] = contextvars.ContextVar("mint_method", default="")
_deadline: contextvars.ContextVar[float | None] = contextvars.ContextVar("mint_deadline", default=None)


def principal() -> str:
    """Who makes the call being served."""
    return _principal.get()


def method() -> str:
    """Full name of the RPC being served, like ``mint.v1.AliasService/PromoteAlias``, or of a job of the process's own;
    empty outside of both."""
    return _method.get()


def remaining_s() -> float | None:
    """Seconds left until the inbound deadline (never negative), or None where the caller set none."""
    deadline = _deadline.get()
    return None if deadline is None else max(0.0, deadline - clock.monotonic_s())


@contextlib.contextmanager
def inbound_call(caller: str, time_remaining_s: float | None, method: str = "") -> Iterator[None]:
    """Serve a call: outgoing calls made inside carry its principal and at most its deadline.

    ``method`` is the RPC's full name without the leading slash; empty keeps the one of the call around this one.
    """
    deadline = None if time_remaining_s is None else clock.monotonic_s() + time_remaining_s
    principal_token, deadline_token = _principal.set(caller), _deadline.set(deadline)
    method_token = _method.set(method or _method.get())
    try:
        yield
    finally:
        # A streaming handler may be closed by the event loop in another context, where the tokens are foreign;
        # the variables of this context die with it then.
        with contextlib.suppress(ValueError):
            _principal.reset(principal_token)
            _deadline.reset(deadline_token)
            _method.reset(method_token)
