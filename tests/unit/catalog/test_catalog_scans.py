from __future__ import annotations

from unit.catalog.memory_store import MemoryStore

from mint_catalog.model.keys import Keys
from mint_catalog.storage.paging import scan_family, tenants_of
from mint_catalog.storage.store import Put
from mint_core.names import PolicyName

KEYS = Keys()
TENANTS = ["a", "acme", "acme-x", "acme.y", "acme0", "acmee", "acmeez", "b", "t000", "t001", "t010", "zz"]


async def _put(store: MemoryStore, *keys: bytes) -> None:
    for key in keys:
        await store.txn([], [Put(key, b"v")])


async def _filled(num_policies: int = 3) -> MemoryStore:
    store = MemoryStore()
    for tenant in TENANTS:
        names = [PolicyName(tenant, f"p{number}") for number in range(num_policies)]
        await _put(store, *map(KEYS.policy, names))
    await _put(store, KEYS.family("aliases", "other") + b"00/p/live", KEYS.tick)
    return store


async def test_tenants_of_a_family_are_found_once_each() -> None:
    store = await _filled()
    assert [tenant async for tenant in tenants_of(store, KEYS, "policies")] == sorted(
        TENANTS, key=lambda tenant: tenant + "/"
    )
    assert [tenant async for tenant in tenants_of(store, KEYS, "aliases")] == ["other"]
    assert [tenant async for tenant in tenants_of(store, KEYS, "graves")] == []


async def test_a_scan_holds_every_key_of_one_revision_once() -> None:
    store = await _filled(40)
    revision = store.revision
    keys: list[bytes] = []
    async for stretch in scan_family(store, KEYS, "policies", limit=7):
        assert stretch.revision == revision
        assert len(stretch.values) <= 7
        keys += [kv.key for kv in stretch.values]
        await _put(store, KEYS.policy(PolicyName("acme", f"new{len(keys)}")), KEYS.policy(PolicyName("new", "p")))
    assert len(keys) == len(set(keys)) == 40 * len(TENANTS)


async def test_a_scan_of_one_tenant_leaves_the_others_out() -> None:
    store = await _filled()
    names = [
        KEYS.policy_name(kv.key)
        async for stretch in scan_family(store, KEYS, "policies", tenant="acme", keys_only=True)
        for kv in stretch.values
        if not kv.value
    ]
    assert sorted(names) == [PolicyName("acme", f"p{number}") for number in range(3)]


async def test_an_unsharded_family_is_read_in_plain_pages() -> None:
    store = MemoryStore()
    wanted = [KEYS.family("blobs", tenant) + b"%02d" % number for tenant in ("a", "b") for number in range(5)]
    await _put(store, *wanted)
    found = [kv.key async for stretch in scan_family(store, KEYS, "blobs", limit=3) for kv in stretch.values]
    assert found == wanted
