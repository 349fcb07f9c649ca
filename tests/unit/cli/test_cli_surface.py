"""The command line as people and scripts know it: whatever changes here, changes for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mint_api.v1 import common_pb2, policy_service_pb2, run_service_pb2
from mint_cli.commands.config import _overlay
from mint_cli.endpoints import find_endpoints, find_runtime_address
from mint_cli.failures import error_of
from mint_cli.main import app, run
from mint_cli.output import to_plain
from mint_cli.references import alias_name, model_name, policy_name, run_name, short
from mint_cli.state import RunningService, Snapshot, StateDir
from mint_core.errors import EtagMismatch, FailedPrecondition, InvalidArgument, MintError

_CATALOG = ["--catalog", "--json", "--state-dir"]
_LOADER = ["--json", "--loader-runtime", "--node", "--state-dir"]
EVAL = ["eval", "--scorer", "exact_match"]
GATE = ["alias", "gate", "set", "a/b", "--condition"]
GRPO = ["train", "grpo", "a/p", "prompts.jsonl"]

SURFACE = {
    "": ["--version"],
    "alias canary clear": ["ALIAS", "--etag", "--reason", *_CATALOG],
    "alias canary set": ["ALIAS", "REVISION", "--etag", "--reason", "--salt", "--weight", *_CATALOG],
    "alias gate clear": ["ALIAS", "--etag", "--reason", *_CATALOG],
    "alias gate set": ["ALIAS", "--condition", "--etag", "--reason", *_CATALOG],
    "alias gate show": ["ALIAS", *_CATALOG],
    "alias history": ["ALIAS", *_CATALOG],
    "alias promote": [
        "ALIAS",
        "REVISION",
        "--etag",
        "--ignore-gate",
        "--reason",
        "--wait-replicas",
        "--wait-timeout",
        *_CATALOG,
    ],
    "alias rollback": ["ALIAS", "--etag", "--reason", "--to", *_CATALOG],
    "audit list": ["TENANT", "--limit", "--resource", "--since", "--until", *_CATALOG],
    "catalog backup": ["OUT", "--catalog-runtime", "--json", "--state-dir"],
    "catalog gc": ["--catalog-runtime", "--dry-run", "--json", "--state-dir"],
    "catalog restore": ["SOURCE", "--catalog-runtime", "--json", "--state-dir"],
    "config show": ["--json", "--state-dir"],
    "down": ["--json", "--state-dir"],
    "eval list": ["POLICY", *_CATALOG],
    "eval run": [
        "REFERENCE",
        "DATA_FILE",
        "--exporter",
        "--max-new-tokens",
        "--policy",
        "--priority",
        "--run-id",
        "--scorer",
        "--scorer-option",
        "--scorer-timeout-s",
        "--seed",
        "--stop",
        "--temperature",
        "--watch",
        *_CATALOG,
    ],
    "fleet cancel": ["OPERATION", "--reason", *_CATALOG],
    "fleet list": ["TENANT", *_CATALOG],
    "fleet pause": ["TENANT", "--filter", "--id", "--reason", "--wait", *_CATALOG],
    "fleet promote": ["TENANT", "--alias", "--filter", "--id", "--reason", "--wait", *_CATALOG],
    "fleet results": ["OPERATION", "--failed", *_CATALOG],
    "fleet resume": ["TENANT", "--filter", "--id", "--reason", "--wait", *_CATALOG],
    "fleet rollback": ["TENANT", "--alias", "--filter", "--id", "--reason", "--wait", *_CATALOG],
    "fleet show": ["OPERATION", *_CATALOG],
    "generate": [
        "MODEL",
        "PROMPT",
        "--chat",
        "--inference",
        "--json",
        "--logprobs",
        "--max-new-tokens",
        "--seed",
        "--state-dir",
        "--sticky-key",
        "--stream",
        "--system",
        "--temperature",
        "--tenant",
        "--top-p",
    ],
    "lease list": ["TENANT", "--catalog-runtime", "--json", "--state-dir"],
    "loader cancel": ["TICKET", *_LOADER],
    "loader pin": ["ALIAS", "--end", "--start", "--tier", *_LOADER],
    "loader pins": _LOADER,
    "loader prefetch": ["MODELS", "--catalog", "--deadline", "--priority", "--tier", *_LOADER],
    "loader status": _LOADER,
    "loader tickets": ["--open", "--tenant", *_LOADER],
    "loader unpin": ["ALIAS", "--loader-runtime", "--node", "--state-dir"],
    "model fetch": ["[MODEL]", "--json"],
    "policy create": [
        "POLICY",
        "--alpha",
        "--base-model",
        "--description",
        "--init-seed",
        "--label",
        "--owner",
        "--rank",
        "--target-module",
        *_CATALOG,
    ],
    "policy delete": ["POLICY", "--etag", *_CATALOG],
    "policy describe": ["POLICY", *_CATALOG],
    "policy import": ["FILE", "--base-model", "--skip-existing", *_CATALOG],
    "policy list": ["TENANT", "--filter", "--order-by", *_CATALOG],
    "policy pause": ["POLICY", "--etag", *_CATALOG],
    "policy resume": ["POLICY", "--etag", *_CATALOG],
    "policy undelete": ["POLICY", *_CATALOG],
    "replica drain": ["REPLICA", "--timeout-s", "--wait", *_CATALOG],
    "replica list": [*_CATALOG],
    "replica undrain": ["REPLICA", *_CATALOG],
    "revision delete": ["REVISION", "--etag", *_CATALOG],
    "revision diff": ["REVISION", "OTHER", "--exporter-runtime", "--json", "--show", "--state-dir"],
    "revision export": ["REVISION", "FOLDER", "--exporter-runtime", "--json", "--layout", "--state-dir"],
    "revision import": [
        "POLICY",
        "[SOURCE]",
        "--code-version",
        "--data-digest",
        "--digest",
        "--exporter",
        "--exporter-runtime",
        "--json",
        "--object",
        "--recipe",
        "--state-dir",
    ],
    "revision list": ["POLICY", *_CATALOG],
    "revision retire": ["REVISION", "--etag", *_CATALOG],
    "revision show": ["REVISION", *_CATALOG],
    "rollout list": ["POLICY", "--run", *_CATALOG],
    "run cancel": ["RUN", "--reason", *_CATALOG],
    "run describe": ["RUN", *_CATALOG],
    "run list": ["[TENANT]", "--dead-letter", "--policy", "--state", *_CATALOG],
    "run plot": ["RUN", "--metric", "--png", *_CATALOG],
    "run retry": ["RUN", "--reason", *_CATALOG],
    "run watch": ["RUN", *_CATALOG],
    "status": ["--json", "--state-dir"],
    "tenant delete": ["TENANT", "--confirm", "--reason", *_CATALOG],
    "tenant erasure": ["TENANT", *_CATALOG],
    "train grpo": [
        "POLICY",
        "PROMPTS_FILE",
        "--advantage",
        "--clip",
        "--clip-high",
        "--continue/--fresh",
        "--exporter",
        "--group-size",
        "--kl",
        "--learning-rate",
        "--loss",
        "--max-grad-norm",
        "--max-new-tokens",
        "--priority",
        "--promote",
        "--promote-every",
        "--prompts-per-step",
        "--rollout-ttl-s",
        "--run-id",
        "--scorer",
        "--scorer-option",
        "--scorer-timeout-s",
        "--seed",
        "--sequence-level",
        "--staleness",
        "--steps",
        "--stop",
        "--temperature",
        "--warmup-steps",
        "--watch",
        "--weight-decay",
        "--weighting",
        *_CATALOG,
    ],
    "train sft": [
        "POLICY",
        "--batch-size",
        "--continue/--fresh",
        "--data",
        "--eval-data",
        "--eval-every",
        "--exporter",
        "--learning-rate",
        "--max-grad-norm",
        "--max-tokens",
        "--priority",
        "--promote",
        "--publish/--no-publish",
        "--run-id",
        "--save-every",
        "--seed",
        "--steps",
        "--warmup-steps",
        "--watch",
        "--weight-decay",
        *_CATALOG,
    ],
    "up": [
        "--base",
        "--dtype",
        "--foreground",
        "--json",
        "--max-lora-rank",
        "--metrics",
        "--replicas",
        "--state-dir",
        "--timeout-s",
    ],
    "usage": ["RESOURCE", "--since", "--until", *_CATALOG],
}


def commands(command: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    parameters = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            name = parameter.name.upper()
            parameters.append(name if parameter.required else f"[{name}]")
        else:
            parameters.append("/".join([*parameter.opts, *parameter.secondary_opts]))
    if parameters or not hasattr(command, "commands"):
        yield path, parameters
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}".strip())


def test_the_surface() -> None:
    found = {path: sorted(parameters) for path, parameters in commands(typer.main.get_command(app))}
    assert found == {path: sorted(parameters) for path, parameters in SURFACE.items()}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINT_STATE_DIR", raising=False)
    for service in ("CATALOG", "CATALOG_RUNTIME", "INFERENCE", "EXPORTER"):
        monkeypatch.delenv(f"MINT_ENDPOINTS_{service}", raising=False)


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["frobnicate"], 2, "error: USAGE: No such command 'frobnicate'."),
        (["policy", "create"], 2, "error: USAGE: Missing argument 'policy'."),
        (["alias", "promote", "a/b", "x"], 2, "error: USAGE: Invalid value for 'revision'"),
        (["up", "--dtype", "int4"], 2, "error: USAGE: Invalid value for '--dtype'"),
        (["policy", "list", "acme"], 1, "error: PRECONDITION_FAILED: the address of the catalog is not known: run"),
        (["policy", "list", "A/../b"], 1, "error: INVALID_FIELD: tenant is 'A/../b'"),
        (["policy", "describe", "acme"], 1, "error: INVALID_FIELD: policy is 'acme': expected tenant/policy"),
        (["policy", "describe", "a/b@live"], 1, "error: INVALID_FIELD: policy is 'a/b@live'"),
        (["alias", "rollback", "a/b@3"], 1, "error: INVALID_FIELD: alias is 'a/b@3'"),
        (["alias", "canary", "set", "a/b", "2"], 2, "error: USAGE: Missing option '--weight'."),
        ([*GATE, "scorer"], 1, "error: INVALID_FIELD: condition is 'scorer': expected KEY=VALUE"),
        ([*GATE, "scorer=s,most=1"], 1, "error: INVALID_FIELD: condition has 'most': expected some of scorer, metric"),
        ([*GATE, "scorer=s,min=much"], 1, "error: INVALID_FIELD: condition min is 'much': expected a number"),
        ([*GATE, "min_examples=1.5"], 1, "error: INVALID_FIELD: condition min_examples is '1.5': expected a number"),
        (["generate", "a/b", ""], 1, "error: INVALID_FIELD: prompt is empty"),
        (["generate", "a/b", "x", "--system", "s"], 1, "error: INVALID_FIELD: --system goes with --chat only"),
        (["generate", "a/b", "x", "--stream", "--json"], 1, "error: INVALID_FIELD: --stream and --json exclude"),
        (["model", "fetch", "no such thing"], 1, "error: INVALID_FIELD: model is 'no such thing': expected"),
        (["config", "show"], 1, "error: PRECONDITION_FAILED: "),
        (["policy", "create", "a/b", "--label", "x"], 1, "error: INVALID_FIELD: label is 'x': expected KEY=VALUE"),
        (["run", "list"], 1, "error: INVALID_FIELD: whose runs? name a tenant, or a policy with --policy"),
        (["run", "list", "b", "--policy", "a/p"], 1, "error: INVALID_FIELD: tenant is 'b', but --policy is 'a/p'"),
        (["run", "watch", "r"], 1, "error: INVALID_FIELD: run is 'r': expected tenant/run, as `mint run list` shows"),
        (["run", "cancel", "tenants/a/policies/p"], 1, "error: INVALID_FIELD: run is 'tenants/a/policies/p'"),
        (["run", "retry", "r"], 1, "error: INVALID_FIELD: run is 'r': expected tenant/run, as `mint run list`"),
        (["run", "list", "a", "--state", "dead"], 2, "error: USAGE: Invalid value for '--state'"),
        (["lease", "list", "a"], 1, "error: PRECONDITION_FAILED: the runtime address of the catalog is not known: run"),
        (["run", "plot", "a/r", "--png", "."], 2, "error: USAGE: Invalid value for '--png'"),
        (["rollout", "list", "a/p", "--run", "r/../x"], 1, "error: INVALID_FIELD: run is "),
        (["eval", "list"], 2, "error: USAGE: Missing argument 'policy'."),
        (["eval", "a/p@2", "data.jsonl"], 2, "error: USAGE: Missing option '--scorer'."),
        (
            [*EVAL, "a/p@2", "d", "--policy", "a/p"],
            1,
            "error: INVALID_FIELD: policy is 'a/p': --policy goes with a base",
        ),
        ([*EVAL, "baseModels/b", "d"], 1, "error: INVALID_FIELD: baseModels/b belongs to no policy: say with --policy"),
        (
            [*EVAL, "a/p", "d", "--scorer-option", "x"],
            1,
            "error: INVALID_FIELD: scorer_option is 'x': expected KEY=VALUE",
        ),
        ([*EVAL, "p", "d"], 1, "error: INVALID_FIELD: reference is 'p': expected tenant/policy, tenant/policy@alias"),
        ([*GRPO], 2, "error: USAGE: Missing option '--scorer'."),
        ([*GRPO, "--scorer", "s", "--loss", "reinforce"], 2, "error: USAGE: Invalid value for '--loss'"),
        ([*GRPO, "--scorer", "s", "--group-size", "1"], 2, "error: USAGE: Invalid value for '--group-size'"),
        ([*GRPO, "--scorer", "s", "--staleness", "2"], 2, "error: USAGE: Invalid value for '--staleness'"),
        ([*GRPO, "--scorer", "s", "--promote-every", "2"], 1, "error: INVALID_FIELD: --promote-every is 2 without"),
        (
            [*GRPO, "--scorer", "s", "--scorer-option", "k=1", "--scorer-option", "k=2"],
            1,
            "error: INVALID_FIELD: scorer_option 'k' is given twice: '1' and '2'",
        ),
        (["policy", "list", "acme", "--catalog", "127.0.0.1:1"], 1, "error: TEMPORARILY_UNAVAILABLE: "),
    ],
)
def test_failures_are_one_line_with_the_reason(
    argv: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_where_nothing_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"services": []}
    assert run(["down", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"num_stopped": 0}
    assert list(Path().iterdir()) == []


def test_status_tells_who_is_not_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = StateDir(tmp_path / ".state")
    state.create()
    service = RunningService("catalog", "127.0.0.1:1", "127.0.0.1:2", "grpc:127.0.0.1:1", None, 0.0)
    state.write_snapshot(Snapshot("ready", "", 1, "baseModels/b", (service,)))
    assert run(["status", "--json"]) == 0
    (described,) = json.loads(capsys.readouterr().out)["services"]
    assert (described["name"], described["address"], described["healthy"]) == ("catalog", "127.0.0.1:1", False)


def test_secrets_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = StateDir(tmp_path / ".state")
    state.create()
    state.write_settings('[common.object_store]\naccess_key_id = "id"\nsecret_access_key = "hush"\n')
    monkeypatch.setenv("MINT_TRAINER_OBJECT_STORE__SECRET_ACCESS_KEY", "louder")
    for argv in (["config", "show"], ["config", "show", "--json"]):
        assert run(argv) == 0
        out = capsys.readouterr().out
        assert "hush" not in out
        assert "louder" not in out
        assert out.count("**********") == 2
    assert json.loads(out)["common"]["object_store"]["access_key_id"] == "id"


def test_the_environment_lies_over_the_file() -> None:
    settings: dict[str, Any] = {"engine": {"sglang": {"dtype": "float32"}}}
    _overlay(settings, {"MINT_ENGINE_SGLANG__DTYPE": "bfloat16", "MINT_CONFIG": "x", "MINT_CATALOG_LISTEN": "a:1"})
    assert settings == {"engine": {"sglang": {"dtype": "bfloat16"}}, "catalog": {"listen": "a:1"}}


def test_addresses_come_from_the_option_then_from_what_is_up(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.create()
    services = (
        RunningService("catalog", "127.0.0.1:1", "", "", None, 0.0),
        RunningService("exporter", "127.0.0.1:2", "", "", None, 0.0),
    )
    state.write_snapshot(Snapshot("ready", "", 1, "baseModels/b", services))
    found = find_endpoints(state, catalog="127.0.0.1:9", needed=("catalog", "exporter"))
    assert (found.catalog, found.exporter, found.inference) == ("127.0.0.1:9", "127.0.0.1:2", "")
    with pytest.raises(FailedPrecondition, match="address of the inference is not known"):
        find_endpoints(state, needed=("inference",))
    with pytest.raises(FailedPrecondition, match=r"runtime address of the catalog .*--catalog-runtime"):
        find_runtime_address(state, "catalog")
    catalog = RunningService("catalog", "127.0.0.1:1", "127.0.0.1:3", "", None, 0.0)
    state.write_snapshot(Snapshot("ready", "", 1, "baseModels/b", (catalog,)))
    assert find_runtime_address(state, "catalog") == "127.0.0.1:3"
    assert find_runtime_address(state, "catalog", given="127.0.0.1:9") == "127.0.0.1:9"


def test_names_are_typed_short() -> None:
    assert str(policy_name("acme/tone")) == "tenants/acme/policies/tone"
    assert str(alias_name("acme/tone")) == "tenants/acme/policies/tone/aliases/live"
    assert model_name("acme/tone@canary") == "tenants/acme/policies/tone/aliases/canary"
    assert model_name("acme/tone@3") == "tenants/acme/policies/tone/revisions/3"
    assert model_name("baseModels/b") == "baseModels/b"
    assert short("tenants/acme/policies/tone/revisions/3") == "acme/tone@3"
    assert short("tenants/acme/policies/tone") == "acme/tone"
    assert str(run_name("acme/r")) == str(run_name("tenants/acme/runs/r")) == "tenants/acme/runs/r"
    assert short("tenants/acme/runs/r") == "acme/r"
    assert short("tenants/acme/blobs/b") == "tenants/acme/blobs/b"
    with pytest.raises(InvalidArgument):
        model_name("acme/tone@../x")


def test_messages_become_plain_values() -> None:
    policy = policy_service_pb2.Policy(
        name="p", labels={"b": "2", "a": "1"}, state=policy_service_pb2.POLICY_STATE_ACTIVE, next_revision_number=2**40
    )
    policy.lora.CopyFrom(common_pb2.LoraConfig(rank=4, target_modules=["q_proj"]))
    policy.create_time.FromSeconds(0)
    plain = to_plain(policy)
    assert plain["state"] == "ACTIVE"
    assert plain["next_revision_number"] == 2**40
    assert plain["labels"] == {"a": "1", "b": "2"}
    assert plain["lora"]["target_modules"] == ["q_proj"]
    assert plain["create_time"] == "1970-01-01T00:00:00.000+00:00"
    assert "latest_training_state" not in plain
    assert to_plain(run_service_pb2.Run(state=run_service_pb2.RUN_STATE_QUEUED))["state"] == "QUEUED"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("ETAG_MISMATCH: it changed: twice", EtagMismatch, "it changed: twice"),
        ("no reason here", MintError, "no reason here"),
    ],
)
def test_written_down_failures_become_errors_again(text: str, kind: type[MintError], message: str) -> None:
    error = error_of(text)
    assert isinstance(error, kind)
    assert error.message == message


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = {"etcd3aio", "matplotlib", "numpy", "plotille", "sglang", "torch", "transformers"}
    code = f"import sys, mint_cli.main; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
