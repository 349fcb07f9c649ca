"""Which steps of a session have run: order and idempotency by ``seq``."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from mint_core.errors import InvalidArgument, NotFound, RequestIdReused, WrongState
from mint_trainer.session import StepResult

__all__ = ["LedgerContents", "RecordedStep", "StepLedger"]


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A step that ran."""

    payload_digest: bytes
    """Of everything that was asked for, without the session's name."""
    result: StepResult


@dataclass(frozen=True, slots=True)
class LedgerContents:
    """What a ledger knows, apart from whose it is; of a fresh one, nothing."""

    next_seq: int = 1
    """What the next new step must carry."""
    recorded: tuple[RecordedStep, ...] = ()
    """The newest steps in the order in which they ran; the last of them carried ``next_seq - 1``."""


class StepLedger:
    """Steps carry seq 1, 2, 3, …; a seq is used up by success only, so a failed step is repeated under the same seq.

    The results of the last ``num_kept`` steps are kept for callers whose answer was lost. A session made from a saved
    state goes on with the ``contents`` that were saved.
    """

    def __init__(self, session: str, num_kept: int, contents: LedgerContents | None = None) -> None:
        contents = contents or LedgerContents()
        self._session = session
        self._num_kept = num_kept
        self._recorded = OrderedDict(enumerate(contents.recorded, start=contents.next_seq - len(contents.recorded)))
        self.next_seq = contents.next_seq
        """What the next new step must carry."""
        self._forget_old()

    @property
    def contents(self) -> LedgerContents:
        """What to save."""
        return LedgerContents(self.next_seq, tuple(self._recorded.values()))

    def result_of(self, seq: int, payload_digest: bytes) -> StepResult | None:
        """The stored result if ``seq`` has run with this payload, ``None`` if it is the next to run; otherwise raises.

        Errors: :class:`WrongState` for a gap or a result no longer kept, :class:`RequestIdReused` for another payload.
        """
        if seq < 1:
            raise InvalidArgument(f"seq is {seq}: steps of a session carry 1, 2, 3, …", field="seq")
        if seq == self.next_seq:
            return None
        if seq > self.next_seq:
            raise WrongState(
                f"seq is {seq} but the next step of {self._session} is {self.next_seq}; "
                "steps run in order, and a failed step is repeated under its own seq",
                metadata=self._metadata(),
            )
        recorded = self._recorded.get(seq)
        if recorded is None:
            raise WrongState(
                f"seq {seq} of {self._session} has run, and its result is not kept any more "
                f"(the last {self._num_kept} are); the next step is {self.next_seq}",
                metadata=self._metadata(),
            )
        if recorded.payload_digest != payload_digest:
            raise RequestIdReused(
                f"seq {seq} of {self._session} has run with another payload; the next step is {self.next_seq}",
                metadata=self._metadata(),
            )
        return recorded.result

    def record(self, seq: int, payload_digest: bytes, result: StepResult) -> None:
        """Note that ``seq``, which is the next one, has run."""
        self._recorded[seq] = RecordedStep(payload_digest, result)
        self.next_seq = seq + 1
        self._forget_old()

    def kept(self, seq: int) -> StepResult:
        """The result of a step that ran; :class:`NotFound` if it has not run or is not kept."""
        recorded = self._recorded.get(seq)
        if recorded is None:
            raise NotFound(
                f"{self._session}/steps/{seq} has no stored result: the next step is {self.next_seq}, "
                f"and the results of the last {self._num_kept} are kept",
                metadata={"resource": f"{self._session}/steps/{seq}"},
            )
        return recorded.result

    def _forget_old(self) -> None:
        while len(self._recorded) > self._num_kept:
            self._recorded.popitem(last=False)

    def _metadata(self) -> dict[str, str]:
        return {"resource": self._session, "next_seq": str(self.next_seq)}
