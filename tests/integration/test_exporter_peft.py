"""PEFT adapters into a running exporter and out again: folders, archives, objects; signed, compared, loaded by PEFT."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from mint_api.v1 import base_model_service_pb2, revision_service_pb2
from mint_core.errors import AlreadyExists, DigestMismatch, InvalidArgument, MintError, NotFound
from mint_core.signing import Signature, TrustedKeys
from support.adapters import BASE_DIGEST
from support.exporter_house import SIGNING_KEY, House
from support.lora_bases import adapted, logits, tiny_base
from support.peft_archives import tar_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

MINT = str(Path(sys.executable).parent / "mint")
LLAMA = "LlamaForCausalLM"
ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OPTIONS: dict[str, dict[str, object]] = {
    LLAMA: {"target_modules": [*ATTENTION, "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 6}},
    "Qwen3MoeForCausalLM": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "MixtralForCausalLM": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "DeepseekV3ForCausalLM": {"target_modules": ["q_b_proj", "kv_b_proj"], "target_parameters": EXPERTS},
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT saves: random A and B, rank-stabilised, a rank of its own for one module."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    adapted(LLAMA, **OPTIONS[LLAMA]).save_pretrained(folder)
    return folder


def logits_of(architecture: str, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        # PEFT looks for its own patterns of fused experts among modules, not parameters.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match any targeted module")
        return logits(PeftModel.from_pretrained(tiny_base(architecture), folder).eval())


async def imported(house: House, adapter: Path, base_model: str = "tiny") -> tuple[str, revision_service_pb2.Revision]:
    policy, weights = await house.policy(base_model), adapter / "adapter_model.safetensors"
    blob = await house.client.blobs.upload("acme", weights)
    text = (adapter / "adapter_config.json").read_text()
    return policy, await house.exports.import_revision(policy, blob, text)


@pytest.mark.parametrize("architecture", OPTIONS)
async def test_a_round_trip_through_the_exporter_has_the_same_logits(
    house: House, tmp_path: Path, architecture: str
) -> None:
    name = f"baseModels/{architecture.lower()}"
    base = base_model_service_pb2.BaseModel(name=name, digest=BASE_DIGEST, size_bytes=1, architecture=architecture)
    await house.client.base_models.register(base)
    model = adapted(architecture, **OPTIONS[architecture])
    model.save_pretrained(tmp_path / "saved")
    _, revision = await imported(house, tmp_path / "saved", architecture.lower())
    await house.exports.export_peft(revision.name, tmp_path / "back")
    assert (logits(model) - logits(tiny_base(architecture))).abs().max() > 0.1
    torch.testing.assert_close(logits_of(architecture, tmp_path / "back"), logits(model), rtol=0, atol=1e-5)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["back", "saved"]
    assert house.left_on_disk() == []


async def test_what_cannot_be_exported(house: House, adapter: Path, tmp_path: Path) -> None:
    _, revision = await imported(house, adapter)
    (tmp_path / "back").mkdir()
    with pytest.raises(AlreadyExists, match="back"):
        await house.exports.export_peft(revision.name, tmp_path / "back")
    with pytest.raises(NotFound):
        await house.exports.export_peft(revision.name[:-1] + "9", tmp_path / "none")
    with pytest.raises(InvalidArgument, match="cannot write"):
        await house.exports.export_peft(revision.name, tmp_path / "no" / "such")
    assert [each.name for each in tmp_path.iterdir()] == ["back"]
    assert house.left_on_disk() == []


async def test_folder_archive_and_object_are_one_adapter(house: House, adapter: Path, tmp_path: Path) -> None:
    policy, first = await imported(house, adapter)
    packed, zipped = tmp_path / "adapter.tar.gz", tmp_path / "adapter.zip"
    packed.write_bytes(tar_of(adapter))
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for each in adapter.iterdir():
            archive.write(each, f"adapter/{each.name}")
    lineage = revision_service_pb2.Lineage(data_digest="sha256:" + "d" * 64, recipe="theirs", code_version="peft")
    revisions = [first]
    for path in (packed, zipped):
        blob = await house.client.blobs.upload("acme", path)
        revisions.append(await house.exports.import_archive(policy, blob, lineage=lineage))
    key = "tenants/acme/imports/new/adapter.tar.gz"
    info = await house.store.put_bytes(key, packed.read_bytes(), if_absent=False)
    revisions.append(await house.exports.import_object(policy, key))
    revisions.append(await house.exports.import_object(policy, key, digest=info.digest or ""))
    with pytest.raises(DigestMismatch):
        await house.exports.import_object(policy, key, digest="sha256:" + "0" * 64)
    assert {each.blob.digest for each in revisions} == {first.blob.digest}
    assert [each.number for each in revisions] == [1, 2, 3, 4, 5]
    assert revisions[1].lineage == lineage
    assert first.lineage.code_version.startswith("mint-lora")
    await house.check(policy, [1, 2, 3, 4, 5])


async def test_a_request_sent_twice_is_one_revision(house: House, adapter: Path, tmp_path: Path) -> None:
    policy = await house.policy()
    (tmp_path / "a.tar.gz").write_bytes(tar_of(adapter))
    blob = await house.client.blobs.upload("acme", tmp_path / "a.tar.gz")
    request_id = "6f1c1b52-2b5f-4b4c-9d0e-0a4e3c4a5b6d"
    twice = [await house.exports.import_archive(policy, blob, request_id=request_id) for _ in range(2)]
    assert twice[0] == twice[1]
    await house.check(policy, [1])


async def test_the_signature_goes_with_every_way_to_the_adapter(house: House, adapter: Path) -> None:
    policy, revision = await imported(house, adapter)
    trusted = TrustedKeys({"acme": [SIGNING_KEY.public_key()]})
    alias = await house.client.aliases.promote(f"{policy}/aliases/live", 1, reason="test")
    resolved = [await house.client.aliases.resolve(name) for name in (alias.name, revision.name)]
    for carrier in (revision, alias.resolution, *resolved):
        signature = Signature(carrier.signature.key_id, carrier.signature.value)
        trusted.check("acme", revision.blob.digest, BASE_DIGEST, signature)
        for tenant, digest in (("umbrella", revision.blob.digest), ("acme", "sha256:" + "0" * 64)):
            with pytest.raises(MintError, match="does not hold"):
                TrustedKeys({tenant: [SIGNING_KEY.public_key()]}).check(tenant, digest, BASE_DIGEST, signature)


async def test_a_bad_signing_key_ends_the_start_with_one_sentence(house: House, tmp_path: Path) -> None:
    house.exporter.stop(kill=False)
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(RuntimeError, match=r"mint-exporter: PRECONDITION_FAILED: .*key\.pem is no unencrypted private"):
        await house.exporter.start(MINT_EXPORTER_SIGNING_KEY_FILE=str(tmp_path / "key.pem"))
    await house.exporter.start()


async def test_the_command_line(house: House, adapter: Path, tmp_path: Path) -> None:
    policy = await house.policy()
    short = policy.replace("tenants/", "").replace("policies/", "")
    addresses = {"--exporter": house.exporter.public, "--exporter-runtime": house.exporter.runtime}

    async def mint(*arguments: str, options: tuple[str, ...] = ("--exporter-runtime",), check: bool = True) -> str:
        given = [part for option in options for part in (option, addresses[option])]
        command = [MINT, "revision", *arguments, *given]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=check, timeout=60)
        return str(done.stdout + done.stderr)

    both = ("--exporter", "--exporter-runtime")
    (tmp_path / "adapter.tar.gz").write_bytes(tar_of(adapter))
    first = json.loads(await mint("import", short, str(adapter), "--recipe", "theirs", "--json", options=both))
    assert (first["number"], first["lineage"]["recipe"]) == (1, "theirs")
    second = await mint("import", short, str(tmp_path / "adapter.tar.gz"), options=both)
    assert f"{short}@2 is {first['blob']['digest']}" in second
    await mint("export", f"{short}@2", str(tmp_path / "back"))
    torch.testing.assert_close(logits_of(LLAMA, tmp_path / "back"), logits_of(LLAMA, adapter), rtol=0, atol=1e-5)
    assert "exists: name a new folder" in await mint("export", f"{short}@2", str(tmp_path / "back"), check=False)
    diff = json.loads(await mint("diff", f"{short}@1", f"{short}@2", "--json"))
    assert (diff["total"]["norm_difference"], len(diff["modules"])) == (0, 6)


async def test_two_revisions_side_by_side(house: House, adapter: Path, tmp_path: Path) -> None:
    policy, first = await imported(house, adapter)
    fence = await house.lease(policy)
    state = await house.save(tmp_path, policy, fence, seed=3)
    second = (await house.exports.export(policy, state, fence)).revision
    await house.work.release_lease(fence)
    same = await house.exports.diff(first.name, first.name)
    assert (same.total.norm_difference, same.total.cosine) == (0, pytest.approx(1))
    assert list(same.config) == []
    with pytest.raises(InvalidArgument, match="not made for the same base"):
        await house.exports.diff(first.name, second.name)
    with pytest.raises(InvalidArgument, match="two tenants"):
        await house.exports.diff(first.name, first.name.replace("acme", "umbrella"))
    assert house.left_on_disk() == []
