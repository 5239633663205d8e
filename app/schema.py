"""JSON Schema (Draft 2020-12) of results: whether a schema can be used at all, and whether a result fits it. Pure.

Schemas and results come from strangers, so both functions end, on whatever they are given: a check may take STEPS_MAX
steps, and what is dear counts as many of them. Nothing is ever fetched: a `$ref` points into its own schema, by a JSON
pointer. Regular expressions (`pattern`, `patternProperties`) run on an engine that does not backtrack, because
Python's own may take for ever and holds its lock meanwhile; what that engine does not know (look-around, references to
groups), or what would be large on it (`_states`), is left unchecked. So are `format` and the `content…` words, as the
draft has it.

At worst `misfit` takes a few seconds of one core: where others wait for the thread, call it in another one.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from jsonschema import Draft202012Validator, FormatChecker, SchemaError, ValidationError
from jsonschema.exceptions import best_match
from jsonschema.validators import extend
from pydantic_core import SchemaError as UnknownPattern
from pydantic_core import SchemaValidator, core_schema
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from app.errors import Invalid, TooLarge
from app.events import DEPTH_MAX, Json, depth

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMA_BYTES_MAX = 64 * 1024
SCHEMA_OBJECTS_MAX = 1000
"""In one schema: each is compared with the draft's own schema, a quarter of a millisecond each."""
SCHEMA_DEPTH_MAX = 40
"""Checks recurse, and Python's stack has 1,000 frames."""
STEPS_MAX = 400_000
"""Of a check; a keyword on a value is one, of 5 to 10 µs. The smallest values of 192 KiB, three keywords on each, are
300,000.
"""
NESTED_MAX = 220
"""Keywords within keywords, each of them four frames of Python's 1,000 at most: two for each level of the deepest result."""
TRIAL_STEPS_MAX = 20_000
"""On nothing at all."""
STATES_MAX = 500
"""Of a pattern's automaton, roughly; they take 50 ms to make."""
SAID_CHARACTERS_MAX = 250
"""Of a place, and of what is wrong there: it may quote the whole result."""

Keyword = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]
"""As jsonschema calls it: with a validator, what the schema says there, a value, and that schema."""
KEYWORDS: dict[str, Keyword] = {word: one for word, one in Draft202012Validator.VALIDATORS.items() if one}


def check(schema: Json) -> None:
    """Raises Invalid when results cannot be checked against it, and TooLarge."""
    try:
        raw = msgspec.json.encode(schema)
    except RecursionError:
        raise _too_deep() from None
    if len(raw) > SCHEMA_BYTES_MAX:
        raise TooLarge(f"The output schema has {len(raw)} bytes; at most {SCHEMA_BYTES_MAX} are allowed.")
    if (objects := raw.count(b"{")) > SCHEMA_OBJECTS_MAX:
        raise TooLarge(f"The output schema has {objects} objects; at most {SCHEMA_OBJECTS_MAX} are allowed.")
    if depth(raw) > SCHEMA_DEPTH_MAX:
        raise _too_deep()
    dialect = schema.get("$schema", DIALECT)
    if not isinstance(dialect, str) or dialect.removesuffix("#") != DIALECT:
        raise Invalid(f"The output schema is of another dialect than {DIALECT}: {_short(str(dialect))}")
    root = _plain(schema)
    words: set[str] = set()
    for one in _reachable(root):
        words |= one.keys()
    if {"patternProperties", "unevaluatedProperties"} <= words:  # jsonschema would ask Python's `re`
        raise Invalid("The output schema has both patternProperties and unevaluatedProperties: that is not supported.")
    nothings: tuple[Any, ...] = (None, {}, [])
    for nothing in nothings:
        try:
            _misfit(root, nothing, TRIAL_STEPS_MAX)
        except (_TooMuch, RecursionError):
            raise Invalid("The output schema refers to itself without end, or far too often.") from None


def misfit(schema: Json, result: str) -> str:
    """Empty when the result is JSON that fits; else a sentence: where it does not, and why.

    `schema`: one that `check` has let pass.
    """
    raw = result.encode()
    try:
        if raw.count(b"[") + raw.count(b"{") > DEPTH_MAX and depth(raw) > DEPTH_MAX:
            return f"The result is nested deeper than {DEPTH_MAX} levels."
        value = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return "The result is no JSON, as its output schema asks for."
    try:
        error = _misfit(_plain(schema), value, STEPS_MAX)
    except (_TooMuch, RecursionError):
        return "The result cannot be checked against its output schema: that would take too long."
    except OverflowError:
        return "The result cannot be checked against its output schema: a number is too large."
    if error is None:
        return ""
    return f"The result does not fit its output schema at {_short(error.json_path)}: {error.message}"


def _plain(schema: Json) -> Json:
    """Without what would give it another validator, or another place in the world."""
    return {word: value for word, value in schema.items() if word not in {"$schema", "$id"}}


def _short(text: str) -> str:
    return text if len(text) <= SAID_CHARACTERS_MAX else f"{text[:SAID_CHARACTERS_MAX]}…"


def _reachable(root: Json) -> Iterator[Json]:
    """Every schema in it, and all that these refer to. Raises Invalid for one that is none, or leads elsewhere."""
    resolver = Registry[Any]().resolver_with_root(DRAFT202012.create_resource(root))
    left: list[Any] = [root]
    seen: set[int] = set()
    _is_schema(root)
    while left:
        schema = left.pop()
        if id(schema) in seen or isinstance(schema, bool):
            continue
        seen.add(id(schema))
        yield schema
        if wrong := {"$schema", "$id", "$anchor", "$dynamicAnchor", "$dynamicRef"} & schema.keys():
            raise Invalid(f"The output schema uses {min(wrong)} inside: that is not supported.")
        left += DRAFT202012.subresources_of(schema)
        if (ref := schema.get("$ref")) is None:
            continue
        if ref != "#" and not ref.startswith("#/"):
            raise Invalid(f"The output schema refers to something outside, or by name: {_short(ref)}")
        try:
            found = resolver.lookup(ref).contents
        except Unresolvable as error:
            raise Invalid(f"The output schema refers to nothing: {_short(ref)}") from error
        if id(found) not in seen:
            _is_schema(found)
            left.append(found)


def _is_schema(value: Any) -> None:
    try:
        Draft202012Validator.check_schema(value, format_checker=FormatChecker(()))
    except SchemaError as error:
        said = f"The output schema is no JSON Schema at {_short(error.json_path)}: {_short(error.message)}"
        raise Invalid(said) from None


def _too_deep() -> Invalid:
    return Invalid(f"The output schema is nested deeper than {SCHEMA_DEPTH_MAX} levels.")


class _TooMuch(Exception):
    pass


class _Steps:
    """What is left of a check."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.nested = 0
        self._nodes: dict[int, int] = {}
        self._engines: dict[str, tuple[SchemaValidator | None, int]] = {}

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _TooMuch

    def nodes(self, value: Any) -> int:
        """How many values it has in it. It lives longer than this, so that its id names it."""
        if not isinstance(value, list | dict):
            return 1
        if (known := self._nodes.get(id(value))) is None:
            inner = value.values() if isinstance(value, dict) else value
            known = self._nodes[id(value)] = 1 + sum(map(self.nodes, inner))
        return known

    def matches(self, pattern: str, text: str) -> bool | None:
        """Whether it is found in the text; None: this pattern is left unchecked."""
        if pattern not in self._engines:
            states = _states(pattern)
            small = states <= STATES_MAX
            self.take(50 + 10 * states if small else 50)
            self._engines[pattern] = _engine(pattern) if small else None, states
        engine, states = self._engines[pattern]
        if engine is None:
            self.take(1)
            return None
        self.take(1 + states * len(text) // 500)  # what the engine takes at worst
        return engine.isinstance_python(text)


def _misfit(root: Json, value: Any, count: int) -> ValidationError | None:
    """What is wrong with it, if anything. Raises _TooMuch, RecursionError, OverflowError."""
    steps = _Steps(count)

    def counted(word: str, keyword: Keyword) -> Keyword:
        def cost(said: Any, instance: Any) -> int:
            if word == "uniqueItems":
                return steps.nodes(instance)
            return steps.nodes(said) // 4 if word in {"enum", "const"} else 0

        def checked(validator: Any, said: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
            steps.take(1 + cost(said, instance))
            if steps.nested == NESTED_MAX:
                raise RecursionError
            steps.nested += 1
            try:
                for error in keyword(validator, said, instance, schema) or ():
                    # It holds the whole instance as text, and as many errors as there are branches are kept.
                    steps.take(4 + len(error.message) // 1000)
                    error.message = _short(error.message)
                    yield error
            finally:
                steps.nested -= 1

        return checked

    def pattern(_: Any, said: str, instance: Any, __: Any) -> Iterator[ValidationError]:
        if isinstance(instance, str) and steps.matches(said, instance) is False:
            yield ValidationError(f"{instance!r} does not match {said!r}")

    def pattern_properties(validator: Any, said: Json, instance: Any, _: Any) -> Iterator[ValidationError]:
        for name, inner in instance.items() if isinstance(instance, dict) else ():
            for regex, schema in said.items():
                if steps.matches(regex, name):
                    yield from validator.descend(inner, schema, path=name, schema_path=regex)

    def additional_properties(validator: Any, said: Any, instance: Any, schema: Json) -> Iterator[ValidationError]:
        named, regexes = schema.get("properties", {}), schema.get("patternProperties", {})
        for name, inner in instance.items() if isinstance(instance, dict) else ():
            # What may match a pattern that is left unchecked is not additional.
            if name not in named and all(steps.matches(regex, name) is False for regex in regexes):
                if said is False:
                    yield ValidationError(f"Additional properties are not allowed ({name!r} was unexpected)")
                else:
                    yield from validator.descend(inner, said, path=name)

    own: dict[str, Keyword] = {
        "pattern": pattern,
        "patternProperties": pattern_properties,
        "additionalProperties": additional_properties,
        "uniqueItems": _unique_items,
    }
    keywords = {word: counted(word, own.get(word, keyword)) for word, keyword in KEYWORDS.items()}
    validator = extend(Draft202012Validator, keywords)  # type: ignore[no-untyped-call]
    try:
        found = best_match(validator(root, registry=Registry()).iter_errors(value))
    except BaseException as error:
        # Where Python's stack ends inside the libraries' Rust, that panics, which is no Exception (tried).
        if type(error).__name__ == "PanicException":
            raise RecursionError from error
        raise
    assert found is None or isinstance(found, ValidationError)
    return found


def _unique_items(_: Any, said: bool, instance: Any, __: Any) -> Iterator[ValidationError]:
    if said and isinstance(instance, list) and len(set(map(_frozen, instance))) < len(instance):
        yield ValidationError(f"{instance!r} has non-unique elements")


def _frozen(value: Any) -> Any:
    """Equal where JSON Schema says equal: 1 is 1.0, and true is not 1."""
    match value:
        case dict():
            return "object", frozenset((name, _frozen(inner)) for name, inner in value.items())
        case list():
            return "array", tuple(map(_frozen, value))
        case bool():
            return "boolean", value
        case _:
            return value


# Patterns


def _engine(pattern: str) -> SchemaValidator | None:
    """Pydantic's, which is Rust's `regex`: linear in the text. None: not one of its patterns."""
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except UnknownPattern:
        return None


_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|\(\?(?!:|P?<[A-Za-z_])|.", re.DOTALL)


def _states(pattern: str) -> int:
    """About how large its automaton is: the length, counted repetitions written out. Never less than that."""
    if len(pattern) > STATES_MAX:
        return len(pattern)
    total, last = [0], 0
    for token in _TOKEN.finditer(pattern):
        said = token[0]
        if said == "(?":  # flags may change what the rest means
            return STATES_MAX + 1
        if said == "(":
            total.append(1)
        elif said == ")" and len(total) > 1:
            last = total.pop()
            total[-1] += last
        elif token[1]:
            times = max(int(token[2] or token[1]), int(token[1]), 1)
            total[-1] += last * (times - 1)
            last *= times
        elif said in "*+?":
            last += 1
            total[-1] += 1
        else:
            # Of all the letters of the world, there are many ranges.
            last = 8 if (len(said) > 1 and not (said.isascii() and "\\" not in said)) or said == "." else 1
            total[-1] += last
    return sum(total)
