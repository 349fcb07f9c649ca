"""Running the CLI as a user does, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys

__all__ = ["run_mint"]


async def run_mint(*arguments: str, **environ: str) -> tuple[int, str]:
    """Exit code of ``mint ARGUMENTS``, and what it printed. AWS's and MinT's own variables are not inherited."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MINT_"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mint_cli", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=inherited | environ,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()
