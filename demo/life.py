"""The story of the demo, told through the public client: nothing here that a user could not do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.loop import HANDOFF, LoopFigures
from demo.report import PolicyStory, Report, Served
from mint_api.v1 import common_pb2, inference_service_pb2, run_service_pb2
from mint_client import Generation, MintClient
from mint_core.errors import Internal

__all__ = ["Plan", "Say", "live_one_life"]

Say = Callable[[str], None]
Flush = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained, and how long."""

    base_model: str
    data: Path
    seed: int
    first_steps: int = 16
    """SFT steps of revision 1: enough to show the behaviour, too few to master it."""
    neighbour_steps: int = 16
    """SFT steps of the neighbour's revision 1."""
    learning_rate: float = 1e-3
    batch_size: int = 8
    grpo_steps: int = 24
    """GRPO steps on top, whose last state is served as revision 2 of the story."""
    grpo_learning_rate: float = 3e-4
    grpo_warmup_steps: int = 3
    """AdamW's first updates move every weight by the whole learning rate, whatever the gradient's size."""
    num_prompts_per_step: int = 8
    group_size: int = 6
    max_new_tokens: int = 16
    num_concurrent: int = 50
    """Requests in flight where answers need not be compared bit for bit."""
    num_compared: int = 25
    """Prompts whose answers before and after the rollback are compared token for token, one request at a time."""


def read_examples(path: Path) -> tuple[list[str], list[str]]:
    """Questions and reference answers of a JSONL file of conversations with one turn each."""
    conversations = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [turns[0]["content"] for turns in conversations], [turns[-1]["content"] for turns in conversations]


async def live_one_life(client: MintClient, plan: Plan, say: Say, flush_prefix_cache: Flush) -> Report:
    """Born, taught by examples, served, improved by rewards, rolled back."""
    base = await client.base_models.get(plan.base_model)
    stories = {}
    for tenant, policy, scorer in (("acme", "triage", "json_fields"), ("globex", "dates", "exact_match")):
        prompts, references = read_examples(plan.data / f"{policy}_heldout.jsonl")
        lora = common_pb2.LoraConfig(rank=8, alpha=16, init_seed=plan.seed)
        created = await client.policies.create(tenant, policy, base_model=plan.base_model, lora=lora)
        stories[policy] = PolicyStory(created.name, prompts, references, scorer)
        say(f"{created.name} created over {plan.base_model}")
    main, other = stories["triage"], stories["dates"]
    report = Report(plan.seed, plan.base_model, base.digest, base.size_bytes, main, other)
    life = _Life(client, plan, say, report)

    for story in (main, other):
        await life.ask(story, "base", plan.base_model)
    await life.teach(main, "triage", plan.first_steps)
    await life.teach(other, "dates", plan.neighbour_steps)
    await life.ask(other, "revision_1", f"{other.policy}/aliases/live")
    await life.ask(main, "revision_1", f"{main.policy}/aliases/live")
    await life.ask_exactly(main, "revision_1", f"{main.policy}/aliases/live", flush_prefix_cache)

    await life.reinforce(main, "triage")
    await life.ask(main, "revision_2", f"{main.policy}/aliases/live")

    start_s = time.perf_counter()
    alias = await client.aliases.rollback(f"{main.policy}/aliases/live", reason="the demo's last act")
    report.seconds["rollback"] = time.perf_counter() - start_s
    say(f"{alias.name} rolled back to revision {alias.active.revision_number} ({alias.active.digest[:19]}…)")
    await life.ask(main, "rolled_back", f"{main.policy}/aliases/live")
    await life.ask_exactly(main, "rolled_back", f"{main.policy}/aliases/live", flush_prefix_cache)
    return report


class _Life:
    def __init__(self, client: MintClient, plan: Plan, say: Say, report: Report) -> None:
        self._client = client
        self._plan = plan
        self._say = say
        self._report = report

    async def teach(self, story: PolicyStory, data: str, num_steps: int) -> None:
        """Supervised fine-tuning from fresh weights; ``live`` is promoted to the result."""
        recipe = run_service_pb2.SftRecipe(
            train_data=await self._upload(story, f"{data}_train.jsonl"),
            num_steps=num_steps,
            batch_size=self._plan.batch_size,
            optimizer=run_service_pb2.OptimizerConfig(learning_rate=self._plan.learning_rate),
            seed=self._plan.seed,
            save_every_steps=num_steps,
        )
        await self._train(story, run_service_pb2.Run(sft=recipe), shown_every=8)

    async def reinforce(self, story: PolicyStory, data: str) -> None:
        """GRPO on top: the policy's own answers, rewarded by what is right in them; ``live`` is promoted at the end.

        Each step publishes a revision, and the next step samples from it.
        """
        plan = self._plan
        recipe = run_service_pb2.GrpoRecipe(
            prompts=await self._upload(story, f"{data}_train.jsonl"),
            scorer=story.scorer,
            num_steps=plan.grpo_steps,
            num_prompts_per_step=plan.num_prompts_per_step,
            group_size=plan.group_size,
            max_new_tokens=plan.max_new_tokens,
            optimizer=run_service_pb2.OptimizerConfig(
                learning_rate=plan.grpo_learning_rate, num_warmup_steps=plan.grpo_warmup_steps, max_grad_norm=1.0
            ),
            seed=plan.seed + 1000,
        )
        run = await self._train(story, run_service_pb2.Run(grpo=recipe, continue_from_latest=True), shown_every=4)
        await self._note_handoff(run)

    async def _upload(self, story: PolicyStory, name: str) -> common_pb2.BlobRef:
        return await self._client.blobs.upload(story.policy.split("/")[1], self._plan.data / name)

    async def _train(self, story: PolicyStory, wanted: run_service_pb2.Run, *, shown_every: int) -> run_service_pb2.Run:
        """One managed run that publishes its result and promotes ``live`` to it; answers it as it ended."""
        wanted.policy, wanted.publish, wanted.promote_alias = story.policy, True, "live"
        start_s = time.perf_counter()
        run = queued = await self._client.runs.create(story.policy.split("/")[1], wanted)
        shown_step = -1
        async for run in self._client.runs.watch(queued.name):
            progress = run.progress
            if progress.step >= shown_step + shown_every or progress.step == progress.num_steps != shown_step:
                shown_step = progress.step
                reward = progress.metrics.get("reward_mean")
                figure = f"loss per token {progress.loss:.3f}" if reward is None else f"mean reward {reward:.2f}"
                self._say(f"{story.policy}: step {progress.step}/{progress.num_steps}, {figure}")
        if run.state != run_service_pb2.RUN_STATE_SUCCEEDED:
            raise Internal(f"{run.name} ended as {run_service_pb2.RunState.Name(run.state)}: {run.error}")
        first = await self._generate(f"{story.policy}/aliases/live", story.prompts[0])
        self._say(f"{run.published_revision} published and served, first answer {first.text!r}")
        if first.revision != run.published_revision:
            raise Internal(f"{run.published_revision} was promoted, but {first.revision} answered")
        self._report.seconds[f"{story.policy} {run.WhichOneof('recipe')}"] = time.perf_counter() - start_s
        return run

    async def _note_handoff(self, run: run_service_pb2.Run) -> None:
        """What moved the run's last state into the engine: its bytes, and the time by the run's own figures."""
        steps = [dict(step.metrics) async for step in self._client.runs.steps(run.name)]
        self._report.grpo = LoopFigures.of(steps)
        parts = {phase: steps[-1][f"{phase}_ms"] for phase in ("save", *HANDOFF)}
        self._report.handoff_parts_ms, self._report.handoff_ms = parts, sum(parts.values())
        revision = await self._client.revisions.get(run.published_revision)
        state = run.latest_training_state
        self._report.blob_bytes = revision.blob.size_bytes
        # trainer → store → exporter (weights), exporter → store → node (the packed blob)
        self._report.bytes_moved = 2 * state.weights.size_bytes + 2 * revision.blob.size_bytes

    async def ask(self, story: PolicyStory, version: str, model: str) -> None:
        """Answer every held-out prompt greedily, several at a time."""
        start_s = time.perf_counter()
        gate = asyncio.Semaphore(self._plan.num_concurrent)

        async def ask_one(prompt: str) -> Generation:
            async with gate:
                return await self._generate(model, prompt)

        answers = await asyncio.gather(*(ask_one(prompt) for prompt in story.prompts))
        revision, digest = _only_one(model, answers)
        story.served[version] = Served(version, revision, digest, [answer.text for answer in answers])
        self._report.seconds[f"{story.policy} {version}"] = time.perf_counter() - start_s
        score = story.scores()[version]
        self._say(f"{story.policy}: {version} answered {len(answers)} held-out prompts, score {score:.3f}")

    async def ask_exactly(self, story: PolicyStory, version: str, model: str, flush_prefix_cache: Flush) -> None:
        """Answer the first held-out prompts once more, each with the engine and an empty prefix cache to itself.

        Only so must equal weights give equal tokens: batches and cached prefixes change the order of additions.
        """
        start_s = time.perf_counter()
        answers = []
        for prompt in story.prompts[: self._plan.num_compared]:
            await flush_prefix_cache()
            answers.append(await self._generate(model, prompt))
        _only_one(model, answers)
        story.served[version].exact_token_ids = [list(answer.token_ids) for answer in answers]
        self._report.seconds[f"{story.policy} {version}, one at a time"] = time.perf_counter() - start_s
        self._say(
            f"{story.policy}: {version} answered {len(answers)} prompts one at a time, with an empty prefix cache"
        )

    async def _generate(self, model: str, prompt: str) -> Generation:
        sampling = inference_service_pb2.SamplingParams(max_new_tokens=self._plan.max_new_tokens, temperature=0)
        messages = [{"role": "user", "content": prompt}]
        return await self._client.generate_text(model, messages, sampling=sampling, tenant="tenants/demo")


def _only_one(model: str, answers: Sequence[Generation]) -> tuple[str, str]:
    """Revision and digest that all of ``answers`` came from, while no alias moved."""
    named = {(answer.revision, answer.digest) for answer in answers}
    if len(named) != 1:
        raise Internal(f"{model} was answered by {len(named)} revisions while no alias moved: {sorted(named)}")
    return named.pop()
