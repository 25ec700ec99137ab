"""YAML text -> plain values and the place of every key. Nothing is executed, and nothing is expanded.

A recipe may come from anywhere. So this reads PyYAML's events and builds dictionaries, lists and scalars itself: tags,
anchors, aliases, merge keys and second documents are refused where they stand, before they can grow. Scalars follow the
core rules of YAML 1.2: `1e-4` is a number and `no` is text, where PyYAML alone says '1e-4' and False.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdedge.errors import Problem, RecipeError
from kdedge.wording import KeyPath, dotted, given, nearest, shorten, unknown

MAX_BYTES = 1_000_000  # a recipe is a page
MAX_DEPTH = 50
MAX_DIGITS = 40  # longer numbers are never meant, and Python refuses to convert the longest

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}

_HINTS = {  # what PyYAML says -> what to do about it
    "mapping values are not allowed here": "a ':' too many or a wrong indentation; text with ': ' in it needs quotes",
    "could not find expected ':'": "a key without ':' and value",
    "unexpected end of stream": "a quote that is opened here is never closed",
    "'<stream end>'": "a bracket is never closed",
    "'\\t'": "a tab; YAML is separated by spaces",
    "but got '['": 'text with a [ inside of { } needs quotes, such as "learns[0]"; learns.0 is the same',
    "cannot start any token": "text that starts with this character needs quotes",
}


@dataclass
class Document:
    """Plain values (dict, list, str, int, float, bool, None) and where each stands."""

    value: Any = None
    places: dict[KeyPath, int | str] = field(default_factory=dict)  # line from 1, or the --set that wrote it
    problems: list[Problem] = field(default_factory=list)
    refused: set[KeyPath] = field(default_factory=set)  # values left out, after a problem that says so
    whole: bool = True  # False when reading stopped before the end

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A problem at `path`, with its line, or its nearest parent's; `--set ...` stands in the line's place."""
        place = self.place(path)
        if isinstance(place, str):
            setting = f"--set {shorten(place)}"
            return Problem(setting if path in self.places else f"{setting}: {dotted(path)}", message)
        return Problem(dotted(path), message, place)

    def place(self, path: KeyPath) -> int | str | None:
        """The line or --set that wrote what stands at `path`, or its nearest parent; None for a document without any."""
        return next((self.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.places), None)


def read_text(path: Path) -> str:
    """The text of a recipe's file. Raises RecipeError when it cannot be read, is too large or is no text."""
    problem = None
    content = b""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) <= MAX_BYTES:
            return content.decode("utf-8-sig")
        problem = Problem("", f"larger than {MAX_BYTES:,} bytes; this is no recipe")
    except UnicodeDecodeError as error:
        problem = Problem("", "not a text in UTF-8", content.count(b"\n", 0, error.start) + 1)
    except FileNotFoundError:
        meant = nearest(str(path), [str(file) for file in path.parent.glob("*.yaml")])
        problem = Problem("", "there is no such file" + (f"; did you mean {meant}?" if meant else ""))
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        problem = Problem("", f"cannot be read: {getattr(error, 'strerror', None) or error}")
    raise RecipeError(str(path), [problem])


def read(text: str) -> Document:
    """The one document in `text`. What is wrong stands in `problems`; nothing is raised."""
    document = Document()
    tabs = [n for n, line in enumerate(text.split("\n"), 1) if "\t" in line[: len(line) - len(line.lstrip())]]
    if tabs:
        document.problems += [Problem("", "a tab in the indentation; YAML is indented with spaces", n) for n in tabs]
        document.whole = False
        return document
    try:
        _Reader(document).read(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.problems.append(Problem("", f"the character {error.character:#04x} is not allowed in YAML", line))
        document.whole = False
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        hint = next((f": {hint}" for words, hint in _HINTS.items() if words in said), "")
        document.problems.append(Problem("", f"not valid YAML ({said}){hint}", mark.line + 1 if mark else None))
        document.whole = False
    except _StopReading:
        document.whole = False
    return document


class _StopReading(Exception):
    """The rest of the text is not worth reading, or not safe to read."""


class _Reader:
    """Builds a document from events; one level of Python calls a level of nesting, so MAX_DEPTH bounds both."""

    def __init__(self, document: Document) -> None:
        self.document = document

    def read(self, events: Iterable[yaml.Event]) -> None:
        self.events = iter(events)
        started = False
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if started:
                    self._complain((), "a second document starts here; a recipe is one document", event)
                    raise _StopReading
                started = True
                first = next(self.events)
                self.document.places[()] = _line(first)
                self.document.value = self._value(first, ())

    def _complain(self, path: KeyPath, message: str, event: yaml.Event) -> None:
        self.document.problems.append(Problem(dotted(path), message, _line(event)))

    def _value(self, event: yaml.Event, path: KeyPath) -> Any:
        if len(path) > MAX_DEPTH:
            self._complain((), f"nested deeper than {MAX_DEPTH} levels", event)
            raise _StopReading
        self._check_plain(event, path)
        if isinstance(event, yaml.ScalarEvent):
            try:
                return _scalar(event)
            except ValueError as error:
                self._complain(path, str(error), event)
                self.document.refused.add(path)
        elif isinstance(event, yaml.SequenceStartEvent):
            return self._list(path)
        elif isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        return None

    def _check_plain(self, event: yaml.Event, path: KeyPath) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._complain(path, f"the alias *{event.anchor} is not allowed in a recipe; write the value out", event)
            self.document.refused.add(path)
            return
        assert isinstance(event, yaml.ScalarEvent | yaml.SequenceStartEvent | yaml.MappingStartEvent), event
        if event.anchor is not None:
            self._complain(path, f"the anchor &{event.anchor} is not allowed in a recipe; remove it", event)
        if event.tag is not None:
            self._complain(path, f"the tag {event.tag!r} is not allowed in a recipe; write the value alone", event)
            self.document.refused.add(path)

    def _list(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            at = (*path, len(items))
            self.document.places.setdefault(at, _line(event))
            items.append(self._value(event, at))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._key(event, path)
            if key is None:
                self.document.refused.add(path)
                self._value(next(self.events), (*path, event.value if isinstance(event, yaml.ScalarEvent) else "?"))
                continue
            at = (*path, key)
            if key in mapping:
                self._complain(at, f"the key is written twice, first in line {self.document.places[at]}", event)
            self.document.places[at] = _line(event)
            mapping[key] = self._value(next(self.events), at)
        return mapping

    def _key(self, event: yaml.Event, path: KeyPath) -> str | None:
        """The key, or None when it is not one that a recipe can have."""
        if not isinstance(event, yaml.ScalarEvent):
            self._complain(path, "a list, mapping or alias stands where a key should; keys are names", event)
            if not isinstance(event, yaml.AliasEvent):
                self._value(event, (*path, "?"))
            return None
        self._check_plain(event, path)
        try:
            key = _scalar(event)
        except ValueError as error:
            self._complain(path, str(error), event)
            return None
        if event.style is None and key == "<<":
            self._complain(path, "the merge key << is not allowed in a recipe; write the keys out", event)
            return None
        if not isinstance(key, str):
            self._complain(path, f"the key {shorten(event.value)!r} is not a name", event)
            return None
        return key


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None, "PyYAML marks every event that it parses from text"
    return event.start_mark.line + 1


def _scalar(event: yaml.ScalarEvent) -> str | int | float | bool | None:
    """The value of a scalar by YAML 1.2's core rules. Raises ValueError for what no recipe can mean."""
    text = event.value
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair is no character")
    if event.style is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} digits; a recipe's numbers have at most {MAX_DIGITS}")
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


_PATH = re.compile(r"[^.\[\]=\s]+(\.[^.\[\]=\s]+|\[[0-9]+\])*")

Keys = Callable[[KeyPath], Iterable[str]]


def assign(document: Document, setting: str, keys_at: Keys) -> None:
    """Write one `--set key.key[0].key=value` into the document; what cannot be done becomes a problem."""
    path, equals, text = setting.partition("=")
    value = read(text)
    try:
        if not equals or not _PATH.fullmatch(path):
            raise ValueError("expected KEY=VALUE, for example --set networks.teacher.fit.epochs=2")
        if value.problems:
            raise ValueError("; ".join(problem.message for problem in value.problems))
        put(document, path, value.value, setting, keys_at)
    except ValueError as error:
        document.problems.append(Problem(f"--set {shorten(setting)}", str(error)))


def put(document: Document, path: str, value: Any, place: int | str, keys_at: Keys) -> None:
    """Write a value at `key.key[0].key`, where `place`, a line or a --set, says so. Raises ValueError when it cannot be.

    `keys_at` says which keys may stand somewhere: a mapping that was not written there is made.
    """
    if not _PATH.fullmatch(path):
        raise ValueError(f"{shorten(path)!r} is no path; write it like networks.teacher.fit.epochs")
    names = re.findall(r"[^.\[\]]+", path)
    node = document.value
    at: KeyPath = ()
    for n, name in enumerate(names):
        key = _key_in(node, name, at)
        here, at = at, (*at, key)
        if n == len(names) - 1:
            node[key] = value
            document.places = {path: place for path, place in document.places.items() if path[: len(at)] != at}
            document.places[at] = place
        elif isinstance(node, dict) and node.get(key) is None:
            known = dict.fromkeys([*keys_at(here), *node])
            if key not in known:
                raise ValueError(unknown("key", name, known))
            if names[n + 1].isdecimal():
                raise ValueError(f"{dotted(at)} is not written in the recipe; set the whole list")
            node[key] = {}
            document.places[at] = place
        node = node[key]


def _key_in(node: Any, name: str, at: KeyPath) -> Any:
    """`name` as the index or key that `node` takes. Raises ValueError when it can have none of that name."""
    if isinstance(node, dict):
        return name
    if not isinstance(node, list):
        raise ValueError(f"{dotted(at)} is {given(node)}, a single value without keys")
    if re.fullmatch("[0-9]{1,9}", name) and int(name) < len(node):
        return int(name)
    raise ValueError(f"{dotted(at)} is a list of {len(node)}, counted from {dotted((*at, 0))}")
