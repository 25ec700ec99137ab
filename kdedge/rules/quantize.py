"""What must hold of a network that trains quantized."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from kdedge.losses import LOSSES
from kdedge.rules.merge import split_name
from kdedge.wording import KeyPath, given

Finding = tuple[KeyPath, str]

_SAME = ("model", "count", "view")  # of a network and of the one whose weights it starts with


def check(written: dict[str, Any], refused: Collection[KeyPath]) -> Iterator[Finding]:
    """What is wrong with `quantize` in the networks `written`, in plain values."""
    known = {name: network for name, network in written.items() if isinstance(network, dict)}
    for name, network in known.items():
        at: KeyPath = ("networks", name)
        bad = {path[2] for path in refused if path[:2] == at and len(path) > 2}
        if network.get("members") is not None:
            if "members" not in bad:
                yield from _members(at, network["members"], known)
            continue
        quantize = network.get("quantize")
        if not isinstance(quantize, dict) or "quantize" in bad:
            continue
        if network.get("split") == "none":
            yield (*at, "quantize"), "rounds a network or a group, not an ensemble; remove it, or `split: none`"
        if not bad & {"learns", "head"} and not _head_learns(network):
            why = "nothing teaches its head, which learns the range of what it rounds from that"
            yield (*at, "quantize"), f"{why}; write head.fine_tune_epochs: 1 or more, or add a lesson on logits"
        source = quantize.get("from")
        if source in known and source != name:
            yield from _start((*at, "quantize", "from"), network, source, known[source])


def _members(at: KeyPath, members: list[str], known: dict[str, Any]) -> Iterator[Finding]:
    for n, member in enumerate(members):
        if known.get(split_name(member)[0], {}).get("quantize") is not None:
            message = f"{member!r} is quantized, and what is made of members is not; name one without `quantize`"
            yield (*at, "members", n), message


def _head_learns(network: dict[str, Any]) -> bool:
    lessons = network.get("learns")
    if not isinstance(lessons, list | tuple):
        return True  # the labels
    if (network.get("head") or {}).get("fine_tune_epochs"):
        return True
    return any(LOSSES[lesson["loss"]].model_fields["what"].default == "logits" for lesson in lessons)


def _start(at: KeyPath, network: dict[str, Any], source: str, of: dict[str, Any]) -> Iterator[Finding]:
    if of.get("quantize") is not None or of.get("members") is not None or of.get("split") == "none":
        yield at, f"{source!r} is quantized, an ensemble, or made of members; name a plain network or group"
        return
    for key in _SAME:
        if network.get(key) != of.get(key):
            different = f"{source!r} has {key}: {given(of.get(key))}, {at[1]!r} has {given(network.get(key))}"
            yield at, f"{different}; its weights fit where {', '.join(_SAME)} are the same"
            return
