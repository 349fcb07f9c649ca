from __future__ import annotations

import pytest
from pydantic import ValidationError

from mint_blobs.settings import ObjectStoreSettings


def test_secret_is_not_shown() -> None:
    settings = ObjectStoreSettings.model_validate({"secret_access_key": "hush"})
    assert "hush" not in repr(settings) + str(settings) + settings.model_dump_json()
    assert settings.secret_access_key.get_secret_value() == "hush"


@pytest.mark.parametrize(
    "wrong", [{"bukket": "x"}, {"bucket": "x"}, {"read_timeout_s": 0}, {"part_size_bytes": 1}, {"max_attempts": 0}]
)
def test_wrong_settings_name_their_key(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ObjectStoreSettings.model_validate(wrong)
