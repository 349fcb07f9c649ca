from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.catalog.catalog_lab import digest_of

from mint_api.runtime.v1 import publish_service_pb2
from mint_api.v1 import alias_service_pb2, policy_service_pb2, revision_service_pb2
from mint_catalog.model.codec import from_message, to_message
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.model.folding import fold_alias, fold_blob, fold_policy, fold_revision
from mint_catalog.model.keys import Keys
from mint_catalog.model.records import (
    AdapterSignature,
    Alias,
    AliasHistoryEntry,
    AliasTarget,
    Attribution,
    BlobRecord,
    BlobRef,
    BlobState,
    Canary,
    Lineage,
    LoraConfig,
    Policy,
    PolicyState,
    Resolution,
    Revision,
    RevisionState,
)
from mint_catalog.model.tables import Tables
from mint_catalog.storage.store import KeyValue
from mint_core.names import AliasName, BlobName, PolicyName, RevisionName

KEYS = Keys()
TABLES = Tables(KEYS, MessageCodecs.over(KEYS).for_store())
POLICY = PolicyName("acme", "tone")
REVISION = RevisionName("acme", "tone", 3)
ALIAS = AliasName("acme", "tone", "live")
UID = "0f8fad5b-d9cb-469f-a165-70867728950e"
STAGE = "7c9e6679f5ea4b0f8d0a1f2b3c4d5e6f"
DIGEST, BASE = digest_of("adapter"), digest_of("base")
OBJECT_KEY = f"tenants/acme/blobs/{DIGEST[7:]}/{STAGE}"
TIME = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
LORA = LoraConfig(16, 32.0)

HEAD = Policy(
    POLICY,
    UID,
    "baseModels/qwen3",
    BASE,
    LORA,
    state=PolicyState.ACTIVE,
    next_revision_number=2,
    create_time=TIME,
    update_time=TIME,
)
ADAPTER = Revision(
    REVISION,
    3,
    UID,
    BlobRef(DIGEST, 1_234_567),
    BASE,
    LORA,
    392,
    "packed-1",
    Lineage(f"{POLICY}/revisions/2", "tenants/acme/runs/r1", 40, digest_of("data"), "v1", "sft"),
    RevisionState.READY,
    TIME,
    OBJECT_KEY,
)
SIGNATURE = AdapterSignature(digest_of("key"), bytes(range(64)))
SIGNED = replace(ADAPTER, signature=SIGNATURE)
STORED = BlobRecord(BlobName("acme", DIGEST), BlobRef(DIGEST, 1_234_567), OBJECT_KEY, BlobState.VERIFIED, TIME)
LIVE = Alias(
    ALIAS,
    AliasTarget(3, DIGEST),
    (AliasHistoryEntry(AliasTarget(3, DIGEST), Attribution("ada", TIME)),),
    UID,
    TIME,
    Resolution(str(REVISION), ADAPTER.blob, OBJECT_KEY, "baseModels/qwen3", BASE),
)
SIGNED_LIVE = replace(LIVE, resolution=replace(LIVE.resolution or Resolution(), signature=SIGNATURE))

# What a stored text can hold: the forms that are folded, their folded forms, and things that look nearly like them.
TEXTS = st.sampled_from(
    [
        "",
        "/",
        "x",
        "p/q",
        UID,
        UID.upper(),
        UID.replace("-", ""),
        STAGE,
        STAGE.upper(),
        DIGEST,
        DIGEST.upper(),
        DIGEST[7:],
        "sha256:" + " " * 64,
        "sha256:" + "ä" * 64,
        "A" * 22,
        "B" * 22,
        "_" * 22,
        "/" * 22,
        "A" * 43,
        "B" * 43,
        "é" * 43,
        OBJECT_KEY,
        OBJECT_KEY + "/more",
        f"tenants/acme/blobs/{DIGEST[7:]}/",
        f"tenants/acme/blobs/{DIGEST[7:]}/plain",
        f"tenants/acme/blobs/{DIGEST[7:]}/{'A' * 22}",
        f"tenants/acme/blobs/{DIGEST[7:]}/" + "/" * 22,
        f"tenants/acme/blobs/{BASE[7:]}/{STAGE}",
        "tenants/acme/blobs//plain",
        str(REVISION),
        f"{POLICY}/revisions/0",
        f"{POLICY}/revisions/",
        "tenants/acme/runs/r1",
        "tenants/other/runs/r1",
    ]
)


def _texts(message: Any, data: st.DataObject) -> Any:
    """Fill a message: each field is left out, or gets what may lie there."""
    for field in message.DESCRIPTOR.fields:
        if field.name in ("etag", "name", "labels") or not data.draw(st.booleans(), label=field.name):
            continue
        if field.message_type is not None and field.is_repeated:
            for _ in range(data.draw(st.integers(0, 2))):
                _texts(getattr(message, field.name).add(), data)
        elif field.message_type is not None:
            part = getattr(message, field.name)
            part.SetInParent()
            _texts(part, data)
        elif field.is_repeated:
            getattr(message, field.name).extend(["q_proj"])
        elif field.type == field.TYPE_STRING:
            setattr(message, field.name, data.draw(TEXTS, label=field.name))
        elif field.type in (field.TYPE_DOUBLE, field.TYPE_FLOAT):
            setattr(message, field.name, data.draw(st.sampled_from([0.0, 1.0, 2.0, float("inf")])))
        elif field.type == field.TYPE_BYTES:
            setattr(message, field.name, data.draw(st.sampled_from([b"\0" * 64, b"x"])))
        elif field.type == field.TYPE_BOOL:
            setattr(message, field.name, True)
        else:
            setattr(message, field.name, data.draw(st.sampled_from([0, 1, 2, 3])))
    return message


@pytest.mark.parametrize(
    ("message_type", "fold", "name"),
    [
        (policy_service_pb2.Policy, fold_policy, POLICY),
        (revision_service_pb2.Revision, fold_revision, REVISION),
        (alias_service_pb2.Alias, fold_alias, ALIAS),
        (publish_service_pb2.BlobRecord, fold_blob, STORED.name),
    ],
    ids=["policy", "revision", "alias", "blob"],
)
@given(data=st.data())
def test_folding_twice_gives_any_message_back(message_type: Any, fold: Any, name: Any, data: st.DataObject) -> None:
    message = _texts(message_type(), data)
    before = message.SerializeToString(deterministic=True)
    fold(message, name)
    message = message_type.FromString(message.SerializeToString())  # what is folded must be text that can be stored
    fold(message, name)
    assert message.SerializeToString(deterministic=True) == before


KINDS = ["policy", "revision", "alias", "blob"]


def _ref(record: Any) -> Any:
    tables = {Policy: TABLES.policy, Revision: TABLES.revision, Alias: TABLES.alias, BlobRecord: TABLES.blob}
    return tables[type(record)](record.name)


@pytest.mark.parametrize(
    ("record", "most_bytes"),
    [(HEAD, 120), (ADAPTER, 245), (LIVE, 215), (STORED, 55), (SIGNED, 358), (SIGNED_LIVE, 330)],
    ids=[*KINDS, "signed", "signed-alias"],
)
def test_records_are_stored_small_and_read_whole(record: Any, most_bytes: int) -> None:
    ref = _ref(record)
    value = ref.codec.encode(record)
    assert len(value) <= most_bytes
    assert ref.codec.decode(KeyValue(ref.key, value, 3, 7)) == replace(record, mod_revision=7)


@pytest.mark.parametrize("record", [HEAD, ADAPTER, LIVE, STORED], ids=KINDS)
def test_values_that_were_stored_unfolded_are_read(record: Any) -> None:
    ref = _ref(record)
    plain = {
        Policy: policy_service_pb2.Policy,
        Revision: revision_service_pb2.Revision,
        Alias: alias_service_pb2.Alias,
        BlobRecord: publish_service_pb2.BlobRecord,
    }[type(record)]
    value = to_message(record, plain).SerializeToString(deterministic=True)
    assert ref.codec.decode(KeyValue(ref.key, value, 3, 7)) == replace(record, mod_revision=7)


def test_an_alias_is_read_out_of_its_grave() -> None:
    ref = TABLES.grave(ALIAS, UID)
    assert ref.codec.decode(KeyValue(ref.key, ref.codec.encode(LIVE), 3, 7)) == replace(LIVE, mod_revision=7)


def answer_of(alias: Alias) -> Alias:
    """What resolving an alias takes of it."""
    return Alias(
        alias.name, canary=alias.canary, canary_resolution=alias.canary_resolution, resolution=alias.resolution
    )


@pytest.mark.parametrize("with_canary", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_an_alias_is_read_as_far_as_resolving_takes(with_canary: bool, plain: bool) -> None:
    alias = LIVE
    if with_canary:
        canary = Canary(AliasTarget(9, digest_of("canary")), 0.25, "salt")
        resolution = Resolution(f"{ALIAS.parent}/revisions/9", BlobRef(digest_of("canary"), 7), "elsewhere", "b", "d")
        alias = replace(LIVE, canary=canary, canary_resolution=resolution)
    value = TABLES.codecs.alias.encode(alias)
    if plain:
        value = to_message(alias, alias_service_pb2.Alias).SerializeToString()
    assert TABLES.codecs.alias_answer(value, ALIAS) == answer_of(alias)
    assert TABLES.codecs.alias_answer(value, ALIAS).resolution is not None


@given(st.data())
def test_any_folded_alias_resolves_as_its_whole_record_does(data: st.DataObject) -> None:
    message = _texts(alias_service_pb2.Alias(name="."), data)
    message.resolution.ClearField("split")  # only in answers, never stored
    value = message.SerializeToString()
    fold_alias(message, ALIAS)
    assert TABLES.codecs.alias_answer(value, ALIAS) == answer_of(from_message(message, Alias, name=ALIAS))


def test_an_answer_of_another_revision_is_otherwise_the_same() -> None:
    """``Resolution.at`` names the fields one by one: a new one must not be lost there."""
    marked: Any = Resolution(**{each.name: f"<{each.name}>" for each in fields(Resolution)})  # type: ignore[arg-type]
    assert marked.at(7) == replace(marked, catalog_revision=7)
