"""kill -9 of every process at every phase of a GRPO step: the run ends as planned, and no revision is published twice.

A blow falls at a failpoint. A process that has one inside the phase is killed there; for the others somebody is made to
stand still at the phase's point, the victim is killed, and work goes on into a phase whose partner has just died.
The supervisor restarts the dead.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest

from mint_api.v1 import run_service_pb2
from mint_client import MintClient
from support.conductor import Conductor, Held
from support.grpo_runs import check_ended, grpo_recipe, history, start_grpo
from support.stack import Stack

PROCESSES = ("runs", "trainer", "engine", "loader", "exporter", "catalog")


@dataclass(frozen=True)
class Phase:
    """Where blows fall in one phase of a step."""

    point: str
    """Somebody stands still here while another process is killed."""
    own: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Points at which these processes are killed in their own work instead."""

    def point_of(self, process: str) -> str:
        return self.own.get(process, self.point)


PHASES: Mapping[str, Phase] = MappingProxyType(
    {
        "sample": Phase("runs.sampling", {"engine": "engine.generating"}),
        "score": Phase("runs.sampled", {"runs": "runs.scored"}),
        "persist": Phase("runs.scored", {"runs": "runs.persisted"}),
        "update": Phase("runs.persisted", {"runs": "runs.stepped", "trainer": "trainer.step_computed"}),
        "save": Phase("runs.stepped", {"runs": "runs.saved", "trainer": "trainer.optimizer_stored"}),
        "export": Phase("exporter.packed", {"exporter": "exporter.uploaded", "runs": "runs.committed"}),
        "publish": Phase(
            "catalog.publish.before", {"catalog": "catalog.publish.after", "exporter": "exporter.published"}
        ),
        "promote": Phase("catalog.alias.before", {"catalog": "catalog.alias.after", "runs": "runs.promoted"}),
        "load": Phase("loader.loading", {"loader": "loader.loaded", "engine": "engine.loaded", "runs": "runs.loaded"}),
    }
)
STEP_DONE = "runs.promoted"

DIAGONAL = (
    ("sample", "engine"),
    ("score", "runs"),
    ("persist", "runs"),
    ("update", "trainer"),
    ("save", "trainer"),
    ("export", "exporter"),
    ("publish", "catalog"),
    ("promote", "catalog"),
    ("load", "loader"),
)
"""Every phase and every process once at least."""

NUM_SPARE_STEPS = 3
BLOW_TIMEOUT_S = 300.0
"""A busy machine takes minutes to start an engine."""


class Table:
    """What became of each blow."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, str], str] = {}

    def note(self, phase: str, process: str, outcome: str) -> None:
        self._cells[phase, process] = outcome

    def lines(self) -> Iterator[str]:
        yield "seconds from kill -9 to the end of the step (phase of the step, process killed)"
        yield f"{'':10}" + "".join(f"{process:>10}" for process in PROCESSES)
        for phase in PHASES:
            yield f"{phase:10}" + "".join(f"{self._cells.get((phase, process), '.'):>10}" for process in PROCESSES)


@pytest.fixture(scope="module")
def table(report: Callable[[str], None]) -> Iterator[Table]:
    """Shown at the end, whatever happened."""
    table = Table()
    yield table
    for line in table.lines():
        report(line)


class Striker:
    """Kills processes in the middle of one run's steps."""

    def __init__(self, stack: Stack, conductor: Conductor, client: MintClient, run: run_service_pb2.Run) -> None:
        self._stack = stack
        self._conductor = conductor
        self._client = client
        self._run = run

    async def strike(self, phase: str, process: str) -> float:
        """Kill ``process`` in the next ``phase``; seconds until a step was completed after that."""
        held = await self._hold(PHASES[phase].point_of(process))
        killed_at_s = time.monotonic()
        if held.service == process:
            pid = held.pid
            held.kill()
        else:
            pid = await self._stack.kill(process)
            held.go_on()
        done = await self._hold(STEP_DONE)
        taken_s = time.monotonic() - killed_at_s
        done.go_on()
        await self._stack.wait_restarted(process, pid)
        return taken_s

    async def _hold(self, point: str) -> Held:
        """Whoever stands still at ``point`` next. Raises AssertionError if the run ends first or gets nowhere."""
        ended = asyncio.ensure_future(self._client.runs.wait(self._run.name))
        held = asyncio.ensure_future(self._conductor.hold(point, timeout_s=BLOW_TIMEOUT_S))
        try:
            await asyncio.wait({ended, held}, return_when=asyncio.FIRST_COMPLETED)
            if held.done():
                return held.result()
            run = ended.result()
            state = run_service_pb2.RunState.Name(run.state)
            raise AssertionError(f"{state} before anybody came to {point}: {run.error}\n{history(run)}")
        except TimeoutError as error:
            run = await self._client.runs.get(self._run.name)
            raise AssertionError(f"{error}\n{history(run)}\n{self._stack.tail()}") from None
        finally:
            for waiting in (ended, held):
                waiting.cancel()
            await asyncio.gather(ended, held, return_exceptions=True)


async def strike_one_run(
    stack: Stack, conductor: Conductor, work: Path, table: Table, blows: Sequence[tuple[str, str]]
) -> None:
    """A run that takes all ``blows``, one in each step, and what must be true of it afterwards."""
    async with stack.client() as client:
        run = await start_grpo(stack, client, work, grpo_recipe(len(blows) + NUM_SPARE_STEPS))
        striker = Striker(stack, conductor, client, run)
        try:
            for phase, process in blows:
                table.note(phase, process, "failed")
                table.note(phase, process, f"{await striker.strike(phase, process):.1f}")
            async with asyncio.timeout(BLOW_TIMEOUT_S):
                run = await client.runs.wait(run.name)
        except BaseException:
            await client.runs.cancel(run.name)  # or it would take the blows that are meant for the next run
            raise
        await stack.wait_healthy()
        await check_ended(stack, client, run)


@pytest.mark.timeout(600)
async def test_a_run_survives_a_death_in_every_phase_and_of_every_process(
    armed_stack: Stack, conductor: Conductor, work: Path, table: Table
) -> None:
    await strike_one_run(armed_stack, conductor, work, table, DIAGONAL)


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("phase", PHASES)
async def test_a_run_survives_the_death_of_every_process_in(
    armed_stack: Stack, conductor: Conductor, work: Path, table: Table, phase: str
) -> None:
    await strike_one_run(armed_stack, conductor, work, table, [(phase, process) for process in PROCESSES])
