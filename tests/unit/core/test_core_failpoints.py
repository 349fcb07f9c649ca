"""Named places where a process can be made to die, fail, wait or stand still."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mint_core import errors, failpoints


def test_failpoints_act_only_when_armed() -> None:
    point = failpoints.declare("unit.example", "an example")
    point()
    failpoints.arm_from_environment({"MINT_FAILPOINTS": "unit.example=error@2"})
    point()
    with pytest.raises(errors.Unavailable, match=r"unit\.example"):
        point()
    point()
    failpoints.arm_from_environment({})
    with pytest.raises(ValueError, match="twice"):
        failpoints.declare("unit.example", "again")
    with pytest.raises(ValueError, match="expected NAME"):
        failpoints.arm_from_environment({"MINT_FAILPOINTS": "unit.example=explode"})
    failpoints.arm_from_environment({})


def test_a_failpoint_kills_its_process() -> None:
    code = "from mint_core import failpoints; failpoints.declare('unit.kill', 'x')(); print('alive')"
    environ = os.environ | {"MINT_FAILPOINTS": "unit.kill=kill"}
    died = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=False, timeout=60)
    assert died.returncode == -signal.SIGKILL
    assert died.stdout == b""


def test_a_stopping_failpoint_says_so_and_goes_on_at_sigcont() -> None:
    code = (
        "from mint_core import failpoints, log; log.configure('unit')\n"
        "point = failpoints.declare('unit.stop', 'x'); point(); print('between', flush=True); point(); print('beyond')"
    )
    environ = os.environ | {"MINT_FAILPOINTS": "unit.stop=stop@2"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            # Returns when the process is stopped; a child that ended instead would not satisfy it.
            assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_status == signal.SIGSTOP
            assert Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
            assert process.stdout is not None
            assert process.stderr is not None
            line = json.loads(process.stderr.readline())
            assert (line["message"], line["failpoint"], line["pid"]) == (failpoints.STOPPING, "unit.stop", process.pid)
            assert process.stdout.readline() == "between\n"
            process.send_signal(signal.SIGCONT)
            assert process.communicate(timeout=60) == ("beyond\n", "")
        finally:
            process.kill()
    assert process.returncode == 0
