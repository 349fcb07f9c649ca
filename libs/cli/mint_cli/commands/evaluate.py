"""`mint eval`: score what a policy has published."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from mint_api.v1 import evaluation_service_pb2, run_service_pb2
from mint_cli.endpoints import find_endpoints, state_dir
from mint_cli.options import (
    CatalogOption,
    ExporterOption,
    JsonOption,
    MaxNewTokensOption,
    PolicyArgument,
    PriorityOption,
    RunIdOption,
    ScorerNameOption,
    ScorerOptionsOption,
    ScorerTimeoutOption,
    StateDirOption,
    StopOption,
    WatchOption,
    key_values,
)
from mint_cli.output import print_json, print_table, to_plain
from mint_cli.references import model_name, policy_name, short
from mint_cli.runs import conclude, evaluation_of, queue_run
from mint_client import MintClient
from mint_core.errors import InvalidArgument
from mint_core.names import PolicyName

__all__ = ["app"]

_DEFAULT = "run"


class _DefaultsToRun(typer.core.TyperGroup):
    """Takes ``mint eval REFERENCE …`` for ``mint eval run REFERENCE …``; no reference is a command's name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    no_args_is_help=True,
    cls=_DefaultsToRun,
    help="Evaluations: `mint eval REFERENCE DATA_FILE --scorer NAME` is short for `mint eval run …`.",
)


@app.command(name=_DEFAULT)
def run(
    reference: Annotated[str, typer.Argument(help="tenant/policy[@alias|@number], or baseModels/NAME with --policy.")],
    data_file: Annotated[Path, typer.Argument(help="JSONL of {prompt, …} or {messages: […], …}.", dir_okay=False)],
    scorer: ScorerNameOption,
    scorer_option: ScorerOptionsOption = None,
    scorer_timeout_s: ScorerTimeoutOption = 0.0,
    policy: Annotated[str, typer.Option(help="tenant/policy that keeps the evaluation of a base model.")] = "",
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    stop: StopOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    priority: PriorityOption = 0,
    run_id: RunIdOption = "",
    watch: WatchOption = False,
    catalog: CatalogOption = "",
    exporter: ExporterOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """Score a revision, or the base, on a data set; an alias means the revision it points at now."""
    model = model_name(reference, field="reference")
    name = _policy(model, policy)
    recipe = run_service_pb2.EvaluationRecipe(
        scorer=scorer,
        scorer_options=key_values(scorer_option, field="scorer_option"),
        scorer_timeout_s=scorer_timeout_s,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop=stop,
        seed=seed,
    )
    endpoints = find_endpoints(
        state_dir(state_path), catalog=catalog, exporter=exporter, needed=("catalog", "exporter")
    )

    async def call() -> tuple[run_service_pb2.Run, evaluation_service_pb2.Evaluation | None]:
        async with MintClient(endpoints) as client:
            recipe.revision = (await client.aliases.resolve(model)).revision if "/aliases/" in model else model
            wanted = run_service_pb2.Run(policy=str(name), evaluation=recipe, priority=priority)
            files = [(wanted.evaluation.data, data_file)]
            done = await queue_run(client, name.tenant, wanted, files=files, run_id=run_id, watch=watch)
            return done, await evaluation_of(client, done)

    done, evaluation = asyncio.run(call())
    if json_output:
        print_json({"run": to_plain(done), "evaluation": None if evaluation is None else to_plain(evaluation)})
    elif not watch:
        print(f"queued {short(done.name)}: {short(done.evaluation.revision)} on {data_file.name}")
    if watch:
        conclude(done, evaluation, json_output=json_output)


@app.command(name="list")
def list_(
    policy: PolicyArgument,
    catalog: CatalogOption = "",
    state_path: StateDirOption = None,
    json_output: JsonOption = False,
) -> None:
    """List a policy's evaluations."""
    name = str(policy_name(policy))
    endpoints = find_endpoints(state_dir(state_path), catalog=catalog, needed=("catalog",))

    async def call() -> list[evaluation_service_pb2.Evaluation]:
        async with MintClient(endpoints) as client:
            return [evaluation async for evaluation in client.evaluations.list(name)]

    evaluations = [to_plain(evaluation) for evaluation in asyncio.run(call())]
    if json_output:
        print_json({"evaluations": evaluations})
        return
    rows = [
        [
            evaluation["name"].rpartition("/")[2],
            short(evaluation["revision"]) or "the base",
            evaluation["scorer"],
            evaluation["num_examples"],
            " ".join(f"{figure}={value:.4g}" for figure, value in evaluation["metrics"].items()),
            evaluation.get("create_time"),
            evaluation["data_digest"],
        ]
        for evaluation in evaluations
    ]
    print_table(["EVALUATION", "REVISION", "SCORER", "EXAMPLES", "FIGURES", "CREATED", "DATA"], rows)


def _policy(model: str, policy: str) -> PolicyName:
    """The policy that keeps the evaluation: the one evaluated, or for a base model the one that is named."""
    if not model.startswith("baseModels/"):
        if policy:
            raise InvalidArgument(
                f"policy is {policy!r}: --policy goes with a base model only; an evaluation of {short(model)} is "
                "kept by its own policy",
                field="policy",
            )
        return PolicyName.parse("/".join(model.split("/")[:4]))
    if not policy:
        raise InvalidArgument(
            f"{model} belongs to no policy: say with --policy tenant/policy which one keeps the evaluation",
            field="policy",
        )
    return policy_name(policy)
