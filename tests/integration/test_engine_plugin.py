"""The plugin against the installed SGLang: every hook finds its target, and a hook that does not is said."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(300)

SCRIPT = """
from mint_engine.sglang_plugin.platform import activate
assert activate() in (None, "mint_engine.sglang_plugin.cpu_platform:MintCpuPlatform")
from mint_core.errors import FailedPrecondition
from mint_engine.sglang_plugin import hooks
hooks.apply_hooks()
hooks.apply_hooks()
hooks.self_check()
from sglang.srt.plugins.hook_registry import HookRegistry
assert {hook.target for hook in hooks.HOOKS} <= HookRegistry._patched
hooks.HOOKS += (hooks.Hook("sglang.srt.lora.lora_manager.LoRAManager.no_such_function", "AFTER", print, False),)
try:
    hooks.apply_hooks()
except FailedPrecondition as error:
    assert "LoRAManager.no_such_function" in error.message, error.message
else:
    raise SystemExit("a hook without target was not noticed")
try:
    hooks.register()
except SystemExit as end:
    assert end.code == 78
print("all said")
"""


def test_every_hook_applies_and_a_missing_target_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("all said")
    assert "mint-engine: MinT's SGLang plugin is not fully in place" in done.stderr
