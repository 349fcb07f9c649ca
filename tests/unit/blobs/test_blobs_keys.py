from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_blobs.keys import blob_key, blob_prefix, check_key, rollout_key, rollout_prefix, state_keys
from mint_core.errors import InvalidArgument
from mint_core.names import PolicyName

DIGEST = "sha256:" + "ab" * 32


def test_layout() -> None:
    assert blob_key("acme", DIGEST, "s-1") == f"tenants/acme/blobs/{'ab' * 32}/s-1"
    assert blob_prefix("acme") == "tenants/acme/blobs/"
    keys = state_keys(PolicyName("acme", "support"), "run-7", 40, 123)
    assert keys.weights == "tenants/acme/states/support/run-7/00000040-123/weights.safetensors"
    assert keys.optimizer == "tenants/acme/states/support/run-7/00000040-123/optimizer.safetensors"
    assert keys.state == "tenants/acme/states/support/run-7/00000040-123/state.json"
    rollout = rollout_key(PolicyName("acme", "support"), "run-7", 40, 123)
    assert rollout == "tenants/acme/rollouts/support/run-7/00000040-123"
    assert rollout.startswith(rollout_prefix(PolicyName("acme", "support"), "run-7"))
    assert not rollout.startswith(rollout_prefix(PolicyName("acme", "support"), "run"))
    for key in (rollout, keys.weights, keys.optimizer, keys.state, blob_key("acme", DIGEST, "s-1")):
        assert check_key(key) == key


@pytest.mark.parametrize("tenant", ["", "..", "A", "a/b", "../b", "a" * 64, "a..b"])
def test_no_name_leaves_its_tenant(tenant: str) -> None:
    with pytest.raises(InvalidArgument, match="tenant"):
        blob_key(tenant, DIGEST, "s")
    with pytest.raises(InvalidArgument, match="stage_id"):
        blob_key("acme", DIGEST, tenant)
    with pytest.raises(InvalidArgument, match="run"):
        state_keys(PolicyName("acme", "p"), tenant, 1, 1)
    with pytest.raises(InvalidArgument, match="run"):
        rollout_key(PolicyName("acme", "p"), tenant, 1, 1)


@pytest.mark.parametrize("digest", ["", "ab" * 32, "sha256:" + "AB" * 32, "sha256:" + "ab" * 31, "md5:" + "ab" * 32])
def test_only_digests_are_digests(digest: str) -> None:
    with pytest.raises(InvalidArgument, match="digest"):
        blob_key("acme", digest, "s")


def test_negative_step() -> None:
    with pytest.raises(InvalidArgument, match="-1"):
        state_keys(PolicyName("acme", "p"), "r", -1, 1)
    with pytest.raises(InvalidArgument, match="-2"):
        rollout_key(PolicyName("acme", "p"), "r", 1, -2)


@given(st.text(max_size=40))
def test_accepted_keys_are_relative_plain_paths(text: str) -> None:
    try:
        check_key(text)
    except InvalidArgument:
        return
    assert text.isascii()
    assert text.isprintable()
    assert not set(text.split("/")) & {"", ".", ".."}
