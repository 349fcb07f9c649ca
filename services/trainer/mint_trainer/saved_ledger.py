"""The step ledger inside a saved state: a JSON document, and log-probabilities as tensors beside it.

How long a step took is left out, so that the same steps give the same bytes in any process.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mint_lora import TensorFile
from mint_trainer.ledger import LedgerContents, RecordedStep
from mint_trainer.session import StepResult

__all__ = ["ledger_document", "ledger_tensors", "read_ledger"]

_MAX_INT64 = 2**63 - 1

_Count = Annotated[int, Field(ge=0, le=_MAX_INT64)]
_Figure = Annotated[float, Field(allow_inf_nan=False)]


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Step(_Document):
    payload_digest: Annotated[str, Field(pattern="^([0-9a-f]{2})*$")]
    step: _Count
    loss_sum: _Figure
    weight_sum: _Figure
    num_tokens: _Count
    num_logprobs: list[_Count]
    """For each datum; none if the step's log-probabilities were not asked for."""
    grad_norm: _Figure
    metrics: dict[str, _Figure]


class _Ledger(_Document):
    next_seq: Annotated[int, Field(ge=1, le=_MAX_INT64)]
    steps: list[_Step]


def ledger_document(contents: LedgerContents) -> dict[str, Any]:
    """What is no tensor, ready for JSON."""
    steps = [
        _Step(
            payload_digest=recorded.payload_digest.hex(),
            step=recorded.result.step,
            loss_sum=recorded.result.loss_sum,
            weight_sum=recorded.result.weight_sum,
            num_tokens=recorded.result.num_tokens,
            num_logprobs=[len(values) for values in recorded.result.logprobs],
            grad_norm=recorded.result.grad_norm,
            metrics=dict(recorded.result.metrics),
        )
        for recorded in contents.recorded
    ]
    return _Ledger(next_seq=contents.next_seq, steps=steps).model_dump()


def ledger_tensors(contents: LedgerContents) -> dict[str, npt.NDArray[np.float32]]:
    """Log-probabilities of each step that has them: float32 ``[num_tokens of all data]``, data after data."""
    first_seq = contents.next_seq - len(contents.recorded)
    return {
        _tensor_name(seq): np.concatenate([np.asarray(values, np.float32) for values in recorded.result.logprobs])
        for seq, recorded in enumerate(contents.recorded, start=first_seq)
        if recorded.result.logprobs
    }


def read_ledger(document: Any, file: TensorFile) -> LedgerContents:
    """The inverse of the two above; :class:`ValueError` names the first defect."""
    try:
        ledger = _Ledger.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, ('ledger', *first['loc'])))}: {first['msg']}") from error
    first_seq = ledger.next_seq - len(ledger.steps)
    if first_seq < 1:
        raise ValueError(f"ledger has {len(ledger.steps)} steps before seq {ledger.next_seq}")
    recorded = [_recorded(step, seq, file) for seq, step in enumerate(ledger.steps, start=first_seq)]
    return LedgerContents(ledger.next_seq, tuple(recorded))


def _recorded(step: _Step, seq: int, file: TensorFile) -> RecordedStep:
    result = StepResult(
        step=step.step,
        loss_sum=step.loss_sum,
        weight_sum=step.weight_sum,
        num_tokens=step.num_tokens,
        logprobs=_logprobs(_tensor_name(seq), step.num_logprobs, file),
        grad_norm=step.grad_norm,
        metrics=step.metrics,
    )
    return RecordedStep(bytes.fromhex(step.payload_digest), result)


def _logprobs(name: str, lengths: Sequence[int], file: TensorFile) -> tuple[array[float], ...]:
    if not lengths:
        return ()
    info = file.header.tensors.get(name)
    if info is None or info.dtype != "F32" or info.shape != (sum(lengths),):
        found = "is absent" if info is None else f"is {info.dtype} {list(info.shape)}"
        raise ValueError(f"tensor {name!r} {found}, expected F32 [{sum(lengths)}]")
    parts = np.split(file.array(name), np.cumsum(lengths)[:-1])
    return tuple(array("f", part.tobytes()) for part in parts)


def _tensor_name(seq: int) -> str:
    return f"ledger/logprobs/{seq}"
