"""The real SGLang: the engine contract, its numbers against transformers + PEFT, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from safetensors.numpy import load_file, save_file

from mint_core.errors import InvalidArgument, Unavailable
from mint_engine.adapter_engine import EngineLimits
from mint_engine.host import EngineHost, Generation, HostState
from mint_engine.prompts import TokenPrompt
from mint_engine.sglang_settings import SglangSettings
from mint_lora.folders import CONFIG_NAME, WEIGHTS_NAME
from support.engine_contract import PROMPT, EngineContract, Rig, ask, until
from support.serving_adapters import ServingAdapter, make_serving_adapter
from support.sglang_rig import SglangRig, running_sglang
from support.tiny_models import make_tiny_llama

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    # SGLang and PEFT warn of accelerators and options that do not concern us.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

TOLERANCE = 1e-4
SETTINGS = SglangSettings(
    dtype="float32",
    max_lora_rank=8,
    num_slots=4,
    max_loaded_adapters=4,
    max_total_tokens=8192,
    max_running_requests=16,
    call_timeout_s=30,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sglang(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SglangRig]:
    folder = tmp_path_factory.mktemp("sglang")
    async with running_sglang(make_tiny_llama(folder / "base"), folder / "adapters", SETTINGS) as rig:
        yield rig
    assert not any(psutil.pid_exists(pid) for pid in rig.process_ids)


@pytest.fixture(scope="module")
def adapters(sglang: SglangRig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[ServingAdapter]]:
    work = tmp_path_factory.mktemp("work")

    def make(**options) -> ServingAdapter:
        return make_serving_adapter(sglang.base, sglang.adapter_dir, work, **options)

    return {
        "mixed": [make(seed=seed, rank=rank) for seed, rank in enumerate((2, 8, 5, 8, 3))],
        "zero": [make(seed=20, rank=4, zero=True)],
        "foreign": [make(seed=21, base_digest="sha256:" + "0" * 64)],
        "high": [make(seed=22, rank=9)],
        "partial": [make(seed=23, rank=4, targets=("q_proj", "v_proj")), make(seed=24, targets=("gate_proj",))],
    }


@pytest_asyncio.fixture(loop_scope="module")
async def host(sglang: SglangRig) -> AsyncIterator[EngineHost]:
    async with sglang.host() as host:
        yield host


class TestSglangEngine(EngineContract):
    @pytest_asyncio.fixture(loop_scope="module")
    async def rig(self, host: EngineHost, adapters: dict[str, list[ServingAdapter]]) -> Rig:
        return Rig(host, adapters["mixed"], adapters["foreign"][0], adapters["high"][0])


def reference_logprobs(base: Path, adapter: ServingAdapter | None, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probability of each token but the first, float32, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter.peft_folder)
        logits = model.eval()(torch.tensor([token_ids])).logits[0, :-1]
        picked = torch.tensor(token_ids[1:])[:, None]
        return torch.log_softmax(logits, -1).gather(1, picked)[:, 0]


def difference(found: tuple[float, ...], expected: torch.Tensor) -> float:
    return float((torch.tensor(found) - expected).abs().max())


async def test_three_adapters_and_the_base_in_one_batch_equal_peft(
    host: EngineHost, sglang: SglangRig, adapters: dict[str, list[ServingAdapter]]
) -> None:
    three = adapters["mixed"][:3]
    for adapter in three:
        await host.load(adapter.digest, adapter.folder, into_slot=True)
    everybody: list[ServingAdapter | None] = [*three, None, *three, None]
    prompts = [TokenPrompt(tuple(range(10 + 3 * place, 40 + 5 * place))) for place in range(len(everybody))]
    answers = await asyncio.gather(
        *(
            ask(host, adapter.digest if adapter else "", prompt=prompt, max_new_tokens=24)
            for adapter, prompt in zip(everybody, prompts, strict=True)
        )
    )
    for adapter, prompt, answer in zip(everybody, prompts, answers, strict=True):
        whole = prompt.token_ids + answer.token_ids
        expected = reference_logprobs(sglang.base, adapter, whole)
        assert difference(answer.logprobs, expected[len(prompt.token_ids) - 1 :]) < TOLERANCE
        request = Generation(
            prompt=TokenPrompt(whole),
            tenant="tenants/a",
            digest=adapter.digest if adapter else "",
            base=adapter is None,
        )
        scored = await host.score(request, timeout_s=30)
        assert difference(scored.logprobs, expected) < TOLERANCE
        base = reference_logprobs(sglang.base, None, whole)
        # The adapters matter, or the comparison would prove nothing.
        assert adapter is None or difference(answer.logprobs, base[len(prompt.token_ids) - 1 :]) > 0.05


async def test_zero_adapter_is_bit_identical_to_the_base(
    host: EngineHost, adapters: dict[str, list[ServingAdapter]]
) -> None:
    zero = adapters["zero"][0]
    await host.load(zero.digest, zero.folder)
    base = await ask(host, max_new_tokens=48)
    answer = await ask(host, zero.digest, max_new_tokens=48)
    assert answer.token_ids == base.token_ids
    assert answer.logprobs == base.logprobs


async def test_slots_are_reused_exactly_when_more_adapters_than_slots_alternate(
    host: EngineHost, sglang: SglangRig, adapters: dict[str, list[ServingAdapter]]
) -> None:
    four = adapters["mixed"][:4]
    for adapter in four:
        await host.load(adapter.digest, adapter.folder)
    expected = {adapter.digest: (await ask(host, adapter.digest)).logprobs for adapter in four}
    for _ in range(2):
        for adapter in [None, *reversed(four)]:
            answer = await ask(host, adapter.digest if adapter else "", tenant="tenants/fresh")
            if adapter:
                assert answer.logprobs == pytest.approx(expected[adapter.digest], abs=1e-5)
        await host.flush_prefix_cache()


async def test_adapters_of_some_modules_equal_peft(
    host: EngineHost, sglang: SglangRig, adapters: dict[str, list[ServingAdapter]]
) -> None:
    for adapter in adapters["partial"]:
        await host.load(adapter.digest, adapter.folder)
        request = Generation(prompt=PROMPT, tenant="tenants/a", digest=adapter.digest)
        scored = await host.score(request, timeout_s=30)
        assert difference(scored.logprobs, reference_logprobs(sglang.base, adapter, PROMPT.token_ids)) < TOLERANCE


async def test_slots_hold_bit_for_bit_what_sglang_itself_would_write(
    host: EngineHost, sglang: SglangRig, adapters: dict[str, list[ServingAdapter]]
) -> None:
    loaded = [adapters["mixed"][0], *adapters["partial"]]
    for adapter in loaded:
        await host.load(adapter.digest, adapter.folder)
    await sglang.check_upload(ranks=[], mapped=[adapter.digest for adapter in loaded])
    for adapter in loaded:
        await host.unload(adapter.digest)
    await sglang.check_upload(ranks=[8, 1, 5, 3, 8, 2])


async def test_adapter_that_does_not_fit_is_refused_by_the_engine_itself_before_a_slot_is_touched(
    host: EngineHost, sglang: SglangRig, adapters: dict[str, list[ServingAdapter]], tmp_path: Path
) -> None:
    good = adapters["mixed"][1]
    await host.load(good.digest, good.folder, into_slot=True)
    before = await ask(host, good.digest)
    tensors = load_file(sglang.adapter_dir / good.folder / WEIGHTS_NAME)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    tensors[name] = tensors[name][:32].copy()
    folder = tmp_path / "misfit"
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME)
    shutil.copy(sglang.adapter_dir / good.folder / CONFIG_NAME, folder / CONFIG_NAME)
    # Past the host, which would have refused the folder.
    with pytest.raises(InvalidArgument, match=r"layers\.1\.mlp\.down_proj.*shape \[32, 8\]"):
        await sglang.engine.load("misfit", folder, into_slot=True)
    again = await ask(host, good.digest)
    assert again.token_ids == before.token_ids
    assert again.logprobs == pytest.approx(before.logprobs, abs=1e-5)


async def test_prefix_cache_is_shared_within_a_tenant_only(host: EngineHost) -> None:
    prompt = TokenPrompt(tuple(range(100, 200)))
    first = await ask(host, prompt=prompt, tenant="tenants/a")
    again = await ask(host, prompt=prompt, tenant="tenants/a")
    other = await ask(host, prompt=prompt, tenant="tenants/b")
    assert first.finish.num_cached_tokens == 0
    assert again.finish.num_cached_tokens > 50
    assert other.finish.num_cached_tokens == 0
    await host.flush_prefix_cache()
    assert (await ask(host, prompt=prompt, tenant="tenants/a")).finish.num_cached_tokens == 0


async def test_prefix_cache_is_never_shared_between_adapter_and_base(
    host: EngineHost, adapters: dict[str, list[ServingAdapter]]
) -> None:
    adapter = adapters["mixed"][0]
    await host.load(adapter.digest, adapter.folder)
    prompt = TokenPrompt(tuple(range(100, 200)))
    await ask(host, prompt=prompt)
    assert (await ask(host, adapter.digest, prompt=prompt)).finish.num_cached_tokens == 0


async def test_seed_decides_the_draw_whoever_shares_the_batch(host: EngineHost) -> None:
    async def draw(seed: int | None, **options: float) -> tuple[int, ...]:
        sampling = {"temperature": 1.0, "max_new_tokens": 16, "seed": seed} | options
        return (await ask(host, **sampling)).token_ids

    alone = await draw(7)
    crowd = await asyncio.gather(draw(7), draw(8), draw(7), draw(None), draw(None), draw((1 << 64) - 1))
    assert crowd[0] == crowd[2] == alone
    assert len(set(crowd)) == 5
    assert await draw(7, top_p=0.9, top_k=20) == await draw(7, top_p=0.9, top_k=20)


async def test_logprobs_are_the_models_own_at_any_temperature(host: EngineHost, sglang: SglangRig) -> None:
    answer = await ask(host, temperature=1.7, top_k=50, seed=3, max_new_tokens=16)
    expected = reference_logprobs(sglang.base, None, PROMPT.token_ids + answer.token_ids)
    assert difference(answer.logprobs, expected[len(PROMPT.token_ids) - 1 :]) < TOLERANCE


async def test_stop_text_ends_the_completion_and_is_not_in_it(host: EngineHost) -> None:
    whole = await ask(host, max_new_tokens=40)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 5]
    answer = await ask(host, max_new_tokens=40, stop=("never there", stop))
    assert answer.finish.reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]


async def test_stop_token_ends_the_completion_and_is_reported_without_its_text(host: EngineHost) -> None:
    whole = await ask(host, max_new_tokens=20)
    stop = whole.token_ids[7]
    end = whole.token_ids.index(stop)
    for stop_text in ((), ("never there",)):
        answer = await ask(host, max_new_tokens=20, stop_token_ids=(stop,), stop=stop_text, ignore_eos=False)
        assert answer.finish.reason == "stop"
        assert answer.token_ids == whole.token_ids[: end + 1]
        assert whole.text.startswith(answer.text)
        assert len(answer.text) < len(whole.text)


async def test_limits_are_those_of_the_engine(sglang: SglangRig) -> None:
    limits = sglang.engine.limits
    assert limits == EngineLimits(
        max_loaded_adapters=4,
        num_slots=4,
        max_lora_rank=8,
        target_modules=frozenset(SETTINGS.target_modules),
        context_length=512,
        max_total_tokens=510,
        max_prompt_tokens=505,
        vocab_size=384,
        spreads_shared_experts=True,
    )
    assert (sglang.engine.numerics.engine, sglang.engine.numerics.engine_version) == ("sglang", "0.5.23")
    assert sglang.engine.numerics.dtype == "float32"


async def test_dead_engine_process_ends_streams_and_makes_the_replica_sick(host: EngineHost, sglang: SglangRig) -> None:
    """Last of this module: it takes the engine with it."""
    stream = asyncio.create_task(ask(host, max_new_tokens=480))
    await until(lambda: host.num_running)
    await asyncio.sleep(0.05)
    for pid in sglang.process_ids:
        psutil.Process(pid).kill()
    with contextlib.suppress(asyncio.TimeoutError):
        with pytest.raises(Unavailable):
            async with asyncio.timeout(20):
                await stream
        assert host.state is HostState.SICK
        with pytest.raises(Unavailable, match="sick"):
            await ask(host)
        return
    pytest.fail("the stream of a dead engine did not end")
