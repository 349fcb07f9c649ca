"""Does a download by parallel ranges beat a single stream? ``python -m bench.download --help``

One SeaweedFS on this machine holds one blob. The loader's own client brings it to a file, checked against its digest
and synced, once by a single request and once by ranges; interleaved, each time into a new file, over connections that
are open. Twice: straight from the server, which shares the machine's cores with the client, and through a proxy that
limits each connection, as object stores and long ways do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import psutil

from bench.support.report import Report, Target
from bench.support.timing import interleaved
from mint_blobs import ObjectStoreSettings, blob_key
from mint_blobs.digests import digest_file
from mint_blobs.s3 import S3ObjectStore
from support.children import dying_with_parent
from support.weed import running_weed

TARGETS: Final = {"ranged_over_single": Target(at_least=2.0), "ranged_over_single_limited": Target(at_least=2.0)}
_MB: Final = 1_000_000
_TESTS: Final = str(Path(__file__).resolve().parents[1] / "tests")
_SINGLE: Final = {"range_size_bytes": 1 << 40, "max_concurrency": 1}


class Bench:
    """One run over one blob."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        self.reps: int = options.reps
        self.size_bytes: int = options.size_mb << 20
        self.mb_per_s: float = options.mb_per_s
        self.report = Report("download", vars(options), TARGETS)

    async def run(self, settings: ObjectStoreSettings) -> None:
        source = self.folder / "source"
        with source.open("wb") as file:
            for _ in range(self.size_bytes >> 20):
                file.write(secrets.token_bytes(1 << 20))
        digest = await digest_file(source)
        key = blob_key("acme", digest, "stage-1")
        async with S3ObjectStore(settings) as store:
            await store.ensure_bucket()
            await store.put_file(key, source, digest=digest)
            small = secrets.token_bytes(1 << 10)
            small_digest = f"sha256:{hashlib.sha256(small).hexdigest()}"
            small_key = blob_key("acme", small_digest, "stage-1")
            await store.put_bytes(small_key, small)
            await self._fixed_cost(store, small_key, small_digest, len(small))
        direct = await self._compare("", settings, key, digest)
        async with _limited(settings.endpoint_url, self.mb_per_s) as url:
            limited = await self._compare("_limited", settings.model_copy(update={"endpoint_url": url}), key, digest)
        self.report.detail("write_and_sync_mb_per_s", self._rate(await self._locally(source)))
        self.report.detail("digest_mb_per_s", self._rate(await _timed(lambda: digest_file(source))))
        self.report.figure("ranged_over_single", direct)
        self.report.figure("ranged_over_single_limited", limited)
        self.report.finish()

    async def _compare(self, name: str, settings: ObjectStoreSettings, key: str, digest: str) -> float:
        async with (
            S3ObjectStore(settings.model_copy(update=_SINGLE)) as single,
            S3ObjectStore(settings) as ranged,
        ):
            busy: dict[str, list[float]] = {"single": [], "ranged": []}

            def getting(way: str, store: S3ObjectStore) -> Callable[[int], Awaitable[float]]:
                async def get(_: int) -> float:
                    before = _busy_s()
                    taken = await self._get(store, key, digest, self.size_bytes)
                    busy[way].append((_busy_s() - before) / taken)
                    return taken

                return get

            ways = {"single": getting("single", single), "ranged": getting("ranged", ranged)}
            await interleaved(ways, 1)  # connections, page cache
            taken = await interleaved(ways, self.reps)
        for way, each in taken.items():
            self.report.detail(f"{way}{name}_mb_per_s", self._rate(statistics.median(each)))
            self.report.detail(f"{way}{name}_busy_cores", statistics.median(busy[way]))
        pairs = zip(taken["single"], taken["ranged"], strict=True)
        return statistics.median(single_s / ranged_s for single_s, ranged_s in pairs)

    async def _get(self, store: S3ObjectStore, key: str, digest: str, size_bytes: int) -> float:
        target = self.folder / "target"
        taken = await _timed(lambda: store.get_file(key, target, digest=digest, size_bytes=size_bytes))
        target.unlink()
        return taken

    async def _fixed_cost(self, store: S3ObjectStore, key: str, digest: str, size_bytes: int) -> None:
        taken = [await self._get(store, key, digest, size_bytes) for _ in range(max(20, self.reps))]
        self.report.detail("small_ms", 1000 * statistics.median(taken))

    async def _locally(self, source: Path) -> float:
        def copy() -> None:
            with source.open("rb") as file, (self.folder / "copy").open("wb") as target:
                while data := file.read(1 << 20):
                    target.write(data)
                target.flush()
                os.fsync(target.fileno())

        taken = await _timed(lambda: asyncio.to_thread(copy))
        (self.folder / "copy").unlink()
        return taken

    def _rate(self, seconds: float) -> float:
        return self.size_bytes / _MB / seconds


async def _timed(call: Callable[[], Awaitable[object]]) -> float:
    begun = time.perf_counter()
    await call()
    return time.perf_counter() - begun


def _busy_s() -> float:
    """Seconds that the machine's cores have worked, whoever for."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


@contextlib.asynccontextmanager
async def _limited(url: str, mb_per_s: float) -> AsyncIterator[str]:
    command = dying_with_parent([sys.executable, "-m", "support.fault_proxy", url, f"--mb-per-s={mb_per_s}"])
    environ = os.environ | {"PYTHONPATH": _TESTS}
    proxy = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environ)
    try:
        assert proxy.stdout is not None
        yield (await proxy.stdout.readline()).decode().strip()
    finally:
        proxy.kill()
        await proxy.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=256, help="size of the blob, in MiB")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--mb-per-s", type=float, default=25.0, help="limit of one connection, where there is one")
    options = parser.parse_args()
    with running_weed() as weed, tempfile.TemporaryDirectory(prefix="mint-bench-") as folder:
        asyncio.run(Bench(options, Path(folder)).run(weed.settings()))


if __name__ == "__main__":
    main()
