"""One request from name to last token: loads, retries, losses, and a header that never lies."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mint_core import calls, clock
from mint_core.errors import (
    AdapterNotResident,
    BaseModelMismatch,
    BlobCorrupt,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    MintError,
    NotFound,
    ResourceExhausted,
    SignatureInvalid,
    SignatureRequired,
    Unavailable,
)
from mint_core.names import AliasName, BaseModelName, RevisionName
from mint_core.placement import placement_order
from mint_core.signing import Signature, Signer, TrustedKeys
from mint_inference.generation import Generation, GenerationLimits
from mint_inference.model import (
    AliasWord,
    Call,
    Consistency,
    Header,
    Replica,
    ReplicaState,
    Residency,
    Resolution,
    Scored,
    Started,
)
from mint_inference.resolver import Resolver, ResolverLimits
from mint_inference.router import Router
from mint_inference.usage import UsageCount, UsageMeter

BASE = "sha256:base"
ALIAS = AliasName("acme", "tone", "live")
CALL = Call(model=ALIAS, tenant="tenants/acme", prompt="prompt", sampling="sampling")


@dataclass(frozen=True)
class Piece:
    token_ids: tuple[int, ...] = (7,)
    finish_reason: int = 0


TEXT = [Piece(), Piece(), Piece((8,), 1)]


@dataclass
class FakeCatalog:
    """One alias, any replicas."""

    resolution: Resolution = field(
        default_factory=lambda: Resolution(
            base_digest=BASE, revision="tenants/acme/policies/tone/revisions/1", digest="sha256:1", catalog_revision=5
        )
    )
    replicas: list[Replica] = field(default_factory=list)
    num_asked: int = 0
    error: MintError | None = None

    async def resolve(
        self, name: AliasName | RevisionName, consistency: Consistency, *, timeout_s: float
    ) -> Resolution:
        self.num_asked += 1
        if self.error is not None:
            raise self.error
        return self.resolution

    async def watch_aliases(self, *, after: int) -> AsyncGenerator[AliasWord, None]:
        yield AliasWord(5)
        await asyncio.Event().wait()

    async def list_replicas(self, *, timeout_s: float) -> list[Replica]:
        if self.error is not None:
            raise self.error
        return self.replicas

    async def base_digest(self, name: BaseModelName, *, timeout_s: float) -> str:
        if str(name) != "baseModels/known":
            raise NotFound(f"{name} does not exist")
        return BASE


class FakeEngines:
    """Each replica has residents; the text of a stream is what the test says."""

    def __init__(self) -> None:
        self.residents: dict[str, set[str]] = {}
        self.text: list[Piece | MintError] = list(TEXT)
        self.before: dict[str, MintError] = {}
        self.num_asked = 0
        self.asked: list[tuple[str, str]] = []
        self.num_open = 0
        self.pause = asyncio.Event()
        self.pause.set()
        self.hung: set[str] = set()

    def check(self, replica: Replica, digest: str) -> None:
        self.num_asked += 1
        self.asked.append((replica.name, digest))
        if replica.name in self.before:
            raise self.before[replica.name]
        if digest and digest not in self.residents.setdefault(replica.name, set()):
            raise AdapterNotResident(f"{digest} is not resident")

    async def generate(self, replica: Replica, call: Call, digest: str) -> AsyncGenerator[Started | Piece, None]:
        if replica.name in self.hung:
            await asyncio.Event().wait()
        self.check(replica, digest)
        self.num_open += 1
        try:
            yield Started((1, 2))
            for piece in self.text:
                await self.pause.wait()
                if isinstance(piece, MintError):
                    raise piece
                yield piece
        finally:
            self.num_open -= 1

    async def score(self, replica: Replica, call: Call, digest: str) -> Scored:
        self.check(replica, digest)
        return Scored((1, 2, 3), (-0.5, -0.25))

    async def residency(self, replica: Replica, *, timeout_s: float) -> Residency:
        if replica.name in self.before:
            raise self.before[replica.name]
        return Residency(frozenset(self.residents.get(replica.name, ())), self.num_open)


class FakeLoaders:
    """Makes resident what it is asked for, unless told otherwise."""

    def __init__(self, engines: FakeEngines) -> None:
        self.engines = engines
        self.loaded: list[tuple[str, str, str]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.error: MintError | None = None
        self.num_lost_loads = 0

    async def ensure(self, replica: Replica, tenant: str, resolution: Resolution) -> bool:
        self.loaded.append((replica.name, tenant, resolution.digest))
        await self.go.wait()
        if self.error is not None:
            raise self.error
        residents = self.engines.residents.setdefault(replica.name, set())
        if resolution.digest in residents:
            return False
        if self.num_lost_loads:
            self.num_lost_loads -= 1  # another adapter pushed it out at once
        else:
            residents.add(resolution.digest)
        return True


def a_replica(name: str = "one", base: str = BASE, state: ReplicaState = ReplicaState.READY) -> Replica:
    return Replica(f"engineReplicas/{name}", f"{name}:1", f"{name}:2", "baseModels/smol", base, state, 1.0)


class Setting:
    def __init__(self, limits: GenerationLimits | None = None) -> None:
        self.catalog = FakeCatalog(replicas=[a_replica()])
        self.engines = FakeEngines()
        self.loaders = FakeLoaders(self.engines)
        self.resolver = Resolver(self.catalog, ResolverLimits())
        self.router = Router(self.catalog, poll_s=0.01)
        self.generation = Generation(
            self.catalog, self.resolver, self.router, self.engines, self.loaders, limits or GenerationLimits()
        )
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self.tasks = [asyncio.ensure_future(self.resolver.follow()), asyncio.ensure_future(self.router.follow())]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.resolver.close()
        await self.router.close()

    async def generate(self, call: Call = CALL) -> list[object]:
        return [part async for part in self.generation.generate(call)]

    async def failure(self, call: Call = CALL) -> tuple[list[object], MintError]:
        parts: list[object] = []
        try:
            async for part in self.generation.generate(call):
                parts.append(part)
        except MintError as error:
            return parts, error
        raise AssertionError("nothing was raised")


@pytest.fixture
async def at() -> AsyncIterator[Setting]:
    setting = Setting()
    await setting.start()
    yield setting
    await setting.stop()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - any condition
            await asyncio.sleep(0.002)


async def test_a_resident_adapter_costs_one_engine_call_and_nothing_else(at: Setting) -> None:
    at.engines.residents["engineReplicas/one"] = {"sha256:1"}
    await at.generate()
    at.catalog.num_asked = at.engines.num_asked = 0
    header, *chunks = await at.generate()
    assert isinstance(header, Header)
    assert (header.resolution.digest, header.replica, header.cold) == ("sha256:1", "engineReplicas/one", False)
    assert tuple(header.prompt_token_ids) == (1, 2)
    assert chunks == TEXT
    assert (at.catalog.num_asked, at.engines.num_asked, at.loaders.loaded) == (0, 1, [])


def says(at: Setting, replica: Replica, *digests: str) -> None:
    """The replica says what it holds, as of now."""
    at.router.note_residency(replica, Residency(frozenset(digests), 0), clock.monotonic_s())


async def test_an_engine_that_said_it_lacks_the_adapter_is_asked_once_its_loader_brought_it(at: Setting) -> None:
    says(at, at.catalog.replicas[0], "sha256:2")
    header = (await at.generate())[0]
    assert isinstance(header, Header)
    assert header.cold
    assert (at.engines.num_asked, len(at.loaders.loaded)) == (1, 1)


async def test_an_adapter_that_came_since_the_engine_said_what_it_holds_is_not_cold(at: Setting) -> None:
    says(at, at.catalog.replicas[0])
    at.engines.residents["engineReplicas/one"] = {"sha256:1"}
    header = (await at.generate())[0]
    assert isinstance(header, Header)
    assert not header.cold
    assert (at.engines.num_asked, len(at.loaders.loaded)) == (1, 1)


async def test_what_the_engine_holds_is_served_without_its_loader_whatever_was_believed(at: Setting) -> None:
    says(at, at.catalog.replicas[0])
    at.loaders.error = Unavailable("the loader is away")
    _, error = await at.failure()
    assert error is at.loaders.error
    assert (at.engines.num_asked, len(at.loaders.loaded)) == (1, 1)
    at.engines.residents["engineReplicas/one"] = {"sha256:1"}
    assert len(await at.generate()) == 1 + len(TEXT)


async def test_an_adapter_pushed_out_again_and_again_is_given_up_though_the_engine_says_so(at: Setting) -> None:
    at.loaders.num_lost_loads = 100
    says(at, at.catalog.replicas[0])
    _, error = await at.failure()
    assert "was loaded 4 times and pushed out" in error.message


async def test_a_load_at_a_replica_that_stops_answering_is_taken_elsewhere() -> None:
    at = Setting(GenerationLimits(start_s=0.05))
    at.catalog.replicas = [a_replica("one"), a_replica("two")]
    await at.start()
    await until(lambda: len(at.router.replicas) == 2)
    for replica in at.catalog.replicas:
        says(at, replica)
    at.loaders.go.clear()
    request = asyncio.ensure_future(at.generate())
    await until(lambda: at.loaders.loaded)
    hung = at.loaders.loaded[0][0]
    at.router.note_failed(next(each for each in at.catalog.replicas if each.name == hung))
    await until(lambda: len(at.loaders.loaded) == 2)
    at.loaders.go.set()
    header = (await request)[0]
    assert isinstance(header, Header)
    assert header.replica != hung
    await at.stop()


async def test_a_cold_adapter_is_loaded_first_and_the_header_says_so(at: Setting) -> None:
    header, *chunks = await at.generate()
    assert isinstance(header, Header)
    assert header.cold
    assert chunks == TEXT
    assert at.loaders.loaded == [("engineReplicas/one", "tenants/acme", "sha256:1")]


async def test_an_adapter_pushed_out_between_load_and_use_is_loaded_again(at: Setting) -> None:
    at.loaders.num_lost_loads = 2
    header, *_ = await at.generate()
    assert isinstance(header, Header)
    assert len(at.loaders.loaded) == 3


async def test_but_not_for_ever(at: Setting) -> None:
    at.loaders.num_lost_loads = 100
    parts, error = await at.failure()
    assert parts == []
    assert isinstance(error, Unavailable)
    assert "was loaded 4 times and pushed out" in error.message
    assert error.retry_after_s is not None
    assert len(at.loaders.loaded) == 4


async def test_the_header_does_not_wait_for_the_first_token(at: Setting) -> None:
    at.engines.residents["engineReplicas/one"] = {"sha256:1"}
    at.engines.pause.clear()
    parts = at.generation.generate(CALL)
    async with asyncio.timeout(1):
        assert isinstance(await anext(parts), Header)
    await parts.aclose()
    assert at.engines.num_open == 0


async def test_closing_the_stream_cancels_the_engine_and_frees_the_place(at: Setting) -> None:
    parts = at.generation.generate(CALL)
    await anext(parts)
    await anext(parts)
    assert (at.engines.num_open, at.generation.num_streams) == (1, 1)
    await parts.aclose()
    assert (at.engines.num_open, at.generation.num_streams) == (0, 0)


async def test_a_cancelled_client_cancels_the_engine(at: Setting) -> None:
    at.engines.pause.clear()
    running = asyncio.ensure_future(at.generate())
    await until(lambda: at.engines.num_open)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert (at.engines.num_open, at.generation.num_streams) == (0, 0)


@pytest.mark.parametrize(
    "end",
    [
        [Piece(), Unavailable("Socket closed")],
        [Piece(), Cancelled("RST_STREAM")],
        [Piece(), Internal("Received RST_STREAM with error code 2")],
        [Piece()],
    ],
)
async def test_a_replica_lost_in_mid_stream_is_told(at: Setting, end: list[Piece | MintError]) -> None:
    at.engines.text = end
    parts, error = await at.failure()
    assert isinstance(parts[0], Header)
    assert parts[1:] == [Piece()]
    assert isinstance(error, Unavailable)
    assert error.message.startswith("engineReplicas/one was lost after 1 tokens: ")
    assert error.metadata["engine_replica"] == "engineReplicas/one"


async def test_a_bug_of_the_engine_in_mid_stream_stays_one(at: Setting) -> None:
    at.engines.text = [Piece(), Internal("internal error 1f", metadata={"error_id": "1f"})]
    _, error = await at.failure()
    assert isinstance(error, Internal)


async def test_what_goes_wrong_after_the_last_chunk_is_no_error(at: Setting) -> None:
    at.engines.text = [*TEXT, Unavailable("connection closed")]
    assert (await at.generate())[1:] == TEXT


async def test_a_silent_engine_is_lost() -> None:
    at = Setting(GenerationLimits(silence_s=0.05))
    await at.start()
    at.engines.pause.clear()
    parts, error = await at.failure()
    assert len(parts) == 1
    assert isinstance(error, Unavailable)
    assert "it was silent" in error.message
    assert at.engines.num_open == 0
    await at.stop()


async def test_errors_before_the_first_token_are_relayed(at: Setting) -> None:
    at.engines.before["engineReplicas/one"] = InvalidArgument("the prompt has 9999 tokens", field="prompt")
    parts, error = await at.failure()
    assert parts == []
    assert isinstance(error, InvalidArgument)
    assert error.field == "prompt"


async def test_an_unknown_alias_asks_no_engine(at: Setting) -> None:
    at.catalog.error = NotFound("no such alias")
    _, error = await at.failure()
    assert isinstance(error, NotFound)
    assert at.engines.num_asked == 0


async def test_a_foreign_base_is_a_mismatch_and_the_resident_base_does_not_answer(at: Setting) -> None:
    at.catalog.resolution = replace(at.catalog.resolution, base_digest="sha256:foreign")
    _, error = await at.failure()
    assert isinstance(error, BaseModelMismatch)
    assert (error.metadata["expected"], error.metadata["actual"]) == ("sha256:foreign", BASE)
    assert at.engines.num_asked == 0


async def test_no_replica_at_all_is_unavailable(at: Setting) -> None:
    at.catalog.replicas = []
    await asyncio.sleep(0.05)
    _, error = await at.failure()
    assert isinstance(error, Unavailable)
    assert "is registered now" in error.message


async def test_a_replica_that_registers_this_moment_is_found() -> None:
    at = Setting()
    at.catalog.replicas = []
    at.router = Router(at.catalog, poll_s=1000)
    at.generation = Generation(at.catalog, at.resolver, at.router, at.engines, at.loaders, GenerationLimits())
    await at.start()
    at.catalog.replicas = [a_replica()]
    assert isinstance((await at.generate())[0], Header)
    await at.stop()


async def test_replicas_are_remembered_while_the_catalog_is_away(at: Setting) -> None:
    await at.generate()
    at.catalog.error = Unavailable("etcd away")
    await asyncio.sleep(0.05)
    assert isinstance((await at.generate())[0], Header)


async def test_a_draining_replica_is_not_asked(at: Setting) -> None:
    at.catalog.replicas = [a_replica("old", state=ReplicaState.DRAINING), a_replica("new")]
    await asyncio.sleep(0.05)
    await at.generate()
    assert {name for name, _ in at.engines.asked} == {"engineReplicas/new"}
    at.catalog.replicas = [a_replica("old", state=ReplicaState.DRAINING)]
    await asyncio.sleep(0.05)
    _, error = await at.failure()
    assert isinstance(error, Unavailable)
    assert "engineReplicas/old is draining" in error.message


async def test_a_dead_replica_is_passed_over(at: Setting) -> None:
    at.catalog.replicas = [a_replica("dead"), a_replica("alive")]
    at.engines.before["engineReplicas/dead"] = Unavailable("connection refused")
    await asyncio.sleep(0.05)
    for _ in range(10):
        header = (await at.generate())[0]
        assert isinstance(header, Header)
        assert header.replica == "engineReplicas/alive"


async def test_the_only_replica_being_dead_tells_its_own_reason(at: Setting) -> None:
    at.engines.before["engineReplicas/one"] = Unavailable("connection refused")
    _, error = await at.failure()
    assert error.message == "connection refused"
    assert at.engines.num_asked == 1


async def test_who_holds_the_adapter_is_asked_first_then_who_is_idle(at: Setting) -> None:
    at.catalog.replicas = [a_replica(name) for name in ("one", "two", "three")]
    await asyncio.sleep(0.05)
    await at.generate()
    (holder,) = {name for name, _, _ in at.loaders.loaded}
    for _ in range(5):
        header = (await at.generate())[0]
        assert isinstance(header, Header)
        assert header.replica == holder
    assert len(at.loaders.loaded) == 1
    streams = [at.generation.generate(replace(CALL, model=BaseModelName("smol"))) for _ in range(60)]
    headers = [await anext(stream) for stream in streams]
    served = Counter(header.replica for header in headers if isinstance(header, Header))
    assert len(served) == 3
    assert max(served.values()) <= 24  # of two choices the less busy one; one choice would leave it to luck
    for stream in streams:
        await stream.aclose()


async def test_a_restarted_engine_is_believed_to_be_empty(at: Setting) -> None:
    first, second = placement_order("sha256:1", [a_replica("one").name, a_replica("two").name])
    at.catalog.replicas = [replace(a_replica(), name=second)]
    await asyncio.sleep(0.05)
    await at.generate()
    at.catalog.replicas = [replace(a_replica(), name=name) for name in (first, second)]
    await asyncio.sleep(0.05)
    await at.generate()
    assert {name for name, _ in at.engines.asked} == {second}  # it holds it
    at.catalog.replicas = [replace(each, registered_at_s=2.0) for each in at.catalog.replicas]
    at.engines.residents.clear()
    at.engines.asked.clear()
    await asyncio.sleep(0.05)
    await at.generate()
    assert {name for name, _ in at.engines.asked} == {first}  # nobody holds it, so the first of its order is asked


async def test_the_base_is_asked_on_purpose_only(at: Setting) -> None:
    header, *_ = await at.generate(replace(CALL, model=BaseModelName("smol")))
    assert isinstance(header, Header)
    assert (header.resolution.revision, header.resolution.digest) == ("", "")
    assert header.resolution.base_digest == BASE
    assert at.engines.asked == [("engineReplicas/one", "")]
    assert at.catalog.num_asked == 0
    await at.generate(replace(CALL, model=BaseModelName("known")))
    _, error = await at.failure(replace(CALL, model=BaseModelName("nobody")))
    assert isinstance(error, NotFound)


async def test_too_many_requests_are_refused_with_a_hint() -> None:
    at = Setting(GenerationLimits(max_streams=2))
    await at.start()
    streams = [at.generation.generate(CALL) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    _, error = await at.failure()
    assert isinstance(error, ResourceExhausted)
    assert error.retry_after_s == 1.0
    await streams[0].aclose()
    await at.generate()
    await streams[1].aclose()
    await at.stop()


async def test_a_full_engine_is_waited_for(at: Setting) -> None:
    at.loaders.error = ResourceExhausted("every place is in use", retry_after_s=0.02)
    running = asyncio.ensure_future(at.generate())
    await until(lambda: len(at.loaders.loaded) >= 3)
    at.loaders.error = None
    assert isinstance((await running)[0], Header)


async def test_but_within_bounds() -> None:
    at = Setting(GenerationLimits(place_wait_s=0.1))
    await at.start()
    at.loaders.error = ResourceExhausted("every place is in use", retry_after_s=0.02)
    _, error = await at.failure()
    assert error.message == "every place is in use"
    at.loaders.error = ResourceExhausted("rank too high")
    at.loaders.loaded.clear()
    await at.failure()
    assert len(at.loaders.loaded) == 1  # waiting would not lower the rank
    await at.stop()


async def test_a_damaged_adapter_is_data_loss(at: Setting) -> None:
    at.loaders.error = BlobCorrupt("bad bytes")
    _, error = await at.failure()
    assert isinstance(error, BlobCorrupt)


async def test_an_adapter_that_does_not_fit_its_base_is_no_loss_of_data(at: Setting) -> None:
    at.loaders.error = InvalidArgument("not a packed adapter", field="layout")
    _, error = await at.failure()
    assert type(error) is FailedPrecondition
    assert "not a packed adapter" in error.message


async def test_a_missing_object_of_a_living_revision_is_data_loss(at: Setting) -> None:
    at.loaders.error = NotFound("no object")
    _, error = await at.failure()
    assert isinstance(error, BlobCorrupt)
    assert "is gone" in error.message


async def test_a_missing_object_of_a_revision_that_was_replaced_meanwhile_is_no_error(at: Setting) -> None:
    at.engines.residents["engineReplicas/one"] = {"sha256:1"}
    await at.generate()
    at.engines.residents.clear()
    at.loaders.error = NotFound("no object")
    at.catalog.resolution = replace(at.catalog.resolution, digest="sha256:2", catalog_revision=9)
    at.engines.residents["engineReplicas/one"] = {"sha256:2"}
    header, *_ = await at.generate()
    assert isinstance(header, Header)
    assert header.resolution.digest == "sha256:2"


async def test_a_load_that_takes_too_long_is_unavailable_unless_the_caller_is_out_of_time(at: Setting) -> None:
    at.loaders.error = DeadlineExceeded("did not reach tier HOST")
    _, error = await at.failure()
    assert isinstance(error, Unavailable)
    with calls.inbound_call("ada", 0.0):
        _, error = await at.failure()
    assert isinstance(error, DeadlineExceeded)


async def test_score_goes_the_same_way(at: Setting) -> None:
    header, scored = await at.generation.score(CALL)
    assert header.cold
    assert tuple(header.prompt_token_ids) == (1, 2, 3)
    assert tuple(scored.logprobs) == (-0.5, -0.25)
    assert at.generation.num_streams == 0


async def test_every_stream_names_the_revision_it_was_asked_by_while_the_alias_moves(at: Setting) -> None:
    """Two hundred streams, an alias that moves under them: the engine was asked by the digest of each header."""
    headers: list[tuple[str, str]] = []

    async def one(number: int) -> None:
        if number % 20 == 0:
            digest = f"sha256:{number}"
            at.catalog.resolution = replace(at.catalog.resolution, digest=digest, catalog_revision=5 + number)
        at.engines.num_asked = 0
        parts = at.generation.generate(replace(CALL, consistency=Consistency(strong=True)))
        async for part in parts:
            if isinstance(part, Header):
                headers.append((part.replica, part.resolution.digest))

    await asyncio.gather(*(one(number) for number in range(200)))
    assert len(headers) == 200
    assert set(headers) <= set(at.engines.asked)


async def test_what_an_engine_answers_is_counted_for_its_policy_and_nothing_else() -> None:
    at, kept = Setting(), _Kept()
    meter = UsageMeter(kept)
    limits = GenerationLimits()
    at.generation = Generation(at.catalog, at.resolver, at.router, at.engines, at.loaders, limits, meter)
    await at.start()
    await at.generate()
    await at.generation.score(CALL)
    await at.generate(replace(CALL, model=BaseModelName("smol")))
    parts = at.generation.generate(CALL)
    await anext(parts)
    await parts.aclose()
    at.engines.residents.clear()
    at.loaders.error = Unavailable("the loader is down; retry")
    await at.failure()
    assert await meter.report()
    (count,) = kept.counts
    num_tokens = sum(len(piece.token_ids) for piece in TEXT)
    assert (str(count.policy), count.num_requests) == (str(ALIAS.parent), 3)
    assert (count.num_prompt_tokens, count.num_generated_tokens) == (2 + 3 + 2, num_tokens)
    await at.stop()


class _Kept:
    """Keeps the last report."""

    counts: Sequence[UsageCount] = ()

    async def report(self, reporter: str, counts: Sequence[UsageCount]) -> None:
        self.counts = counts


async def test_a_full_engine_is_waited_for_though_another_one_is_away(at: Setting) -> None:
    at.catalog.replicas = [a_replica("full"), a_replica("away")]
    await asyncio.sleep(0.05)
    at.engines.before["engineReplicas/away"] = Unavailable("connection refused")
    at.loaders.error = ResourceExhausted("every place is in use", retry_after_s=0.02)
    running = asyncio.ensure_future(at.generate())
    await until(lambda: len(at.loaders.loaded) >= 3)
    at.loaders.error = None
    header = (await running)[0]
    assert isinstance(header, Header)
    assert header.replica == "engineReplicas/full"


@pytest.mark.parametrize("error", [Cancelled("RST_STREAM"), Internal("Received RST_STREAM with error code 2")])
async def test_a_replica_that_breaks_off_before_it_answers_is_passed_over(at: Setting, error: MintError) -> None:
    at.catalog.replicas = [a_replica("dead"), a_replica("alive")]
    at.engines.before["engineReplicas/dead"] = error
    await asyncio.sleep(0.05)
    for _ in range(4):
        header, _ = await at.generation.score(CALL)
        assert header.replica == "engineReplicas/alive"
    assert sum(name == "engineReplicas/dead" for name, _ in at.engines.asked) <= 1


async def test_a_replica_that_accepts_nothing_is_passed_over_in_time() -> None:
    at = Setting(GenerationLimits(start_s=0.05, silence_s=1000))
    first, second = placement_order("sha256:1", ["engineReplicas/one", "engineReplicas/two"])
    at.catalog.replicas = [replace(a_replica(), name=name) for name in (first, second)]
    at.engines.hung.add(first)
    await at.start()
    header = (await at.generate())[0]
    assert isinstance(header, Header)
    assert header.replica == second
    assert at.router.is_suspect(replace(a_replica(), name=first))
    await at.stop()


async def test_a_stream_of_a_replica_whose_registration_ended_waits_less() -> None:
    at = Setting(GenerationLimits(silence_s=1000, gone_silence_s=0.05))
    await at.start()
    at.engines.pause.clear()
    parts = at.generation.generate(CALL)
    await anext(parts)
    waiting = asyncio.ensure_future(anext(parts))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    at.catalog.replicas = []
    with pytest.raises(Unavailable, match=r"engineReplicas/one was lost after 0 tokens: it was silent for 0.05 s"):
        await waiting
    assert at.engines.num_open == 0
    await at.stop()


async def test_and_goes_on_as_long_as_it_speaks() -> None:
    at = Setting(GenerationLimits(silence_s=1000, gone_silence_s=0.5))
    await at.start()
    parts = at.generation.generate(CALL)
    await anext(parts)
    at.catalog.replicas = []
    await asyncio.sleep(0.05)
    assert [part async for part in parts] == TEXT
    await at.stop()


async def test_a_lost_replica_is_asked_last(at: Setting) -> None:
    first, second = placement_order("sha256:1", ["engineReplicas/one", "engineReplicas/two"])
    at.catalog.replicas = [replace(a_replica(), name=name) for name in (first, second)]
    await asyncio.sleep(0.05)
    at.engines.text = [Piece(), Unavailable("Socket closed")]
    _, error = await at.failure()
    assert error.metadata["engine_replica"] == first
    at.engines.text = TEXT
    header = (await at.generate())[0]
    assert isinstance(header, Header)
    assert header.replica == second


@pytest.mark.parametrize("signed_for", [None, "acme", "other"])
async def test_a_resident_adapter_serves_a_tenant_that_demands_signatures_only_signed(
    at: Setting, signed_for: str | None
) -> None:
    await at.generate()  # another tenant's request, say, brought the same bytes into the engine
    key = Ed25519PrivateKey.generate()
    signer = Signer(key)
    signature: Signature | None = None
    if signed_for is not None:
        signature = signer.sign(signed_for, at.catalog.resolution.digest, BASE)
    at.catalog.resolution = replace(at.catalog.resolution, signature=signature)
    at.generation = Generation(
        at.catalog,
        Resolver(at.catalog, ResolverLimits()),
        at.router,
        at.engines,
        at.loaders,
        GenerationLimits(),
        trusted=TrustedKeys({"acme": [key.public_key()]}),
    )
    if signed_for == "acme":
        assert isinstance((await at.generate())[0], Header)
        return
    parts, error = await at.failure()
    assert not parts
    assert isinstance(error, SignatureRequired if signed_for is None else SignatureInvalid)


async def test_a_replica_that_is_ready_again_is_found_when_the_others_failed() -> None:
    at = Setting()
    at.router = Router(at.catalog, poll_s=1000)
    at.generation = Generation(at.catalog, at.resolver, at.router, at.engines, at.loaders, GenerationLimits())
    at.catalog.replicas = [a_replica("one"), a_replica("two", state=ReplicaState.DRAINING)]
    at.engines.before["engineReplicas/one"] = Unavailable("draining")
    await at.start()
    at.catalog.replicas = [a_replica("one"), a_replica("two")]
    header = (await at.generate())[0]
    assert isinstance(header, Header)
    assert header.replica == "engineReplicas/two"
    await at.stop()
