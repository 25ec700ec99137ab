"""What must hold of a network that trains quantized."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from kdedge.losses import LOSSES
from kdedge.models import catalog
from kdedge.rules.merge import split_name
from kdedge.wording import KeyPath, given

Finding = tuple[KeyPath, str]

_SAME = ("model", "count")  # of a network and of the one whose weights it starts with
_SEEN = ("resize", "centre")  # of their views: what is left of an image; `fraction` and others choose images


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
        if quantize.get("weights", 8) != 8 and not bad & {"model", "count"}:
            yield from _inner_layers((*at, "quantize", "weights"), network)
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


def _inner_layers(at: KeyPath, network: dict[str, Any]) -> Iterator[Finding]:
    models = [model] if isinstance(model := network.get("model"), str) else model or ()
    if models and all(isinstance(one, str) and catalog.mlp_hidden(one) for one in models):
        yield at, f"{models[0]} has a first layer and a head, which keep 8 bits, and nothing between them; write 8"


def _start(at: KeyPath, network: dict[str, Any], source: str, of: dict[str, Any]) -> Iterator[Finding]:
    if of.get("quantize") is not None or of.get("members") is not None or of.get("split") == "none":
        yield at, f"{source!r} is quantized, an ensemble, or made of members; name a plain network or group"
        return
    if of.get("improve") is not None:
        yield at, f"{source!r} changes the models of its members (improve); name a network that keeps them"
        return
    pairs = [(key, of.get(key), network.get(key)) for key in _SAME]
    pairs += [(f"view.{key}", _view(of).get(key), _view(network).get(key)) for key in _SEEN]
    for key, its, own in pairs:
        if its != own:
            same = ", ".join(key for key, *_ in pairs)
            yield (
                at,
                f"{source!r} has {key}: {given(its)}, {at[1]!r} has {given(own)}; its weights fit where {same} are the same",
            )
            return


def _view(network: dict[str, Any]) -> dict[str, Any]:
    view = network.get("view")
    return view if isinstance(view, dict) else {}
