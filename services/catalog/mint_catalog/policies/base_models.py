"""Base models known to the installation: a name and the digest that trainers and engines must hold."""

from __future__ import annotations

from dataclasses import replace

from mint_catalog.model.checks import check_range, check_text, not_found
from mint_catalog.model.records import BaseModel, now
from mint_catalog.model.tables import Tables
from mint_catalog.storage.draft import Answer, Draft, Transactions, Written
from mint_catalog.storage.paging import Page, list_page
from mint_catalog.storage.store import Store
from mint_core.errors import AlreadyExists
from mint_core.names import BaseModelName, check_digest

__all__ = ["BaseModels"]


class BaseModels:
    """Register, read and list base models."""

    def __init__(self, store: Store, tables: Tables) -> None:
        self._store = store
        self._tables = tables
        self._transactions = Transactions(store, tables.keys)

    async def register(self, wanted: BaseModel) -> Written[BaseModel]:
        """Register a base model; the same name and digest again changes nothing.

        Raises ``InvalidArgument``, ``AlreadyExists`` when the name has another digest.
        """
        check_digest(wanted.digest, field="base_model.digest")
        check_range(wanted.size_bytes, field="base_model.size_bytes", least=0)
        check_range(wanted.num_parameters, field="base_model.num_parameters", least=0)
        check_text(wanted.architecture, field="base_model.architecture", max_chars=256)
        ref = self._tables.base_model(wanted.name)

        async def body(draft: Draft) -> Answer[BaseModel]:
            await draft.fetch(ref)
            known = draft.get(ref)
            if known is None:
                return draft.put(ref, replace(wanted, create_time=now()))
            if known.digest != wanted.digest:
                raise AlreadyExists(
                    f"{wanted.name} is registered with digest {known.digest}, not {wanted.digest}: a base model never "
                    "changes; register the other bytes under another name",
                    metadata={"resource": str(wanted.name), "digest": known.digest},
                )
            return Answer(ref, known)

        return await self._transactions.run(body, self._tables.codecs.base_model)

    async def get(self, name: BaseModelName) -> BaseModel:
        """Read one base model. Raises ``NotFound``."""
        ref = self._tables.base_model(name)
        kv = (await self._store.get([ref.key])).values[0]
        if kv is None:
            raise not_found(name)
        return ref.codec.decode(kv)

    async def list(self, *, page_size: int, page_token: str) -> Page[BaseModel]:
        """One page of the base models by name. Raises ``InvalidArgument``, ``RevisionCompacted``."""
        return await list_page(
            self._store,
            self._tables.keys.family("baseModels"),
            self._tables.codecs.base_model,
            bound="baseModels",
            page_size=page_size,
            page_token=page_token,
        )
