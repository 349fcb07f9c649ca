"""`mint catalog gc`."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from mint_api.runtime.v1 import maintenance_service_pb2 as pb
from mint_cli.endpoints import find_runtime_address, state_dir
from mint_cli.options import CatalogRuntimeOption, JsonOption, StateDirOption
from mint_cli.output import print_json, print_pairs, progress_console, to_plain
from mint_client.garbage import GarbageClient

__all__ = ["gc"]

_MAX_SHOWN = 20


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, and do nothing.")] = False,
    catalog_runtime: CatalogRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Collect garbage now: blobs that nothing refers to, unfinished uploads, and what is past its time.

    A blob is condemned by one collection and deleted by one that begins an hour later or more.
    """
    address = find_runtime_address(state_dir(state_path), "catalog", given=catalog_runtime)

    async def call() -> pb.GarbageReport:
        report = pb.GarbageReport()
        shown = progress_console()
        async with GarbageClient(address) as client:
            async for response in client.collect(dry_run=dry_run):
                report = response.report
                if not json_output:
                    shown.print(response.step)
        return report

    report = asyncio.run(call())
    if json_output:
        print_json(to_plain(report))
        return
    counts = {field.name: getattr(report, field.name) for field in report.DESCRIPTOR.fields if field.name != "examples"}
    print_pairs([(name.replace("_", " ").removeprefix("num "), value) for name, value in counts.items()])
    for name in report.examples[:_MAX_SHOWN]:
        print(f"  {name}")
    if len(report.examples) > _MAX_SHOWN:
        print(f"  and {len(report.examples) - _MAX_SHOWN} more names; --json shows up to 1000")
