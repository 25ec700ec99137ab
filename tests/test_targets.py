"""What students learn from: cached or live, the numbers are the same, and a cache is whole or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdedge import targets as module
from kdedge.data.batches import Batch, Samples, Views
from kdedge.data.catalog import DATASETS
from kdedge.errors import RunError
from kdedge.models.network import Network, build
from kdedge.store import load_tensors
from kdedge.targets import Cached, Live, Rest, compute, targets

SAMPLES = 40
BOTH = ("dense", "logits")


def teacher(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return build(["tcn-student-4"], 64, 10).to(memory_format=torch.channels_last)


def data(views: Views | None = None) -> Samples:
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 1, 28, 28), np.uint8)
    labels = np.arange(SAMPLES) % 10
    return Samples.to(torch.device("cpu"), images, labels, DATASETS["fashion-mnist"], views or Views(flip=True))


def quiet(done: int, total: int) -> None:
    pass


def test_cached_is_live_for_every_sample_in_every_view() -> None:
    network, samples = teacher().eval(), data(Views(flip=True, shift=1))
    cached, live = compute(network, samples, BOTH, quiet), Live(network)
    assert {name: output.shape for name, output in cached.outputs.items()} == {
        "dense": (18, SAMPLES, 64),
        "logits": (18, SAMPLES, 10),
    }
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        order, views = torch.randperm(SAMPLES, generator=generator)[:7], torch.randint(18, (7,), generator=generator)
        batch = Batch(order, views)
        expected = live(batch, samples.seen(batch.samples, batch.views))
        found = cached(batch, None)
        assert found.keys() == expected.keys() == {"dense", "logits"}
        for what in found:
            torch.testing.assert_close(found[what], expected[what], rtol=1e-5, atol=1e-5)


def test_dense_is_the_input_of_the_head() -> None:
    network = teacher().eval()
    outputs = compute(network, data(), BOTH, quiet).outputs
    torch.testing.assert_close(outputs["logits"], outputs["dense"] @ network.head.weight.T + network.head.bias)


def test_the_rest_is_what_one_network_leaves_over_of_another() -> None:
    """Of a cached network by a live one, which needs the images."""
    samples, batch = data(), Batch(torch.tensor([3, 1, 4]), torch.tensor([0, 1, 0]))
    first, second = compute(teacher(1).eval(), samples, BOTH, quiet), Live(teacher(2).eval())
    rest, images = Rest(first, second), samples.seen(batch.samples, batch.views)
    assert rest.needs_images and not Rest(first, first).needs_images
    found = rest(batch, images)["dense"]
    torch.testing.assert_close(found, first(batch, images)["dense"] - second(batch, images)["dense"])


def test_maps_of_layers_come_from_the_live_network_and_are_not_kept(tmp_path: Path) -> None:
    network, samples = build(["tcn-student-8"], 32, 10), data()
    found = targets(network, samples, tmp_path / "kept", wanted={"conv2"}, epochs=5, progress=quiet)
    assert isinstance(found, Live) and not (tmp_path / "kept").exists()
    batch = Batch(torch.arange(3), torch.zeros(3, dtype=torch.int64))
    seen = samples.seen(batch.samples, batch.views)
    outputs = found(batch, seen)
    assert outputs.keys() == {"dense", "logits", "conv2"} and not outputs["conv2"].requires_grad
    assert torch.equal(outputs["conv2"], network.members[0][:4](seen))  # type: ignore[index]
    assert torch.equal(outputs["logits"], network(seen))


def test_outputs_carry_no_gradient() -> None:
    network, samples = teacher().eval(), data()
    batch = Batch(torch.arange(4), torch.zeros(4, dtype=torch.int64))
    live = Live(network)(batch, samples.seen(batch.samples, batch.views))
    cached = compute(network, samples, BOTH, quiet)
    assert not any(tensor.requires_grad for tensor in (*live.values(), *cached.outputs.values()))


@pytest.mark.parametrize(
    ("views", "epochs", "kind"),
    [
        (Views(), 1, Cached),
        (Views(flip=True), 1, Live),  # half of the outputs would be computed for nothing
        (Views(flip=True), 2, Cached),
        (Views(flip=True, shift=1), 17, Live),
        (Views(flip=True, shift=1), 18, Cached),
    ],
)
def test_cached_when_each_view_is_seen_about_once(tmp_path: Path, views: Views, epochs: int, kind: type) -> None:
    found = targets(teacher(), data(views), tmp_path / "outputs", wanted=BOTH, epochs=epochs, progress=quiet)
    assert type(found) is kind and found.needs_images == (kind is Live)
    assert (tmp_path / "outputs").is_dir() == (kind is Cached)


@pytest.mark.parametrize(("spare", "kind"), [(0, Cached), (-1, Live)])
def test_live_when_the_cache_would_be_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int, kind: type
) -> None:
    monkeypatch.setattr(module, "CACHE_LIMIT_BYTES", 2 * SAMPLES * 10 * 4 + spare)
    folder = tmp_path / "outputs"
    assert type(targets(teacher(), data(), folder, wanted=["logits"], epochs=5, progress=quiet)) is kind
    assert type(targets(teacher(), data(), tmp_path / "both", wanted=BOTH, epochs=5, progress=quiet)) is Live


def test_the_second_call_reads_the_file(tmp_path: Path) -> None:
    """It is given another network, whose outputs must not appear."""
    first = targets(teacher(0), data(), tmp_path / "outputs", wanted=BOTH, epochs=2, progress=quiet)
    seen: list[int] = []
    second = targets(
        teacher(1), data(), tmp_path / "outputs", wanted=BOTH, epochs=2, progress=lambda done, total: seen.append(done)
    )
    assert isinstance(first, Cached) and isinstance(second, Cached) and not seen
    assert first.outputs.keys() == second.outputs.keys() == set(BOTH)
    assert all(torch.equal(output, second.outputs[name]) for name, output in first.outputs.items())


def test_only_what_is_wanted_is_kept(tmp_path: Path) -> None:
    """A dense vector may be four hundred times as wide as the logits."""
    for _ in ("computed", "read"):
        found = targets(teacher(), data(), tmp_path / "outputs", wanted=["logits"], epochs=2, progress=quiet)
        assert isinstance(found, Cached) and found.outputs.keys() == {"logits"}
    assert load_tensors(tmp_path / "outputs" / "outputs.safetensors").keys() == {"logits"}


def test_progress_counts_images_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 30)
    seen: list[tuple[int, int]] = []
    targets(
        teacher(),
        data(),
        tmp_path / "outputs",
        wanted=BOTH,
        epochs=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(30, 80), (40, 80), (70, 80), (80, 80)]


def test_batch_norm_of_the_teacher_stays_as_it_is(tmp_path: Path) -> None:
    """A teacher that still moves would teach each sibling something else."""
    member = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4))
    network = Network([member], nn.Linear(4, 10)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for epochs, kind in ((1, Live), (2, Cached)):
        found = targets(network, data(), tmp_path / "outputs", wanted=BOTH, epochs=epochs, progress=quiet)
        assert type(found) is kind
        batch = Batch(torch.arange(8), torch.zeros(8, dtype=torch.int64))
        found(batch, data().seen(batch.samples, batch.views))
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_stop_while_computing_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        targets(teacher(), data(), tmp_path / "outputs", wanted=BOTH, epochs=2, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    """Also when it can still be read: one flipped bit would teach every student of every later run."""
    folder = tmp_path / "outputs"
    targets(teacher(), data(), folder, wanted=BOTH, epochs=2, progress=quiet)
    file = folder / "outputs.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"x" * len(whole), whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(content)
        with pytest.raises(RunError, match=r"outputs\.safetensors was changed.*[Dd]elete"):
            targets(teacher(), data(), folder, wanted=BOTH, epochs=2, progress=quiet)
    file.unlink()
    with pytest.raises(RunError, match=r"outputs\.safetensors is missing.*[Dd]elete"):
        targets(teacher(), data(), folder, wanted=BOTH, epochs=2, progress=quiet)
    (folder / "outputs.json").write_text("{}")
    file.write_bytes(whole)
    with pytest.raises(RunError, match=r"outputs\.safetensors was changed"):
        targets(teacher(), data(), folder, wanted=BOTH, epochs=2, progress=quiet)
