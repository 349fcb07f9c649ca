"""A training session against plain torch and PEFT, among others, and in trouble."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM
from unit.trainer.trainer_lab import OPTIMIZER, MakeData, NewSession, PlainPeft, assert_near, bits, outcome, train

from mint_core.errors import FailedPrecondition, InvalidArgument, Unimplemented, WrongState
from mint_trainer.adapters import ResidentAdapters
from mint_trainer.base import ResidentBase
from mint_trainer.batch import BatchLimits, Datum
from mint_trainer.optimizer import AdamWConfig
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.session import TrainingSession
from support.tiny_models import make_tiny_qwen3_moe


def cross_entropy(logprobs: torch.Tensor, datum: Datum) -> torch.Tensor:
    return -(torch.tensor(datum.weights) * logprobs).sum()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradients_and_updates_equal_plain_peft(
    base_folder: Path, new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe, use_rslora: bool
) -> None:
    session = new_session(
        AdapterRecipe(recipe.rank, recipe.alpha, recipe.target_modules, use_rslora=use_rslora, init_seed=3)
    )
    plain = PlainPeft(base_folder, session)
    for step in range(4):
        data = make_data(step) + make_data(50 + step, (30, 31, 32, 4))
        assert session.forward_backward(data[:3]).num_tokens == sum(w != 0 for d in data[:3] for w in d.weights)
        result = session.forward_backward(data[3:])  # gradients add up over calls
        plain.backward(data[:3], cross_entropy)
        assert result.loss_sum == pytest.approx(plain.backward(data[3:], cross_entropy), rel=1e-6)
        assert result.weight_sum == pytest.approx(sum(w for d in data[3:] for w in d.weights))
        for datum, values in zip(data[3:], result.logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(values), plain.logprobs(datum).detach(), rtol=1e-5, atol=1e-6)
        for name, gradient in session.gradients.items():
            assert_near(gradient, plain.parameters[name].grad, 1e-5)
        stepped = session.optim_step(OPTIMIZER, 0.1)
        assert stepped.grad_norm == pytest.approx(plain.step(OPTIMIZER, 0.1), rel=1e-5)
        assert stepped.step == step + 1
        for name, parameter in session.adapter.parameters.items():
            assert_near(parameter, plain.parameters[name], 1e-4)  # Adam divides by what may be rounding noise
            with torch.no_grad():
                plain.parameters[name].copy_(parameter)  # so that the next gradient is taken at the same weights
    session.close()


def test_training_learns(new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe) -> None:
    session = new_session(recipe)
    data = make_data(5)
    before = session.forward(data).loss_sum
    for _ in range(10):
        session.forward_backward(data)
        session.optim_step(OPTIMIZER)
    assert session.forward(data).loss_sum < 0.7 * before
    session.close()


def test_interleaved_sessions_equal_each_alone_bit_for_bit(
    new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe
) -> None:
    recipes = [
        recipe,
        AdapterRecipe(2, 4.0, ("q_proj", "v_proj"), init_seed=2),
        AdapterRecipe(8, 8.0, recipe.target_modules, dropout=0.2, init_seed=3),
        AdapterRecipe(16, 32.0, ("down_proj", "k_proj"), use_rslora=True, dropout=0.1, init_seed=4),
    ]
    alone = []
    for seed, each in enumerate(recipes):
        session = new_session(each)
        alone.append(([outcome(r) for r in train(session, make_data, seed, 3)], bits(session)))
        session.close()
    sessions = [new_session(each) for each in recipes]
    together: list[list[object]] = [[] for _ in recipes]
    for step in range(3):
        for seed, session in enumerate(sessions):
            together[seed].append(outcome(session.forward_backward(make_data(100 * seed + step))))
        torch.rand(7)  # the process's generator belongs to nobody
        for seed, session in reversed(list(enumerate(sessions))):
            session.forward(make_data(9))
            together[seed].append(outcome(session.optim_step(OPTIMIZER, 0.25)))
    for seed, session in enumerate(sessions):
        assert together[seed] == alone[seed][0]
        assert bits(session) == alone[seed][1]
        session.close()


def test_initial_weights_are_a_function_of_the_recipe(new_session: NewSession, recipe: AdapterRecipe) -> None:
    first = new_session(recipe)
    torch.rand(3)
    again = new_session(recipe)
    other = new_session(AdapterRecipe(recipe.rank, recipe.alpha, recipe.target_modules, init_seed=0))
    fewer = new_session(AdapterRecipe(recipe.rank, recipe.alpha, ("q_proj",), init_seed=recipe.init_seed))
    assert bits(first) == bits(again)
    a_names = [name for name in first.adapter.parameters if name.endswith("lora_A.weight")]
    assert len({first.adapter.parameters[name].detach().numpy().tobytes() for name in a_names}) == len(a_names)
    for name in a_names:
        assert not torch.equal(first.adapter.parameters[name], other.adapter.parameters[name])
        bound = math.sqrt(1 / first.adapter.parameters[name].shape[1])
        assert 0.5 * bound < float(first.adapter.parameters[name].detach().abs().max()) <= bound
    for name, parameter in fewer.adapter.parameters.items():
        assert torch.equal(parameter, first.adapter.parameters[name])
    for session in (first, again, other, fewer):
        session.close()


def test_fresh_adapter_computes_exactly_what_the_base_does(
    base: ResidentBase, base_folder: Path, new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe
) -> None:
    session = new_session(recipe)
    datum = make_data(1, (20,))[0]
    alone = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with torch.no_grad():
        logits = alone(torch.tensor([list(datum.tokens)])).logits[0]
    wanted = logits.log_softmax(-1)[torch.arange(20), torch.tensor(list(datum.targets))].tolist()
    assert list(session.forward([datum]).logprobs[0]) == wanted
    session.close()


def test_switching_shares_the_base(base: ResidentBase, new_session: NewSession, recipe: AdapterRecipe) -> None:
    first, second = new_session(recipe), new_session(recipe)
    storages = {p.data_ptr() for n, p in base.model.named_parameters() if "lora_" not in n}
    num_before = sum(p.numel() for p in base.model.parameters())
    third = new_session(recipe)
    assert {p.data_ptr() for n, p in base.model.named_parameters() if "lora_" not in n} == storages
    added = sum(p.numel() for p in base.model.parameters()) - num_before
    assert added == sum(p.numel() for p in third.adapter.parameters.values())
    for session in (first, second, third):
        session.close()
    assert not [n for n, _ in base.model.named_parameters() if "lora_" in n]


def test_base_in_bfloat16_keeps_adapters_in_float32(base_folder: Path, make_data: MakeData) -> None:
    base = ResidentBase.load(base_folder, model_id="tiny", dtype="bfloat16")
    limits = BatchLimits(base.vocab_size, 128, 2048, 96)
    session = TrainingSession(base, ResidentAdapters(base), AdapterRecipe(4, 8.0, ("q_proj",)), limits)
    session.forward_backward(make_data(1))
    session.optim_step(OPTIMIZER)
    assert {p.dtype for p in session.adapter.parameters.values()} == {torch.float32}
    assert {p.dtype for n, p in base.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert all(math.isfinite(v) for values in session.forward(make_data(1)).logprobs for v in values)


def test_base_with_routed_experts_trains_its_attention(tmp_path: Path, make_data: MakeData) -> None:
    base = ResidentBase.load(make_tiny_qwen3_moe(tmp_path / "moe"), model_id="moe")
    adapters = ResidentAdapters(base)
    session = TrainingSession(
        base, adapters, AdapterRecipe(4, 8.0, ("q_proj", "o_proj")), BatchLimits(base.vocab_size, 128, 2048, 96)
    )
    before = session.forward(make_data(1))
    for _ in range(3):
        session.forward_backward(make_data(1))
        session.optim_step(OPTIMIZER)
    assert session.forward(make_data(1)).loss_sum < before.loss_sum


@pytest.mark.parametrize("key", ["logits_scaling", "final_logit_softcapping"])
def test_base_that_changes_its_logits_is_refused(tmp_path: Path, key: str) -> None:
    kind, model = {
        "logits_scaling": (GraniteConfig, GraniteForCausalLM),
        "final_logit_softcapping": (Gemma2Config, Gemma2ForCausalLM),
    }[key]
    config = kind(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "initializer_range": 1.0,
            key: 2.0,
        }
    )
    model(config).save_pretrained(tmp_path / "model")
    with pytest.raises(FailedPrecondition, match="changes its logits"):
        ResidentBase.load(tmp_path / "model", model_id="odd")


def test_folder_without_safetensors_is_refused(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no config\.json there"):
        ResidentBase.load(tmp_path, model_id="none")
    (tmp_path / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(InvalidArgument, match="transformers cannot load it"):
        ResidentBase.load(tmp_path, model_id="pickle")


def test_how_a_step_is_cut_does_not_change_the_sum(
    base: ResidentBase, adapters: ResidentAdapters, make_data: MakeData, recipe: AdapterRecipe
) -> None:
    data = make_data(3, (9, 30, 4, 11, 25))
    gradients = []
    for micro_batch_tokens in (1, 60, 1000):
        limits = BatchLimits(base.vocab_size, 128, 2048, micro_batch_tokens)
        session = TrainingSession(base, adapters, recipe, limits)
        result = session.forward_backward(data)
        assert [len(values) for values in result.logprobs] == [9, 30, 4, 11, 25]
        gradients.append(dict(session.gradients))
        session.close()
    for other in gradients[1:]:
        for name, gradient in other.items():
            assert_near(gradient, gradients[0][name], 1e-5)


def test_logits_in_chunks_change_nothing(
    new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session(recipe)
    whole = session.forward_backward(make_data(8))
    gradients = session.gradients
    session.drop_gradients()
    monkeypatch.setattr("mint_trainer.logprobs.LOGITS_CHUNK_TOKENS", 4)
    chunked = session.forward_backward(make_data(8))
    assert chunked.loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)
    for name, gradient in session.gradients.items():
        assert_near(gradient, gradients[name], 1e-5)
    session.close()


def test_step_of_zero_weights_only_is_an_empty_gradient(
    new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe
) -> None:
    session = new_session(recipe)
    data = [Datum(d.tokens, d.targets, [0.0] * len(d.tokens)) for d in make_data(1)]
    before = bits(session)
    result = session.forward_backward(data)
    assert (result.loss_sum, result.num_tokens, result.weight_sum) == (0.0, 0, 0.0)
    assert result.logprobs == session.forward(data).logprobs
    stepped = session.optim_step(OPTIMIZER)
    assert (stepped.step, stepped.grad_norm) == (1, 0.0)
    assert bits(session) == before
    session.close()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokens": [], "targets": [], "weights": []}, "data[1].tokens"),
        ({"targets": [1, 2]}, "data[1].targets"),
        ({"weights": [1.0]}, "data[1].weights"),
        ({"weights": [1.0, float("nan"), 1.0]}, "data[1].weights[1]"),
        ({"weights": [1.0, 1.0, float("inf")]}, "data[1].weights[2]"),
        ({"tokens": [1, 2, 384]}, "data[1].tokens[2]"),
        ({"tokens": [-1, 2, 3]}, "data[1].tokens[0]"),
        ({"targets": [1, 2, 384]}, "data[1].targets[2]"),
        ({"advantages": [1.0]}, "data[1].advantages"),
        ({"advantages": [1.0, 2.0, 3.0]}, "data.advantages"),
        ({"behavior_logprobs": [1.0, 2.0, float("nan")]}, "data[1].behavior_logprobs[2]"),
        ({"reference_logprobs": [-1.0, -2.0, -3.0]}, "data.reference_logprobs"),
        ({"tokens": [1] * 129, "targets": [1] * 129, "weights": [1.0] * 129}, "data[1].tokens"),
    ],
)
def test_bad_data_is_refused_by_field(
    new_session: NewSession, recipe: AdapterRecipe, change: dict[str, list[float]], field: str
) -> None:
    session = new_session(recipe)
    good = Datum([1, 2, 3], [2, 3, 4], [0.0, 1.0, 1.0])
    bad = Datum(**{"tokens": [1, 2, 3], "targets": [2, 3, 4], "weights": [0.0, 1.0, 1.0], **change})
    for call in (session.forward, session.forward_backward):
        with pytest.raises(InvalidArgument) as caught:
            call([good, bad])
        assert caught.value.field == field
    assert session.num_gathered == 0
    session.close()


def test_other_bad_steps_are_refused(new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe) -> None:
    session = new_session(recipe)
    with pytest.raises(InvalidArgument, match="at least one datum"):
        session.forward_backward([])
    with pytest.raises(InvalidArgument, match=r"2060 tokens.*takes 2048"):
        session.forward_backward(make_data(1, (103,)) * 20)
    with pytest.raises(Unimplemented, match=r"'dpo'.*cross_entropy"):
        session.forward_backward(make_data(1), "dpo")
    with pytest.raises(InvalidArgument, match="clip_epsilon"):
        session.forward_backward(make_data(1), "cross_entropy", {"clip_epsilon": 0.2})
    with pytest.raises(WrongState, match="no gradient was gathered"):
        session.optim_step(OPTIMIZER)
    session.forward_backward(make_data(1))
    with pytest.raises(InvalidArgument, match="gradient_scale"):
        session.optim_step(OPTIMIZER, -1.0)
    session.close()


@pytest.mark.parametrize(
    "values",
    [{"learning_rate": -1.0}, {"eps": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"weight_decay": float("nan")}],
)
def test_bad_optimizer_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        AdamWConfig(**{"learning_rate": 1e-3, **values})
    assert caught.value.field == f"optimizer.{next(iter(values))}"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"rank": 0}, "session.lora.rank"),
        ({"rank": 513}, "session.lora.rank"),
        ({"alpha": -1.0}, "session.lora.alpha"),
        ({"dropout": 1.0}, "session.lora.dropout"),
        ({"target_modules": ()}, "session.lora.target_modules"),
    ],
)
def test_bad_recipe_is_refused(values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        AdapterRecipe(**{"rank": 4, "alpha": 8.0, "target_modules": ("q_proj",), **values})  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "nope", "self_attn"])
def test_unknown_targets_are_refused_and_nothing_is_added(
    base: ResidentBase, new_session: NewSession, target: str
) -> None:
    before = [name for name, _ in base.model.named_parameters()]
    with pytest.raises(InvalidArgument, match=f"{target!r}.*q_proj"):
        new_session(AdapterRecipe(4, 8.0, ("q_proj", target)))
    assert [name for name, _ in base.model.named_parameters()] == before


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_failed_step_harms_nothing(
    new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    recipe = AdapterRecipe(recipe.rank, recipe.alpha, recipe.target_modules, dropout=dropout)
    session, undisturbed, neighbour = new_session(recipe), new_session(recipe), new_session(recipe)
    train(session, make_data, 1, 1)
    train(undisturbed, make_data, 1, 1)
    train(neighbour, make_data, 2, 1)
    session.forward_backward(make_data(11))
    undisturbed.forward_backward(make_data(11))
    before, before_neighbour = bits(session), bits(neighbour)

    import mint_trainer.session as module

    real, calls = module.target_logprobs, []

    def fails_late(*args: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("torch found no memory")
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "target_logprobs", fails_late)
        with pytest.raises(MemoryError):
            session.forward_backward(make_data(12, (60, 60, 60)))  # the first of three micro-batches was computed
    assert len(calls) == 2
    huge = [Datum(d.tokens, d.targets, [3e38] * len(d.tokens)) for d in make_data(12)]
    with pytest.raises(WrongState, match="diverged"):
        session.forward_backward(huge)
    assert bits(session) == before
    assert bits(neighbour) == before_neighbour
    for each in (session, undisturbed):
        each.optim_step(OPTIMIZER)
        each.forward_backward(make_data(13))
        each.optim_step(OPTIMIZER)
    assert bits(session) == bits(undisturbed)
    for each in (session, undisturbed, neighbour):
        each.close()


def test_gathered_gradient_that_overflows_is_not_applied(
    new_session: NewSession, make_data: MakeData, recipe: AdapterRecipe
) -> None:
    session = new_session(recipe)
    session.forward_backward(make_data(1))
    before = bits(session)
    with pytest.raises(WrongState, match="nothing was applied"):
        session.optim_step(OPTIMIZER, 1e308)
    assert bits(session) == before
    session.optim_step(OPTIMIZER)
    session.close()
