from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from etcd3aio import _protobuf as pb

from mint_catalog.settings import EtcdSettings
from mint_catalog.storage.etcd import EtcdStore, _target, translate
from mint_catalog.storage.store import LeaseGone
from mint_core import errors
from mint_core.calls import inbound_call


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, empty, empty, details=details)


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        ("OUT_OF_RANGE", "etcdserver: mvcc: required revision has been compacted", errors.RevisionCompacted),
        ("OUT_OF_RANGE", "etcdserver: mvcc: required revision is a future revision", errors.OutOfRange),
        ("NOT_FOUND", "etcdserver: requested lease not found", LeaseGone),
        ("RESOURCE_EXHAUSTED", "etcdserver: mvcc: database space exceeded", errors.ResourceExhausted),
        ("RESOURCE_EXHAUSTED", "etcdserver: too many requests", errors.Unavailable),
        ("INVALID_ARGUMENT", "etcdserver: request is too large", errors.ResourceExhausted),
        ("UNAVAILABLE", "etcdserver: no leader", errors.Unavailable),
        ("DEADLINE_EXCEEDED", "", errors.Unavailable),
        ("FAILED_PRECONDITION", "etcdserver: not leader", errors.Unavailable),
        ("UNAUTHENTICATED", "etcdserver: invalid auth token", errors.FailedPrecondition),
    ],
)
def test_etcds_errors_become_ours(code: str, details: str, expected: type[Exception]) -> None:
    translated = translate(_error(grpc.StatusCode[code], details), "a read")
    assert type(translated) is expected


def test_many_endpoints_are_one_target() -> None:
    assert _target(["etcd.example:2379"]) == "dns:///etcd.example:2379"
    assert _target(["127.0.0.1:1", "localhost:2"]) == "ipv4:127.0.0.1:1,127.0.0.1:2"


@pytest.mark.parametrize(
    ("version", "fits", "warns"),
    [
        ("3.4.21", False, False),
        ("3.3.27", False, False),
        ("garbage", False, False),
        ("3.4.22", True, False),
        ("3.5.0", True, True),
        ("3.5.2", True, True),
        ("3.5.3", True, False),
        ("3.6.0-rc.1", True, False),
    ],
)
async def test_an_unfit_etcd_is_refused_and_a_bad_one_warned_of(
    version: str, fits: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with EtcdStore(EtcdSettings()) as store:

        async def status(*_: Any, **__: Any) -> pb.StatusResponse:
            return pb.StatusResponse(version=version)

        store._call = status  # type: ignore[method-assign, assignment]
        if fits:
            assert await store.check_version() == version
        else:
            with pytest.raises(errors.FailedPrecondition, match=r"3\.4\.22"):
                await store.check_version()
    assert ("corrupt" in caplog.text) is warns


async def test_a_call_takes_no_longer_than_its_caller_waits() -> None:
    async with EtcdStore(EtcdSettings(endpoints=["127.0.0.1:1"], call_timeout_s=5)) as store:
        with inbound_call("ada", 0.2):
            assert store._timeout_s() <= 0.2
            await asyncio.sleep(0.25)
            with pytest.raises(errors.DeadlineExceeded):
                await store.get([b"x"])
        assert store._timeout_s() == 5
