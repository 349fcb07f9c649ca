import inspect
import os
import signal
import subprocess
import sys

import pytest

from mint_api.v1 import error_reason_pb2
from mint_core import errors, failpoints, status


def test_all_names_every_public_class() -> None:
    public = [
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.MintError)
    ]
    assert sorted(public) == errors.__all__


def test_reasons_are_those_of_the_contract() -> None:
    ours = {cls.reason for name in errors.__all__ if (cls := getattr(errors, name)) is not errors.MintError}
    contract = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert ours == contract - {"UNSPECIFIED"}


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "MintError"])
def test_every_error_survives_the_wire(name: str) -> None:
    cls = getattr(errors, name)
    error = cls("what, which value, what to do", metadata={"resource": "x"}, retry_after_s=0.25)
    back = status.error_from_status(status.to_status(error))
    assert type(back) is cls
    assert (back.message, back.metadata, back.retry_after_s) == (error.message, error.metadata, 0.25)


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
