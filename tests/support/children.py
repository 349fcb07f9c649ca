"""Starting servers that cannot outlive the test run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["dying_with_parent"]

# A test run that is itself killed cannot clean up; the kernel does it then (PR_SET_PDEATHSIG = 1). Set by a process
# of its own before it becomes the server: a preexec_fn would fork this process, and gRPC's threads do not survive that.
_BECOME = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); os.execvp(sys.argv[1], sys.argv[1:])"
)


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """``command``, under the same process id, but killed when the thread that starts it ends."""
    return [sys.executable, "-I", "-S", "-c", _BECOME, *command]
