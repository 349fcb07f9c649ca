"""`mint replica`: the engines that serve a base, one by one."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from mint_api.v1 import engine_replica_service_pb2 as pb
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import CatalogOption, JsonOption, StateDirOption
from mint_cli.output import print_json, print_table, to_plain
from mint_client import MintClient
from mint_client.engines import EngineClient
from mint_core.errors import MintError
from mint_core.names import EngineReplicaName

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Engine replicas: who serves, and taking one out of service.")

_LOOK_TIMEOUT_S = 2.0

ReplicaArgument = Annotated[str, typer.Argument(help="Its name, with or without engineReplicas/.")]


@app.command("list")
def list_(catalog: CatalogOption = "", state_path: StateDirOption = None, json_output: JsonOption = False) -> None:
    """List the registered engine replicas, and what each says that it holds and runs."""
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> list[dict[str, Any]]:
        async with MintClient(endpoints) as client:
            replicas = await client.engine_replicas.list()
        return list(await asyncio.gather(*map(_described, replicas)))

    described = asyncio.run(call())
    if json_output:
        print_json({"engine_replicas": described})
        return
    keys = ("name", "state", "base_model", "address", "num_running", "num_resident", "max_loaded_adapters", "num_slots")
    rows = [["?" if each[key] is None else each[key] for key in keys] for each in described]
    print_table(["NAME", "STATE", "BASE", "ADDRESS", "RUNNING", "RESIDENT", "MOST", "SLOTS"], rows)


@app.command()
def drain(
    replica: ReplicaArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Return when what runs has finished.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0, help="How long --wait waits, in seconds.")] = 600.0,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Let a replica finish what runs and give it nothing new, until it is taken back or restarted."""
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> tuple[pb.EngineReplica, int]:
        async with MintClient(endpoints) as client:
            known = await client.engine_replicas.get(_name(replica))
        async with EngineClient(known.address) as engine:
            drained = await engine.drain()
            if not wait:
                return drained.engine_replica, drained.num_running
            await engine.wait_idle(timeout_s=timeout_s)
            return drained.engine_replica, 0

    described, num_running = asyncio.run(call())
    if json_output:
        print_json(to_plain(described) | {"num_running": num_running})
    else:
        print(f"{described.name} is draining; {num_running} streams run")


@app.command()
def undrain(
    replica: ReplicaArgument,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Take a drained replica back."""
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> pb.EngineReplica:
        async with MintClient(endpoints) as client:
            known = await client.engine_replicas.get(_name(replica))
        async with EngineClient(known.address) as engine:
            return (await engine.undrain()).engine_replica

    described = asyncio.run(call())
    if json_output:
        print_json(to_plain(described))
    else:
        print(f"{described.name} takes requests")


def _name(text: str) -> str:
    name = text if "/" in text else f"engineReplicas/{text}"
    return str(EngineReplicaName.parse(name, field="replica"))


async def _described(replica: pb.EngineReplica) -> dict[str, Any]:
    """The registry's record, with what the replica says now; null if it does not answer."""
    plain = to_plain(replica) | {"num_running": None, "num_resident": None}
    try:
        async with EngineClient(replica.address) as engine:
            now = await engine.residency(timeout_s=_LOOK_TIMEOUT_S)
    except MintError:
        return plain
    return plain | {"num_running": now.num_running, "num_resident": len(now.adapters)}
