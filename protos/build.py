"""Generate, lint and check the protocol buffers: ``python protos/build.py {generate|check|lint|breaking}``.

The generated modules live below ``mint_api`` (the bare package name ``mint`` belongs to the public SDK), while
the files keep their canonical names ``mint/v1/…`` in every descriptor, so reflection and other languages see
the contract as it is written. ``buf`` reads a descriptor image, because the googleapis come from the
``googleapis-common-protos`` wheel and not from buf's registry.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
ROOT = PROTOS.parent
STUBS = ROOT / "libs" / "api" / "mint_api"
WHEELS = Path(sysconfig.get_paths()["purelib"])
_IMPORT = re.compile(r"^(from|import) mint\.(runtime\.)?v1\b", re.MULTILINE)


def _run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    subprocess.run([str(part) for part in command], check=True, env=env)


def _sources(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in (root / "mint").rglob("*.proto"))


def _protoc(root: Path, *arguments: str) -> None:
    scripts = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    _run(sys.executable, "-m", "grpc_tools.protoc", f"-I{root}", f"-I{WHEELS}", *arguments, *_sources(root), env=env)


def image(root: Path, out: Path) -> Path:
    """Write a descriptor image with comments, as buf reads it."""
    _protoc(root, "--include_imports", "--include_source_info", f"--descriptor_set_out={out}")
    return out


def generate(out: Path) -> None:
    """Write the Python stubs and their ``.pyi`` into the package folder ``out``."""
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary)
        _protoc(
            PROTOS,
            f"--python_out={raw}",
            f"--grpc_python_out={raw}",
            f"--mypy_out=quiet:{raw}",
            f"--mypy_grpc_out=quiet:{raw}",
        )
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(raw / "mint", out)
    for path in sorted(out.rglob("*.py*")):
        text = path.read_text()
        text = _IMPORT.sub(lambda m: f"{m[1]} mint_api.{m[2] or ''}v1", text)
        text = re.sub(r"(?<![\w./\"'])mint\.((?:runtime\.)?v1\.\w+_pb2)", r"mint_api.\1", text)
        text = text.replace("from mint import", "from mint_api import")
        text = text.replace("import mint.", "import mint_api.")
        path.write_text(text)
    for package in (out, out / "v1", out / "runtime", out / "runtime" / "v1"):
        (package / "__init__.py").write_text('"""Generated from protos/ by `make protos`. Do not edit."""\n')
    (out / "py.typed").touch()


def check() -> int:
    """Compare the committed stubs with fresh ones."""
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary) / "mint_api"
        generate(fresh)
        wanted = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
        found = {p.relative_to(STUBS) for p in STUBS.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        stale = sorted(wanted ^ found)
        stale += [p for p in sorted(wanted & found) if not filecmp.cmp(fresh / p, STUBS / p, shallow=False)]
    for path in stale:
        print(f"libs/api/mint_api/{path} is not what protos/ generates: run `make protos` and commit", file=sys.stderr)
    return 1 if stale else 0


def _buf(*arguments: str | Path) -> None:
    _run(Path(sys.executable).parent / "buf", *arguments)


def lint() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        out = image(PROTOS, Path(temporary) / "image.binpb")
        _buf("lint", out, "--config", PROTOS / "buf.yaml", "--path", "mint")


def breaking(against: str) -> None:
    """Compare with the protos at git revision ``against``; a history without protos has nothing to break."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        show = ["git", "-C", str(ROOT), "archive", against, "protos"]
        archived = subprocess.run(show, capture_output=True, check=False)
        if archived.returncode != 0:
            print(f"no protos at git revision {against}: nothing to compare with")
            return
        subprocess.run(["tar", "-x", "-C", str(folder)], input=archived.stdout, check=True)
        before = image(folder / "protos", folder / "before.binpb")
        after = image(PROTOS, folder / "after.binpb")
        _buf("breaking", after, "--against", before, "--config", PROTOS / "buf.yaml", "--path", "mint")


def main(arguments: list[str]) -> int:
    match arguments:
        case ["generate"]:
            generate(STUBS)
        case ["check"]:
            return check()
        case ["lint"]:
            lint()
        case ["breaking", against]:
            breaking(against)
        case _:
            print("usage: python protos/build.py generate | check | lint | breaking GIT_REVISION", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
