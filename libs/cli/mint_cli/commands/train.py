"""`mint train`: queue training runs and watch them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mint_api.v1 import common_pb2, run_service_pb2
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import (
    CatalogOption,
    ContinueOption,
    ExporterOption,
    JsonOption,
    LearningRateOption,
    MaxGradNormOption,
    MaxNewTokensOption,
    PolicyArgument,
    PriorityOption,
    PromoteOption,
    RunIdOption,
    ScorerNameOption,
    ScorerOptionsOption,
    ScorerTimeoutOption,
    StateDirOption,
    StopOption,
    WarmupStepsOption,
    WatchOption,
    WeightDecayOption,
    key_values,
)
from mint_cli.output import print_json, to_plain
from mint_cli.references import policy_name, short
from mint_cli.runs import conclude, queue_run
from mint_client import Endpoints, MintClient
from mint_core.errors import InvalidArgument
from mint_core.names import PolicyName

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Training runs.")


class Advantage(StrEnum):
    """Choices of ``GroupAdvantage``."""

    STANDARDIZED = "standardized"
    CENTERED = "centered"


class Weighting(StrEnum):
    """Choices of ``TokenWeighting``."""

    TOKEN_MEAN = "token-mean"  # noqa: S105 - no password
    SEQUENCE_MEAN = "sequence-mean"
    FIXED_LENGTH = "fixed-length"


class Loss(StrEnum):
    """Choices of ``LossFunction`` that learn from rewards."""

    PPO = "ppo"
    CISPO = "cispo"
    IMPORTANCE_SAMPLING = "importance-sampling"
    DRO = "dro"


@app.command()
def sft(
    policy: PolicyArgument,
    data: Annotated[
        Path, typer.Option(help="JSONL of {prompt, completion} or {messages: [{role, content}, …]}.", dir_okay=False)
    ],
    eval_data: Annotated[Path | None, typer.Option(help="Held-out JSONL.", dir_okay=False)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in one step.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest example in tokens.")] = 1024,
    learning_rate: LearningRateOption = 0.0,
    warmup_steps: WarmupStepsOption = 0,
    weight_decay: WeightDecayOption = 0.0,
    max_grad_norm: MaxGradNormOption = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of examples.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 20,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: at the end only.")] = 0,
    continue_: ContinueOption = False,
    publish: Annotated[bool, typer.Option(help="Publish the final state as a revision.")] = True,
    promote: PromoteOption = "",
    priority: PriorityOption = 0,
    run_id: RunIdOption = "",
    watch: WatchOption = False,
    catalog: CatalogOption = "",
    exporter: ExporterOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Fine-tune a policy on examples; the loss is on completions only."""
    name = policy_name(policy)
    endpoints = find_endpoints(
        state_dir(state_path), catalog=catalog, exporter=exporter, needed=("catalog", "exporter")
    )
    recipe = run_service_pb2.SftRecipe(
        num_steps=steps,
        batch_size=batch_size,
        max_tokens=max_tokens,
        optimizer=_optimizer(learning_rate, weight_decay, max_grad_norm, warmup_steps),
        seed=seed,
        save_every_steps=save_every,
        eval_every_steps=eval_every,
    )
    run = run_service_pb2.Run(
        policy=str(name),
        sft=recipe,
        continue_from_latest=continue_,
        publish=publish,
        promote_alias=promote,
        priority=priority,
    )
    files = [(run.sft.train_data, data)]
    if eval_data is not None:
        files.append((run.sft.eval_data, eval_data))
    _train(endpoints, name, run, files=files, run_id=run_id, watch=watch, json_output=json_output)


@app.command()
def grpo(
    policy: PolicyArgument,
    prompts_file: Annotated[
        Path,
        typer.Argument(
            help="JSONL of {prompt, …} or {messages: […], …}; data of `mint train sft` will do.", dir_okay=False
        ),
    ],
    scorer: ScorerNameOption,
    scorer_option: ScorerOptionsOption = None,
    scorer_timeout_s: ScorerTimeoutOption = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 20,
    prompts_per_step: Annotated[int, typer.Option(min=1, help="Prompts in one step.")] = 8,
    group_size: Annotated[int, typer.Option(min=2, help="Samples for each prompt.")] = 8,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 means 1.")] = 1.0,
    stop: StopOption = None,
    learning_rate: LearningRateOption = 0.0,
    warmup_steps: WarmupStepsOption = 0,
    weight_decay: WeightDecayOption = 0.0,
    max_grad_norm: MaxGradNormOption = 0.0,
    clip: Annotated[float, typer.Option(min=0, help="Clip the ratio below 1 - this; 0 means 0.2.")] = 0.2,
    clip_high: Annotated[float, typer.Option(min=0, help="Clip the ratio above 1 + this; 0 means as --clip.")] = 0.0,
    kl: Annotated[float, typer.Option(min=0, help="Weight of the KL penalty to the base.")] = 0.0,
    advantage: Annotated[Advantage, typer.Option(help="How rewards become advantages.")] = Advantage.STANDARDIZED,
    weighting: Annotated[Weighting, typer.Option(help="How much each token counts.")] = Weighting.TOKEN_MEAN,
    loss: Annotated[Loss, typer.Option(help="The loss.")] = Loss.PPO,
    sequence_level: Annotated[
        bool, typer.Option("--sequence-level", help="Take the ratio of whole completions, not of tokens.")
    ] = False,
    staleness: Annotated[
        int, typer.Option(min=0, max=1, help="1: sample the next batch during the update, one revision behind.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts and samples.")] = 0,
    rollout_ttl_s: Annotated[int, typer.Option(min=0, help="How long rollouts are kept; 0 means 7 days.")] = 0,
    continue_: ContinueOption = False,
    promote: PromoteOption = "",
    promote_every: Annotated[
        int, typer.Option(min=0, help="Steps between promotions, with --promote; 0: at the end only.")
    ] = 0,
    priority: PriorityOption = 0,
    run_id: RunIdOption = "",
    watch: WatchOption = False,
    catalog: CatalogOption = "",
    exporter: ExporterOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train a policy on rewards: sample, score, update, publish, and again from what was published."""
    name = policy_name(policy)
    if promote_every and not promote:
        raise InvalidArgument(
            f"--promote-every is {promote_every} without --promote: name the alias to move", field="promote_every"
        )
    recipe = run_service_pb2.GrpoRecipe(
        scorer=scorer,
        scorer_options=key_values(scorer_option, field="scorer_option"),
        scorer_timeout_s=scorer_timeout_s,
        num_steps=steps,
        num_prompts_per_step=prompts_per_step,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop=stop,
        optimizer=_optimizer(learning_rate, weight_decay, max_grad_norm, warmup_steps),
        clip_epsilon=clip,
        clip_epsilon_high=clip_high,
        kl_coefficient=kl,
        advantage=run_service_pb2.GroupAdvantage.Value(f"GROUP_ADVANTAGE_{advantage.name}"),
        weighting=run_service_pb2.TokenWeighting.Value(f"TOKEN_WEIGHTING_{weighting.name}"),
        loss=common_pb2.LossFunction.Value(f"LOSS_FUNCTION_{loss.name}"),
        sequence_level_ratio=sequence_level,
        max_staleness=staleness,
        seed=seed,
        promote_every_steps=promote_every,
        rollout_ttl_s=rollout_ttl_s,
    )
    endpoints = find_endpoints(
        state_dir(state_path), catalog=catalog, exporter=exporter, needed=("catalog", "exporter")
    )
    run = run_service_pb2.Run(
        policy=str(name),
        grpo=recipe,
        continue_from_latest=continue_,
        publish=True,
        promote_alias=promote,
        priority=priority,
    )
    files = [(run.grpo.prompts, prompts_file)]
    _train(endpoints, name, run, files=files, run_id=run_id, watch=watch, json_output=json_output)


def _optimizer(
    learning_rate: float, weight_decay: float, max_grad_norm: float, warmup_steps: int
) -> run_service_pb2.OptimizerConfig:
    return run_service_pb2.OptimizerConfig(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        num_warmup_steps=warmup_steps,
    )


def _train(
    endpoints: Endpoints,
    policy: PolicyName,
    run: run_service_pb2.Run,
    *,
    files: Sequence[tuple[common_pb2.BlobRef, Path]],
    run_id: str,
    watch: bool,
    json_output: bool,
) -> None:
    async def call() -> run_service_pb2.Run:
        async with MintClient(endpoints) as client:
            return await queue_run(client, policy.tenant, run, files=files, run_id=run_id, watch=watch)

    done = asyncio.run(call())
    if json_output:
        print_json(to_plain(done))
    elif not watch:
        print(f"queued {short(done.name)}")
    if watch:
        conclude(done, None, json_output=json_output)
