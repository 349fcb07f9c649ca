"""Reinforcement learning over a base with routed experts: what was routed where is kept with every sample."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mint_runs.rollouts.codec import read_batch
from support.grpo_runs import check_ended, grpo_recipe, start_grpo
from support.scorer_packages import write_scorer_package
from support.stack import Stack, running_stack
from support.tiny_models import make_tiny_qwen3_moe

NUM_STEPS = 2
# As make_tiny_qwen3_moe writes it.
NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 8, 2

SCORER = "crc"
SCORER_SOURCE = """
    import zlib

    def make(options):
        return lambda sample: zlib.crc32(sample.completion.encode()) / 2**32
"""


@pytest.fixture(scope="module")
def moe_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything up over a tiny mixture of experts, as ``mint up`` makes it."""
    base = make_tiny_qwen3_moe(tmp_path_factory.mktemp("base") / "tiny-qwen3-moe", seed=0)
    scorers = tmp_path_factory.mktemp("scorers")
    write_scorer_package(scorers, package="crc_scorer", source=SCORER_SOURCE, entry_points={SCORER: "crc_scorer:make"})
    with running_stack(tmp_path_factory.mktemp("stack"), base, environ={"PYTHONPATH": str(scorers)}) as stack:
        yield stack


@pytest.mark.timeout(400)
async def test_a_run_keeps_the_experts_of_every_token(moe_stack: Stack, work: Path) -> None:
    recipe = grpo_recipe(NUM_STEPS, scorer=SCORER, group_size=4)
    async with moe_stack.client() as client:
        queued = await start_grpo(moe_stack, client, work, recipe)
        async with asyncio.timeout(200):
            run = await client.runs.wait(queued.name)
        await check_ended(moe_stack, client, run)
        revisions = [revision async for revision in client.revisions.list(run.policy)]
        assert len({revision.blob.digest for revision in revisions}) == NUM_STEPS + 1, "every step learnt something"
        pointers = [pointer async for pointer in client.rollouts.list(run.policy, run=run.name)]
    assert len(pointers) == NUM_STEPS
    async with moe_stack.object_store() as store:
        for pointer in pointers:
            path = work / f"batch-{pointer.step}"
            await store.get_file(pointer.object_key, path, digest=pointer.blob.digest)
            batch = await asyncio.to_thread(read_batch, path, key=pointer.object_key)
            seen: set[int] = set()
            for group in batch.groups:
                for sample in group.samples:
                    num_tokens = len(group.prompt_token_ids) + len(sample.token_ids)
                    routes = sample.routed_experts
                    assert routes is not None
                    assert routes.shape == (num_tokens - 1, NUM_LAYERS, TOP_K)
                    assert ((routes >= 0) & (routes < NUM_EXPERTS)).all()
                    assert (np.diff(np.sort(routes, axis=-1), axis=-1) > 0).all(), "a token goes to different experts"
                    # One prompt, one revision: all its samples were routed alike as far as the prompt goes.
                    shared = len(group.prompt_token_ids)
                    first = group.samples[0].routed_experts
                    assert first is not None
                    assert (np.sort(routes[:shared], -1) == np.sort(first[:shared], -1)).all()
                    seen.update(routes.flatten().tolist())
            assert len(seen) > TOP_K
