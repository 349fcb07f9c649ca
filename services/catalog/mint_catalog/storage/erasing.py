"""What a tenant's erasure asks of every writer: one more compare in each transaction, and no read."""

from __future__ import annotations

from mint_catalog.model.keys import Keys
from mint_catalog.storage.store import Compare, Field, Store
from mint_core.errors import WrongState
from mint_core.names import TenantErasureName

__all__ = ["check_erasing", "not_erasing"]


def not_erasing(keys: Keys, tenant: str) -> Compare:
    """Holds unless the tenant is being erased. Every transaction that writes a tenant's records compares it."""
    return Compare(keys.erasing(tenant), Field.CREATE, 0)


async def check_erasing(store: Store, keys: Keys, tenant: str) -> None:
    """Raise ``WrongState`` if the tenant is being erased: what to ask once such a transaction was refused."""
    if (await store.get([keys.erasing(tenant)])).values[0] is not None:
        name = TenantErasureName(tenant)
        raise WrongState(
            f"tenants/{tenant} is being erased and takes no writes; wait until {name} is DONE, then the name may be "
            "used anew",
            metadata={"resource": str(name), "state": "RUNNING"},
        )
