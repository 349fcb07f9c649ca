"""`mint policy import`: many policies out of a file, with adapters that are stored already."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from google.protobuf import json_format

from mint_api.v1 import policy_service_pb2
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import print_json
from mint_cli.references import policy_name
from mint_client import MintClient
from mint_core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, MintError, RequestIdReused
from mint_core.names import PolicyName

__all__ = ["import_", "requests_of"]

_POLICY_FIELDS: Final = ("lora", "labels", "owner", "description", "quota")
_REQUEST_FIELDS: Final = ("revisions", "aliases", "request_id")
_MAX_SHOWN: Final = 20


@dataclass(slots=True)
class _Outcome:
    num_created: int = 0
    num_existing: int = 0
    num_failed: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    """The first ones."""

    def add(self, request: policy_service_pb2.CreatePolicyRequest, error: MintError | None, *, skip: bool) -> None:
        if error is None:
            self.num_created += 1
        elif skip and isinstance(error, AlreadyExists) and not isinstance(error, RequestIdReused):
            self.num_existing += 1
        else:
            self.num_failed += 1
            if len(self.failures) < _MAX_SHOWN:
                policy = f"{request.parent.removeprefix('tenants/')}/{request.policy_id}"
                self.failures.append({"policy": policy, "reason": error.reason, "message": error.message})


def import_(
    file: Annotated[Path, typer.Argument(help="JSON Lines, one policy a line; - reads standard input.")],
    base_model: Annotated[
        str, typer.Option(help="baseModels/NAME, for lines without base.", show_default="the one of `mint up`")
    ] = "",
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="A policy that exists already is no failure.")
    ] = False,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Create the policies of a file, thousands a second.

    A line holds name (tenant/policy), base, and optionally lora, labels, owner, description, quota, revisions (a list
    of adapters that are stored already: blob, lora, num_tensors, layout, lineage), aliases (alias: position in
    revisions) and request_id. What comes before a line that cannot be read is created.
    """
    state = state_dir(state_path)
    endpoints = find_endpoints(state, catalog=catalog, needed=("catalog",))
    snapshot = state.snapshot()
    default_base = base_model or (snapshot.base_model if snapshot is not None else "")

    async def call() -> _Outcome:
        outcome = _Outcome()
        async with MintClient(endpoints) as client:
            answers = client.policies.import_(requests_of(file, default_base))
            async with contextlib.aclosing(answers):
                async for imported in answers:
                    outcome.add(imported.request, imported.error, skip=skip_existing)
        return outcome

    outcome = asyncio.run(call())
    if json_output:
        print_json({name: getattr(outcome, name) for name in _Outcome.__dataclass_fields__})
    else:
        existing = f", {outcome.num_existing} existed already" if skip_existing else ""
        print(f"created {outcome.num_created} policies{existing}")
        for failure in outcome.failures:
            print("{policy}: {reason}: {message}".format(**failure), file=sys.stderr)
    if outcome.num_failed:
        raise FailedPrecondition(
            f"{outcome.num_failed} policies were not created, the first {len(outcome.failures)} of them are shown; "
            "mend their lines and import again with --skip-existing"
        )


async def requests_of(file: Path, default_base: str) -> AsyncIterator[policy_service_pb2.CreatePolicyRequest]:
    """The requests that a file's lines ask for. Raises ``InvalidArgument`` naming the line that is wrong."""
    with contextlib.ExitStack() as stack:
        lines = sys.stdin if str(file) == "-" else stack.enter_context(file.open(encoding="utf-8"))
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield _request(json.loads(line), default_base)
                except (ValueError, TypeError, json_format.Error, InvalidArgument) as error:
                    raise InvalidArgument(f"{file}, line {number}: {error}", field="file") from error


def _request(line: Any, default_base: str) -> policy_service_pb2.CreatePolicyRequest:
    if not isinstance(line, dict):
        raise TypeError(f"expected an object with name and base, got {type(line).__name__}")
    unknown = sorted(set(line) - {"name", "base", *_POLICY_FIELDS, *_REQUEST_FIELDS})
    if unknown:
        raise ValueError(
            f"unknown key {unknown[0]!r}: a policy has name, base, {', '.join(_POLICY_FIELDS)}, "
            f"{', '.join(_REQUEST_FIELDS)}"
        )
    name: PolicyName = policy_name(str(line.get("name", "")))
    base = line.get("base") or default_base
    if not base:
        raise ValueError("base is missing: give it in the line, or --base-model for all lines")
    policy = {"base_model": base} | {key: line[key] for key in _POLICY_FIELDS if key in line}
    fields = {key: line[key] for key in _REQUEST_FIELDS if key in line}
    request = policy_service_pb2.CreatePolicyRequest(parent=f"tenants/{name.tenant}", policy_id=name.policy)
    json_format.ParseDict({"policy": policy, **fields}, request)
    return request
