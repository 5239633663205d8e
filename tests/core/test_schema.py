"""JSON Schema of results: what is wrong is told in a sentence, and whatever strangers send comes to an end."""

import json
import socket
import time
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app import schema as module
from app.errors import Invalid, TooLarge
from app.events import DEPTH_MAX, RESULT_BYTES_MAX
from app.schema import DIALECT, SCHEMA_BYTES_MAX, SCHEMA_DEPTH_MAX, SCHEMA_OBJECTS_MAX, check, misfit

PERSON = {
    "$schema": DIALECT,
    "$id": "https://example.org/person",
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "friends": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name"],
    "additionalProperties": False,
}
SECONDS_MAX = 40.0
"""For what takes 5 s at worst, on a machine that has several other things to do."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("a schema led into the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def nested(depth: int) -> str:
    return '{"a":' * depth + "{}" + "}" * depth


def test_what_fits_is_told_by_silence_and_what_does_not_in_a_sentence() -> None:
    check(PERSON)
    assert misfit(PERSON, '{"name": "Ada", "friends": [{"name": "Bob"}]}') == ""
    assert misfit(PERSON, '{"name": "Ada", "friends": [{"name": 3}]}') == (
        "The result does not fit its output schema at $.friends[0].name: 3 is not of type 'string'"
    )
    assert "'name' is a required property" in misfit(PERSON, "{}")
    assert "'age' was unexpected" in misfit(PERSON, '{"name": "Ada", "age": 36}')


@pytest.mark.parametrize("result", ["", "Hello", "{", "NaN", "{'a': 1}", '"\\ud800"', "1e999"])
def test_what_is_no_json_fits_no_schema(result: str) -> None:
    assert misfit({}, result) == "The result is no JSON, as its output schema asks for."


def test_any_json_fits_a_schema_that_asks_for_nothing() -> None:
    for result in ("null", "1", '"a"', "[]", "{}", " true\n"):
        assert misfit({}, result) == ""


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"type": "objekt"}, "no JSON Schema at $.type: 'objekt'"),
        ({"properties": {"a": {"minimum": "1"}}}, "no JSON Schema at $.properties.a.minimum"),
        ({"required": "name"}, "no JSON Schema at $.required"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "another dialect"),
        ({"$schema": 7}, "another dialect"),
        ({"properties": {"a": {"$schema": "http://json-schema.org/draft-07/schema#"}}}, "uses $schema inside"),
        ({"$ref": "https://example.org/other"}, "something outside, or by name: https://example.org/other"),
        ({"$ref": "other.json#/a"}, "something outside"),
        ({"$ref": "#name", "$defs": {"a": {"type": "null"}}}, "by name"),
        ({"$defs": {"a": {"$anchor": "name"}}}, "uses $anchor inside"),
        ({"$dynamicRef": "#"}, "uses $dynamicRef inside"),
        ({"items": {"$id": "https://example.org/inner"}}, "uses $id inside"),
        ({"$ref": "#/$defs/nobody"}, "refers to nothing: #/$defs/nobody"),
        ({"$ref": "#/odd", "odd": {"minimum": "1"}}, "no JSON Schema at $.minimum"),
        ({"$ref": "#/odd", "odd": {"$ref": "http://example.org"}}, "something outside"),
        ({"$ref": "#"}, "without end"),
        ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"not": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
         "without end"),
        ({"patternProperties": {"a": {}}, "items": {"unevaluatedProperties": False}}, "both patternProperties and"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_used_is_refused_with_a_sentence(schema: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Invalid, match=r"^The output schema ") as refused:
        check(schema)
    assert sentence in str(refused.value)
    assert len(str(refused.value)) < 700


def test_a_schema_is_bounded_in_size_and_depth() -> None:
    check({"enum": ["x" * (SCHEMA_BYTES_MAX - 20)]})
    with pytest.raises(TooLarge, match="bytes"):
        check({"enum": ["x" * SCHEMA_BYTES_MAX]})
    check({"properties": {f"a{i}": {} for i in range(SCHEMA_OBJECTS_MAX - 2)}})
    with pytest.raises(TooLarge, match="objects"):
        check({"properties": {f"a{i}": {} for i in range(SCHEMA_OBJECTS_MAX)}})
    deep: dict[str, Any] = {}
    for _ in range(SCHEMA_DEPTH_MAX - 1):
        deep = {"not": deep}
    check(deep)
    with pytest.raises(Invalid, match="nested deeper"):
        check({"not": deep})
    for _ in range(5000):
        deep = {"not": deep}
    with pytest.raises(Invalid, match="nested deeper"):
        check(deep)


def test_a_schema_may_call_itself_and_follows_a_result_to_its_depth() -> None:
    tree = {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}
    check(tree)
    assert misfit(tree, nested(DEPTH_MAX - 1)) == ""
    assert misfit(tree, nested(DEPTH_MAX)) == f"The result is nested deeper than {DEPTH_MAX} levels."
    assert misfit({}, "[" * 90_000) == f"The result is nested deeper than {DEPTH_MAX} levels."
    assert len(misfit(tree, nested(DEPTH_MAX - 2).replace("{}", '{"b":1}'))) < 700


def test_a_sentence_is_short_whatever_it_is_about() -> None:
    huge = json.dumps({"k" * 90_000: "x" * 90_000})
    for schema in ({"type": "null"}, {"additionalProperties": {"type": "null"}}, {"additionalProperties": False}):
        check(schema)
        assert 0 < len(misfit(schema, huge)) < 700


# Numbers, and what equals what


@pytest.mark.parametrize(
    ("schema", "result", "fits"),
    [
        ({"uniqueItems": True}, '[1, 2, true, [1], {}, {"a": 1}]', True),
        ({"uniqueItems": True}, "[1, 1.0]", False),
        ({"uniqueItems": True}, "[1, true, [1], [true]]", True),
        ({"uniqueItems": True}, '[{"a": 1, "b": 2}, {"b": 2, "a": 1}]', False),
        ({"uniqueItems": True}, '[[], {}, "", null, false, 0]', True),
        ({"uniqueItems": False}, "[1, 1]", True),
        ({"patternProperties": {"^a": {"type": "null"}}}, '{"a": null, "b": 1}', True),
        ({"patternProperties": {"^a": {"type": "null"}}}, '{"ab": 1}', False),
        ({"patternProperties": {"^a": True}, "additionalProperties": False}, '{"ab": 1}', True),
        ({"patternProperties": {"^a": True}, "additionalProperties": False}, '{"b": 1}', False),
        ({"patternProperties": {"^a": True}, "additionalProperties": {"type": "null"}}, '{"b": null}', True),
        ({"properties": {"b": True}, "additionalProperties": {"type": "null"}}, '{"b": 1, "c": 1}', False),
        ({"additionalProperties": False}, "[]", True),
        ({"pattern": "b+"}, '"abbc"', True),
        ({"pattern": "^b+"}, '"abbc"', False),
        ({"pattern": "^b+"}, "1", True),
        ({"pattern": r"^\d{4}-\d{2}$"}, '"2026-11"', True),
        ({"pattern": r"^\d{4}-\d{2}$"}, '"2026-1"', False),
        ({"pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}, '"123e4567-e89b-12d3-a456-42661417400"', False),
        ({"unevaluatedProperties": False, "allOf": [{"properties": {"a": True}}]}, '{"a": 1}', True),
        ({"unevaluatedProperties": False, "allOf": [{"properties": {"a": True}}]}, '{"b": 1}', False),
    ],
)  # fmt: skip
def test_own_keywords_say_what_jsonschemas_say(schema: dict[str, Any], result: str, fits: bool) -> None:
    check(schema)
    assert (misfit(schema, result) == "") == fits
    assert Draft202012Validator(schema).is_valid(json.loads(result)) == fits


@pytest.mark.parametrize("pattern", [r"^(?!x).*$", r"(a)\1", "[", "(?x)a{ 900 }", "(?:a{0,500}){0,100}b", "a" * 600])
def test_a_pattern_that_the_engine_does_not_know_or_that_is_large_is_left_unchecked(pattern: str) -> None:
    closed = {"patternProperties": {pattern: {"type": "null"}}, "additionalProperties": False}
    for schema, result in (({"pattern": pattern}, '"xyz"'), (closed, '{"xyz": 1}')):
        check(schema)
        assert misfit(schema, result) == ""


def test_formats_are_left_unchecked() -> None:
    check({"format": "email"})
    assert misfit({"format": "email"}, '"nobody"') == ""


def test_a_number_beyond_arithmetic_is_told() -> None:
    assert "a number is too large" in misfit({"multipleOf": 0.1}, "1" + "0" * 400)
    assert misfit({"multipleOf": 0.1}, "1" + "0" * 400) != misfit({"multipleOf": 0.5}, "1.5")


# What would take for ever

LAUGHS = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)} | {"d60": {"type": "null"}}


def test_a_schema_that_doubles_with_each_reference_is_refused() -> None:
    began = time.monotonic()
    with pytest.raises(Invalid, match="far too often"):
        check({"$defs": LAUGHS, "$ref": "#/$defs/d0"})
    assert time.monotonic() - began < SECONDS_MAX


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


LONG = json.dumps("a" * (RESULT_BYTES_MAX - 2))
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "doubles with each level": ({"properties": {"a": {"allOf": [{"$ref": "#"}] * 2}}}, nested(DEPTH_MAX - 1)),
    "doubles behind unevaluated": (
        {"properties": {"a": {"anyOf": [{"$ref": "#"}] * 2}}, "unevaluatedProperties": False},
        nested(DEPTH_MAX - 1),
    ),
    "many branches quote the whole result": ({"items": {"anyOf": [{"type": "null"}] * 900}}, f'[{LONG[:-3]}"]'),
    "many branches, many items": ({"items": {"anyOf": [{"type": "null"}] * 900}}, f"[{'1,' * 90_000}1]"),
    "many values, many items": ({"items": {"enum": [*range(9000)]}}, f"[{'-1,' * 60_000}1]"),
    "long values, many items": (
        {"items": {"enum": [[0] * 300 + [i] for i in range(90)]}},
        compact([[0] * 300 + [-1]] * 200),
    ),
    "unique objects": ({"uniqueItems": True}, compact([{"a": i} for i in range(15_000)])),
    "unique, again and again": ({"allOf": [{"uniqueItems": True}] * 900}, compact([{"a": i} for i in range(15_000)])),
    "patterns, again and again": ({"allOf": [{"pattern": r"\w{1,60}x"}] * 400}, LONG),
    "additional names and patterns": (
        {"patternProperties": {f"(a+)+{i}$": True for i in range(400)}, "additionalProperties": False},
        json.dumps({f"{'a' * 300}{i}b": 1 for i in range(500)}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_check_comes_to_an_end(name: str) -> None:
    schema, result = HOSTILE[name]
    assert len(result.encode()) <= RESULT_BYTES_MAX
    began = time.monotonic()
    check(schema)
    said = misfit(schema, result)
    assert time.monotonic() - began < SECONDS_MAX
    assert len(said) < 700


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*a){12}$", r"^(\w+\s?)*$", "a*a*a*a*a*a*b", r"\w{1,60}x", "(?:a{0,20}){0,20}b"]
)  # fmt: skip
@pytest.mark.parametrize("text", ["a" * 190_000 + "!", "é" * 90_000 + "!"])
def test_a_hostile_pattern_does_not_backtrack(pattern: str, text: str) -> None:
    began = time.monotonic()
    for schema, result in (
        ({"pattern": pattern}, json.dumps(text, ensure_ascii=False)),
        ({"patternProperties": {pattern: False}}, json.dumps({text: 1}, ensure_ascii=False)),
        ({"patternProperties": {pattern: True}, "additionalProperties": False}, json.dumps({text: 1})),
    ):
        check(schema)
        misfit(schema, result)
    assert time.monotonic() - began < SECONDS_MAX


def test_pythons_own_regular_expressions_never_run_on_what_clients_send(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("Python's engine was asked")

    monkeypatch.setattr("jsonschema._keywords.re.search", refuse)
    schemas: list[dict[str, Any]] = [
        {"pattern": "a", "format": "regex"},
        {"patternProperties": {"a": {"pattern": "a"}}, "additionalProperties": False},
        {"$schema": DIALECT, "properties": {"a": {"$ref": "#"}}, "patternProperties": {"b": {"$ref": "#"}}},
        {"propertyNames": {"pattern": "a"}, "not": {"pattern": "b"}, "if": {"pattern": "c"}, "then": {"pattern": "d"}},
        {"unevaluatedProperties": {"pattern": "a"}, "dependentSchemas": {"a": {"pattern": "a"}}},
    ]
    for schema in schemas:
        check(schema)
        for result in ('"abc"', '{"a": "abc", "b": {"a": "c"}, "c": 1}', '["a"]'):
            misfit(schema, result)


@pytest.mark.parametrize(
    ("pattern", "least"),
    [
        ("abc", 3),
        ("(ab){10}", 20),
        ("(?:(?:a{10}){10}){10}", 1000),
        ("a{5}{5}", 25),
        (r"[a\]b]{7}", 7),
        ("(?P<n>a){9}", 9),
        ("(a|b){3,}", 6),
        ("a{0,50}", 50),
        (r"\{9\}", 3),
        ("a{9", 3),
        ("(", 1),
        (")", 1),
    ],
)
def test_an_automatons_size_is_never_thought_too_small(pattern: str, least: int) -> None:
    assert module._states(pattern) >= least
