from __future__ import annotations

from mint_catalog.model.keys import Keys, shard_of
from mint_catalog.storage.store import prefix_end
from mint_core.names import AliasName, BaseModelName, BlobName, PolicyName, RevisionName, RolloutName, RunName

KEYS = Keys()
POLICY = PolicyName("acme", "tone")


def test_names_survive_their_keys() -> None:
    alias, revision, run = AliasName("acme", "tone", "live"), RevisionName("acme", "tone", 7), RunName("acme", "r1")
    assert KEYS.alias_name(KEYS.alias(alias)) == alias
    assert KEYS.revision_name(KEYS.revision(revision)) == revision
    assert KEYS.policy_name(KEYS.policy(POLICY)) == POLICY
    assert KEYS.lease_resource(KEYS.lease(POLICY)) == POLICY
    assert KEYS.lease_resource(KEYS.lease(run)) == run
    rollout = RolloutName("acme", "tone", "r1-7")
    assert KEYS.rollout_name(KEYS.rollout(rollout, "uid")) == rollout
    queued = KEYS.queued(BaseModelName("tiny"), run, priority=0, create_time_us=1)
    assert [KEYS.run_name(key) for key in (KEYS.run(run), KEYS.claim(run), queued)] == [run] * 3


def test_what_belongs_to_a_policy_lies_below_its_prefix_and_nothing_else_does() -> None:
    twin = PolicyName("acme", "tone-2")
    start, end = KEYS.aliases(POLICY), prefix_end(KEYS.aliases(POLICY))
    assert start < KEYS.alias(AliasName("acme", "tone", "live")) < end
    assert not start <= KEYS.alias(AliasName("acme", "tone-2", "live")) < end
    assert not start <= KEYS.aliases(twin) < end
    assert not KEYS.policy(PolicyName("acme-2", "tone")).startswith(KEYS.family("policies", "acme"))


def test_revisions_lie_in_the_order_of_their_numbers() -> None:
    numbers = [1, 2, 9, 10, 99, 100, 123456]
    keys = [KEYS.revision(RevisionName("acme", "tone", number)) for number in numbers]
    assert keys == sorted(keys)


def test_steps_of_a_run_lie_in_order_below_its_prefix() -> None:
    run, twin = RunName("acme", "r1"), RunName("acme", "r1-2")
    keys = [KEYS.run_step(run, step) for step in (1, 2, 9, 10, 100, 10_000_000)]
    assert keys == sorted(keys)
    assert all(key.startswith(KEYS.run_steps(run)) for key in keys)
    assert not KEYS.run_step(twin, 1).startswith(KEYS.run_steps(run))


def test_the_queue_lies_in_the_order_of_priority_then_age() -> None:
    base = BaseModelName("tiny")

    def key(priority: int, time: int, run: str = "r") -> bytes:
        return KEYS.queued(base, RunName("acme", run), priority=priority, create_time_us=time)

    wanted = [key(10, 9), key(10, 1700000000000000), key(0, 5), key(0, 1700000000000000), key(-3, 1), key(-1000000, 1)]
    assert wanted == sorted(wanted)


def test_shards_are_two_hex_digits_and_spread() -> None:
    shards = {shard_of(f"policy-{number}") for number in range(5000)}
    assert len(shards) == 256
    assert all(len(shard) == 2 and int(shard, 16) < 256 for shard in shards)
    assert KEYS.policy(POLICY) == f"/mint/v1/policies/acme/{shard_of('tone')}/tone".encode()


def test_a_blobs_key_names_its_tenant_and_digest() -> None:
    assert KEYS.blob(BlobName("acme", "sha256:" + "a" * 64)) == b"/mint/v1/blobs/acme/" + b"a" * 64


def test_the_tick_lies_in_the_watched_range() -> None:
    assert KEYS.prefix < KEYS.tick < prefix_end(KEYS.prefix)
