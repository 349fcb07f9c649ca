"""`mint revision import`, `export` and `diff`: adapters as PEFT folders."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer

from mint_api.runtime.v1 import exporter_service_pb2 as pb
from mint_api.v1 import revision_service_pb2
from mint_cli.endpoints import find_endpoints, find_runtime_address, state_dir
from mint_cli.options import ExporterOption, ExporterRuntimeOption, JsonOption, StateDirOption
from mint_cli.output import print_json, print_pairs, print_table, to_plain
from mint_cli.references import policy_name, revision_name, short
from mint_client import MintClient
from mint_client.runtime import ExporterClient
from mint_core.errors import InvalidArgument

__all__ = ["diff", "export", "import_"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def import_(
    policy: Annotated[str, typer.Argument(help="tenant/policy")],
    source: Annotated[
        Path | None, typer.Argument(help="A PEFT folder, or a tar, tar.gz or zip of one.", show_default=False)
    ] = None,
    object_key: Annotated[
        str, typer.Option("--object", help="Instead: key of an object below tenants/TENANT/imports/.")
    ] = "",
    digest: Annotated[str, typer.Option(help="Of that object, sha256:HEX, where the store does not know it.")] = "",
    data_digest: Annotated[str, typer.Option(help="Digest of the training data, kept with the revision.")] = "",
    recipe: Annotated[str, typer.Option(help="How it was trained, kept with the revision.")] = "",
    code_version: Annotated[str, typer.Option(help="Of what trained it, kept with the revision.")] = "",
    exporter: ExporterOption = "",
    exporter_runtime: ExporterRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Publish a LoRA adapter that PEFT saved as the policy's next revision. Pickled adapters are refused."""
    name = policy_name(policy)
    if (source is None) == (not object_key):
        raise InvalidArgument("name a folder or archive, or give --object KEY, one of the two", field="source")
    lineage = revision_service_pb2.Lineage(data_digest=data_digest, recipe=recipe, code_version=code_version)
    state = state_dir(state_path)
    runtime = find_runtime_address(state, "exporter", given=exporter_runtime)

    async def call() -> revision_service_pb2.Revision:
        async with ExporterClient(runtime) as importing:
            if source is None:
                return await importing.import_object(str(name), object_key, digest=digest, lineage=lineage)
            endpoints = find_endpoints(state, exporter=exporter, needed=("exporter",))
            async with MintClient(endpoints) as client:
                if not source.is_dir():
                    archive = await client.blobs.upload(name.tenant, source)
                    return await importing.import_archive(str(name), archive, lineage=lineage)
                config = _config(source)
                weights = await client.blobs.upload(name.tenant, source / _WEIGHTS)
                return await importing.import_revision(str(name), weights, config, lineage=lineage)

    revision = asyncio.run(call())
    if json_output:
        print_json(to_plain(revision))
    else:
        print(f"{short(revision.name)} is {revision.blob.digest} ({revision.blob.size_bytes} bytes)")


def export(
    revision: Annotated[str, typer.Argument(help="tenant/policy@NUMBER")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    layout: Annotated[
        str,
        typer.Option(help="Tensor layout: peft-1 (a tensor for each expert) or peft-parameters-1 (fused experts)."),
    ] = "",
    exporter_runtime: ExporterRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write a revision as a folder that `PeftModel.from_pretrained` loads."""
    name = str(revision_name(revision))
    address = find_runtime_address(state_dir(state_path), "exporter", given=exporter_runtime)

    async def call() -> None:
        async with ExporterClient(address) as exporting:
            await exporting.export_peft(name, folder, layout=layout)

    asyncio.run(call())
    if json_output:
        print_json({"revision": name, "folder": str(folder)})
    else:
        print(f"{short(name)} is in {folder}")


def diff(
    revision: Annotated[str, typer.Argument(help="tenant/policy@NUMBER")],
    other: Annotated[str, typer.Argument(help="tenant/policy@NUMBER of the same tenant")],
    show: Annotated[int, typer.Option("--show", min=0, help="Modules shown, most changed first.")] = 20,
    exporter_runtime: ExporterRuntimeOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Compare two revisions: configuration, and the change each makes to the base, module by module."""
    names = str(revision_name(revision)), str(revision_name(other))
    address = find_runtime_address(state_dir(state_path), "exporter", given=exporter_runtime)

    async def call() -> pb.DiffRevisionsResponse:
        async with ExporterClient(address) as exporting:
            return await exporting.diff(*names)

    response = asyncio.run(call())
    if json_output:
        print_json(to_plain(response))
        return
    total = response.total
    print_pairs(
        [
            *((f"{each.field}", f"{_value(each.value)} → {_value(each.other_value)}") for each in response.config),
            ("norm of delta W", f"{total.norm:.6g} → {total.other_norm:.6g}"),
            ("norm of the difference", f"{total.norm_difference:.6g}"),
            ("cosine", _cosine(total)),
            ("largest difference", _largest(total)),
        ]
    )
    modules = sorted(response.modules, key=lambda each: (-each.norm_difference, each.module))
    rows = [
        [
            each.module,
            f"{each.rank} → {each.other_rank}",
            f"{each.norm:.4g}",
            f"{each.other_norm:.4g}",
            f"{each.norm_difference:.4g}",
            _cosine(each),
            _largest(each),
        ]
        for each in modules[:show]
    ]
    if rows:
        print_table(["MODULE", "RANK", "NORM", "OTHER", "DIFFERENCE", "COSINE", "LARGEST"], rows)
    if len(modules) > show:
        print(f"and {len(modules) - show} more modules; --show {len(modules)} shows all")


def _config(folder: Path) -> str:
    try:
        return (folder / _CONFIG).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(
            f"cannot read {_CONFIG} in {str(folder)!r}: {error.strerror}; name a folder that PEFT saved", field="source"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{str(folder / _CONFIG)!r} is not UTF-8: {error}", field="source") from error


def _value(text: str) -> object:
    value = json.loads(text)
    return value if isinstance(value, (str, int, float)) else text


def _cosine(each: pb.ModuleDifference) -> str:
    return f"{each.cosine:.4f}" if each.HasField("cosine") else ""


def _largest(each: pb.ModuleDifference) -> str:
    return f"{each.max_abs_difference:.4g}" if each.max_is_exact else f"≤ {each.max_abs_difference:.4g}"
