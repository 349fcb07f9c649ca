"""What every engine must do under MinT's rules, fake or real; subclasses provide ``rig``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from mint_core.errors import (
    AdapterNotResident,
    AdapterPinned,
    BaseModelMismatch,
    DeadlineExceeded,
    DigestMismatch,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    WrongState,
)
from mint_engine.adapter_engine import Delta, Finish, Sampling
from mint_engine.host import EngineHost, Generation, HostState, Started
from mint_engine.prompts import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from support.serving_adapters import ServingAdapter

__all__ = ["PROMPT", "Answer", "EngineContract", "Rig", "ask", "until"]

PROMPT = TokenPrompt(tuple(range(20, 40)))


@dataclass(frozen=True)
class Rig:
    """A host over some engine, without residents, and adapters to load: one more than the engine has places."""

    host: EngineHost
    adapters: list[ServingAdapter]
    foreign: ServingAdapter
    """Made for another base."""
    high_rank: ServingAdapter
    """Of a rank that the engine does not take."""

    async def load(self, adapter: ServingAdapter, **options: bool) -> bool:
        return (await self.host.load(adapter.digest, adapter.folder, **options)).already_resident


@dataclass(frozen=True)
class Answer:
    """A whole stream."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Finish


async def ask(
    host: EngineHost, digest: str = "", *, prompt=PROMPT, tenant: str = "tenants/a", logprobs: bool = True, **sampling
) -> Answer:
    """Generate 6 greedy tokens from the adapter, or from the base without a digest."""
    options = {"max_new_tokens": 6, "ignore_eos": True} | sampling
    request = Generation(
        prompt=prompt,
        tenant=tenant,
        digest=digest,
        base=not digest,
        sampling=Sampling(**options),
        with_logprobs=logprobs,
    )
    items = [item async for item in host.generate(request, timeout_s=60)]
    assert isinstance(items[0], Started)
    deltas = [item for item in items[1:] if isinstance(item, Delta)]
    assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish is not None
    return Answer(
        items[0].prompt_token_ids,
        tuple(token for delta in deltas for token in delta.token_ids),
        tuple(value for delta in deltas for value in delta.logprobs),
        "".join(delta.text for delta in deltas),
        deltas[-1].finish,
    )


async def until(condition: Callable[[], object], *, timeout_s: float = 10) -> None:
    """Wait for something that announces itself nowhere."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.001)


class EngineContract:
    """The suite. Each test begins without residents and leaves none in use."""

    async def test_starts_empty_and_ready(self, rig: Rig) -> None:
        assert rig.host.residents() == []
        assert rig.host.num_running == 0
        assert rig.host.state is HostState.READY

    async def test_base_answers_when_asked_by_name(self, rig: Rig) -> None:
        answer = await ask(rig.host)
        assert answer.prompt_token_ids == PROMPT.token_ids
        assert len(answer.token_ids) == len(answer.logprobs) == 6
        assert all(value <= 0 for value in answer.logprobs)
        assert (answer.finish.reason, answer.finish.num_prompt_tokens) == ("length", 20)
        assert answer.finish.num_completion_tokens == 6

    async def test_base_never_answers_by_omission(self, rig: Rig) -> None:
        for request in (
            Generation(prompt=PROMPT, tenant="tenants/a"),
            Generation(prompt=PROMPT, tenant="tenants/a", digest=rig.adapters[0].digest, base=True),
            Generation(prompt=PROMPT, tenant="tenants/a", digest="sha256:short"),
        ):
            with pytest.raises(InvalidArgument):
                await anext(rig.host.generate(request, timeout_s=5))

    async def test_absent_adapter_is_refused_before_any_token(self, rig: Rig) -> None:
        request = Generation(prompt=PROMPT, tenant="tenants/a", digest=rig.adapters[0].digest)
        with pytest.raises(AdapterNotResident):
            await anext(rig.host.generate(request, timeout_s=5))
        with pytest.raises(AdapterNotResident):
            await rig.host.score(request, timeout_s=5)

    async def test_loaded_adapter_answers_and_base_stays_base(self, rig: Rig) -> None:
        first, second = rig.adapters[:2]
        base = await ask(rig.host)
        assert not await rig.load(first)
        assert not await rig.load(second, into_slot=True)
        answers = await asyncio.gather(*(ask(rig.host, digest) for digest in (first.digest, "", second.digest)))
        assert answers[1].token_ids == base.token_ids
        assert len({answer.logprobs for answer in answers}) == 3
        assert {resident.digest for resident in rig.host.residents()} == {first.digest, second.digest}
        assert [resident.num_references for resident in rig.host.residents()] == [0, 0]

    async def test_second_load_is_a_no_op(self, rig: Rig) -> None:
        adapter = rig.adapters[0]
        assert not await rig.load(adapter)
        assert await rig.load(adapter)
        assert await rig.load(adapter, into_slot=True)
        assert len(rig.host.residents()) == 1
        assert rig.host.residents()[0].rank == adapter.config.rank

    async def test_parallel_loads_of_one_digest_are_one(self, rig: Rig) -> None:
        adapter = rig.adapters[0]
        assert await asyncio.gather(*(rig.load(adapter) for _ in range(5))) == [False] * 5
        assert len(rig.host.residents()) == 1

    async def test_unloaded_adapter_does_not_answer_any_more(self, rig: Rig) -> None:
        adapter = rig.adapters[0]
        await rig.load(adapter)
        before = await ask(rig.host, adapter.digest)
        assert await rig.host.unload(adapter.digest)
        assert not await rig.host.unload(adapter.digest)
        with pytest.raises(AdapterNotResident):
            await ask(rig.host, adapter.digest)
        await rig.load(adapter)
        assert (await ask(rig.host, adapter.digest)).token_ids == before.token_ids

    async def test_adapter_in_use_is_not_unloaded(self, rig: Rig) -> None:
        adapter = rig.adapters[0]
        await rig.load(adapter)
        request = Generation(
            prompt=PROMPT,
            tenant="tenants/a",
            digest=adapter.digest,
            sampling=Sampling(max_new_tokens=400, ignore_eos=True),
        )
        async with contextlib.aclosing(rig.host.generate(request, timeout_s=60)) as stream:
            await anext(stream)
            await anext(stream)
            assert rig.host.residents()[0].num_references == 1
            with pytest.raises(AdapterPinned):
                await rig.host.unload(adapter.digest)
            with pytest.raises(WrongState):
                await rig.host.flush_prefix_cache()
        assert rig.host.residents()[0].num_references == 0
        assert rig.host.num_running == 0
        assert await rig.host.unload(adapter.digest)

    async def test_least_recently_used_goes_first(self, rig: Rig) -> None:
        *fitting, extra = rig.adapters
        for adapter in fitting:
            await rig.load(adapter)
        await ask(rig.host, fitting[0].digest)
        await rig.load(extra)
        resident = [adapter.digest for adapter in rig.host.residents()]
        assert fitting[1].digest not in resident
        assert resident[:2] == [extra.digest, fitting[0].digest]
        with pytest.raises(AdapterNotResident):
            await ask(rig.host, fitting[1].digest)

    async def test_pinned_and_used_adapters_are_never_evicted(self, rig: Rig) -> None:
        *fitting, extra = rig.adapters
        for adapter in fitting:
            await rig.load(adapter, pinned=True)
        with pytest.raises(ResourceExhausted) as raised:
            await rig.load(extra)
        assert raised.value.retry_after_s
        with pytest.raises(AdapterPinned):
            await rig.host.unload(fitting[0].digest)
        assert {resident.digest for resident in rig.host.residents()} == {adapter.digest for adapter in fitting}

    async def test_abandoned_stream_frees_its_adapter(self, rig: Rig) -> None:
        adapter = rig.adapters[0]
        await rig.load(adapter)
        task = asyncio.create_task(ask(rig.host, adapter.digest, max_new_tokens=400))
        await until(lambda: rig.host.num_running)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert rig.host.num_running == 0
        async with asyncio.timeout(10):
            assert await rig.host.unload(adapter.digest)

    async def test_passed_deadline_is_refused(self, rig: Rig) -> None:
        with pytest.raises(DeadlineExceeded):
            await anext(rig.host.generate(Generation(prompt=PROMPT, tenant="tenants/a", base=True), timeout_s=0))

    async def test_deadline_ends_a_stream_and_its_reference(self, rig: Rig) -> None:
        adapter = rig.adapters[0]
        await rig.load(adapter)
        request = Generation(
            prompt=PROMPT,
            tenant="tenants/a",
            digest=adapter.digest,
            sampling=Sampling(max_new_tokens=450, ignore_eos=True),
        )

        async def read_slowly() -> None:
            async for _ in rig.host.generate(request, timeout_s=0.05):
                await asyncio.sleep(0.01)

        with pytest.raises(DeadlineExceeded):
            await read_slowly()
        assert rig.host.residents()[0].num_references == 0

    async def test_what_does_not_fit_is_refused_by_name(self, rig: Rig) -> None:
        adapter = rig.adapters[0]
        with pytest.raises(BaseModelMismatch):
            await rig.load(rig.foreign)
        with pytest.raises(ResourceExhausted, match="rank"):
            await rig.load(rig.high_rank)
        with pytest.raises(DigestMismatch):
            await rig.host.load(rig.adapters[1].digest, adapter.folder)
        with pytest.raises(NotFound):
            await rig.host.load(adapter.digest, "no-such-folder")
        for folder in ("../adapters", "..", "/etc", "", ".hidden", "a/b", "a\0b"):
            with pytest.raises(InvalidArgument, match="folder"):
                await rig.host.load(adapter.digest, folder)
        with pytest.raises(InvalidArgument, match="digest"):
            await rig.host.load("latest", adapter.folder)
        assert rig.host.residents() == []
        assert not await rig.load(adapter)

    async def test_oversize_prompt_names_the_limit(self, rig: Rig) -> None:
        limits = rig.host.engine.limits
        long = TokenPrompt((5,) * (limits.max_prompt_tokens + 1))
        with pytest.raises(InvalidArgument, match=str(limits.max_prompt_tokens)):
            await ask(rig.host, prompt=long, max_new_tokens=1)
        with pytest.raises(InvalidArgument, match=str(limits.max_total_tokens)) as raised:
            await ask(rig.host, max_new_tokens=limits.max_total_tokens)
        assert raised.value.field == "sampling.max_new_tokens"
        fitting = await ask(rig.host, max_new_tokens=limits.max_total_tokens - 20)
        assert len(fitting.token_ids) == limits.max_total_tokens - 20

    @pytest.mark.parametrize(
        ("field", "sampling"),
        [
            ("max_new_tokens", {"max_new_tokens": 0}),
            ("temperature", {"temperature": -1.0}),
            ("temperature", {"temperature": float("nan")}),
            ("top_p", {"top_p": 1.5}),
            ("top_p", {"top_p": 0.0}),
            ("top_k", {"top_k": -1}),
            ("stop", {"stop": ("x",) * 17}),
            ("stop[0]", {"stop": ("",)}),
            ("stop_token_ids[1]", {"stop_token_ids": (1, 384), "ignore_eos": False}),
            ("ignore_eos", {"ignore_eos": True, "stop_token_ids": (5,)}),
            ("seed", {"seed": 1 << 64}),
        ],
    )
    async def test_bad_sampling_is_named(self, rig: Rig, field: str, sampling: dict[str, object]) -> None:
        with pytest.raises(InvalidArgument) as raised:
            await ask(rig.host, **sampling)
        assert raised.value.field == f"sampling.{field}"

    async def test_empty_and_foreign_prompts_are_refused(self, rig: Rig) -> None:
        for prompt in (TextPrompt(""), TokenPrompt(()), TokenPrompt((384,)), TokenPrompt((-1,)), ChatPrompt(())):
            with pytest.raises(InvalidArgument) as raised:
                await ask(rig.host, prompt=prompt)
            assert raised.value.field.startswith("prompt")

    async def test_text_and_chat_prompts_answer(self, rig: Rig) -> None:
        text = await ask(rig.host, prompt=TextPrompt("The capital of France is"))
        chat = await ask(rig.host, prompt=ChatPrompt((ChatMessage("user", "What is the answer?"),)))
        assert text.prompt_token_ids != chat.prompt_token_ids
        assert len(text.token_ids) == len(chat.token_ids) == 6

    async def test_score_has_one_logprob_for_each_token_but_the_first(self, rig: Rig) -> None:
        adapter = rig.adapters[0]
        await rig.load(adapter)
        request = Generation(prompt=PROMPT, tenant="tenants/a", digest=adapter.digest)
        scored = await rig.host.score(request, timeout_s=30)
        assert scored.token_ids == PROMPT.token_ids
        assert len(scored.logprobs) == 19
        with pytest.raises(InvalidArgument):
            await rig.host.score(
                Generation(prompt=TokenPrompt((3,)), tenant="tenants/a", digest=adapter.digest), timeout_s=5
            )

    async def test_routes_are_refused_where_none_are_recorded(self, rig: Rig) -> None:
        request = Generation(prompt=PROMPT, tenant="tenants/a", base=True, with_routed_experts=True)
        with pytest.raises(InvalidArgument, match="routed"):
            await anext(rig.host.generate(request, timeout_s=5))

    async def test_loads_streams_and_unloads_race_without_harm(self, rig: Rig) -> None:
        alone = {}
        for adapter in rig.adapters:
            await rig.load(adapter)
            alone[adapter.digest] = (await ask(rig.host, adapter.digest)).token_ids

        async def use(adapter: ServingAdapter, turn: int) -> None:
            for attempt in range(6):
                with contextlib.suppress(ResourceExhausted):
                    await rig.load(adapter, into_slot=attempt % 2 == 0)
                with contextlib.suppress(AdapterNotResident):
                    assert (await ask(rig.host, adapter.digest)).token_ids == alone[adapter.digest]
                if turn % 3 == 0:
                    with contextlib.suppress(AdapterPinned):
                        await rig.host.unload(adapter.digest)

        async with asyncio.timeout(90):
            await asyncio.gather(*(use(adapter, turn) for turn, adapter in enumerate(rig.adapters * 3)))
        assert len(rig.host.residents()) <= rig.host.engine.limits.max_loaded_adapters
        assert all(resident.num_references == 0 for resident in rig.host.residents())
        assert rig.host.state is HostState.READY
