"""``mint.v1.SessionService``: decode, one domain call, encode."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from mint_api.v1 import common_pb2, run_service_pb2, session_service_pb2_grpc
from mint_api.v1 import session_service_pb2 as pb
from mint_core.errors import InvalidArgument, Unimplemented
from mint_core.names import PolicyName, RunName, SessionName, StepName, TenantName, check_id
from mint_trainer.batch import Datum
from mint_trainer.optimizer import AdamWConfig
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.session import StepResult
from mint_trainer.sessions import Sessions, SessionView
from mint_trainer.state import Blob, SavedState

__all__ = ["SessionServicer"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
StepRequest = TypeVar("StepRequest", pb.ForwardBackwardRequest, pb.OptimStepRequest)


class SessionServicer(session_service_pb2_grpc.SessionServiceServicer):
    """The step API over :class:`Sessions`."""

    def __init__(
        self, sessions: Sessions, numerics: common_pb2.Numerics, default_target_modules: Sequence[str]
    ) -> None:
        self._sessions = sessions
        self._numerics = numerics
        self._default_target_modules = tuple(default_target_modules)

    async def CreateSession(self, request: pb.CreateSessionRequest, _: Context) -> pb.CreateSessionResponse:
        tenant = TenantName.parse(request.parent, field="parent").tenant
        lora = request.session.lora if request.session.HasField("lora") else None
        view = await self._sessions.create(
            SessionName(tenant, check_id(request.session_id, field="session_id")),
            PolicyName.parse(request.session.policy, field="session.policy"),
            payload_digest=_digest(request),
            recipe=None if lora is None else self._recipe(lora),
            from_state=_state(request.from_state) if request.HasField("from_state") else None,
            weights_only=request.weights_only,
            base_digest=request.base_digest,
        )
        return pb.CreateSessionResponse(session=self._session(view))

    async def GetSession(self, request: pb.GetSessionRequest, _: Context) -> pb.GetSessionResponse:
        return pb.GetSessionResponse(session=self._session(self._sessions.get(SessionName.parse(request.name))))

    async def CloseSession(self, request: pb.CloseSessionRequest, _: Context) -> pb.CloseSessionResponse:
        await self._sessions.close(SessionName.parse(request.name))
        return pb.CloseSessionResponse()

    async def Forward(self, request: pb.ForwardRequest, _: Context) -> pb.ForwardResponse:
        result = await self._sessions.forward(
            _session_name(request.session), _data(request.data), reference=request.reference
        )
        return pb.ForwardResponse(result=_result(result))

    async def ForwardBackward(self, request: pb.ForwardBackwardRequest, _: Context) -> pb.ForwardBackwardResponse:
        result = await self._sessions.forward_backward(
            _session_name(request.session),
            request.seq,
            _step_digest(request),
            _data(request.data),
            _loss(request.loss),
            dict(request.loss_parameters),
            return_logprobs=request.return_logprobs,
        )
        return pb.ForwardBackwardResponse(result=_result(result))

    async def OptimStep(self, request: pb.OptimStepRequest, _: Context) -> pb.OptimStepResponse:
        result = await self._sessions.optim_step(
            _session_name(request.session),
            request.seq,
            _step_digest(request),
            _optimizer(request.optimizer),
            request.gradient_scale or 1.0,
        )
        return pb.OptimStepResponse(result=_result(result))

    async def SaveState(self, request: pb.SaveStateRequest, _: Context) -> pb.SaveStateResponse:
        name = _session_name(request.session)
        run_id = _run_id(request.run, name)
        saved = await self._sessions.save_state(name, request.run, run_id, request.fence, for_export=request.for_export)
        state = _encode_state(saved)
        state.save_time.GetCurrentTime()
        return pb.SaveStateResponse(state=state)

    async def LoadState(self, request: pb.LoadStateRequest, _: Context) -> pb.LoadStateResponse:
        view = await self._sessions.load_state(
            _session_name(request.session), _state(request.state), weights_only=request.weights_only
        )
        return pb.LoadStateResponse(session=self._session(view))

    async def GetStep(self, request: pb.GetStepRequest, _: Context) -> pb.GetStepResponse:
        name = StepName.parse(request.name)
        return pb.GetStepResponse(result=_result(self._sessions.step_result(name.parent, name.seq)))

    def _recipe(self, lora: common_pb2.LoraConfig) -> AdapterRecipe:
        return AdapterRecipe(
            rank=lora.rank,
            alpha=lora.alpha or 2.0 * lora.rank,
            target_modules=tuple(lora.target_modules) or self._default_target_modules,
            use_rslora=lora.use_rslora,
            dropout=lora.dropout,
            init_seed=lora.init_seed,
        )

    def _session(self, view: SessionView) -> pb.Session:
        return pb.Session(
            name=str(view.name),
            policy=str(view.policy),
            lora=common_pb2.LoraConfig(
                rank=view.recipe.rank,
                alpha=view.recipe.alpha,
                target_modules=view.recipe.target_modules,
                use_rslora=view.recipe.use_rslora,
                dropout=view.recipe.dropout,
                init_seed=view.recipe.init_seed,
            ),
            step=view.step,
            next_seq=view.next_seq,
            numerics=self._numerics,
            create_time=_timestamp(view.create_time_s),
            expire_time=_timestamp(view.expire_time_s),
        )


def _session_name(name: str) -> SessionName:
    return SessionName.parse(name, field="session")


def _digest(request: Message) -> bytes:
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()


def _step_digest(request: StepRequest) -> bytes:
    """Digest of all but the session's name: results saved with a state answer in the session made from it too."""
    payload = type(request)()
    payload.CopyFrom(request)
    payload.ClearField("session")
    return _digest(payload)


def _data(data: Sequence[pb.Datum]) -> list[Datum]:
    for index, datum in enumerate(data):
        if datum.routed_experts:
            raise Unimplemented(
                f"data[{index}].routed_experts is set: this trainer does not replay routes yet; leave it empty"
            )
    # Plain lists: a repeated field is slow to walk more than once.
    return [
        Datum(
            tokens=list(d.tokens),
            targets=list(d.targets),
            weights=list(d.weights),
            behavior_logprobs=list(d.behavior_logprobs),
            advantages=list(d.advantages),
            reference_logprobs=list(d.reference_logprobs),
        )
        for d in data
    ]


def _loss(loss: common_pb2.LossFunction.ValueType) -> str:
    if loss == common_pb2.LOSS_FUNCTION_UNSPECIFIED or loss not in common_pb2.LossFunction.values():
        raise InvalidArgument(f"loss is {loss}: choose one, e.g. LOSS_FUNCTION_CROSS_ENTROPY", field="loss")
    return common_pb2.LossFunction.Name(loss).removeprefix("LOSS_FUNCTION_").lower()


def _optimizer(config: run_service_pb2.OptimizerConfig) -> AdamWConfig:
    return AdamWConfig(
        learning_rate=config.learning_rate,
        beta1=config.beta1 or 0.9,
        beta2=config.beta2 or 0.999,
        eps=config.eps or 1e-8,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def _run_id(run: str, session: SessionName) -> str:
    if not run:
        return session.session
    name = RunName.parse(run, field="run")
    if name.tenant != session.tenant:
        raise InvalidArgument(f"run is {run!r}: it belongs to another tenant than {session}", field="run")
    return name.run


def _state(state: common_pb2.TrainingState) -> SavedState:
    return SavedState(
        run=state.run,
        step=state.step,
        fence=state.fence,
        weights_key=state.weights_key,
        weights=Blob(state.weights.digest, state.weights.size_bytes),
        optimizer_key=state.optimizer_key,
        optimizer=Blob(state.optimizer.digest, state.optimizer.size_bytes),
    )


def _encode_state(saved: SavedState) -> common_pb2.TrainingState:
    return common_pb2.TrainingState(
        run=saved.run,
        step=saved.step,
        fence=saved.fence,
        weights_key=saved.weights_key,
        weights=common_pb2.BlobRef(digest=saved.weights.digest, size_bytes=saved.weights.size_bytes),
        optimizer_key=saved.optimizer_key,
        optimizer=common_pb2.BlobRef(digest=saved.optimizer.digest, size_bytes=saved.optimizer.size_bytes),
    )


def _result(result: StepResult) -> pb.StepResult:
    return pb.StepResult(
        loss_sum=result.loss_sum,
        weight_sum=result.weight_sum,
        num_tokens=result.num_tokens,
        logprobs=[pb.TokenLogprobs(values=values) for values in result.logprobs],
        grad_norm=result.grad_norm,
        step=result.step,
        compute_ms=result.compute_ms,
        metrics=result.metrics,
    )


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(seconds * 1e9))
    return timestamp
