from pathlib import Path

import pytest

from mint_core.base_model import digest_of_folder, routed_top_k
from mint_core.errors import FailedPrecondition, InvalidArgument


def make(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_the_digest_is_of_content_not_of_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINT_CACHE", str(tmp_path / "cache"))
    one, two, three = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", b"weightS")
    (two / ".hidden").write_text("not counted")
    assert digest_of_folder(one) == digest_of_folder(two)
    assert digest_of_folder(one).digest != digest_of_folder(three).digest
    assert digest_of_folder(one).size_bytes == 9
    assert digest_of_folder(one) == digest_of_folder(one, use_cache=False)


def test_a_changed_file_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINT_CACHE", str(tmp_path / "cache"))
    folder = make(tmp_path / "a")
    before = digest_of_folder(folder)
    (folder / "model.safetensors").write_bytes(b"changed")
    assert digest_of_folder(folder) != before


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        digest_of_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{}", 0),
        ('{"num_experts_per_tok": 8}', 8),
        ('{"text_config": {"num_experts_per_tok": 2}}', 2),
        ('{"num_experts_per_tok": null}', 0),
    ],
)
def test_a_base_that_routes_says_so(tmp_path: Path, config: str, expected: int) -> None:
    (tmp_path / "config.json").write_text(config)
    assert routed_top_k(tmp_path) == expected


@pytest.mark.parametrize("config", ["[]", "{", '{"num_experts_per_tok": "two"}', None])
def test_a_base_that_cannot_say_whether_it_routes_is_refused(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(FailedPrecondition, match="name a complete Hugging Face folder"):
        routed_top_k(tmp_path)
