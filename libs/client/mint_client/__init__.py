"""What the CLI, the services and users call MinT's RPCs with: thin, asynchronous, every call with a deadline.

=============================  ====================================================================
:class:`MintClient`              the public services (``mint.v1``), grouped: policies, revisions, aliases, …
:class:`Generation`              the whole answer of one generation
:mod:`mint_client.runtime`       the services between MinT's own processes (``mint.runtime.v1``)
=============================  ====================================================================

Resources are the generated messages of ``mint_api``; every failure is an error of :mod:`mint_core.errors`.
"""

from __future__ import annotations

from mint_client.catalog import run_has_ended
from mint_client.client import Endpoints, MintClient
from mint_client.generation import Generation, PromptLike, as_prompt
from mint_client.policies import ImportedPolicy

__all__ = ["Endpoints", "Generation", "ImportedPolicy", "MintClient", "PromptLike", "as_prompt", "run_has_ended"]
