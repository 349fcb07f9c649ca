"""BaseModelService."""

from __future__ import annotations

from typing import Any

from mint_api.v1 import base_model_service_pb2 as pb
from mint_api.v1 import base_model_service_pb2_grpc as pb_grpc
from mint_catalog.model.codecs import MessageCodecs
from mint_catalog.policies.base_models import BaseModels
from mint_core.names import BaseModelName

__all__ = ["BaseModelServicer"]


class BaseModelServicer(pb_grpc.BaseModelServiceServicer):
    def __init__(self, base_models: BaseModels, codecs: MessageCodecs) -> None:
        self._base_models = base_models
        self._codec = codecs.base_model

    async def RegisterBaseModel(self, request: pb.RegisterBaseModelRequest, _context: Any) -> Any:
        name = BaseModelName.parse(request.base_model.name, field="base_model.name")
        written = await self._base_models.register(self._codec.from_message(request.base_model, name=name))
        return pb.RegisterBaseModelResponse(
            base_model=self._codec.to_message(written.record), catalog_revision=written.catalog_revision
        )

    async def GetBaseModel(self, request: pb.GetBaseModelRequest, _context: Any) -> Any:
        record = await self._base_models.get(BaseModelName.parse(request.name))
        return pb.GetBaseModelResponse(base_model=self._codec.to_message(record))

    async def ListBaseModels(self, request: pb.ListBaseModelsRequest, _context: Any) -> Any:
        page = await self._base_models.list(page_size=request.page_size, page_token=request.page_token)
        return pb.ListBaseModelsResponse(
            base_models=map(self._codec.to_message, page.records), next_page_token=page.next_page_token
        )
