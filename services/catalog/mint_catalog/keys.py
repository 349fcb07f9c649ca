"""Where everything lies: families of keys below one prefix.

::

    baseModels/{b}                          policies/{t}/{hh}/{p}
    engines/{e}                             revisions/{t}/{hh}/{p}/{n}
    engineHolders/{e}                       aliases/{t}/{hh}/{p}/{a}
    blobs/{t}/{digest hex}                  graves/{t}/{hh}/{p}/{uid}/{a}           aliases of a deleted policy
    leases/{t}/{policies|runs}/{id}         published/{t}/{hh}/{p}/{run}/{step}     what makes Publish idempotent
    runs/{t}/{hh}/{r}                       evaluations/{t}/{hh}/{p}/{uid}/{e}
    runSteps/{t}/{hh}/{r}/{n}               rollouts/{t}/{hh}/{p}/{uid}/{r}
    queue/{b}/{order}/{t}/{r}               requests/{bucket}/{t}/{hash}            request ids
    claims/{t}/{r}                          tick

``hh`` is a hash of the policy's (or run's) id in two hex digits: etcd counts the whole rest of a range for every page
of it, so a page must not lie in a range of a million keys. A revision's or step's number has 12 digits and a queue
entry's order is written so that byte order is the order wanted. What lies below a policy's uid is out of reach once the
policy is deleted.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

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

__all__ = ["NUM_SHARDS", "Keys", "shard_of"]

NUM_SHARDS = 256
_MAX_PRIORITY = 2**31
_ORDER_DIGITS = 12


@lru_cache(maxsize=65536)
def shard_of(resource_id: str) -> str:
    """The hash shard of an id: two hex digits."""
    return hashlib.blake2b(resource_id.encode(), digest_size=1).hexdigest()


class Keys:
    """Builds every key; nothing else in the catalog puts keys together or takes them apart."""

    def __init__(self, prefix: str = "/mint/v1/") -> None:
        self.prefix = prefix.encode()
        self.tick = self.prefix + b"tick"

    def _key(self, *parts: str) -> bytes:
        return self.prefix + "/".join(parts).encode()

    def family(self, *parts: str) -> bytes:
        """Prefix of a family, or of a part of it: ``family("aliases", "acme")``."""
        return self.prefix + "".join(f"{part}/" for part in parts).encode()

    def parts(self, key: bytes) -> list[str]:
        """The parts of a key below the prefix; the first one names the family."""
        return key[len(self.prefix) :].decode().split("/")

    def base_model(self, name: BaseModelName) -> bytes:
        return self._key("baseModels", name.base_model)

    def engine(self, name: EngineReplicaName) -> bytes:
        return self._key("engines", name.engine_replica)

    def engine_holder(self, name: EngineReplicaName) -> bytes:
        return self._key("engineHolders", name.engine_replica)

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
        return self.aliases(name.parent) + name.alias.encode()

    def alias_name(self, key: bytes) -> AliasName:
        _, tenant, _, policy, alias = self.parts(key)
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
        """Name of the run of a ``runs/``, ``queue/`` or ``claims/`` key."""
        parts = self.parts(key)
        return RunName(parts[-2] if parts[0] != "runs" else parts[1], parts[-1])

    def queue(self, base_model: BaseModelName) -> bytes:
        return self.family("queue", base_model.base_model)

    def queued(self, base_model: BaseModelName, run: RunName, *, priority: int, create_time_us: int) -> bytes:
        """Larger priorities sort first, then older runs. Microseconds since the epoch fit 16 digits until 2286."""
        order = f"{_MAX_PRIORITY - priority:010d}-{create_time_us:016d}"
        return self.queue(base_model) + f"{order}/{run.tenant}/{run.run}".encode()

    def claim(self, run: RunName) -> bytes:
        return self._key("claims", run.tenant, run.run)

    def request(self, bucket: int, tenant: str, request_hash: str) -> bytes:
        return self._key("requests", f"{bucket:08d}", tenant, request_hash)
