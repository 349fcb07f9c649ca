"""The shipped scorers: what earns a reward, what does not, and what cannot be judged."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_scorers import Sample, Scorer, make_scorer
from mint_scorers.arithmetic import evaluate, last_number


def judge(scorer: Scorer, completion: str, /, **example: Any) -> float:
    return scorer(Sample(prompt="?", completion=completion, example=example))


# exact_match


@pytest.mark.parametrize(
    ("normalize", "equal", "different"),
    [
        ("none", "a  b", " a  b"),
        ("strip", "\na  b ", "a b"),
        ("whitespace", " a\n b", "A b"),
        ("casefold", " A\n B", "ab"),
    ],
)
def test_exact_match_forgives_what_it_is_told_to(normalize: str, equal: str, different: str) -> None:
    scorer = make_scorer("exact_match", {"normalize": normalize})
    assert judge(scorer, equal, completion="a  b") == 1.0
    assert judge(scorer, different, completion="a  b") == 0.0


def test_exact_match_strips_by_default_and_reads_the_field_it_is_told() -> None:
    assert judge(make_scorer("exact_match", {}), " yes\n", completion="yes") == 1.0
    assert judge(make_scorer("exact_match", {"field": "label"}), "no", completion="yes", label="no") == 1.0


def test_exact_match_cannot_judge_without_a_reference() -> None:
    scorer = make_scorer("exact_match", {"field": "label"})
    with pytest.raises(ValueError, match=r"no field 'label'; it has a, b"):
        judge(scorer, "x", b=1, a=2)
    with pytest.raises(TypeError, match="field 'label' is 3: expected the reference as text"):
        judge(scorer, "3", label=3)


# json_fields

TICKET = '{"team": "billing", "urgency": "low"}'


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (TICKET, 1.0),
        (' {"urgency": "low",\n "team": "billing"}\n', 1.0),
        ('{"team": "billing", "urgency": "high"}', 0.5),
        ('{"team": "billing"}', 0.5),
        ('{"team": "billing", "urgency": "low", "why": "money"}', 2 / 3),
        ('{"team": "account", "urgency": "high", "why": ""}', 0.0),
        (f"Here it is: {TICKET}", 0.0),
        ('["billing", "low"]', 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_json_fields_counts_what_is_right_of_all_there_is(completion: str, reward: float) -> None:
    assert judge(make_scorer("json_fields", {}), completion, completion=TICKET) == pytest.approx(reward)


def test_json_fields_reads_the_field_it_is_told_as_an_object_and_tells_true_from_one() -> None:
    scorer = make_scorer("json_fields", {"field": "wanted"})
    assert judge(scorer, '{"n": 1, "ok": true, "f": [1.0]}', wanted={"n": 1, "ok": True, "f": [1]}) == 1.0
    assert judge(scorer, '{"n": true}', wanted={"n": 1}) == 0.0


@pytest.mark.parametrize("reference", ["not JSON", "[1]", "{}", {}, 3])
def test_json_fields_cannot_judge_by_what_is_no_object(reference: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="field 'completion' is"):
        judge(make_scorer("json_fields", {}), TICKET, completion=reference)


# json_schema

PERSON = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize("example", [{}, {"schema": PERSON}, {"schema": json.dumps(PERSON)}])
def test_json_schema_of_the_option_or_of_the_example(example: dict[str, Any]) -> None:
    scorer = make_scorer("json_schema", {} if example else {"schema": json.dumps(PERSON)})
    assert judge(scorer, ' {"name": "Ada"}\n', **example) == 1.0
    for wrong in ('{"name": 1}', "{}", "[]", '{"name": "Ada"', 'Sure: {"name": "Ada"}', "", "[" * 100_000):
        assert judge(scorer, wrong, **example) == 0.0


def test_json_schema_has_a_smaller_reward_for_json_that_is_not_accepted() -> None:
    scorer = make_scorer("json_schema", {"schema": json.dumps(PERSON), "parses": "0.25"})
    assert [judge(scorer, text) for text in ('{"name": "Ada"}', "{}", "NaN", "{")] == [1.0, 0.25, 0.0, 0.0]


def test_json_schema_fetches_nothing() -> None:
    scorer = make_scorer("json_schema", {"schema": '{"$ref": "http://127.0.0.1:9/schema.json"}'})
    with pytest.raises(ValueError, match=r"refers to 'http://127.0.0.1:9/schema.json', which is not in it"):
        judge(scorer, "{}")


def test_json_schema_knows_the_drafts_and_references_inside() -> None:
    draft = "https://json-schema.org/draft/2020-12/schema"
    assert judge(make_scorer("json_schema", {"schema": json.dumps({"$ref": draft})}), '{"type": "object"}') == 1.0
    inside = {"$defs": {"n": {"type": "integer"}}, "items": {"$ref": "#/$defs/n"}}
    assert judge(make_scorer("json_schema", {}), "[1, 2]", schema=inside) == 1.0
    # In draft 4 a bound may be exclusive by a flag; in 2020-12 that is no schema.
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1, "exclusiveMinimum": True}
    assert judge(make_scorer("json_schema", {}), "1", schema=old) == 0.0


@pytest.mark.parametrize("schema", [3, None, [], "{", {"type": "zork"}, {"minimum": "one"}])
def test_json_schema_cannot_judge_by_what_is_no_schema(schema: Any) -> None:
    with pytest.raises(ValueError, match="the example's schema is not"):
        judge(make_scorer("json_schema", {}), "{}", schema=schema)


# arithmetic


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", "7"),
        ("It is -12", "-12"),
        ("It is \u221212 degrees", "-12"),
        ("7-5", "5"),
        ("(7)-5", "5"),
        ("$1,234,567.50!", "1234567.5"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        ("about .5", "1/2"),
        ("-.5", "-1/2"),
        ("6.02e23", "602000000000000000000000"),
        ("2E-2.", "1/50"),
        ("**42**", "42"),
        ("answer=42km", "42"),
        ("<b>8</b>", "8"),
        ("007", "7"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "none", "\u0663", "1e999999999", "9" * 5000, "1e" + "9" * 5000])
def test_a_text_without_a_usable_number(text: str) -> None:
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("-2 ** 2", "-4"),
        ("7 // -2", "-4"),
        ("-7 % 3", "2"),
        ("1 / 3 + 1 / 6", "1/2"),
        ("0.1 + 0.2", "3/10"),
        ("2 ** -3", "1/8"),
        (" +5 ", "5"),
        ("1 ** 10 ** 300", "1"),
        ("(-1) ** (10 ** 300 + 1)", "-1"),
        ("(-1) ** -3", "-1"),
    ],
)
def test_expressions(expression: str, value: str) -> None:
    assert evaluate(expression) == Fraction(value)


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("", "cannot be read"),
        ("2 +", "cannot be read"),
        ("1 / 0", "divides by zero"),
        ("0 ** -1", "divides by zero"),
        ("5 % 0", "divides by zero"),
        ("2 ** 0.5", "exponent 1/2"),
        ("9 ** 9 ** 9", "more than 4096 bits"),
        ("(10 ** 1000) * (10 ** 1000)", "more than 4096 bits"),
        ("0.5 ** 99999", "more than 4096 bits"),
        ("1e999", "only numbers"),
        ("abs(-1)", "only numbers"),
        ("__import__('os').getpid()", "only numbers"),
        ("x", "only numbers"),
        ("True + 1", "only numbers"),
        ("2j", "only numbers"),
        ("'a' * 3", "only numbers"),
        ("1 if 1 else 2", "only numbers"),
        ("1 << 99999", "only numbers"),
        ("1 +" * 500 + "1", "at most 1000"),
        ("(" * 400 + "1" + ")" * 400, "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_what_is_no_arithmetic_is_refused(expression: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        evaluate(expression)


@st.composite
def expressions(draw: st.DrawFn) -> str:
    number = st.integers(0, 999).map(str)
    binary = st.tuples(number, st.sampled_from(["+", "-", "*", "/", "//", "%"]), number)
    leaf = number | st.just("0.25") | binary.map(" ".join).map("({})".format)
    tree = st.recursive(
        leaf,
        lambda inner: (
            st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/"]), inner)
            | inner.map("-{}".format)
        ),
        max_leaves=8,
    )
    return draw(tree)


@given(expressions())
def test_an_expression_is_worth_what_python_says(expression: str) -> None:
    try:
        expected = eval(expression.replace("0.25", "Q(1, 4)").replace(" ", ""), {"Q": Fraction})  # our own text
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="divides by zero"):
            evaluate(expression)
        return
    # Python divides whole numbers to floats, the scorer does not.
    assert float(evaluate(expression)) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@given(st.decimals(-(10**9), 10**9, places=3), st.sampled_from(["{}", "It is {}.", "{} km", "= {}\n"]))
def test_every_written_number_is_found(number: Any, frame: str) -> None:
    assert last_number(frame.format(number)) == Fraction(number)
    assert last_number(frame.format(f"{number:,}")) == Fraction(number)


@given(st.text())
def test_no_completion_breaks_the_search_for_a_number(text: str) -> None:
    number = last_number(text)
    assert number is None or number.denominator > 0


def test_arithmetic_judges_by_expression_then_by_answer() -> None:
    scorer = make_scorer("arithmetic", {})
    assert judge(scorer, "2 and 2 make 4.", expression="2 + 2", answer=5) == 1.0
    assert judge(scorer, "5", expression="2 + 2", answer=5) == 0.0
    for answer in (18, 18.0, "18", "so it is 1,8 … #### 18"):
        assert judge(scorer, "#### 18", answer=answer) == 1.0
    assert judge(scorer, "no idea", answer=18) == 0.0


def test_arithmetic_tolerates_what_it_is_told_to() -> None:
    assert judge(make_scorer("arithmetic", {}), "3.333333", expression="10 / 3") == 1.0
    assert judge(make_scorer("arithmetic", {}), "3.33", expression="10 / 3") == 0.0
    assert judge(make_scorer("arithmetic", {"tolerance": "0.01"}), "3.33", expression="10 / 3") == 1.0
    exact = make_scorer("arithmetic", {"tolerance": "0"})
    assert [judge(exact, text, expression="0.1 + 0.2") for text in ("0.3", "0.30000000001")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("example", "error"),
    [
        ({}, "no field 'answer'; it has none"),
        ({"answer": "?"}, "is '\\?'"),
        ({"answer": True}, "True"),
        ({"answer": None}, "None"),
    ],
)
def test_arithmetic_cannot_judge_without_what_is_right(example: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        judge(make_scorer("arithmetic", {}), "4", **example)
    with pytest.raises(TypeError, match="'expression' is 4: expected text"):
        judge(make_scorer("arithmetic", {}), "4", expression=4)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("exact_match", {"normalise": "none"}, "option 'normalise' is not known; known are field, normalize"),
        ("exact_match", {"normalize": "upper"}, "option normalize is 'upper': expected one of none, strip"),
        ("json_schema", {"schema": "{"}, "option schema is not JSON"),
        ("json_schema", {"schema": '{"type": 1}'}, r"option schema is not a JSON schema: 1 .* at \$\.type"),
        ("json_schema", {"parses": "2"}, "option parses is '2': expected a number from 0 to 1"),
        ("arithmetic", {"tolerance": "nan"}, "option tolerance is 'nan': expected a number from 0"),
        ("arithmetic", {"tolerance": "some"}, "option tolerance is 'some'"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_scorer(name, options)
