from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from mint_blobs.digests import digest_base64, digest_bytes, digest_file, digest_hex
from mint_core.names import check_digest


async def test_bytes_and_file_agree_with_hashlib(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(data)
    expected = hashlib.sha256(data)
    digest = digest_bytes(data)
    assert digest == check_digest(f"sha256:{expected.hexdigest()}", field="digest")
    assert await digest_file(tmp_path / "f") == digest
    assert digest_hex(digest) == expected.hexdigest()
    assert base64.b64decode(digest_base64(digest)) == expected.digest()
