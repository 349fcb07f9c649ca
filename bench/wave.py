"""A thousand policies active at once: what do they cost against the base alone? ``python -m bench.wave --help``

One node of MinT (loader, engine, inference, with catalog, etcd and object store behind) serves policies, each with an
adapter of its own, and the same requests on the base alone. Blocks of requests are made in turns: base, policies by
Zipf's law, policies uniformly, and SGLang by itself with the same adapters. Then requests come by a Poisson process.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import warnings
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import uvloop

from bench.support.asking import Answer, Ask, Asked, Request, at_a_time, when_due
from bench.support.bases import NARROW, WIDE, make_base
from bench.support.clients import clients_of
from bench.support.cold_steps import loader_status
from bench.support.json_child import JsonChild
from bench.support.population import BASE, TENANT, alias_name, import_policies, store_blobs
from bench.support.random_adapters import RandomAdapters
from bench.support.report import Report, Target
from bench.support.serving import Serving
from bench.support.timing import quantile
from mint_api.runtime.v1 import loader_service_pb2
from mint_api.v1 import common_pb2, inference_service_pb2
from mint_api.v1 import policy_service_pb2 as policy_pb
from mint_blobs.s3 import S3ObjectStore
from mint_cli.model import fetch_model
from mint_client import MintClient
from mint_core.base_model import digest_of_folder

TARGETS: Final = {
    "zipf_throughput_ratio": Target(at_least=0.6),
    "uniform_throughput_ratio": Target(at_least=0.5),
    "ttft_p99_over_base": Target(at_most=3),
    "num_errors": Target(at_most=0),
}
_SHAPES: Final = {"wide": WIDE, "narrow": NARROW}
_SHOWN: Final = 5


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.num: int = options.policies
        self.report = Report("wave", {key: each for key, each in vars(options).items() if key != "dir"}, TARGETS)
        self.random = np.random.default_rng(options.seed)
        base = fetch_model().folder if options.base == "smollm2" else make_base(_SHAPES[options.base])
        self.adapters = RandomAdapters(base, folder, rank=options.rank, deviation=0.02, seed=options.seed)
        self.serving = Serving(folder / "installation", base, BASE)
        self.blobs: list[common_pb2.BlobRef] = []
        self.log = folder / "bare_sglang.log"
        self.client: MintClient
        self.sampling = inference_service_pb2.SamplingParams(max_new_tokens=options.tokens, ignore_eos=True)
        self.engine: dict[str, Any] = {
            "dtype": "bfloat16",
            "max_lora_rank": options.rank,
            "num_slots": options.slots,
            "max_loaded_adapters": options.loaded,
            "max_running_requests": 64,
            "mixed_prefill": options.mixed,
            "slot_turn_passes": options.turn,
        }
        self.errors: list[str] = []

    async def run(self) -> None:
        async with self.serving.storage():
            await self._populate()
            threads = self.options.threads
            async with self.serving.node(engine={"num_threads": threads, "sglang": self.engine}) as client:
                self.client = client
                await self._warm_up()
                base_per_s = await self._closed_loop()
                await self._open_loop(base_per_s)
        self.report.figure("num_errors", len(self.errors))
        for error in self.errors[:_SHOWN]:
            self.report.say(f"    {error}")
        self.report.finish()

    async def _populate(self) -> None:
        report = self.report
        report.say(f"{self.num} policies on {self.serving.base.name}, {self.adapters.size_bytes / 1e6:.1f} MB each")
        async with clients_of(self.serving.catalog) as clients, S3ObjectStore(self.serving.store_settings) as store:
            self.blobs = await store_blobs(
                clients.public,
                clients.runtime,
                store,
                self.num,
                make=self.adapters.blob,
                base_digest=digest_of_folder(self.serving.base).digest,
                read_back=False,
            )
            await import_policies(clients.public, range(self.num), self.blobs, adjust=self._describe)

    def _describe(self, request: policy_pb.CreatePolicyRequest) -> None:
        request.policy.lora.rank, request.policy.lora.alpha = self.adapters.rank, 2 * self.adapters.rank
        request.policy.lora.target_modules[:] = sorted({each.rpartition(".")[2] for each in self.adapters.modules})
        for revision in request.revisions:
            revision.num_tensors = self.adapters.num_tensors

    async def _warm_up(self) -> None:
        """Every policy is asked once, by Zipf's ranks from the last to the first: the disk has them all, and the engine
        what it would have."""
        self.report.say("each policy is asked once")
        order = range(self.num - 1, -1, -1)
        asked = await at_a_time(self._policy, [Request(number, self._prompt()) for number in order], 4)
        self._note(asked)
        self.report.detail("cold_request_p50_ms", asked.first_token_ms(0.5))

    async def _closed_loop(self) -> float:
        """Requests per second on the base."""
        options = self.options
        bare = JsonChild("bench.support.bare_sglang", self.log)
        if options.bare:
            await bare.start()
            await bare.ask("start", **self._bare_arguments())
        per_s: dict[str, list[float]] = {}
        asked: dict[str, list[Asked]] = {}
        before = await loader_status(self.serving)
        num_each = -(-options.requests // options.reps)
        for rep in range(options.reps):
            prompts = [self._prompt() for _ in range(num_each)]
            zipf = [Request(*each) for each in zip(self._zipf(num_each), prompts, strict=True)]
            uniform = [Request(*each) for each in zip(self._uniform(num_each), prompts, strict=True)]
            blocks: dict[str, tuple[Ask, Sequence[Request]]] = {
                "base": (self._base, zipf),
                "zipf": (self._policy, zipf),
                "uniform": (self._policy, uniform),
            }
            for name, (ask, requests) in blocks.items():
                done = await at_a_time(ask, requests, options.callers)
                self._note(done)
                per_s.setdefault(name, []).append(done.per_s)
                asked.setdefault(name, []).append(done)
            if options.bare:
                answer = await bare.ask(
                    "ask",
                    requests=[(each.policy, each.prompt) for each in zipf],
                    num_new_tokens=options.tokens,
                    num_callers=options.callers,
                )
                done = Asked(**answer)
                per_s.setdefault("bare_zipf", []).append(done.per_s)
                asked.setdefault("bare_zipf", []).append(done)
            told = ", ".join(f"{name} {values[-1]:.2f}" for name, values in per_s.items())
            self.report.say(f"    block {rep + 1} of {options.reps}, requests/s: {told}")
            self.serving.check()
        if options.bare:
            await bare.ask("stop")
            await bare.stop()
        self._closed_figures(per_s, asked, before, await loader_status(self.serving))
        return statistics.median(per_s["base"])

    def _closed_figures(
        self,
        per_s: dict[str, list[float]],
        asked: dict[str, list[Asked]],
        before: loader_service_pb2.GetLoaderStatusResponse,
        after: loader_service_pb2.GetLoaderStatusResponse,
    ) -> None:
        report = self.report

        def ratio(one: str, other: str) -> float:
            return statistics.median(a / b for a, b in zip(per_s[one], per_s[other], strict=True))

        report.figure("num_policies", self.num)
        report.figure("num_requests", sum(each.num_requests for name in ("zipf", "uniform") for each in asked[name]))
        report.figure("zipf_throughput_ratio", ratio("zipf", "base"))
        report.figure("uniform_throughput_ratio", ratio("uniform", "base"))
        if "bare_zipf" in per_s:
            report.figure("vs_bare_sglang", ratio("zipf", "bare_zipf"))
            report.detail("bare_num_errors", sum(len(each.errors) for each in asked["bare_zipf"]))
            for error in list(itertools.chain(*(each.errors for each in asked["bare_zipf"])))[:_SHOWN]:
                report.say(f"    bare SGLang: {error}")
        for name, values in per_s.items():
            report.detail(f"{name}_requests_per_s", statistics.median(values))
            firsts = sorted(each for block in asked[name] for each in block.first_token_s)
            report.detail(f"{name}_ttft_p50_ms", firsts[len(firsts) // 2] * 1e3)
            report.detail(f"{name}_ttft_p99_ms", firsts[int(0.99 * len(firsts))] * 1e3)
        for name in ("zipf", "uniform"):
            num = sum(each.num_requests for each in asked[name])
            report.detail(f"{name}_engine_hit_rate", 1 - sum(each.num_cold for each in asked[name]) / num)
        for one, other in zip(after.tiers, before.tiers, strict=True):
            hits, misses = one.num_hits - other.num_hits, one.num_misses - other.num_misses
            tier = loader_service_pb2.Tier.Name(one.tier).removeprefix("TIER_").lower()
            report.detail(f"loader_{tier}_hits", hits)
            report.detail(f"loader_{tier}_misses", misses)

    async def _open_loop(self, base_per_s: float) -> None:
        """The same requests, due at the same moments, on the base and on policies by Zipf's law, in turns."""
        options, report = self.options, self.report
        rate = options.load * base_per_s
        report.say(f"open loop at {rate:.2f} requests/s")
        num_each = -(-options.open_requests // options.open_reps)
        ratios: list[float] = []
        taken: dict[str, list[Asked]] = {"base": [], "zipf": []}
        for _ in range(options.open_reps):
            requests = [Request(number, self._prompt()) for number in self._zipf(num_each)]
            due_s = np.cumsum(self.random.exponential(1 / rate, num_each)).tolist()
            for name, ask in (("base", self._base), ("zipf", self._policy)):
                asked = await when_due(ask, requests, due_s)
                self._note(asked)
                taken[name].append(asked)
            p99s = {name: each[-1].first_token_ms(0.99) for name, each in taken.items()}
            ratios.append(p99s["zipf"] / p99s["base"])
            report.say(f"    p99 to the first token: base {p99s['base']:.0f} ms, policies {p99s['zipf']:.0f} ms")
        report.figure("ttft_p99_over_base", statistics.median(ratios))
        report.detail("open_rate_per_s", rate)
        for name, each in taken.items():
            report.detail(f"open_{name}_num_requests", sum(one.num_requests for one in each))
            for q in (50, 99):
                value = statistics.median(one.first_token_ms(q / 100) for one in each)
                report.detail(f"open_{name}_ttft_p{q}_ms", value)
                # What those pay who leave their slots to others.
                value = statistics.median(quantile(one.last_token_s, q / 100) for one in each)
                report.detail(f"open_{name}_last_token_p{q}_ms", value * 1e3)
            value = statistics.median(quantile(one.longest_pause_s, 0.99) for one in each)
            report.detail(f"open_{name}_longest_pause_p99_ms", value * 1e3)
        self._crowd_figures(taken["zipf"])

    def _crowd_figures(self, taken: list[Asked]) -> None:
        """What a request waits that comes while as many other policies are under way as there are slots."""
        pairs = [pair for one in taken for pair in zip(one.num_others, one.first_token_s, strict=True)]
        crowded = [first_s for num_others, first_s in pairs if num_others >= self.options.slots]
        other = [first_s for num_others, first_s in pairs if num_others < self.options.slots]
        self.report.detail("open_zipf_crowded_fraction", len(crowded) / len(pairs))
        for name, firsts in (("crowded", crowded), ("uncrowded", other)):
            if firsts:
                self.report.detail(f"open_zipf_{name}_ttft_p99_ms", quantile(firsts, 0.99) * 1e3)

    async def _base(self, request: Request) -> AsyncIterator[Answer]:
        async for answer in self._generate(BASE, request.prompt, tenant=TENANT):
            yield answer

    async def _policy(self, request: Request) -> AsyncIterator[Answer]:
        digest = self.blobs[request.policy].digest
        async for answer in self._generate(alias_name(request.policy), request.prompt, digest=digest):
            yield answer

    async def _generate(
        self, model: str, prompt: list[int], *, digest: str = "", tenant: str = ""
    ) -> AsyncIterator[Answer]:
        async for response in self.client.generate(model, prompt, sampling=self.sampling, tenant=tenant):
            if response.WhichOneof("content") == "chunk":
                yield Answer(len(response.chunk.token_ids))
                continue
            if response.header.resolution.blob.digest != digest:
                raise RuntimeError(f"{model} is answered by {response.header.resolution.blob.digest}, not {digest}")
            yield Answer(0, is_cold=response.header.cold)

    def _bare_arguments(self) -> dict[str, Any]:
        """The loader's own folders: the same files in the same page cache."""
        folders = []
        for blob in self.blobs:
            found = [each for each in self.serving.cache_dir.iterdir() if blob.digest.rpartition(":")[2] in each.name]
            if len(found) != 1:
                raise RuntimeError(f"{blob.digest} is in {len(found)} folders of {self.serving.cache_dir}")
            folders.append(str(found[0]))
        return {
            "base": str(self.serving.base),
            "folders": folders,
            "settings": self.engine,
            "num_threads": self.options.threads,
        }

    def _prompt(self) -> list[int]:
        tokens: list[int] = self.random.integers(3, 384, self.options.prompt).tolist()
        return tokens

    def _zipf(self, num: int) -> list[int]:
        weights = 1 / np.arange(1, self.num + 1, dtype=np.float64) ** self.options.zipf
        numbers: list[int] = self.random.choice(self.num, num, p=weights / weights.sum()).tolist()
        return numbers

    def _uniform(self, num: int) -> list[int]:
        numbers: list[int] = self.random.integers(0, self.num, num).tolist()
        return numbers

    def _note(self, asked: Asked) -> None:
        self.errors.extend(asked.errors)


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.wave", description=__doc__)
    parser.add_argument("--policies", type=int, default=1000, help="each with an adapter of its own")
    parser.add_argument("--requests", type=int, default=5000, help="of each kind, closed loop")
    parser.add_argument("--reps", type=int, default=5, help="blocks of each kind, in turns")
    parser.add_argument("--open-requests", type=int, default=3000, help="of each kind, open loop")
    parser.add_argument("--open-reps", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.7, help="open loop: share of the base's capacity")
    parser.add_argument("--callers", type=int, default=16, help="closed loop: requests in flight")
    parser.add_argument("--slots", type=int, default=16, help="adapters in one batch")
    parser.add_argument("--turn", type=int, default=4, help="passes of a slot's turn while others wait; 0: no turns")
    parser.add_argument("--loaded", type=int, default=128, help="adapters in the engine's host pool")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens generated")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent")
    parser.add_argument("--base", choices=(*_SHAPES, "smollm2"), default="wide")
    parser.add_argument("--threads", type=int, default=1, help="of the engine; the other core is the rest's")
    parser.add_argument("--no-bare", dest="bare", action="store_false", help="leave SGLang by itself out")
    parser.add_argument(
        "--mixed", action=argparse.BooleanOptionalAction, default=True, help="prompts and next tokens in one pass"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None, help="where everything is kept meanwhile")
    return parser.parse_args(arguments)


def main() -> None:
    options = _options()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="mint-bench-wave-", dir=options.dir))
    try:
        uvloop.run(Bench(options, folder).run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
