"""`mint catalog backup` and `mint catalog restore`."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import tomllib
from typing import Annotated, Any

import typer

from mint_api.runtime.v1 import maintenance_service_pb2 as pb
from mint_blobs.settings import ObjectStoreSettings
from mint_cli.backup_files import BackupPlace, BackupReader, write_backup
from mint_cli.endpoints import find_runtime_address, state_dir
from mint_cli.options import CatalogRuntimeOption, JsonOption, StateDirOption
from mint_cli.output import print_json, progress_console, to_plain
from mint_cli.references import short
from mint_cli.state import StateDir
from mint_client.backups import BackupClient
from mint_core.errors import FailedPrecondition, MintError

__all__ = ["backup", "restore"]

_PLACE = "A file, - for {}, or s3://BUCKET/KEY."


def backup(
    out: Annotated[str, typer.Argument(help=_PLACE.format("standard output"))],
    catalog_runtime: CatalogRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write down everything the catalog holds, as of one revision. Blobs are not part of it."""
    place, state = BackupPlace.parse(out), state_dir(state_path)
    address = find_runtime_address(state, "catalog", given=catalog_runtime)

    async def call() -> pb.BackupTrailer:
        async with BackupClient(address) as client, place.writing(_store(state)) as write:
            with progress_console().status("backing up") as status:
                return await write_backup(
                    client.backup(), write, lambda num: status.update(f"backing up: {num} records")
                )

    began = time.monotonic()
    trailer = asyncio.run(call())
    took_s = time.monotonic() - began
    if place.is_standard_stream:
        print(f"{trailer.num_records} records in {took_s:.1f} s, {trailer.digest}", file=sys.stderr)
    elif json_output:
        print_json({**to_plain(trailer), "place": out})
    else:
        print(f"{out}: {trailer.num_records} records in {took_s:.1f} s, {trailer.digest}")


def restore(
    source: Annotated[str, typer.Argument(metavar="IN", help=_PLACE.format("standard input"))],
    catalog_runtime: CatalogRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write a backup into an empty catalog, whole or not at all, and tell which blobs are missing."""
    place, state = BackupPlace.parse(source), state_dir(state_path)
    address = find_runtime_address(state, "catalog", given=catalog_runtime)

    async def call() -> pb.RestoreResponse:
        with progress_console().status("restoring") as status:
            reader = BackupReader(
                place.reading(_store(state)), source, lambda num: status.update(f"restoring: {num} records sent")
            )
            async with BackupClient(address) as client:
                try:
                    return await client.restore(reader.parts())
                except MintError:
                    if reader.failure is not None:
                        raise reader.failure from None
                    raise

    began = time.monotonic()
    response = asyncio.run(call())
    took_s = time.monotonic() - began
    if json_output:
        print_json(to_plain(response))
        return
    print(f"restored {response.num_records} records in {took_s:.1f} s")
    if not response.num_blobs_checked:
        print("no blobs were checked")
        return
    print(f"{response.num_missing_blobs} of {response.num_blobs_checked} blobs are missing")
    for name in response.missing_blobs:
        print(f"  {short(name)}")


def _store(state: StateDir) -> ObjectStoreSettings:
    """How S3 is reached: as AWS's variables say if there are any, else as the installation's services do it."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if not (endpoint or os.environ.get("AWS_ACCESS_KEY_ID")) and state.settings_path.is_file():
        try:
            document: dict[str, Any] = tomllib.loads(state.settings_path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise FailedPrecondition(f"cannot read {state.settings_path}: {error}; run `mint up` again") from error
        return ObjectStoreSettings.model_validate(document.get("common", {}).get("object_store", {}))
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return ObjectStoreSettings(endpoint_url=endpoint, region=region, path_style=bool(endpoint))
