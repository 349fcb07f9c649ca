"""A session's whole state as two safetensors objects, and back, bit for bit. No pickle.

``weights``: the adapter under its PEFT names, float32, with the adapter configuration that the exporter reads.
``optimizer``: moments, gathered gradient and random state as tensors; what is no tensor as JSON in the metadata,
together with the digest of the weights it belongs to, so that the halves of two states are never mixed. The newest step
results are in it too; states of before they were saved are read as those of a session without steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mint_core.errors import BaseModelMismatch, BlobCorrupt, InvalidArgument, WrongState
from mint_core.names import check_digest
from mint_lora import (
    LAYOUT_PACKED,
    LAYOUT_PEFT,
    AdapterConfig,
    TensorFile,
    TensorSource,
    is_packed_name,
    write_safetensors,
)
from mint_trainer.ledger import LedgerContents
from mint_trainer.optimizer import AdamW
from mint_trainer.recipe import AdapterRecipe
from mint_trainer.saved_ledger import ledger_document, ledger_tensors, read_ledger
from mint_trainer.session import TrainingSession

__all__ = ["Blob", "SavedState", "StateFiles", "StateReader", "write_for_export", "write_state"]

METADATA_KEY = "mint.optimizer"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes in the object store."""

    digest: str = ""
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SavedState:
    """Where a state is."""

    run: str
    """Name of the run that saved it, or empty."""
    step: int
    fence: int
    weights_key: str
    weights: Blob
    optimizer_key: str = ""
    optimizer: Blob = Blob()

    def check(self, tenant: str, *, weights_only: bool, field: str) -> None:
        """Raise :class:`InvalidArgument` if it cannot name a state of ``tenant``."""
        parts = [("weights", self.weights_key, self.weights)]
        if not weights_only:
            parts.append(("optimizer", self.optimizer_key, self.optimizer))
        for name, key, blob in parts:
            if not key.startswith(f"tenants/{tenant}/states/"):
                raise InvalidArgument(
                    f"{field}.{name}_key is {key[:120]!r}: the key of a training state of tenant {tenant} is expected",
                    field=f"{field}.{name}_key",
                )
            check_digest(blob.digest, field=f"{field}.{name}.digest")
            if blob.size_bytes <= 0:
                raise InvalidArgument(
                    f"{field}.{name}.size_bytes is {blob.size_bytes}: must be positive",
                    field=f"{field}.{name}.size_bytes",
                )


@dataclass(frozen=True, slots=True)
class StateFiles:
    """A state on this machine's disk."""

    weights_path: Path
    weights: Blob
    optimizer_path: Path
    optimizer: Blob


def write_state(session: TrainingSession, ledger: LedgerContents, folder: Path) -> StateFiles:
    """Write both files into ``folder``; the same state and steps give the same bytes in any process.

    They are on their way to the object store and not synced.
    """
    weights_path, optimizer_path = folder / "weights.safetensors", folder / "optimizer.safetensors"
    weights = write_safetensors(
        weights_path,
        {name: parameter.detach().numpy() for name, parameter in session.adapter.parameters.items()},
        _config_of(session).to_metadata(),
        durable=False,
    )
    optimizer = session.optimizer
    tensors = {"rng_state": session.rng_state, "num_updates": torch.stack(list(optimizer.num_updates.values()))}
    groups = {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq, "gradient": session.gradients}
    for kind, group in groups.items():
        tensors.update({f"{kind}/{name}": tensor for name, tensor in group.items()})
    document = {
        "format": FORMAT,
        "base_digest": session.base.digest,
        "weights_digest": weights.digest,
        "step": session.step,
        "num_gathered": session.num_gathered,
        "recipe": asdict(session.recipe),
        "ledger": ledger_document(ledger),
    }
    moments = write_safetensors(
        optimizer_path,
        {name: tensor.numpy() for name, tensor in tensors.items()} | ledger_tensors(ledger),
        {METADATA_KEY: json.dumps(document, sort_keys=True, separators=(",", ":"))},
        durable=False,
    )
    return StateFiles(
        weights_path,
        Blob(weights.digest, weights.size_bytes),
        optimizer_path,
        Blob(moments.digest, moments.size_bytes),
    )


def write_for_export(session: TrainingSession, path: Path) -> Blob:
    """Write the weights alone, in the base's compute type, which is what an engine of that type computes with.

    Where all names are those of the packed layout, the file is the blob that an export publishes, byte for byte. It is
    not synced.
    """
    dtype = session.base.dtype
    parameters = {name: parameter.detach() for name, parameter in session.adapter.parameters.items()}
    layout = LAYOUT_PACKED if all(map(is_packed_name, parameters)) else LAYOUT_PEFT
    config = replace(_config_of(session), dtype=dtype).with_layout(layout)
    if dtype == "float32":
        tensors = {name: TensorSource.of(values.numpy()) for name, values in parameters.items()}
    else:
        # numpy has no such type: its bits go through as integers.
        tensors = {
            name: TensorSource.of(values.to(torch.bfloat16).view(torch.uint16).numpy(), "BF16")
            for name, values in parameters.items()
        }
    weights = write_safetensors(path, tensors, config.to_metadata(), durable=False)
    return Blob(weights.digest, weights.size_bytes)


class StateReader:
    """A fetched state; its files were checked against their digests, what they say is checked here.

    Everything is read and checked before the session changes.
    """

    def __init__(self, saved: SavedState, weights_path: Path, optimizer_path: Path | None) -> None:
        """``optimizer_path=None`` takes the weights only, with a fresh optimizer at step 0."""
        self._saved = saved
        self._weights_path = weights_path
        self._optimizer_path = optimizer_path

    def recipe(self) -> AdapterRecipe:
        """What the saved session was made from; without its optimizer object, dropout and seed are unknown and 0."""
        if self._optimizer_path is not None:
            return self._saved_recipe()
        return _recipe_of(self._config(_open(self._weights_path, self._saved.weights_key)))

    def _saved_recipe(self) -> AdapterRecipe:
        assert self._optimizer_path is not None
        values = self._document(_open(self._optimizer_path, self._saved.optimizer_key))["recipe"]
        try:
            return AdapterRecipe(**values | {"target_modules": tuple(values["target_modules"])})
        except (KeyError, TypeError, InvalidArgument) as error:
            raise _corrupt(self._saved.optimizer_key, f"its recipe is unreadable ({error})") from error

    def ledger(self) -> LedgerContents:
        """The steps that were saved; without its optimizer object, and in a state of before they were, none.

        Raises :class:`BlobCorrupt` if they are unreadable.
        """
        if self._optimizer_path is None:
            return LedgerContents()
        file = _open(self._optimizer_path, self._saved.optimizer_key)
        return self._ledger(self._document(file), file)

    def restore(self, session: TrainingSession) -> None:
        """Make ``session`` what was saved.

        Raises :class:`BlobCorrupt` if the objects are not what a trainer saved, :class:`BaseModelMismatch` for another
        base and :class:`WrongState` if the session's adapter is made otherwise than the saved one.
        """
        weights_file = _open(self._weights_path, self._saved.weights_key)
        config = self._config(weights_file)
        _check_base(config.base_digest, session)
        saved, here = _recipe_of(config), _recipe_of(_config_of(session))
        if saved != here:
            raise WrongState(
                f"the state's adapter has {saved}, the session's has {here}: create a session from the state instead"
            )
        shapes = {name: tuple(parameter.shape) for name, parameter in session.adapter.parameters.items()}
        weights = _tensors(weights_file, "", shapes, self._saved.weights_key)
        if self._optimizer_path is None:
            self._install_weights(session, weights)
            session.reset_optimizer()
            return
        file = _open(self._optimizer_path, self._saved.optimizer_key)
        key = self._saved.optimizer_key
        document = self._document(file)
        _check_base(document["base_digest"], session)
        if document["weights_digest"] != self._saved.weights.digest:
            raise InvalidArgument(
                f"optimizer_key {key!r} belongs to the weights {document['weights_digest']}, not to "
                f"{self._saved.weights.digest}: name both objects of one state",
                field="optimizer_key",
            )
        num_gathered, step = document["num_gathered"], document["step"]
        optimizer = AdamW(session.adapter.parameters)
        optimizer.exp_avg = _tensors(file, "exp_avg/", shapes, key)
        optimizer.exp_avg_sq = _tensors(file, "exp_avg_sq/", shapes, key)
        num_updates = _tensor(file, "num_updates", (len(shapes),), torch.float32, key)
        optimizer.num_updates = {name: num_updates[i].clone() for i, name in enumerate(shapes)}
        gathered = [name for name in shapes if f"gradient/{name}" in file.header.tensors]
        gradients = _tensors(file, "gradient/", {name: shapes[name] for name in gathered}, key)
        rng_state = _tensor(file, "rng_state", tuple(session.rng_state.shape), torch.uint8, key)
        self._ledger(document, file)  # also where nobody takes it: a damaged state is not trusted in parts
        self._install_weights(session, weights)
        session.optimizer = optimizer
        session.gradients = gradients
        session.num_gathered = num_gathered
        session.rng_state = rng_state
        session.step = step

    @staticmethod
    def _install_weights(session: TrainingSession, weights: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in session.adapter.parameters.items():
                parameter.copy_(weights[name])

    def _config(self, file: TensorFile) -> AdapterConfig:
        try:
            config = AdapterConfig.from_metadata(file.header.metadata, file_name=self._saved.weights_key)
        except InvalidArgument as error:
            raise _corrupt(self._saved.weights_key, error.message) from error
        if config.layout != LAYOUT_PEFT or not config.is_uniform:
            raise _corrupt(self._saved.weights_key, f"layout {config.layout}, or ranks that differ between modules")
        return config

    def _document(self, file: TensorFile) -> dict[str, Any]:
        key = self._saved.optimizer_key
        try:
            document = json.loads(file.header.metadata[METADATA_KEY])
            version = document["format"]
            typed = {"base_digest": str, "weights_digest": str, "step": int, "num_gathered": int, "recipe": dict}
            wrong = [name for name, kind in typed.items() if not isinstance(document[name], kind)]
        except (KeyError, TypeError, ValueError) as error:
            raise _corrupt(key, f"its metadata {METADATA_KEY!r} is unreadable ({error!r})") from error
        if version != FORMAT:
            raise WrongState(
                f"{key!r} has state format {version}, this trainer reads {FORMAT}: load it with the MinT that saved it"
            )
        if wrong:
            raise _corrupt(key, f"its metadata {METADATA_KEY!r} has no good {', '.join(wrong)}")
        return document

    def _ledger(self, document: Mapping[str, Any], file: TensorFile) -> LedgerContents:
        if "ledger" not in document:
            return LedgerContents()
        try:
            return read_ledger(document["ledger"], file)
        except ValueError as error:
            raise _corrupt(self._saved.optimizer_key, str(error)) from error


def _config_of(session: TrainingSession) -> AdapterConfig:
    recipe = session.recipe
    return AdapterConfig(
        rank=recipe.rank,
        alpha=recipe.alpha,
        target_modules=recipe.target_modules,
        base_model=session.base.model_id,
        base_digest=session.base.digest,
        dtype="float32",
        use_rslora=recipe.use_rslora,
    )


def _recipe_of(config: AdapterConfig) -> AdapterRecipe:
    return AdapterRecipe(config.rank, config.alpha, config.target_modules, use_rslora=config.use_rslora)


def _open(path: Path, key: str) -> TensorFile:
    try:
        return TensorFile(path)
    except InvalidArgument as error:
        raise _corrupt(key, error.message) from error


def _tensors(file: TensorFile, prefix: str, shapes: Mapping[str, tuple[int, ...]], key: str) -> dict[str, torch.Tensor]:
    return {name: _tensor(file, prefix + name, shape, torch.float32, key) for name, shape in shapes.items()}


def _tensor(file: TensorFile, name: str, shape: tuple[int, ...], dtype: torch.dtype, key: str) -> torch.Tensor:
    info = file.header.tensors.get(name)
    wanted = "F32" if dtype == torch.float32 else "U8"
    if info is None or info.shape != shape or info.dtype != wanted:
        found = "is absent" if info is None else f"is {info.dtype} {list(info.shape)}"
        raise _corrupt(key, f"tensor {name!r} {found}, expected {wanted} {list(shape)}")
    tensor = torch.empty(shape, dtype=dtype)
    tensor.numpy()[...] = file.array(name)  # a copy: the file is gone after this
    return tensor


def _check_base(digest: str, session: TrainingSession) -> None:
    if digest != session.base.digest:
        raise BaseModelMismatch(
            f"the state was saved on the base {digest}, but this trainer holds {session.base.digest}",
            metadata={"expected": digest, "actual": session.base.digest},
        )


def _corrupt(key: str, defect: str) -> BlobCorrupt:
    return BlobCorrupt(f"{key!r} is not the training state it should be: {defect}", metadata={"object_key": key})
