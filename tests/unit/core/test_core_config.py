from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, SecretStr

from mint_core.config import ServiceSettings, load, masked
from mint_core.errors import InvalidArgument


class Store(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    bucket: str = "mint"
    """Bucket."""
    secret_key: SecretStr = SecretStr("")
    """Secret."""


class Example(ServiceSettings):
    """An example service."""

    section = "example"

    num_slots: int = 4
    """Number of slots."""
    cache_dir: Path = Path("cache")
    """Folder."""
    names: tuple[str, ...] = ()
    """Names."""
    store: Store = Store()
    """Store."""


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "mint.toml"
    file.write_text('[common]\nlog_level = "DEBUG"\n[example]\nnum_slots = 5\n[example.store]\nbucket = "filed"\n')
    environ = {"MINT_CONFIG": str(file)}
    assert load(Example, [], {}).num_slots == 4
    loaded = load(Example, [], environ)
    assert (loaded.num_slots, loaded.store.bucket, loaded.log_level) == (5, "filed", "DEBUG")
    environ |= {"MINT_EXAMPLE_NUM_SLOTS": "6", "MINT_EXAMPLE_STORE__SECRET_KEY": "hush"}
    loaded = load(Example, [], environ)
    assert (loaded.num_slots, loaded.store.bucket, loaded.store.secret_key.get_secret_value()) == (6, "filed", "hush")
    loaded = load(Example, ["--num-slots", "7", "--store.bucket=typed", "--config", str(file)], environ)
    assert (loaded.num_slots, loaded.store.bucket) == (7, "typed")
    assert type(loaded) is Example


def test_lists_are_read_from_json_and_repeated_options(tmp_path: Path) -> None:
    assert load(Example, [], {"MINT_EXAMPLE_NAMES": '["a","b"]'}).names == ("a", "b")
    assert load(Example, ["--names", "a", "--names", "b"], {}).names == ("a", "b")


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (["--num-slots", "many"], {}, ["example.num_slots", "'many'", "int"]),
        ([], {"MINT_EXAMPLE_NUM_SLOTS": "1.5"}, ["example.num_slots", "'1.5'", "int"]),
        ([], {"MINT_EXAMPLE_NUM_SLOTZ": "1"}, ["MINT_EXAMPLE_NUM_SLOTZ", "MINT_EXAMPLE_NUM_SLOTS"]),
        (["--config", "/nowhere/mint.toml"], {}, ["/nowhere/mint.toml", "readable"]),
    ],
)
def test_a_bad_value_names_key_value_and_expected_type(
    argv: list[str], environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(Example, argv, environ)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_key_in_the_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "mint.toml"
    file.write_text("[example]\nnum_slotz = 5\n")
    with pytest.raises(InvalidArgument, match=r"example\.num_slotz"):
        load(Example, [], {"MINT_CONFIG": str(file)})


def test_secrets_are_masked() -> None:
    settings = load(Example, [], {"MINT_EXAMPLE_STORE__SECRET_KEY": "hush"})
    assert masked(settings)["store"] == {"bucket": "mint", "secret_key": "**********"}
    assert "hush" not in str(masked(settings))
