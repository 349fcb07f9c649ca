"""Finds the scorer that a recipe names.

Recipes name scorers and nothing else: what runs inside the operator's network, and what is called there, the operator
alone decides, by installing packages and by ``runs.remote_scorers``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Mapping

from mint_core.errors import InvalidArgument, NotFound
from mint_runs.scoring.local import local_scoring
from mint_runs.scoring.outcome import Scoring
from mint_runs.scoring.remote import remote_scoring
from mint_runs.settings import RunsSettings
from mint_scorers import installed_scorers

__all__ = ["open_scorer"]


@contextlib.asynccontextmanager
async def open_scorer(
    name: str, options: Mapping[str, str], *, timeout_s: float, settings: RunsSettings
) -> AsyncIterator[Scoring]:
    """The scorer ``name``, ready inside the block; each sample may take it ``timeout_s``.

    Raises :class:`InvalidArgument` for a time-out that is no positive number and for options that an installed scorer
    does not take, :class:`NotFound` for an unknown name, :class:`FailedPrecondition` if the scorer cannot be made, and
    :class:`Unavailable` if its process cannot be started now. A remote scorer is not asked before the first batch.
    """
    if not 0 < timeout_s < math.inf:
        raise InvalidArgument(
            f"scorer_timeout_s is {timeout_s:g}: expected seconds, more than 0", field="scorer_timeout_s"
        )
    address = settings.remote_scorers.get(name)
    if address is not None:
        scoring = remote_scoring(
            name, options, address=address, timeout_s=timeout_s, max_message_bytes=settings.max_message_bytes
        )
    else:
        known = sorted({*await asyncio.to_thread(installed_scorers), *settings.remote_scorers})
        if name not in known:
            raise NotFound(
                f"there is no scorer {name!r}; this worker has {', '.join(known) or 'none'}", metadata={"scorer": name}
            )
        scoring = local_scoring(name, options, timeout_s=timeout_s)
    async with scoring as ready:
        yield ready
