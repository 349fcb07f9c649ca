"""The house keeps its rules: who may import whom, what the catalog never loads, which RPCs are still to come."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import mint_api.runtime.v1
import mint_api.v1

ROOT = Path(__file__).parents[3]
ROOMS = sorted(
    path for path in [*ROOT.glob("libs/*/mint_*"), *ROOT.glob("services/*/mint_*")] if path.name != "mint_api"
)

# Part of the contract, answered by a later version. Only shrinks.
UNIMPLEMENTED = {
    "mint.v1.ScorerService/ScoreSamples",  # served by whoever operates a scorer, called by runs
}


def test_import_linter_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("service", ["catalog", "inference", "exporter", "loader", "runs"])
def test_services_without_tensors_never_load_torch(service: str) -> None:
    code = (
        f"import sys, importlib, mint_{service} as room\nfrom pkgutil import walk_packages\n"
        "for module in walk_packages(room.__path__, room.__name__ + '.'): importlib.import_module(module.name)\n"
        "heavy = {'torch', 'transformers', 'peft', 'sglang'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_scorer_loads_nothing_of_mint() -> None:
    code = (
        "import sys, importlib, mint_scorers as room\nfrom pkgutil import iter_modules\n"
        "for module in iter_modules(room.__path__): importlib.import_module('mint_scorers.' + module.name)\n"
        "rest = {name for name in sys.modules if name.startswith(('mint_', 'grpc', 'pydantic', 'numpy'))}\n"
        "rest = {name for name in rest if name.split('.')[0] != 'mint_scorers'}\n"
        "assert not rest, rest"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def test_domain_modules_never_see_grpc_or_generated_types() -> None:
    borders = {"app", "clients", "codec", "codecs", "registration", "replica", "service", "servicers", "__main__"}
    borders |= {"audit_codec", "etcd", "members", "watch"}  # the catalog's other border: etcd speaks gRPC too
    offenders = []
    # mint_runs has no servicer: it is a client through and through, and the contract's messages are its language.
    for room in (room for room in ROOMS if room.parent.parent.name == "services" and room.name != "mint_runs"):
        for path in room.rglob("*.py"):
            if borders & set(path.relative_to(room).with_suffix("").parts):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] in ("grpc", "mint_api") for name in names):
                    offenders.append(str(path.relative_to(ROOT)))
    assert sorted(set(offenders)) == []


def test_no_file_outgrows_its_room() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for room in ROOMS
        for p in room.rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 500
    }
    assert long == {}


def test_the_list_of_unimplemented_rpcs() -> None:
    for room in ROOMS:
        if room.name == "mint_engine":
            continue  # its plugin imports SGLang; the servicer is imported below
        package = importlib.import_module(room.name)
        for module in pkgutil.walk_packages(package.__path__, f"{room.name}."):
            if "servic" in module.name:
                importlib.import_module(module.name)
    importlib.import_module("mint_engine.service")
    missing = set()
    for package in (mint_api.v1, mint_api.runtime.v1):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if info.name.endswith("_pb2_grpc"):
                missing |= _unanswered(info.name)
    assert missing == UNIMPLEMENTED


def _unanswered(module_name: str) -> set[str]:
    generated = importlib.import_module(module_name)
    package = module_name.removeprefix("mint_api.").rpartition(".")[0]
    missing = set()
    for name, base in inspect.getmembers(generated, inspect.isclass):
        if not name.endswith("Servicer") or base.__module__ != module_name:
            continue
        ours = [cls for cls in base.__subclasses__() if cls.__module__.split(".")[0].startswith("mint_")]
        for rpc in (rpc for rpc in vars(base) if not rpc.startswith("_")):
            if not any(getattr(cls, rpc) is not getattr(base, rpc) for cls in ours):
                missing.add(f"mint.{package}.{name.removesuffix('Servicer')}/{rpc}")
    return missing
