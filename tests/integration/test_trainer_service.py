"""The trainer as others meet it: over gRPC, with a real object store, killed and restarted as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mint_trainer.base  # noqa: F401  # makes transformers importable everywhere, so before tiny_models

# isort: split
import grpc
import pytest
import torch

from mint_api.v1 import base_model_service_pb2 as base_pb
from mint_api.v1 import base_model_service_pb2_grpc as base_rpc
from mint_api.v1 import common_pb2, run_service_pb2
from mint_api.v1 import session_service_pb2 as pb
from mint_api.v1 import session_service_pb2_grpc as rpc
from mint_client._calling import Connection
from mint_client.sessions import Sessions
from mint_core import errors, server
from mint_core.base_model import digest_of_folder
from mint_core.channel import call, connect
from mint_core.config import ServiceSettings, load
from mint_core.server import Binding, Services
from mint_trainer.app import build
from mint_trainer.settings import TrainerSettings
from support.tiny_models import make_tiny_llama
from support.weed import WeedServer, running_weed

SESSION = "tenants/acme/sessions/s1"
LORA = common_pb2.LoraConfig(rank=4, target_modules=["q_proj", "down_proj"], init_seed=3)
OPTIMIZER = run_service_pb2.OptimizerConfig(learning_rate=1e-2, max_grad_norm=1.0)


class CatalogSettings(ServiceSettings):
    """Settings of the catalog's stand-in."""

    section = "catalog"


class BaseModels(base_rpc.BaseModelServiceServicer):
    """The one call that a trainer makes to the catalog."""

    def __init__(self, digests: dict[str, str]) -> None:
        self.digests = digests

    async def GetBaseModel(
        self, request: base_pb.GetBaseModelRequest, _: grpc.aio.ServicerContext
    ) -> base_pb.GetBaseModelResponse:
        if request.name not in self.digests:
            raise errors.NotFound(f"{request.name} is not registered")
        return base_pb.GetBaseModelResponse(
            base_model=base_pb.BaseModel(name=request.name, digest=self.digests[request.name])
        )


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("trainer-service") / "tiny")


@pytest.fixture(scope="module")
def weed() -> Iterator[WeedServer]:
    with running_weed() as running:
        yield running


@pytest.fixture
async def catalog(base_folder: Path) -> AsyncIterator[str]:
    servicer = BaseModels(
        {"baseModels/tiny": digest_of_folder(base_folder).digest, "baseModels/other": "sha256:" + "1" * 64}
    )

    @contextlib.asynccontextmanager
    async def build_catalog() -> AsyncIterator[Services]:
        yield Services(
            public=[Binding(base_rpc.add_BaseModelServiceServicer_to_server, servicer, "mint.v1.BaseModelService")]
        )

    async with server.running("catalog", load(CatalogSettings, [], {}), build_catalog) as addresses:
        yield addresses.public


@pytest.fixture
def environ(base_folder: Path, weed: WeedServer, catalog: str, tmp_path: Path) -> dict[str, str]:
    return {
        "MINT_TRAINER_BASE_MODEL": "baseModels/tiny",
        "MINT_TRAINER_BASE_MODEL_PATH": str(base_folder),
        "MINT_TRAINER_CATALOG_ADDRESS": catalog,
        "MINT_TRAINER_CATALOG_TIMEOUT_S": "2",
        "MINT_TRAINER_NUM_THREADS": "1",
        "MINT_TRAINER_MAX_STEP_TOKENS": "2000",
        "MINT_TRAINER_SCRATCH_PATH": str(tmp_path),
        "MINT_TRAINER_OBJECT_STORE__ENDPOINT_URL": weed.endpoint_url,
        "MINT_TRAINER_OBJECT_STORE__ACCESS_KEY_ID": weed.access_key_id,
        "MINT_TRAINER_OBJECT_STORE__SECRET_ACCESS_KEY": weed.secret_access_key,
    }


@contextlib.asynccontextmanager
async def stub_at(address: str) -> AsyncIterator[rpc.SessionServiceStub]:
    async with connect(address) as channel:
        yield rpc.SessionServiceStub(channel)


@pytest.fixture
async def trainer(environ: dict[str, str], tmp_path: Path) -> AsyncIterator[rpc.SessionServiceStub]:
    settings = load(TrainerSettings, [], environ)
    async with (
        server.running("trainer", settings, partial(build, settings)) as addresses,
        stub_at(addresses.public) as stub,
    ):
        yield stub
    assert list(tmp_path.iterdir()) == []


def datum(seed: int, length: int = 12) -> pb.Datum:
    ids = torch.randint(0, 384, (length + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    return pb.Datum(tokens=ids[:-1], targets=ids[1:], weights=[0.0] * (length // 3) + [1.0] * (length - length // 3))


def creation(session_id: str = "s1", **fields: Any) -> pb.CreateSessionRequest:
    session = pb.Session(policy="tenants/acme/policies/tone", lora=LORA)
    return pb.CreateSessionRequest(**{"parent": "tenants/acme", "session_id": session_id, "session": session, **fields})


def forward_backward(seq: int, *data: pb.Datum, session: str = SESSION, **fields: Any) -> pb.ForwardBackwardRequest:
    return pb.ForwardBackwardRequest(
        **{"session": session, "seq": seq, "data": data, "loss": common_pb2.LOSS_FUNCTION_CROSS_ENTROPY, **fields}
    )


def optim_step(seq: int, session: str = SESSION) -> pb.OptimStepRequest:
    return pb.OptimStepRequest(session=session, seq=seq, optimizer=OPTIMIZER, gradient_scale=0.1)


async def test_life_of_a_session(trainer: rpc.SessionServiceStub, base_folder: Path) -> None:
    created = (await call(trainer.CreateSession, creation())).session
    assert (created.name, created.policy, created.step, created.next_seq) == (
        SESSION,
        "tenants/acme/policies/tone",
        0,
        1,
    )
    assert (created.lora.rank, created.lora.alpha) == (4, 8.0)
    assert list(created.lora.target_modules) == ["down_proj", "q_proj"]
    assert created.numerics.base_digest == digest_of_folder(base_folder).digest
    assert created.numerics.dtype == "float32"
    assert created.numerics.engine_version.startswith("torch ")
    assert created.expire_time.seconds - created.create_time.seconds == pytest.approx(3600, abs=5)

    evaluated = (await call(trainer.Forward, pb.ForwardRequest(session=SESSION, data=[datum(1), datum(2, 5)]))).result
    assert [len(each.values) for each in evaluated.logprobs] == [12, 5]
    assert evaluated.num_tokens == 8 + 4
    by_hand = -sum(
        w * v
        for d, values in zip((datum(1), datum(2, 5)), evaluated.logprobs, strict=True)
        for w, v in zip(d.weights, values.values, strict=True)
    )
    assert evaluated.loss_sum == pytest.approx(by_hand, rel=1e-5)

    request = forward_backward(1, datum(1), datum(2, 5), return_logprobs=True)
    first = (await call(trainer.ForwardBackward, request)).result
    assert first.loss_sum == pytest.approx(evaluated.loss_sum, rel=1e-5)
    assert [len(each.values) for each in first.logprobs] == [12, 5]
    assert first.weight_sum == 12.0
    assert (await call(trainer.ForwardBackward, request)).result == first
    stepped = (await call(trainer.OptimStep, optim_step(2))).result
    assert stepped.step == 1
    assert stepped.grad_norm > 0
    assert stepped.compute_ms > 0
    assert (await call(trainer.GetStep, pb.GetStepRequest(name=f"{SESSION}/steps/2"))).result == stepped
    quiet = (await call(trainer.ForwardBackward, forward_backward(3, datum(1), datum(2, 5)))).result
    assert not quiet.logprobs
    assert quiet.loss_sum < first.loss_sum

    save = pb.SaveStateRequest(session=SESSION, run="tenants/acme/runs/r1", fence=42)
    state = (await call(trainer.SaveState, save)).state
    assert (state.run, state.step, state.fence) == ("tenants/acme/runs/r1", 1, 42)
    assert state.weights_key == "tenants/acme/states/tone/r1/00000001-42/weights.safetensors"
    assert state.save_time.seconds > 0
    assert (await call(trainer.GetSession, pb.GetSessionRequest(name=SESSION))).session.next_seq == 4
    loaded = (await call(trainer.LoadState, pb.LoadStateRequest(session=SESSION, state=state))).session
    assert (loaded.step, loaded.next_seq) == (1, 4)
    own = (await call(trainer.SaveState, pb.SaveStateRequest(session=SESSION))).state
    assert own.weights_key == "tenants/acme/states/tone/s1/00000001-0/weights.safetensors"
    assert own.weights == state.weights
    await call(trainer.CloseSession, pb.CloseSessionRequest(name=SESSION))
    with pytest.raises(errors.NotFound):
        await call(trainer.GetSession, pb.GetSessionRequest(name=SESSION))


async def test_defaults_of_a_recipe(trainer: rpc.SessionServiceStub) -> None:
    session = pb.Session(policy="tenants/acme/policies/tone", lora=common_pb2.LoraConfig(rank=2))
    lora = (await call(trainer.CreateSession, creation(session=session))).session.lora
    assert (lora.alpha, lora.use_rslora, lora.dropout, lora.init_seed) == (4.0, False, 0.0, 0)
    assert list(lora.target_modules) == sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))


@pytest.mark.parametrize(
    ("request_", "error", "field"),
    [
        (creation(parent="acme"), errors.InvalidArgument, "parent"),
        (creation("../etc"), errors.InvalidArgument, "session_id"),
        (creation(session=pb.Session(policy="tone", lora=LORA)), errors.InvalidArgument, "session.policy"),
        (
            creation(session=pb.Session(policy="tenants/acme/policies/p", lora=common_pb2.LoraConfig())),
            errors.InvalidArgument,
            "session.lora.rank",
        ),
        (creation(session=pb.Session(policy="tenants/acme/policies/p")), errors.InvalidArgument, "session.lora"),
        (creation(from_state=common_pb2.TrainingState()), errors.InvalidArgument, "from_state.weights_key"),
        (creation(base_digest="sha256:" + "0" * 64), errors.BaseModelMismatch, None),
        (forward_backward(1), errors.InvalidArgument, "data"),
        (forward_backward(0, datum(1)), errors.InvalidArgument, "seq"),
        (forward_backward(1, datum(1), session="s1"), errors.InvalidArgument, "session"),
        (forward_backward(1, datum(1), session="tenants/acme/sessions/none"), errors.NotFound, None),
        (forward_backward(2, datum(1)), errors.WrongState, None),
        (forward_backward(1, datum(1), loss=common_pb2.LOSS_FUNCTION_UNSPECIFIED), errors.InvalidArgument, "loss"),
        (forward_backward(1, datum(1), loss=99), errors.InvalidArgument, "loss"),
        (
            forward_backward(1, datum(1), loss_parameters={"x": 1.0}),
            errors.InvalidArgument,
            "loss_parameters['x']",
        ),
        (
            forward_backward(1, datum(1), loss=common_pb2.LOSS_FUNCTION_PPO),
            errors.InvalidArgument,
            "data.behavior_logprobs",
        ),
        (
            forward_backward(1, datum(1), loss=common_pb2.LOSS_FUNCTION_CISPO, loss_parameters={"clip_low": 1.5}),
            errors.InvalidArgument,
            "loss_parameters['clip_low']",
        ),
        (
            forward_backward(1, pb.Datum(tokens=[1], targets=[1], weights=[1], reference_logprobs=[-1, -1])),
            errors.InvalidArgument,
            "data[0].reference_logprobs",
        ),
        (
            forward_backward(1, pb.Datum(tokens=[1, 999], targets=[1, 2], weights=[1, 1])),
            errors.InvalidArgument,
            "data[0].tokens[1]",
        ),
        (
            forward_backward(1, pb.Datum(tokens=[1], targets=[1], weights=[1], routed_experts=b"1234")),
            errors.Unimplemented,
            None,
        ),
        (forward_backward(1, *[datum(1, 100)] * 21), errors.InvalidArgument, "data"),
        (optim_step(1), errors.WrongState, None),
        (
            pb.OptimStepRequest(
                session=SESSION, seq=1, optimizer=run_service_pb2.OptimizerConfig(learning_rate=float("nan"))
            ),
            errors.InvalidArgument,
            "optimizer.learning_rate",
        ),
        (pb.SaveStateRequest(session=SESSION, run="tenants/other/runs/r"), errors.InvalidArgument, "run"),
        (pb.SaveStateRequest(session=SESSION, fence=-1), errors.InvalidArgument, "fence"),
        (pb.LoadStateRequest(session=SESSION), errors.InvalidArgument, "state.weights_key"),
        (pb.GetStepRequest(name=f"{SESSION}/steps/1"), errors.NotFound, None),
        (pb.GetStepRequest(name=f"{SESSION}/steps/x"), errors.InvalidArgument, "name"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "DESCRIPTOR") else None,
)
async def test_bad_requests_answer_as_documented_and_good_ones_go_on(
    trainer: rpc.SessionServiceStub, request_: Any, error: type[errors.MintError], field: str | None
) -> None:
    method = getattr(trainer, type(request_).__name__.removesuffix("Request"))
    if method is not trainer.CreateSession:
        await call(trainer.CreateSession, creation())
    with pytest.raises(errors.MintError) as caught:
        await call(method, request_)
    assert type(caught.value) is error, caught.value
    if field is not None:
        assert isinstance(caught.value, errors.InvalidArgument)
        assert caught.value.field == field
    await call(trainer.CreateSession, creation())
    assert (await call(trainer.ForwardBackward, forward_backward(1, datum(1)))).result.num_tokens == 8


async def test_base_that_is_not_the_registered_one_is_refused(environ: dict[str, str]) -> None:
    for name, error, words in (
        ("baseModels/other", errors.BaseModelMismatch, "is registered with sha256:1111"),
        ("baseModels/none", errors.NotFound, "baseModels/none is not registered"),
    ):
        settings = load(TrainerSettings, [], environ | {"MINT_TRAINER_BASE_MODEL": name})
        with pytest.raises(error, match=words):
            async with build(settings):
                pass
    settings = load(TrainerSettings, [], environ | {"MINT_TRAINER_CATALOG_ADDRESS": "127.0.0.1:9"})
    with pytest.raises(errors.Unavailable, match=r"127\.0\.0\.1:9 did not answer for 2 s"):
        async with build(settings):
            pass


async def test_store_that_goes_away_and_comes_back(environ: dict[str, str]) -> None:
    with running_weed() as own:
        environ = environ | {
            "MINT_TRAINER_OBJECT_STORE__ENDPOINT_URL": own.endpoint_url,
            "MINT_TRAINER_OBJECT_STORE__ACCESS_KEY_ID": own.access_key_id,
            "MINT_TRAINER_OBJECT_STORE__SECRET_ACCESS_KEY": own.secret_access_key,
            "MINT_TRAINER_OBJECT_STORE__MAX_ATTEMPTS": "1",
        }
        settings = load(TrainerSettings, [], environ)
        async with (
            server.running("trainer", settings, partial(build, settings)) as addresses,
            connect(addresses.public, retry=False) as channel,
        ):
            trainer = rpc.SessionServiceStub(channel)
            await call(trainer.CreateSession, creation())
            await asyncio.to_thread(own.kill)
            with pytest.raises(errors.Unavailable):
                await call(trainer.SaveState, pb.SaveStateRequest(session=SESSION))
            assert (await call(trainer.ForwardBackward, forward_backward(1, datum(1)))).result.num_tokens == 8
            await asyncio.to_thread(own.start)
            assert (await call(trainer.SaveState, pb.SaveStateRequest(session=SESSION))).state.weights.size_bytes


class Process:
    """``python -m mint_trainer`` and the address it serves on."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._environ = environ
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> str:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mint_trainer",
            env={**os.environ, **self._environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stderr=asyncio.subprocess.PIPE,
        )
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            entry = json.loads(line)
            if entry["message"] == "serving":
                return str(entry["public"])
        raise AssertionError("the trainer ended before it served")

    async def end(self, number: int) -> int:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        await self._process.communicate()
        assert self._process.returncode is not None
        return self._process.returncode


async def steps(trainer: rpc.SessionServiceStub, first: int, last: int, seq: int) -> list[tuple[float, float]]:
    outcomes = []
    for number in range(first, last):
        loss = (
            await call(trainer.ForwardBackward, forward_backward(seq, datum(number), datum(number + 50, 20)))
        ).result
        step = (await call(trainer.OptimStep, optim_step(seq + 1))).result
        outcomes.append((loss.loss_sum, step.grad_norm))
        seq += 2
    return outcomes


async def test_killed_in_mid_step_and_resumed_it_ends_with_the_same_bytes(environ: dict[str, str]) -> None:
    process = Process(environ)
    run = {"session": SESSION, "run": "tenants/acme/runs/r"}
    try:
        async with stub_at(await process.start()) as trainer:
            await call(trainer.CreateSession, creation())
            await steps(trainer, 0, 2, 1)
            saved = (await call(trainer.SaveState, pb.SaveStateRequest(**run, fence=1))).state
            expected = await steps(trainer, 2, 5, 5)
            whole = (await call(trainer.SaveState, pb.SaveStateRequest(**run, fence=1))).state
            cut = asyncio.ensure_future(
                call(trainer.ForwardBackward, forward_backward(11, *[datum(n, 100) for n in range(20)]))
            )
            await asyncio.sleep(0.02)
            assert await process.end(signal.SIGKILL) == -signal.SIGKILL
            with pytest.raises(errors.MintError):
                await cut
        async with stub_at(await process.start()) as trainer:
            with pytest.raises(errors.NotFound, match="the trainer restarted"):
                await call(trainer.GetSession, pb.GetSessionRequest(name=SESSION))
            resumed = creation(from_state=saved, session=pb.Session(policy="tenants/acme/policies/tone"))
            session = (await call(trainer.CreateSession, resumed)).session
            assert (session.step, session.next_seq) == (2, 5)
            assert await steps(trainer, 2, 5, 5) == expected
            again = (await call(trainer.SaveState, pb.SaveStateRequest(**run, fence=2))).state
            assert (again.weights, again.optimizer) == (whole.weights, whole.optimizer)
        assert await process.end(signal.SIGTERM) == 0
    finally:
        await process.end(signal.SIGKILL)


@contextlib.asynccontextmanager
async def client_at(address: str) -> AsyncIterator[Sessions]:
    connection = Connection("trainer", address)
    try:
        yield Sessions(connection, timeout_s=30.0)
    finally:
        await connection.close()


async def rollout(sessions: Sessions, session: str) -> list[pb.Datum]:
    """What one step of reinforcement learning sends: behaviour as the policy is now, advantages of both signs."""
    data = [datum(1), datum(2, 20)]
    behavior = (await sessions.forward(session, data)).logprobs
    reference = (await sessions.forward(session, data, reference=True)).logprobs
    for number, each in enumerate(data):
        each.behavior_logprobs.extend(value + 0.1 for value in behavior[number].values)
        each.reference_logprobs.extend(reference[number].values)
        each.advantages.extend([1.5 - 2.0 * number] * len(each.tokens))
    return data


async def train_on(sessions: Sessions, session: str, seq: int, data: list[pb.Datum]) -> list[pb.StepResult]:
    parameters = {"clip_high": 1.05, "kl_coefficient": 0.1}
    loss = common_pb2.LOSS_FUNCTION_PPO
    return [
        await sessions.forward_backward(
            session, seq, data, loss=loss, loss_parameters=parameters, return_logprobs=True
        ),
        await sessions.optim_step(session, seq + 1, optimizer=OPTIMIZER, gradient_scale=0.1),
    ]


def timeless(results: list[pb.StepResult]) -> list[pb.StepResult]:
    for result in results:
        result.compute_ms = 0.0
    return results


async def test_step_results_outlive_the_process(environ: dict[str, str], base_folder: Path) -> None:
    process = Process(environ)
    given = {"policy": "tenants/acme/policies/tone", "base_digest": digest_of_folder(base_folder).digest}
    run, other = "tenants/acme/runs/rl", "tenants/acme/sessions/s2"
    try:
        async with client_at(await process.start()) as sessions:
            await sessions.create("acme", "s1", lora=LORA, **given)
            first = await rollout(sessions, SESSION)
            results = timeless(await train_on(sessions, SESSION, 1, first))
            assert results[0].metrics.keys() == {"num_clipped", "behavior_kl", "reference_kl"}
            assert [len(each.values) for each in results[0].logprobs] == [12, 20]
            second = await rollout(sessions, SESSION)
            assert [list(d.reference_logprobs) for d in second] == [list(d.reference_logprobs) for d in first]
            saved = await sessions.save_state(SESSION, run=run, fence=1)
            expected = timeless(await train_on(sessions, SESSION, 3, second))
            assert expected[0].metrics["reference_kl"] > results[0].metrics["reference_kl"] == 0.0
            whole = await sessions.save_state(SESSION, run=run, fence=1)
            assert await process.end(signal.SIGKILL) == -signal.SIGKILL
        async with client_at(await process.start()) as sessions:
            resumed = await sessions.create("acme", "s2", from_state=saved, **given)
            assert (resumed.step, resumed.next_seq) == (1, 3)
            assert [await sessions.get_step(other, seq) for seq in (1, 2)] == results
            assert await train_on(sessions, other, 1, first) == results
            with pytest.raises(errors.RequestIdReused, match="seq 1 of tenants/acme/sessions/s2"):
                await train_on(sessions, other, 1, second)
            assert (await sessions.get(other)).next_seq == 3
            assert timeless(await train_on(sessions, other, 3, second)) == expected
            again = await sessions.save_state(other, run=run, fence=2)
            assert (again.weights, again.optimizer) == (whole.weights, whole.optimizer)
        assert await process.end(signal.SIGTERM) == 0
    finally:
        await process.end(signal.SIGKILL)


async def test_process_says_in_one_line_why_it_does_not_start(environ: dict[str, str], tmp_path: Path) -> None:
    for change, words in (
        ({"MINT_TRAINER_BASE_MODEL": "baseModels/other"}, "mint-trainer: BASE_MODEL_MISMATCH: "),
        ({"MINT_TRAINER_BASE_MODEL_PATH": str(tmp_path)}, "mint-trainer: INVALID_FIELD: "),
        ({"MINT_TRAINER_NUM_THREADS": "none"}, "trainer.num_threads is 'none': expected int"),
    ):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mint_trainer",
            env={**os.environ, **environ, **change, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stderr=asyncio.subprocess.PIPE,
        )
        _, stderr = await process.communicate()
        assert process.returncode != 0
        last = stderr.decode().splitlines()[-1]
        assert words in last, stderr.decode()[-1000:]
