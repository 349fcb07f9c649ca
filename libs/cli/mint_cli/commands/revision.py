"""`mint revision`: what a policy has published."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from mint_api.v1 import revision_service_pb2
from mint_cli.commands import revision_files
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import flatten, print_json, print_pairs, print_table, to_plain
from mint_cli.references import policy_name, revision_name, short
from mint_client import MintClient

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Revisions: immutable exports of a policy.")

app.command(name="import")(revision_files.import_)
app.command(name="export")(revision_files.export)
app.command(name="diff")(revision_files.diff)


@app.callback()
def _group() -> None:
    """Revisions: immutable exports of a policy."""


@app.command(name="list")
def list_(
    policy: Annotated[str, typer.Argument(help="tenant/policy")],
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List a policy's revisions, oldest first, with the aliases that point at them."""
    name = str(policy_name(policy))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> tuple[list[revision_service_pb2.Revision], dict[int, list[str]]]:
        async with MintClient(endpoints) as client:
            revisions = [revision async for revision in client.revisions.list(name)]
            aliases: dict[int, list[str]] = {}
            for alias in await client.aliases.list(name):
                aliases.setdefault(alias.active.revision_number, []).append(alias.name.rpartition("/")[2])
            return revisions, aliases

    revisions, aliases = asyncio.run(call())
    plain = [to_plain(revision) | {"aliases": aliases.get(revision.number, [])} for revision in revisions]
    if json_output:
        print_json({"revisions": plain})
        return
    rows = [
        [
            revision.number,
            document["state"],
            ", ".join(document["aliases"]),
            revision.lineage.step,
            revision.lineage.run.rpartition("/")[2],
            revision.blob.size_bytes,
            revision.blob.digest,
        ]
        for revision, document in zip(revisions, plain, strict=True)
    ]
    print_table(["NUMBER", "STATE", "ALIASES", "STEP", "RUN", "BYTES", "DIGEST"], rows)


RevisionArgument = Annotated[str, typer.Argument(help="tenant/policy@NUMBER")]
EtagOption = Annotated[str, typer.Option(help="Fail with ETAG_MISMATCH unless the revision still has it.")]


@app.command()
def show(
    revision: RevisionArgument,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show a revision: its blob, where it came from, who signed it."""
    name = str(revision_name(revision))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> revision_service_pb2.Revision:
        async with MintClient(endpoints) as client:
            return await client.revisions.get(name)

    plain = to_plain(asyncio.run(call()))
    if json_output:
        print_json(plain)
    else:
        print_pairs([(key, value) for key, value in flatten(plain) if value not in ("", None)])


@app.command()
def retire(
    revision: RevisionArgument,
    etag: EtagOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Forbid new promotions of a revision; where an alias points at it, it goes on serving."""
    name = str(revision_name(revision))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> revision_service_pb2.Revision:
        async with MintClient(endpoints) as client:
            return await client.revisions.retire(name, etag=etag)

    retired = asyncio.run(call())
    if json_output:
        print_json(to_plain(retired))
    else:
        print(f"{short(name)} is RETIRED")


@app.command()
def delete(
    revision: RevisionArgument,
    etag: EtagOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Delete a retired revision that no alias points at or has in its history. Its number is not given again."""
    name = str(revision_name(revision))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> None:
        async with MintClient(endpoints) as client:
            await client.revisions.delete(name, etag=etag)

    asyncio.run(call())
    if json_output:
        print_json({"name": name})
    else:
        print(f"deleted {short(name)}")
