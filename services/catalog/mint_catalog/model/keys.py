"""Where everything lies: families of keys below one prefix.

::

    baseModels/{b}                          policies/{t}/{hh}/{p}
    engines/{e}                             revisions/{t}/{hh}/{p}/{n}
    engineHolders/{e}                       aliases/{t}/{hh}/{p}/{a}
    blobs/{t}/{digest hex}                  graves/{t}/{hh}/{p}/{uid}/{a}           aliases of a deleted policy
    leases/{t}/{policies|runs}/{id}         published/{t}/{hh}/{p}/{run}/{step}     what makes Publish idempotent
    runs/{t}/{hh}/{r}                       evaluations/{t}/{hh}/{p}/{uid}/{e}
    runSteps/{t}/{hh}/{r}/{n}               rollouts/{t}/{hh}/{p}/{uid}/{r}
    lanes/{b}/{priority}/{t}                requests/{bucket}/{t}/{hash}            request ids
    queue/{b}/{priority}/{t}/{created}/{r}
    delayed/{b}/{time}/{t}/{r}
    claims/{t}/{r}                          duties/{name}, duties/{name}/done       jobs of one catalog at a time
    audit/{t}/{time}-{nonce}                usage/{t}/{hh}/{p}/{day}/{reporter}
    fleet/{t}/{o}                           fleetItems/{t}/{o}/{hh}/{p}             selected, not tried yet
    fleetOpen/{t}/{o}                       fleetResults/{t}/{o}/{hh}/{p}           operations with work left; tried
    erasures/{t}                            erasing/{t}                             proofs; how far one under way is
    restoring                               holds/{nonce}                           history that a backup still reads
    wishes/{b}/{digest hex}/{nonce}         holdings/{b}/{digest hex}/{nonce}/{e}   promotions that wait for residency
    tick                                    purges/{t}/{p}/{uid}                    deleted policies being removed

``hh`` is a hash of the policy's (or run's) id in two hex digits: etcd counts the whole rest of a range for every page
of it, so a page must not lie in a range of a million keys. A revision's or step's number has 12 digits and a queue
entry's priority and times are written so that byte order is the order wanted; the time of an audit entry counts down,
since etcd reads a whole range before it reverses one, and the newest are wanted first. What lies below a policy's uid
is out of reach once the policy is deleted.

A queued run that may be claimed lies in the lane of its tenant and priority, the oldest first; the lane's own key says
that there may be something in it, so that whose turn it is can be told without reading what 10,000 runs of one tenant
have queued. A run whose next attempt has to wait lies in ``delayed``, by the time until which it does.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from mint_core.names import (
    AliasName,
    AuditEntryName,
    BaseModelName,
    BlobName,
    EngineReplicaName,
    EvaluationName,
    FleetOperationName,
    PolicyName,
    RevisionName,
    RolloutName,
    RunName,
)

__all__ = ["FLEETING_FAMILIES", "NUM_SHARDS", "SHARDED_FAMILIES", "TENANT_PART", "Keys", "shard_of"]

NUM_SHARDS = 256
SHARDED_FAMILIES = frozenset(
    {
        "aliases",
        "evaluations",
        "graves",
        "policies",
        "published",
        "revisions",
        "rollouts",
        "runSteps",
        "runs",
        "usage",
    }
)
"""Families whose keys go on with the tenant and the hash shard."""
TENANT_PART = {
    "aliases": 1,
    "audit": 1,
    "baseModels": 0,
    "blobs": 1,
    "claims": 1,
    "delayed": 3,
    "duties": 0,
    "engineHolders": 0,
    "engines": 0,
    "erasing": 0,
    "erasures": 0,
    "evaluations": 1,
    "fleet": 1,
    "fleetItems": 1,
    "fleetOpen": 1,
    "fleetResults": 1,
    "graves": 1,
    "holdings": 0,
    "holds": 0,
    "lanes": 3,
    "leases": 1,
    "policies": 1,
    "published": 1,
    "purges": 1,
    "queue": 3,
    "requests": 2,
    "revisions": 1,
    "rollouts": 1,
    "runSteps": 1,
    "runs": 1,
    "usage": 1,
    "wishes": 0,
}
"""Every family, and which part of its keys names the tenant that a record belongs to; 0: none, it is the whole
installation's. A tenant's erasure deletes by this table, so a family that is not in it is not allowed."""
FLEETING_FAMILIES = frozenset({"duties", "engineHolders", "engines", "holdings", "holds", "leases", "wishes"})
"""What does not outlive a process and is left out of backups."""
_MAX_PRIORITY = 2**31
_ORDER_DIGITS = 12
_END_OF_TIME_US = 10**16 - 1


@lru_cache(maxsize=65536)
def shard_of(resource_id: str) -> str:
    """The hash shard of an id: two hex digits."""
    return hashlib.blake2b(resource_id.encode(), digest_size=1).hexdigest()


class Keys:
    """Builds every key; nothing else in the catalog puts keys together or takes them apart."""

    def __init__(self, prefix: str = "/mint/v1/") -> None:
        self.prefix = prefix.encode()
        self.tick = self.prefix + b"tick"
        self.restoring = self.prefix + b"restoring"

    def _key(self, *parts: str) -> bytes:
        return self.prefix + "/".join(parts).encode()

    def family(self, *parts: str) -> bytes:
        """Prefix of a family, or of a part of it: ``family("aliases", "acme")``."""
        return self.prefix + "".join(f"{part}/" for part in parts).encode()

    def family_of(self, key: bytes) -> bytes:
        """The family that a key lies in."""
        return key[len(self.prefix) :].partition(b"/")[0]

    def parts(self, key: bytes) -> list[str]:
        """The parts of a key below the prefix; the first one names the family."""
        return key[len(self.prefix) :].decode().split("/")

    def tenant_of(self, key: bytes) -> str | None:
        """The tenant that the record under a key belongs to."""
        parts = self.parts(key)
        index = TENANT_PART.get(parts[0], 0)
        return parts[index] if index else None

    def base_model(self, name: BaseModelName) -> bytes:
        return self._key("baseModels", name.base_model)

    def engine(self, name: EngineReplicaName) -> bytes:
        return self._key("engines", name.engine_replica)

    def engine_holder(self, name: EngineReplicaName) -> bytes:
        return self._key("engineHolders", name.engine_replica)

    def wishes(self, base_model: BaseModelName) -> bytes:
        return self.family("wishes", base_model.base_model)

    def wish(self, base_model: BaseModelName, digest: str, nonce: str) -> bytes:
        return self.wishes(base_model) + f"{digest.removeprefix('sha256:')}/{nonce}".encode()

    def holdings(self, wish: bytes) -> bytes:
        return self.family("holdings", *self.parts(wish)[1:])

    def holding(self, wish: bytes, name: EngineReplicaName) -> bytes:
        return self.holdings(wish) + name.engine_replica.encode()

    def policy(self, name: PolicyName) -> bytes:
        return self._key("policies", name.tenant, shard_of(name.policy), name.policy)

    def policy_name(self, key: bytes) -> PolicyName:
        _, tenant, _, policy = self.parts(key)
        return PolicyName(tenant, policy)

    def revisions(self, policy: PolicyName) -> bytes:
        return self.family("revisions", policy.tenant, shard_of(policy.policy), policy.policy)

    def revision(self, name: RevisionName) -> bytes:
        return self.revisions(name.parent) + f"{name.number:0{_ORDER_DIGITS}d}".encode()

    def revision_name(self, key: bytes) -> RevisionName:
        _, tenant, _, policy, number = self.parts(key)
        return RevisionName(tenant, policy, int(number))

    def aliases(self, policy: PolicyName) -> bytes:
        return self.family("aliases", policy.tenant, shard_of(policy.policy), policy.policy)

    def alias(self, name: AliasName) -> bytes:
        return self._key("aliases", name.tenant, shard_of(name.policy), name.policy, name.alias)

    def alias_name(self, key: bytes) -> AliasName:
        """Name of the alias of an ``aliases/`` or ``graves/`` key."""
        _, tenant, _, policy, *_, alias = self.parts(key)
        return AliasName(tenant, policy, alias)

    def grave(self, name: AliasName, uid: str) -> bytes:
        return self._key("graves", name.tenant, shard_of(name.policy), name.policy, uid, name.alias)

    def published(self, policy: PolicyName, run: str, step: int) -> bytes:
        return self._key("published", policy.tenant, shard_of(policy.policy), policy.policy, run, str(step))

    def evaluations(self, policy: PolicyName, uid: str) -> bytes:
        return self.family("evaluations", policy.tenant, shard_of(policy.policy), policy.policy, uid)

    def evaluation(self, name: EvaluationName, uid: str) -> bytes:
        return self.evaluations(name.parent, uid) + name.evaluation.encode()

    def evaluation_name(self, key: bytes) -> EvaluationName:
        _, tenant, _, policy, _, evaluation = self.parts(key)
        return EvaluationName(tenant, policy, evaluation)

    def rollouts(self, policy: PolicyName, uid: str) -> bytes:
        return self.family("rollouts", policy.tenant, shard_of(policy.policy), policy.policy, uid)

    def rollout(self, name: RolloutName, uid: str) -> bytes:
        return self.rollouts(name.parent, uid) + name.rollout.encode()

    def rollout_name(self, key: bytes) -> RolloutName:
        _, tenant, _, policy, _, rollout = self.parts(key)
        return RolloutName(tenant, policy, rollout)

    def blob(self, name: BlobName) -> bytes:
        return self._key("blobs", name.tenant, name.digest.removeprefix("sha256:"))

    def lease(self, resource: PolicyName | RunName) -> bytes:
        if isinstance(resource, PolicyName):
            return self._key("leases", resource.tenant, "policies", resource.policy)
        return self._key("leases", resource.tenant, "runs", resource.run)

    def lease_resource(self, key: bytes) -> PolicyName | RunName:
        _, tenant, kind, resource_id = self.parts(key)
        return PolicyName(tenant, resource_id) if kind == "policies" else RunName(tenant, resource_id)

    def run(self, name: RunName) -> bytes:
        return self._key("runs", name.tenant, shard_of(name.run), name.run)

    def run_steps(self, run: RunName) -> bytes:
        return self.family("runSteps", run.tenant, shard_of(run.run), run.run)

    def run_step(self, run: RunName, step: int) -> bytes:
        return self.run_steps(run) + f"{step:0{_ORDER_DIGITS}d}".encode()

    def run_name(self, key: bytes) -> RunName:
        """Name of the run of a ``runs/``, ``queue/``, ``delayed/`` or ``claims/`` key."""
        parts = self.parts(key)
        return RunName(parts[TENANT_PART[parts[0]]], parts[-1])

    def lanes(self, base_model: BaseModelName) -> bytes:
        return self.family("lanes", base_model.base_model)

    def lane(self, base_model: BaseModelName, tenant: str, *, priority: int) -> bytes:
        """Larger priorities sort first."""
        return self._key("lanes", base_model.base_model, f"{_MAX_PRIORITY - priority:010d}", tenant)

    def lane_entries(self, lane: bytes) -> bytes:
        """Prefix of the entries in a lane, by the lane's key."""
        return self.family("queue", *self.parts(lane)[1:])

    def queued(self, base_model: BaseModelName, run: RunName, *, priority: int, create_time_us: int) -> bytes:
        """Older runs sort first. Microseconds since the epoch fit 16 digits until 2286."""
        lane = self.lane(base_model, run.tenant, priority=priority)
        return self.lane_entries(lane) + f"{create_time_us:016d}/{run.run}".encode()

    def delays(self, base_model: BaseModelName) -> bytes:
        return self.family("delayed", base_model.base_model)

    def delayed_from(self, base_model: BaseModelName, time_us: int) -> bytes:
        """Where the entries that wait until a time, or longer, begin."""
        return self.delays(base_model) + f"{time_us:016d}".encode()

    def delayed(self, base_model: BaseModelName, run: RunName, *, time_us: int) -> bytes:
        return self.delayed_from(base_model, time_us) + f"/{run.tenant}/{run.run}".encode()

    def duty(self, name: str) -> bytes:
        return self._key("duties", name)

    def purge(self, policy: PolicyName, uid: str) -> bytes:
        return self._key("purges", policy.tenant, policy.policy, uid)

    def purged(self, key: bytes) -> tuple[PolicyName, str]:
        """The policy and uid of a ``purges/`` key."""
        _, tenant, policy, uid = self.parts(key)
        return PolicyName(tenant, policy), uid

    def graves(self, policy: PolicyName, uid: str) -> bytes:
        return self.family("graves", policy.tenant, shard_of(policy.policy), policy.policy, uid)

    def published_by(self, policy: PolicyName) -> bytes:
        """Prefix of everything published on a policy of this name."""
        return self.family("published", policy.tenant, shard_of(policy.policy), policy.policy)

    def duty_done(self, name: str) -> bytes:
        return self._key("duties", name, "done")

    def claim(self, run: RunName) -> bytes:
        return self._key("claims", run.tenant, run.run)

    def audit_before(self, tenant: str, time_us: int) -> bytes:
        """Where a tenant's audit entries before a time begin; microseconds since the epoch, clamped to 16 digits."""
        order = _END_OF_TIME_US + 1 - min(max(time_us, 1), _END_OF_TIME_US)
        return self.family("audit", tenant) + f"{order:016d}".encode()

    def audit_entry(self, name: AuditEntryName) -> bytes:
        time_us, _, nonce = name.audit_entry.partition("-")
        return self._key("audit", name.tenant, f"{_END_OF_TIME_US - int(time_us):016d}-{nonce}")

    def audit_entry_name(self, key: bytes) -> AuditEntryName:
        """The entry's id is its time in microseconds and a nonce."""
        _, tenant, entry = self.parts(key)
        order, _, nonce = entry.partition("-")
        return AuditEntryName(tenant, f"{_END_OF_TIME_US - int(order):016d}-{nonce}")

    def audit_time_us(self, key: bytes) -> int:
        """Time of an audit entry's key."""
        return _END_OF_TIME_US - int(self.parts(key)[2].partition("-")[0])

    def usage(self, policy: PolicyName) -> bytes:
        return self.family("usage", policy.tenant, shard_of(policy.policy), policy.policy)

    def usage_count(self, policy: PolicyName, day: int, reporter: str) -> bytes:
        """``day`` is the number of days since the epoch."""
        return self.usage(policy) + f"{day:06d}/{reporter}".encode()

    def usage_day(self, key: bytes) -> int:
        return int(key.rsplit(b"/", 2)[1])

    def requests_from(self, bucket: int) -> bytes:
        """Where the request ids of a bucket begin."""
        return self.family("requests") + f"{bucket:08d}/".encode()

    def request(self, bucket: int, tenant: str, request_hash: str) -> bytes:
        return self._key("requests", f"{bucket:08d}", tenant, request_hash)

    def fleet_operation(self, name: FleetOperationName) -> bytes:
        return self._key("fleet", name.tenant, name.fleet_operation)

    def fleet_operation_name(self, key: bytes) -> FleetOperationName:
        """Name of the operation of a ``fleet/`` or ``fleetOpen/`` key."""
        _, tenant, operation = self.parts(key)
        return FleetOperationName(tenant, operation)

    def fleet_open(self, name: FleetOperationName) -> bytes:
        return self._key("fleetOpen", name.tenant, name.fleet_operation)

    def fleet_items(self, name: FleetOperationName) -> bytes:
        return self.family("fleetItems", name.tenant, name.fleet_operation)

    def fleet_item(self, name: FleetOperationName, policy: str) -> bytes:
        return self.fleet_items(name) + f"{shard_of(policy)}/{policy}".encode()

    def fleet_results(self, name: FleetOperationName) -> bytes:
        return self.family("fleetResults", name.tenant, name.fleet_operation)

    def fleet_result(self, name: FleetOperationName, policy: str) -> bytes:
        return self.fleet_results(name) + f"{shard_of(policy)}/{policy}".encode()

    def fleet_policy(self, key: bytes) -> PolicyName:
        """The policy of a ``fleetItems/`` or ``fleetResults/`` key."""
        _, tenant, _, _, policy = self.parts(key)
        return PolicyName(tenant, policy)

    def erasure(self, tenant: str) -> bytes:
        return self._key("erasures", tenant)

    def erasing(self, tenant: str) -> bytes:
        """There while the tenant is being erased: whatever writes for a tenant compares that it is absent."""
        return self._key("erasing", tenant)

    def hold(self, nonce: str) -> bytes:
        return self._key("holds", nonce)
