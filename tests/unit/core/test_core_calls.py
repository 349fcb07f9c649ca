"""What a call being served knows about itself."""

from __future__ import annotations

from mint_core import calls


def test_a_call_knows_its_method_and_a_call_inside_keeps_it() -> None:
    assert calls.method() == ""
    with calls.inbound_call("ada", None, "mint.v1.AliasService/PromoteAlias"):
        with calls.inbound_call("catalog", 1.0):
            assert (calls.principal(), calls.method()) == ("catalog", "mint.v1.AliasService/PromoteAlias")
        with calls.inbound_call("catalog", None, "catalog/gc"):
            assert calls.method() == "catalog/gc"
        assert (calls.principal(), calls.method()) == ("ada", "mint.v1.AliasService/PromoteAlias")
    assert (calls.principal(), calls.method()) == (calls.ANONYMOUS, "")
