"""``python -m demo``: start everything, live one policy's life, check every claim, leave nothing behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from demo.life import Plan, Say, live_one_life
from demo.report import Report
from mint_api.runtime.v1 import engine_service_pb2, engine_service_pb2_grpc
from mint_client import Endpoints, MintClient
from mint_core.channel import call, connect
from mint_core.errors import MintError

FOLDER = Path(__file__).parent
MINT = Path(sys.executable).parent / "mint"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of initial weights and of the order of examples")
    parser.add_argument("--report", type=Path, default=FOLDER / "report.json", help="where the report is written")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    start_s = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - start_s:6.1f} s[/]  {text}", highlight=False)

    # Ended from outside, it still stops what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.report.unlink(missing_ok=True)  # an old report must not pass for a new one
    try:
        base = Path(mint("model", "fetch", "--json")["folder"])
        say(f"base model in {base}")
        with everything_up(base) as services:
            say(f"{len(services)} services are up: {', '.join(sorted(services))}")
            report = asyncio.run(live(base, services, options.seed, say))
    except MintError as error:
        console.print(f"[red]{error.reason}[/]: {error.message}", highlight=False)
        return 1
    report.seconds["total"] = time.perf_counter() - start_s
    report.write(options.report)
    report.show(console)
    console.print(f"report: {options.report}; {report.seconds['total']:.0f} s in all")
    return 0 if all(report.claims().values()) else 1


def mint(*arguments: str) -> dict[str, str]:
    """Run the command line tool, its own way for programs: ``--json``."""
    done = subprocess.run([MINT, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"mint {' '.join(arguments)} ended with status {done.returncode}")
    return json.loads(done.stdout) if "--json" in arguments else {}


@contextmanager
def everything_up(base: Path) -> Iterator[dict[str, dict[str, str]]]:
    """All services in a folder of their own; yields their addresses by name."""
    with tempfile.TemporaryDirectory(prefix="mint-demo-") as state:
        try:
            mint("up", "--state-dir", state, "--base", str(base), "--dtype", "float32")
            document = json.loads((Path(state) / "services.json").read_text())
            yield {service["name"]: service for service in document["services"]}
        finally:
            mint("down", "--state-dir", state)


async def live(base: Path, services: dict[str, dict[str, str]], seed: int, say: Say) -> Report:
    endpoints = Endpoints(
        **{name: services[name]["address"] for name in ("catalog", "inference", "exporter", "trainer")}
    )
    plan = Plan(base_model=f"baseModels/{base.name}", data=FOLDER / "data", seed=seed)
    async with MintClient(endpoints) as client, connect(services["engine"]["runtime_address"]) as channel:
        engine = engine_service_pb2_grpc.EngineServiceStub(channel)

        async def flush_prefix_cache() -> None:
            await call(engine.FlushPrefixCache, engine_service_pb2.FlushPrefixCacheRequest())

        return await live_one_life(client, plan, say, flush_prefix_cache)


if __name__ == "__main__":
    raise SystemExit(main())
