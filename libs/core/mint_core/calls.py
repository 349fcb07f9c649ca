"""What the call being served knows about itself: who asked, for what, and until when an answer is of use.

Set by the server's interceptor, read by domain code and by outgoing calls, which inherit the deadline.
"""

from __future__ import annotations

import contextvars
from typing import Final, NamedTuple

from mint_core import clock

__all__ = ["ANONYMOUS", "PRINCIPAL_KEY", "inbound_call", "method", "principal", "remaining_s"]

PRINCIPAL_KEY = "mint-principal"
"""Metadata key that names the caller between services."""

ANONYMOUS = "anonymous"


class _Call(NamedTuple):
    principal: str
    method: str
    deadline_s: float | None
    """On the monotonic clock."""


_NONE: Final = _Call(ANONYMOUS, "", None)
# One variable for all three: it is set anew for each call that is served.
_call: contextvars.ContextVar[_Call] = contextvars.ContextVar("mint_call", default=_NONE)


def principal() -> str:
    """Who makes the call being served."""
    return _call.get().principal


def method() -> str:
    """Full name of the RPC being served, like ``mint.v1.AliasService/PromoteAlias``, or of a job of the process's own;
    empty outside of both."""
    return _call.get().method


def remaining_s() -> float | None:
    """Seconds left until the inbound deadline (never negative), or None where the caller set none."""
    deadline_s = _call.get().deadline_s
    return None if deadline_s is None else max(0.0, deadline_s - clock.monotonic_s())


class inbound_call:  # noqa: N801 - read as a verb: with inbound_call(...)
    """Serve a call: outgoing calls made inside carry its principal and at most its deadline.

    ``method`` is the RPC's full name without the leading slash; empty keeps the one of the call around this one. Use
    it once, as a context manager. (A class, as every call that is served passes it: a generator costs thrice as much.)
    """

    __slots__ = ("_call", "_token")

    def __init__(self, caller: str, time_remaining_s: float | None, method: str = "") -> None:
        deadline_s = None if time_remaining_s is None else clock.monotonic_s() + time_remaining_s
        self._call = _Call(caller, method or _call.get().method, deadline_s)

    def __enter__(self) -> None:
        self._token = _call.set(self._call)

    def __exit__(self, *exc: object) -> None:
        try:  # noqa: SIM105 - suppress() would be made anew for each call
            _call.reset(self._token)
        except ValueError:
            # A streaming handler may be closed by the event loop in another context, where the token is foreign;
            # the variable of this context dies with it then.
            pass
