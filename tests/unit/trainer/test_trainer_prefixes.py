"""Shared prefixes: the same figures as each datum alone, from fewer computed tokens, and only where that is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM
from unit.trainer.trainer_lab import OPTIMIZER, MakeData, assert_near, bits, outcome

from mint_trainer.adapters import ResidentAdapters
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits, Datum, MicroBatch, micro_batches
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.rows import MAX_SHARED_ROW_TOKENS, rows_of
from mint_trainer.session import StepResult, TrainingSession
from support.tiny_models import make_tiny_qwen3_moe

Pair = tuple[TrainingSession, TrainingSession]
"""A session that shares prefixes and one that does not, with equal weights."""


@pytest.fixture(scope="module", params=["llama", "moe"])
def any_base(
    request: pytest.FixtureRequest, base: ResidentBase, tmp_path_factory: pytest.TempPathFactory
) -> ResidentBase:
    if request.param == "llama":
        return base
    return ResidentBase.load(make_tiny_qwen3_moe(tmp_path_factory.mktemp("prefixes") / "moe"), model_id="moe")


@pytest.fixture(scope="module")
def any_adapters(any_base: ResidentBase) -> ResidentAdapters:
    return ResidentAdapters(any_base)


@pytest.fixture
def new_pair(
    any_base: ResidentBase, any_adapters: ResidentAdapters, limits: BatchLimits, make_data: MakeData
) -> Iterator[Callable[..., Pair]]:
    made: list[TrainingSession] = []

    def make(micro_batch_tokens: int = limits.micro_batch_tokens, dropout: float = 0.0) -> Pair:
        targets = tuple(name for name in ("down_proj", "k_proj", "o_proj", "q_proj") if name in any_adapters.targets)
        recipe = AdapterRecipe(4, 8.0, targets, dropout=dropout, init_seed=1)
        ours = replace(limits, micro_batch_tokens=micro_batch_tokens)
        shared, apart = (
            TrainingSession(any_base, any_adapters, recipe, replace(ours, share_prefixes=is_on))
            for is_on in (True, False)
        )
        made.extend((shared, apart))
        for session in (shared, apart):  # at first B is 0, and so is the gradient of A
            session.forward_backward(make_data(1))
            session.optim_step(OPTIMIZER)
        return shared, apart

    yield make
    for session in made:
        session.close()


def draw(generator: torch.Generator, num_tokens: int) -> list[int]:
    return torch.randint(0, 384, (num_tokens,), generator=generator).tolist()


def group(seed: int, prompt_length: int, completion_lengths: Sequence[int]) -> list[Datum]:
    """Samples of one prompt: random completions, weight 0 on the prompt, side inputs of a policy gradient."""
    generator = torch.Generator().manual_seed(seed)
    prompt = draw(generator, prompt_length)
    data = []
    for length in completion_lengths:
        ids = prompt + draw(generator, length)
        values = torch.rand(len(ids) - 1, generator=generator)
        weights = [0.0] * (prompt_length - 1) + [1.0] * length
        data.append(
            Datum(
                ids[:-1],
                ids[1:],
                weights,
                behavior_logprobs=(-5.5 - values).tolist(),
                advantages=[float(values[0]) - 0.5] * len(weights),
                reference_logprobs=(-6.5 + values).tolist(),
            )
        )
    return data


def prefix_of(datum: Datum, length: int) -> Datum:
    fields = ("tokens", "targets", "weights", "behavior_logprobs", "advantages", "reference_logprobs")
    return Datum(**{name: getattr(datum, name)[:length] for name in fields})


def num_computed(data: Sequence[Datum], limits: BatchLimits) -> int:
    return sum(batch.token_ids.numel() for batch in micro_batches(data, limits))


ONE_GROUP = group(1, 20, (9, 4, 12, 1))
CASES: dict[str, list[Datum]] = {
    "groups of different sizes": group(1, 20, (5, 7)) + group(2, 11, (4,) * 5) + group(3, 30, (3, 9, 2)),
    "branches of different lengths": ONE_GROUP,
    "ordinary rows between shared ones": group(4, 3, (9,)) + ONE_GROUP + group(5, 4, (30,)) + group(6, 12, (2, 3)),
    "data that are prefixes of others": [
        ONE_GROUP[0],
        prefix_of(ONE_GROUP[0], 22),
        prefix_of(ONE_GROUP[0], 8),
        ONE_GROUP[2],
    ],
    "a prefix before its continuation": [prefix_of(ONE_GROUP[2], 18), ONE_GROUP[2], ONE_GROUP[0]],
    "identical data": [ONE_GROUP[0], ONE_GROUP[0], ONE_GROUP[0]],
    "equal tokens with other targets and weights": [
        ONE_GROUP[0],
        replace(ONE_GROUP[0], targets=[t + 1 for t in range(28)], weights=[0.5] * 28),
    ],
    "branches of branches": [
        replace(datum, tokens=[*ONE_GROUP[0].tokens[:26], *datum.tokens[26:]]) for datum in group(1, 20, (14, 14, 14))
    ],
}


@pytest.mark.parametrize(("loss", "micro_batch_tokens"), [("ppo", 2048), ("cross_entropy", 96), ("ppo", 40)])
@pytest.mark.parametrize("name", CASES)
def test_shared_equals_apart(new_pair: Callable[..., Pair], name: str, loss: str, micro_batch_tokens: int) -> None:
    data = CASES[name]
    shared, apart = new_pair(micro_batch_tokens)
    limits = shared._limits
    assert num_computed(data, limits) < num_computed(data, replace(limits, share_prefixes=False))
    parameters = {} if loss == "cross_entropy" else {"clip_low": 0.5, "clip_high": 2.0, "kl_coefficient": 0.1}
    results = [session.forward_backward(data, loss, parameters) for session in (shared, apart)]
    assert_same_figures(*results)
    assert_same_figures(*(session.forward(data) for session in (shared, apart)))
    assert sorted(shared.gradients) == sorted(apart.gradients) == sorted(shared.adapter.parameters)
    for key, gradient in apart.gradients.items():
        assert_near(shared.gradients[key], gradient, 1e-5)
    # Adam with a small eps moves an entry whose gradient is rounding noise as far as any other.
    steps = [session.optim_step(replace(OPTIMIZER, eps=1e-4)) for session in (shared, apart)]
    assert steps[0].grad_norm == pytest.approx(steps[1].grad_norm, rel=1e-5)
    for key, parameter in apart.adapter.parameters.items():
        assert_near(shared.adapter.parameters[key], parameter, 1e-5)


def assert_same_figures(shared: StepResult, apart: StepResult) -> None:
    assert (shared.num_tokens, shared.weight_sum) == (apart.num_tokens, apart.weight_sum)
    assert shared.loss_sum == pytest.approx(apart.loss_sum, rel=1e-5, abs=1e-5)
    assert shared.metrics == pytest.approx(apart.metrics, rel=1e-5, abs=1e-5)
    for ours, theirs in zip(shared.logprobs, apart.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)


def test_reference_logprobs_are_shared_too(new_pair: Callable[..., Pair]) -> None:
    shared, apart = new_pair()
    assert_same_figures(*(session.forward(ONE_GROUP, reference=True) for session in (shared, apart)))


def test_same_data_twice_give_the_same_bits(new_pair: Callable[..., Pair]) -> None:
    data = CASES["ordinary rows between shared ones"]
    (first, _), (again, _) = new_pair(), new_pair()
    results = []
    for session in (first, again):
        result = session.forward_backward(data, "ppo")
        results.append((outcome(result), outcome(session.optim_step(OPTIMIZER)), bits(session)))
    assert results[0] == results[1]


def test_data_without_common_prefixes_have_the_bits_they_had(
    new_pair: Callable[..., Pair], make_data: MakeData
) -> None:
    shared, apart = new_pair()
    # A common beginning of less than half, as a chat template makes it, is not shared.
    data = [replace(d, tokens=[3, 1, *list(d.tokens)[2:]]) for d in make_data(4, (5, 17, 30, 9, 60, 61))]
    results = [
        (outcome(session.forward_backward(data)), outcome(session.forward(data)), bits(session))
        for session in (shared, apart)
    ]
    assert results[0] == results[1]


def test_dropout_is_drawn_for_each_datum(new_pair: Callable[..., Pair]) -> None:
    shared, apart = new_pair(dropout=0.3)
    before = [bits(session) for session in (shared, apart)]
    assert before[0] == before[1]
    results = [outcome(session.forward_backward(ONE_GROUP)) for session in (shared, apart)]
    assert results[0] == results[1]
    assert bits(shared) == bits(apart) != before[0]
    assert_same_figures(*(session.forward(ONE_GROUP) for session in (shared, apart)))  # where nothing is dropped


def test_unasked_logprobs_are_not_computed(new_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    data = CASES["groups of different sizes"]
    num_heads: list[int] = []
    head = ResidentBase.head

    def counting(self: ResidentBase, hidden: torch.Tensor) -> torch.Tensor:
        num_heads.append(hidden.shape[0])
        return head(self, hidden)

    monkeypatch.setattr(ResidentBase, "head", counting)
    for session in new_pair():
        num_heads.clear()
        asked = session.forward_backward(data, "ppo")
        gradients, all_heads = bits(session), sum(num_heads)
        session.drop_gradients()
        num_heads.clear()
        unasked = session.forward_backward(data, "ppo", return_logprobs=False)
        assert sum(num_heads) <= sum(weight != 0 for datum in data for weight in datum.weights) < all_heads
        assert bits(session) == gradients
        assert len(asked.logprobs) == len(data)
        assert outcome(unasked) == outcome(replace(asked, logprobs=()))
        assert unasked.metrics == asked.metrics


@pytest.mark.parametrize("return_logprobs", [True, False])
def test_data_of_weight_0_only(new_pair: Callable[..., Pair], return_logprobs: bool) -> None:
    data = [replace(datum, weights=[0.0] * len(datum.tokens)) for datum in ONE_GROUP]
    results = [session.forward_backward(data, return_logprobs=return_logprobs) for session in new_pair()]
    assert_same_figures(*results)
    assert results[0].loss_sum == 0


def test_base_that_fails_the_proof_shares_nothing(tmp_path: Path) -> None:
    small = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.3,
    }
    folders = {
        # The probe is longer than the first window and shorter than the second; the third never comes to bear.
        "window of 8": MistralForCausalLM(MistralConfig(**small, sliding_window=8)),
        "window of 512": MistralForCausalLM(MistralConfig(**small, sliding_window=512)),
        "window of 1024": MistralForCausalLM(MistralConfig(**small, sliding_window=MAX_SHARED_ROW_TOKENS)),
    }
    shares = {}
    for name, model in folders.items():
        model.save_pretrained(tmp_path / name)
        base = ResidentBase.load(tmp_path / name, model_id="windowed")
        shares[name] = base.shares_prefixes
        session = TrainingSession(
            base, ResidentAdapters(base), AdapterRecipe(2, 4.0, ("q_proj",)), BatchLimits(384, 128, 2048, 2048)
        )
        together = session.forward(ONE_GROUP)
        for datum, logprobs in zip(ONE_GROUP, together.logprobs, strict=True):
            alone = torch.tensor(session.forward([datum]).logprobs[0])
            torch.testing.assert_close(torch.tensor(logprobs), alone, rtol=1e-5, atol=1e-4)
        session.close()
    assert shares == {"window of 8": False, "window of 512": False, "window of 1024": True}


def test_base_that_ignores_mask_or_positions_shares_nothing(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = ResidentBase.trunk

    def without_mask(
        self: ResidentBase, token_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        return trunk(self, token_ids, torch.ones_like(mask).tril() if mask.ndim == 4 else mask, positions)

    def without_positions(
        self: ResidentBase, token_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        return trunk(self, token_ids, mask, None)

    def refusing(
        self: ResidentBase, token_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        if mask.ndim == 4:
            raise IndexError("too many indices for a mask")
        return trunk(self, token_ids, mask, positions)

    for dtype in ("float32", "bfloat16"):
        assert ResidentBase.load(base_folder, model_id="able", dtype=dtype).shares_prefixes
        for odd in (without_mask, without_positions, refusing):
            with monkeypatch.context() as patch:
                patch.setattr(ResidentBase, "trunk", odd)
                assert not ResidentBase.load(base_folder, model_id="odd", dtype=dtype).shares_prefixes, odd.__name__


def test_rows_are_trees() -> None:
    (row,) = rows_of([[5, 6, 7, 8], [5, 6, 9], [5, 6, 9, 1], [5, 6], [5, 6, 7, 8]], 100)
    assert row.token_ids == [5, 6, 7, 8, 9, 1]
    assert row.position_ids == [0, 1, 2, 3, 2, 3]
    assert row.paths == [[0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1], [0, 1, 2, 3]]


def test_data_join_a_row_only_where_it_saves_and_fits() -> None:
    def num_rows(*sequences: list[int], limit: int = 2048) -> int:
        return len(list(rows_of(sequences, limit)))

    assert num_rows([1, 2, 3, 4], [1, 2, 5, 6]) == 1
    assert num_rows([1, 2, 3, 4], [1, 5, 6]) == 2  # less than half
    assert num_rows([1, 2], [3, 4], [1, 2]) == 3  # neighbours only
    assert num_rows([1, 2, 3, 4], [1, 2, 5, 6], limit=6) == 1
    assert num_rows([1, 2, 3, 4], [1, 2, 5, 6], limit=5) == 2
    assert num_rows([1, 2], [1, 2], limit=0) == 2  # off
    longest = list(range(MAX_SHARED_ROW_TOKENS))
    assert num_rows(longest, longest) == 1
    assert num_rows(longest, [*longest[:-1], -1]) == 2
    assert num_rows([*longest, 1], longest) == 2


def test_rows_too_long_to_be_shared_are_computed_without_shared_ones() -> None:
    limits = BatchLimits(8, 4096, 1 << 20, 1 << 20)
    long, *short = [Datum([i] * n, [0] * n, [1.0] * n) for i, n in ((1, MAX_SHARED_ROW_TOKENS + 1), (2, 9), (2, 9))]
    other = replace(short[0], tokens=[3] * 9)
    cut = [batch.lengths for batch in micro_batches([long, other, *short, other, long, long, *short], limits)]
    assert cut == [(1025, 9), (9, 9, 9), (1025, 1025), (9, 9)]
    batches: list[MicroBatch] = list(micro_batches([*short, other, long], limits))
    assert [batch.is_shared for batch in batches] == [True, False]
    assert batches[0].attention_mask.shape == (2, 1, 9, 9)
    assert [batch.first for batch in batches] == [0, 3]
