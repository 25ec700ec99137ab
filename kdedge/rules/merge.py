"""What must hold of a network that is not trained but made of finished ones: `members` and `merge`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from kdedge.wording import KeyPath


def check(
    written: dict[str, Any], refused: Collection[KeyPath], width: Callable[[str], int]
) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong with the merged networks among `written`, the plain values of all networks.

    `width` gives the dense width of a network, or of one member of an ensemble; 0 where it is not known.
    """
    for name, network in written.items():
        at: KeyPath = ("networks", name)
        if not isinstance(network, dict) or any(path[:3] == (*at, "members") for path in refused):
            continue
        if network.get("members") is not None:
            yield from _merged(at, network, refused)
            yield from _members(at, network, written)
            if network.get("merge") == "sum":
                yield from _one_width(at, network["members"], width)
        elif network.get("merge") is not None:
            yield (*at, "merge"), "says how `members` are merged; write members: [NETWORK, NETWORK], or remove it"
        elif network.get("model") is None:
            yield (*at, "model"), "missing; write for example `model: tcn-student-4`"


def split_name(member: str) -> tuple[str, int | None]:
    """The network that an entry of `members` names, and the number of its member: `students.0`; None for all of it."""
    network, _, number = member.partition(".")
    return network, int(number) if number.isdecimal() and len(number) <= 2 else None


def _merged(at: KeyPath, network: dict[str, Any], refused: Collection[KeyPath]) -> Iterator[tuple[KeyPath, str]]:
    if "model" in network:
        yield (*at, "model"), "a network has a model, or is made of `members`; remove one of them"
    for key in network:
        if key not in ("model", "members", "merge") and (*at, key) not in refused:
            yield (*at, key), "remove it: a network that is made of `members` is not trained"
    if network.get("merge") is None:
        means = "the mean of their logits", "of their dense vectors, through the first one's head"
        yield (*at, "merge"), f"missing; write `merge: mean`, {means[0]}, or `merge: sum`, {means[1]}"


def _members(at: KeyPath, network: dict[str, Any], written: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Each is there once, and where one member of a network is meant, the network is an ensemble that has it."""
    members = network["members"]
    for n, member in enumerate(members):
        place: KeyPath = (*at, "members", n)
        name, number = split_name(member)
        if member in members[:n]:
            yield place, f"{member!r} is in the list twice"
        of = written.get(name)
        if member == name or not isinstance(of, dict):
            continue
        count = len(of["model"]) if isinstance(of.get("model"), list | tuple) else of.get("count")
        if of.get("split") != "none" or not isinstance(count, int):
            yield place, f"only of an ensemble (split: none) can one member be named; write {name!r}"
        elif number is None or number >= count:
            yield place, f"{name!r} has the members {name}.0 to {name}.{count - 1}"
    if len(members) == 1 and "." not in members[0]:
        yield (*at, "members"), f"{members[0]!r} alone is a network already; name two or more"


def _one_width(at: KeyPath, members: list[str], width: Callable[[str], int]) -> Iterator[tuple[KeyPath, str]]:
    first = width(members[0])
    for n, member in enumerate(members):
        if first and width(member) not in (0, first):
            message = f"{member!r} has a dense vector of {width(member)}, {members[0]!r} one of {first}; a sum needs one width"
            yield (*at, "members", n), message
