"""Training: four students learn the teacher's dense vector, by our loop and by the one that a user would write."""

from __future__ import annotations

import multiprocessing
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import FashionMNIST

from benchmarks import MACHINE
from kdedge.data.batches import Samples, Views
from kdedge.data.load import Dataset, load
from kdedge.devices.runner import device
from kdedge.fit import Learner, Taught, fit
from kdedge.losses.dense import MSE
from kdedge.machine import keep_freed_memory, multiplies_bf16
from kdedge.models.layers import ReLUMaxPool
from kdedge.networks import new_network
from kdedge.targets import compute
from kdedge.variants import load_recipe

IMAGES = 4096  # an epoch of each loop, short enough to take turns often
RECIPE = load_recipe(Path(__file__).parents[2] / "recipes" / "tcn4.yaml")
STUDENTS = RECIPE.networks["students"]
BATCH_SIZES = (64, STUDENTS.fit.batch_size, 128)  # 64 is what PyTorch's quickstart has, also on Fashion-MNIST

Epoch = Callable[[int], int]  # trains once over the images, with that seed; gives the number of images seen by students


def measure(rounds: int) -> dict[str, Any]:
    """Images per second of both loops, and their ratio, as medians over rounds: of the first size of batches, and of each."""
    rows = [_compared(rounds, batch_size) for batch_size in BATCH_SIZES]
    return {
        **rows[0],
        "rows": rows,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "kdedge_in_bf16": multiplies_bf16(torch.device("cpu")),
        "device": {key: device()[key] for key in MACHINE},
        "versions": {"torch": torch.__version__},
    }


def _compared(rounds: int, batch_size: int) -> dict[str, float]:
    turns = [_process(_user_loop, batch_size), _process(_our_loop, batch_size)]
    speeds: list[list[float]] = [[], []]
    for number in range(rounds + 1):  # the first warms both up and is not counted
        for turn, speed in zip(turns, speeds, strict=True):
            turn.send(number)
            speed.append(turn.recv())
    user, ours = speeds[0][1:], speeds[1][1:]
    ratios = [b / a for a, b in zip(user, ours, strict=True)]
    return {
        "batch_size": batch_size,
        "user_loop_images_per_s": round(statistics.median(user)),
        "kdedge_images_per_s": round(statistics.median(ours)),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }


def _process(loop: Callable[[Path, int], Epoch], batch_size: int) -> Connection:
    """A fresh process that trains an epoch for each number it is sent, and answers with images per second."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    spawn.Process(target=_take_turns, args=(loop, batch_size, there), daemon=True).start()
    there.close()  # so that the end of the process is the end of the pipe
    return here


def _take_turns(loop: Callable[[Path, int], Epoch], batch_size: int, pipe: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        epoch = loop(Path(folder), batch_size)
        while True:
            try:
                number = pipe.recv()
            except EOFError:
                return
            began = time.perf_counter()
            images = epoch(number)
            pipe.send(images / (time.perf_counter() - began))


def _our_loop(folder: Path, batch_size: int) -> Epoch:
    """All students on cached targets, as `kdedge distill` trains them."""
    keep_freed_memory()
    data = load(RECIPE.data.name)
    teacher, students = new_network(RECIPE, "teacher").eval(), new_network(RECIPE, "students")
    settings = STUDENTS.fit.model_copy(update={"epochs": 1, "batch_size": batch_size})
    views = Views(settings.augment.flip, settings.augment.shift)
    cpu = torch.device("cpu")
    samples = Samples.to(cpu, data.train_images[:IMAGES], data.train_labels[:IMAGES], data.info, views)
    few = Samples(samples.images[:10], samples.labels[:10], data.info, Views())  # fit validates after an epoch
    cached = compute(teacher, samples, ["dense"], lambda done, total: None)

    def epoch(number: int) -> int:
        fit(
            [Learner(students, [Taught(MSE(source="teacher"), cached)], settings, number)],
            samples,
            few,
            checkpoint=folder / "checkpoint",
            checkpoint_every_s=1e9,
            watch=lambda seen: None,
            stop=lambda: False,
        )
        return IMAGES * len(students.members)

    return epoch


def _user_loop(folder: Path, batch_size: int) -> Epoch:
    """One student an epoch, in turn, on a live teacher."""
    loader = _loader(folder, load(RECIPE.data.name), STUDENTS.fit.augment.flip, batch_size)
    teacher = _plain(new_network(RECIPE, "teacher").members[0]).eval()
    students = [_plain(member) for member in new_network(RECIPE, "students").members]
    optimizers = [torch.optim.Adam(student.parameters()) for student in students]

    def epoch(number: int) -> int:
        chunk = number % len(students)
        _user_epoch(loader, teacher, students[chunk], optimizers[chunk], chunk)
        return IMAGES

    return epoch


def _user_epoch(
    loader: DataLoader[Any], teacher: nn.Module, student: nn.Module, optimizer: torch.optim.Optimizer, chunk: int
) -> None:
    student.train()
    for images, _ in loader:
        with torch.no_grad():
            dense = teacher(images)
        learned = student(images)
        width = learned.shape[1]
        loss = nn.functional.mse_loss(learned, dense[:, chunk * width : (chunk + 1) * width])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _loader(folder: Path, data: Dataset, flip: bool, size: int) -> DataLoader[Any]:
    """The first IMAGES training images as torchvision gives them. Workers would only take the two cores from training."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("t10k", data.test_images, data.test_labels),
    ):
        head = struct.pack(">4I", 0x803, *np.squeeze(images, 1).shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, len(labels)) + labels.astype("u1").tobytes()
        )
    steps = [transforms.RandomHorizontalFlip()] if flip else []
    steps += [transforms.ToTensor(), transforms.Normalize((data.info.mean / 255,), (data.info.std,))]
    dataset = FashionMNIST(str(folder), train=True, transform=transforms.Compose(steps))
    return DataLoader(Subset(dataset, range(IMAGES)), size, shuffle=True)


def _plain(backbone: nn.Module) -> nn.Module:
    """The same backbone as a tutorial has it: default memory layout, ReLU before pooling, nothing in place."""
    layers: list[nn.Module] = []
    for layer in backbone.children():
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.Conv2d(layer.in_channels, layer.out_channels, 3))
        elif isinstance(layer, nn.Linear):
            layers.append(nn.Linear(layer.in_features, layer.out_features))
        elif isinstance(layer, ReLUMaxPool):
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        else:
            layers.append(nn.ReLU() if isinstance(layer, nn.ReLU) else nn.Flatten())
    return nn.Sequential(*layers)


def show(result: dict[str, Any]) -> None:
    """Print both speeds and their ratio for each size of batches."""
    print("images/s    user's loop   kdedge  ratio")
    for row in result["rows"]:
        speeds = f"{row['user_loop_images_per_s']:>11,}  {row['kdedge_images_per_s']:>7,}"
        spread = f"{row['ratio_min']} to {row['ratio_max']} in {result['rounds']} rounds"
        print(f"batch {row['batch_size']:>4}  {speeds}  {row['ratio']:>5} ({spread})")
