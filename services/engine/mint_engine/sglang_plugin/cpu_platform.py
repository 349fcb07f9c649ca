"""SGLang's CPU platform under MinT's name, so that a process can tell that the plugin is in place."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuSRTPlatform

__all__ = ["MintCpuPlatform"]


class MintCpuPlatform(CpuSRTPlatform):
    """The in-tree CPU platform; its identity stays CPU, so every ``is_cpu()`` branch of SGLang is kept."""

    device_name = "cpu"
