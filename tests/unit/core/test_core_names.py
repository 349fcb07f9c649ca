import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_core import names
from mint_core.errors import InvalidArgument

IDS = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True).filter(lambda text: ".." not in text)


@given(IDS, IDS, st.integers(1, 10**17))
def test_names_survive_parsing(tenant: str, policy: str, number: int) -> None:
    name = names.RevisionName(tenant, policy, number)
    assert names.RevisionName.parse(str(name)) == name
    assert names.PolicyName.parse(str(name.parent)) == name.parent


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "tenants/a",
        "tenants/a/policies/",
        "tenants/../policies/p",
        "tenants/a/policies/..",
        "tenants/a/policies/p/",
        "tenants/A/policies/p",
        "tenants/a/policies/p\n",
        "tenants/a/policies/" + "x" * 64,
        "tenants/a/policies/a..b",
        "tenants/a/policy/p",
        "tenants/a/policies/p/../q",
        "tenants/a/policies/é",
        "/tenants/a/policies/p",
        "tenants/a/policies/p\x00",
    ],
)
def test_bad_policy_names_are_refused_with_the_pattern(bad: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        names.PolicyName.parse(bad, field="policy.name")
    assert caught.value.field == "policy.name"
    assert "policy.name" in caught.value.message


@pytest.mark.parametrize("number", ["0", "-1", "01", "1.5", "x", "", "9" * 19])
def test_bad_revision_numbers_are_refused(number: str) -> None:
    with pytest.raises(InvalidArgument):
        names.RevisionName.parse(f"tenants/a/policies/p/revisions/{number}")


def test_short_references() -> None:
    policy = names.PolicyName("acme", "tone")
    assert names.parse_policy_ref("acme/tone") == (policy, "live")
    assert names.parse_policy_ref("acme/tone@canary") == (policy, "canary")
    assert names.parse_policy_ref("acme/tone@3") == (policy, 3)
    for bad in ("acme", "acme/tone/x", "acme/tone@", "acme/tone@Live", "../tone"):
        with pytest.raises(InvalidArgument):
            names.parse_policy_ref(bad)
