"""The README's lines for grpcurl and buf work exactly as they are printed."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from mint_core.errors import NotFound
from support.publishing import import_revision
from support.stack import Stack, write_random_adapter

README = Path(__file__).parents[2] / "README.md"
MARK = "<!-- run by tests/integration/test_readme_commands.py -->\n```bash\n"


async def test_grpcurl_and_buf_lines_work_as_printed(stack: Stack, work: Path) -> None:
    async with stack.client() as client:
        policy = "tenants/acme/policies/triage"
        try:
            await client.policies.get(policy)
        except NotFound:
            await client.policies.create("acme", "triage", base_model=stack.base_model)
        revision = await import_revision(
            stack, client, policy, write_random_adapter(work / "adapter", stack.base, seed=5)
        )
        await client.aliases.promote(f"{policy}/aliases/live", revision.number)
    script = README.read_text().split(MARK)[1].split("```")[0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = await asyncio.to_thread(
        subprocess.run,
        ["bash", "-euo", "pipefail", "-c", script],
        env=stack.environ() | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    for service in ("mint.v1.AliasService", "mint.v1.PolicyService", "grpc.health.v1.Health"):
        assert service in done.stdout
    assert revision.blob.digest in done.stdout
    assert "FINISH_REASON_LENGTH" in done.stdout or "FINISH_REASON_STOP" in done.stdout
    assert '"name": "tenants/acme/policies/triage"' in done.stdout
