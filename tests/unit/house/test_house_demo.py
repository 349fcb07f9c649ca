"""The demo's own pieces: its statistics and its data."""

from pathlib import Path

import pytest

from demo import make_data
from demo.life import read_examples
from demo.loop import PHASES, LoopFigures
from demo.report import PolicyStory, Served
from demo.statistics import paired_bootstrap


def test_a_clear_gain_excludes_zero_and_noise_does_not() -> None:
    assert paired_bootstrap([0.0] * 100, [1.0] * 40 + [0.0] * 60).is_gain
    assert not paired_bootstrap([0.0, 1.0] * 50, [1.0, 0.0] * 50).is_gain
    same = paired_bootstrap([1.0] * 10, [1.0] * 10)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_interval_agrees_with_the_normal_one() -> None:
    interval = paired_bootstrap([0.0] * 400, [1.0] * 200 + [0.0] * 200)
    margin = 1.96 * (0.25 / 400) ** 0.5
    assert interval.low == pytest.approx(0.5 - margin, abs=0.006)
    assert interval.high == pytest.approx(0.5 + margin, abs=0.006)


def test_a_story_is_scored_by_its_scorer() -> None:
    story = PolicyStory("p", ["a", "b"], ['{"x": 1, "y": 2}'] * 2, "json_fields")
    story.served["base"] = Served("base", "", "", ["no", '{"x": 1}'])
    story.served["revision_1"] = Served("revision_1", "r", "d", ['{"x": 1, "y": 2}', '{"x": 1, "y": 3}'])
    assert story.scores() == {"base": 0.25, "revision_1": 0.75}
    assert story.gains()["revision_1 - base"].mean == 0.5


@pytest.mark.parametrize("name", ["triage", "dates"])
def test_held_out_prompts_are_disjoint_and_enough(name: str) -> None:
    parts = {}
    for part in ("train", "heldout"):
        prompts, references = read_examples(make_data.DATA / f"{name}_{part}.jsonl")
        parts[part] = set(prompts)
        assert len(parts[part]) == len(prompts) == len(references)
    assert not parts["train"] & parts["heldout"]
    assert len(parts["heldout"]) >= 100


def test_loop_figures_by_hand() -> None:
    step = {f"{phase}_ms": 10.0 for phase in PHASES} | {"step_ms": 200.0, "behavior_kl": 0.0, "tokens_per_s": 5.0}
    loop = LoopFigures.of([step | {"reward_mean": reward} for reward in (0.2, 0.4, 0.4, 0.5)])
    assert loop.handoff_fraction == pytest.approx(30 / 200)
    assert loop.handoff_and_save_fraction == pytest.approx(40 / 200)
    assert loop.reward_gain == pytest.approx(0.3)


def test_the_shipped_data_is_what_the_generator_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = make_data.DATA
    monkeypatch.setattr(make_data, "DATA", tmp_path)
    make_data.make("triage", make_data.triage)
    make_data.make("dates", make_data.dates)
    for made in sorted(tmp_path.iterdir()):
        assert made.read_text() == (shipped / made.name).read_text()
