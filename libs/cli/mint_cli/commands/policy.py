"""`mint policy`: policies of a tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mint_api.v1 import alias_service_pb2, common_pb2, policy_service_pb2
from mint_cli.commands.policy_import import import_
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, PolicyArgument, StateDirOption, key_values
from mint_cli.output import print_json, print_pairs, print_table, to_plain
from mint_cli.references import policy_name, short, tenant_id
from mint_client import MintClient
from mint_core.errors import FailedPrecondition

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Policies: named behaviours over a base model.")

app.command(name="import")(import_)

EtagOption = Annotated[str, typer.Option(help="Fail with ETAG_MISMATCH unless the policy still has it.")]


@app.command()
def create(
    policy: PolicyArgument,
    base_model: Annotated[str, typer.Option(help="baseModels/NAME.", show_default="the one of `mint up`")] = "",
    rank: Annotated[int, typer.Option(min=1, max=512, help="Rank of the adapter.")] = 16,
    alpha: Annotated[float, typer.Option(min=0, help="Scaling; 0 means twice the rank.")] = 0.0,
    target_module: Annotated[
        list[str] | None,
        typer.Option(help="Linear module that gets an adapter; repeat it.", show_default="the trainer's set"),
    ] = None,
    init_seed: Annotated[int, typer.Option(min=0, help="Seed of the initial weights.")] = 0,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; repeat it.")] = None,
    owner: Annotated[str, typer.Option(help="Who answers for it.")] = "",
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Create a policy."""
    name = policy_name(policy)
    labels = key_values(label, field="label")
    state = state_dir(state_path)
    endpoints = find_endpoints(state, catalog=catalog, needed=("catalog",))
    if not base_model:
        snapshot = state.snapshot()
        base_model = "" if snapshot is None else snapshot.base_model
        if not base_model:
            raise FailedPrecondition("the base model is not known: give --base-model baseModels/NAME")
    lora = common_pb2.LoraConfig(rank=rank, alpha=alpha, target_modules=target_module or [], init_seed=init_seed)

    async def call() -> policy_service_pb2.Policy:
        async with MintClient(endpoints) as client:
            return await client.policies.create(
                name.tenant,
                name.policy,
                base_model=base_model,
                lora=lora,
                labels=labels,
                owner=owner,
                description=description,
            )

    created = asyncio.run(call())
    if json_output:
        print_json(to_plain(created))
    else:
        print(f"created {short(created.name)}")


@app.command(name="list")
def list_(
    tenant: Annotated[str, typer.Argument(help="The tenant; - lists all tenants'.")],
    filter_: Annotated[
        str,
        typer.Option("--filter", help='Such as: state = PAUSED AND labels.team = "search" AND alias = "canary".'),
    ] = "",
    order_by: Annotated[
        str, typer.Option(help='"name", for one tenant.', show_default="the store's own, cheaper")
    ] = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List policies."""
    tenant = tenant if tenant == "-" else tenant_id(tenant)
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> list[policy_service_pb2.Policy]:
        async with MintClient(endpoints) as client:
            found = client.policies.list(tenant, restriction=filter_, order_by=order_by, page_size=1000)
            return [policy async for policy in found]

    policies = asyncio.run(call())
    if json_output:
        print_json({"policies": [to_plain(policy) for policy in policies]})
        return
    rows = [
        [
            short(policy.name),
            to_plain(policy)["state"],
            policy.base_model,
            policy.lora.rank,
            max(0, policy.next_revision_number - 1),
            policy.description,
        ]
        for policy in policies
    ]
    print_table(["POLICY", "STATE", "BASE MODEL", "RANK", "REVISIONS", "DESCRIPTION"], rows)


@app.command()
def describe(
    policy: PolicyArgument,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show a policy and its aliases."""
    name = str(policy_name(policy))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> tuple[policy_service_pb2.Policy, list[alias_service_pb2.Alias]]:
        async with MintClient(endpoints) as client:
            return await client.policies.get(name), await client.aliases.list(name)

    found, aliases = asyncio.run(call())
    plain: dict[str, Any] = to_plain(found)
    if json_output:
        print_json({"policy": plain, "aliases": [to_plain(alias) for alias in aliases]})
        return
    lora = found.lora
    print_pairs(
        [
            ("policy", short(found.name)),
            ("state", plain["state"]),
            ("base model", found.base_model),
            ("rank", lora.rank),
            ("alpha", lora.alpha),
            ("target modules", ", ".join(lora.target_modules) or "the trainer's set"),
            ("labels", ", ".join(f"{key}={value}" for key, value in sorted(found.labels.items()))),
            ("owner", found.owner),
            ("description", found.description),
            ("trained steps", found.latest_training_state.step),
            ("revisions", max(0, found.next_revision_number - 1)),
            *((f"@{alias.name.rpartition('/')[2]}", f"revision {alias.active.revision_number}") for alias in aliases),
        ]
    )


@app.command()
def delete(
    policy: PolicyArgument,
    etag: EtagOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Delete a policy and its aliases; undelete brings them back within the grace period."""
    name = str(policy_name(policy))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> None:
        async with MintClient(endpoints) as client:
            await client.policies.delete(name, etag=etag)

    asyncio.run(call())
    if json_output:
        print_json({"name": name})
    else:
        print(f"deleted {short(name)}")


@app.command()
def undelete(
    policy: PolicyArgument,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Bring back a deleted policy with its aliases."""
    name = str(policy_name(policy))
    _change("undeleted", lambda client: client.policies.undelete(name), catalog, state_path, json_output)


@app.command()
def pause(
    policy: PolicyArgument,
    etag: EtagOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Take no new runs and promotions; what is served goes on."""
    name = str(policy_name(policy))
    _change("paused", lambda client: client.policies.pause(name, etag=etag), catalog, state_path, json_output)


@app.command()
def resume(
    policy: PolicyArgument,
    etag: EtagOption = "",
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Take runs and promotions again."""
    name = str(policy_name(policy))
    _change("resumed", lambda client: client.policies.resume(name, etag=etag), catalog, state_path, json_output)


def _change(
    done: str,
    change: Callable[[MintClient], Awaitable[policy_service_pb2.Policy]],
    catalog: str,
    state_path: Path | None,
    json_output: bool,
) -> None:
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> policy_service_pb2.Policy:
        async with MintClient(endpoints) as client:
            return await change(client)

    changed = asyncio.run(call())
    if json_output:
        print_json(to_plain(changed))
    else:
        print(f"{done} {short(changed.name)}")
