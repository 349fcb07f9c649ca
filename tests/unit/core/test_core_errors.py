import inspect

import pytest

from mint_api.v1 import error_reason_pb2
from mint_core import errors, status


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
