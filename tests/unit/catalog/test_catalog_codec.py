from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from mint_api.v1 import common_pb2, policy_service_pb2, rollout_service_pb2, run_service_pb2
from mint_catalog.model.codec import enum_of, to_message
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.model.keys import Keys
from mint_catalog.model.records import (
    AdapterSignature,
    Alias,
    AliasHistoryEntry,
    AliasTarget,
    Attribution,
    BaseModel,
    BlobRecord,
    BlobRef,
    BlobState,
    Canary,
    EngineReplica,
    EngineReplicaState,
    Evaluation,
    Gate,
    GateCondition,
    Holder,
    Lineage,
    LoraConfig,
    Numerics,
    Policy,
    PolicyQuota,
    PolicyState,
    Published,
    Resolution,
    Revision,
    RevisionState,
    Rollout,
    TrainingState,
)
from mint_catalog.model.run_records import (
    EvaluationRecipe,
    GroupAdvantage,
    GrpoRecipe,
    LossFunction,
    OptimizerConfig,
    Run,
    RunEvent,
    RunProgress,
    RunState,
    RunStep,
    SftRecipe,
    TokenWeighting,
)
from mint_catalog.model.tables import Ref, Tables
from mint_catalog.storage.store import KeyValue
from mint_core.errors import InvalidArgument
from mint_core.names import (
    AliasName,
    BaseModelName,
    BlobName,
    EngineReplicaName,
    EvaluationName,
    PolicyName,
    RevisionName,
    RolloutName,
    RunName,
)

KEYS = Keys()
CODECS = MessageCodecs.over(KEYS)
TABLES = Tables(KEYS, CODECS.for_store())
TIME = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
DIGEST = "sha256:" + "a" * 64
OTHER_DIGEST = "sha256:" + "b" * 64
BLOB = BlobRef(DIGEST, 12)
SIGNATURE = AdapterSignature(OTHER_DIGEST, b"s" * 64)
POLICY = PolicyName("acme", "tone")
STATE = TrainingState("tenants/acme/runs/r", 3, 9, "w", BLOB, "o", BLOB, TIME)
LORA = LoraConfig(8, 16.0, ("q_proj", "v_proj"), True, 0.1, 2**63)

FULL = {
    "alias": (
        TABLES.alias(AliasName("acme", "tone", "live")),
        Alias(
            AliasName("acme", "tone", "live"),
            AliasTarget(2, DIGEST),
            (AliasHistoryEntry(AliasTarget(2, DIGEST), Attribution("ada", TIME, "better"), True), AliasHistoryEntry()),
            "uid",
            TIME,
            Resolution("r", BLOB, "key", "baseModels/b", DIGEST, True, True, 4, signature=SIGNATURE),
            Canary(AliasTarget(3, OTHER_DIGEST), 0.1, "salt"),
            Resolution("r", BlobRef(OTHER_DIGEST, 13), "key", "baseModels/b", DIGEST, True, True, 4),
            Gate((GateCondition("exact", "score_mean", DIGEST, 0.0, 0.5, 3), GateCondition("loss", "mean"))),
            7,
        ),
    ),
    "base_model": (
        TABLES.base_model(BaseModelName("b")),
        BaseModel(BaseModelName("b"), DIGEST, 5, "LlamaForCausalLM", 9, TIME, 7),
    ),
    "blob": (
        TABLES.blob(BlobName("acme", DIGEST)),
        BlobRecord(BlobName("acme", DIGEST), BLOB, "key", BlobState.VERIFIED, TIME, mod_revision=7),
    ),
    "engine": (
        TABLES.engine(EngineReplicaName("e")),
        EngineReplica(
            EngineReplicaName("e"),
            "127.0.0.1:1",
            "baseModels/b",
            Numerics(DIGEST, "float32", "", "sglang 0.5.23"),
            4,
            2,
            64,
            2048,
            EngineReplicaState.SICK,
            TIME,
            "127.0.0.1:2",
            32,
            7,
        ),
    ),
    "evaluation": (
        TABLES.evaluation(EvaluationName("acme", "tone", "e"), "uid"),
        Evaluation(
            EvaluationName("acme", "tone", "e"),
            "r",
            DIGEST,
            "exact",
            DIGEST,
            3,
            {"loss": 0.5, "a": -1.0},
            "run",
            TIME,
            7,
        ),
    ),
    "policy": (
        TABLES.policy(POLICY),
        Policy(
            POLICY,
            "uid",
            "baseModels/b",
            DIGEST,
            LORA,
            {"team": "search", "empty": ""},
            "ada",
            "one line",
            PolicyState.DELETED,
            STATE,
            5,
            TIME,
            TIME,
            TIME,
            PolicyQuota(100, 3),
            PolicyState.PAUSED,
            7,
        ),
    ),
    "published": (TABLES.published(POLICY, "r", 3), Published(4, BLOB, 7)),
    "revision": (
        TABLES.revision(RevisionName("acme", "tone", 4)),
        Revision(
            RevisionName("acme", "tone", 4),
            4,
            "uid",
            BLOB,
            DIGEST,
            LORA,
            672,
            "packed-1",
            Lineage("p", "r", 3, DIGEST, "v1", "sft"),
            RevisionState.RETIRED,
            TIME,
            "key",
            SIGNATURE,
            7,
        ),
    ),
    "rollout": (
        TABLES.rollout(RolloutName("acme", "tone", "r1-3"), "uid"),
        Rollout(
            RolloutName("acme", "tone", "r1-3"),
            "r",
            DIGEST,
            "run",
            3,
            "key",
            BLOB,
            Numerics(DIGEST, "float32", "", "sglang 0.5.23"),
            8,
            -0.5,
            TIME,
            TIME,
            900,
            1,
            7,
        ),
    ),
    "run_step": (TABLES.run_step(RunName("acme", "r"), 3), RunStep(3, TIME, 0.5, {"reward_mean": 1.0}, 7)),
    "run": (
        TABLES.run(RunName("acme", "r")),
        Run(
            RunName("acme", "r"),
            str(POLICY),
            sft=SftRecipe(BLOB, BLOB, 10, 8, 512, OptimizerConfig(1e-4, 0.9, 0.99, 1e-8, 0.1, 1.0, 5), 3, 20, 5),
            continue_from_latest=True,
            publish=True,
            promote_alias="live",
            priority=-2,
            state=RunState.RUNNING,
            progress=RunProgress(1, 10, 0.5, 0.25, 100, 3.5, 1, TIME, {"x": 1.0}),
            events=(RunEvent(TIME, "queued", "waits"), RunEvent(TIME, "claimed", "by w")),
            num_attempts=2,
            worker="worker-1",
            error="E: x",
            published_revision="rev",
            initial_training_state=STATE,
            latest_training_state=STATE,
            create_time=TIME,
            end_time=TIME,
            policy_uid="uid",
            finished_fence=8,
            dead_letter=True,
            num_failures=2,
            not_before_time=TIME,
            mod_revision=7,
        ),
    ),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_record_survives_the_store(kind: str) -> None:
    ref: Ref[object]
    ref, record = FULL[kind]
    assert ref.codec.decode(KeyValue(ref.key, ref.codec.encode(record), 3, 7)) == record


@pytest.mark.parametrize(
    "recipe",
    [
        GrpoRecipe(
            BLOB,
            "exact",
            10,
            4,
            8,
            64,
            0.5,
            OptimizerConfig(1e-4),
            0.1,
            0.01,
            2**64 - 1,
            {"field": "answer"},
            2.5,
            GroupAdvantage.CENTERED,
            TokenWeighting.FIXED_LENGTH,
            LossFunction.DRO,
            0.3,
            True,
            1,
            5,
            ("END", "\n"),
            3600,
        ),
        EvaluationRecipe("r", BLOB, "exact", 64, {"field": "answer"}, 2.5, 0.5, 2**64 - 1, ("END",)),
    ],
)
def test_a_full_recipe_survives_store_and_wire_and_is_the_whole_message(recipe: GrpoRecipe | EvaluationRecipe) -> None:
    kind = "grpo" if isinstance(recipe, GrpoRecipe) else "evaluation"
    record = replace(FULL["run"][1], sft=None, **{kind: recipe})  # type: ignore[type-var]
    ref = TABLES.run(RunName("acme", "r"))
    assert ref.codec.decode(KeyValue(ref.key, ref.codec.encode(record), 3, 7)) == record
    message = getattr(CODECS.run.to_message(record), kind)
    assert {field.name for field, _ in message.ListFields()} == set(message.DESCRIPTOR.fields_by_name)


def test_enums_have_the_numbers_of_the_contract() -> None:
    for ours, theirs in (
        (GroupAdvantage, run_service_pb2.GroupAdvantage),
        (TokenWeighting, run_service_pb2.TokenWeighting),
        (LossFunction, common_pb2.LossFunction),
        (RunState, run_service_pb2.RunState),
    ):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", theirs.DESCRIPTOR.name).upper()
        assert {f"{prefix}_{each.name}": each.value for each in ours} == dict(theirs.items())


def test_a_time_that_is_none_is_refused() -> None:
    message = rollout_service_pb2.Rollout()
    message.expire_time.seconds = 10**15
    with pytest.raises(InvalidArgument, match="expire_time is 1000000000000000 s") as caught:
        CODECS.rollout.from_message(message, name=RolloutName("acme", "tone", "r"))
    assert caught.value.field == "expire_time"


@pytest.mark.parametrize("kind", sorted(set(FULL) - {"published", "run_step"}))
def test_a_full_record_survives_the_wire(kind: str) -> None:
    _, record = FULL[kind]
    codec = getattr(CODECS, kind)
    message = type(codec.to_message(record)).FromString(codec.to_message(record).SerializeToString())
    assert message.name == str(record.name)
    assert getattr(message, "etag", "7") == "7"
    assert codec.from_message(message, name=record.name, mod_revision=7) == record


def test_a_stored_value_goes_without_what_the_key_tells() -> None:
    ref, record = FULL["policy"]
    value = ref.codec.encode(record)
    stored = policy_service_pb2.Policy.FromString(value)
    assert stored.etag == ""
    assert str(POLICY) not in value.decode("utf-8", "replace")
    assert value == ref.codec.encode(record), "equal records must have equal bytes"


def test_an_absent_part_stays_absent_and_an_empty_one_stays() -> None:
    codec, name = CODECS.run, RunName("acme", "r")
    message = run_service_pb2.Run(evaluation=run_service_pb2.EvaluationRecipe())
    record = codec.from_message(message, name=name)
    assert record.evaluation == EvaluationRecipe()
    assert record.sft is None
    assert record.progress is None
    assert codec.to_message(record).WhichOneof("recipe") == "evaluation"


def test_an_enum_value_of_a_newer_program_is_readable() -> None:
    message = policy_service_pb2.Policy()
    message.MergeFromString(b"\x48\x63")  # state = 99
    assert CODECS.policy.from_message(message, name=POLICY).state is PolicyState.UNSPECIFIED
    assert enum_of(3, RunState) is RunState.CANCELLING


def test_a_lease_is_read_with_its_fence() -> None:
    ref = TABLES.lease(POLICY)
    kv = KeyValue(ref.key, ref.codec.encode(Holder("worker-1", 30)), 41, 45, 99)
    held = ref.codec.decode(kv)
    assert held == Holder("worker-1", 30, 41, 99)
    message = CODECS.holder.to_message(POLICY, held)
    assert (message.fence.resource, message.fence.token, message.ttl.seconds) == (str(POLICY), 41, 30)


def test_every_stored_field_has_a_record_field() -> None:
    for kind in sorted(set(FULL) - {"published", "run_step"}):
        _, record = FULL[kind]
        codec = getattr(CODECS, kind)
        of_message = set(type(codec.to_message(record)).DESCRIPTOR.fields_by_name) - {"name", "etag"}
        of_record = set(record.__dataclass_fields__) - {"name", "mod_revision"}
        assert of_message == of_record


def test_plain_messages_convert_without_a_codec() -> None:
    message = to_message(STATE, type(policy_service_pb2.Policy().latest_training_state))
    assert (message.step, message.weights.digest, message.save_time.nanos) == (3, DIGEST, 678901000)
