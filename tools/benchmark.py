"""Speed of our own code against what a user would write, side by side in one run, as ratios.

    python tools/benchmark.py train [--rounds 5] [--json]

`train` teaches the four students of recipes/tcn4.yaml the teacher's dense vector, on the CPU:
  (a) as in a tutorial: torchvision's dataset and transforms, a DataLoader, the live teacher, one student at a time;
  (b) with kdedge's own loop: cached targets, images as uint8 tensors, all siblings in one pass.
Both do the same work on the same images in batches of the same size, and take turns, with memory kept as `distill` keeps
it, which helps both. An "image" is one image seen by one student.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import FashionMNIST

from kdedge.data.batches import Samples, Views
from kdedge.data.load import Dataset, load
from kdedge.devices.runner import device
from kdedge.distillation import keep_freed_memory
from kdedge.fit import fit
from kdedge.losses import MSE
from kdedge.networks import new_network
from kdedge.recipe import load_recipe
from kdedge.targets import compute

IMAGES = 4096  # an epoch of each loop, short enough to take turns often
RECIPE = Path(__file__).parent.parent / "recipes" / "tcn4.yaml"


def train(rounds: int) -> dict[str, Any]:
    """Images per second of both loops, and their ratio, as medians over rounds."""
    recipe = load_recipe(RECIPE)
    data = load(recipe.data.name)
    teacher, students = new_network(recipe, "teacher").eval(), new_network(recipe, "students")
    size, flip = recipe.networks["students"].fit.batch_size, recipe.networks["students"].fit.augment.flip

    samples = Samples.to(
        torch.device("cpu"), data.train_images[:IMAGES], data.train_labels[:IMAGES], data.info, Views(flip)
    )
    began = time.perf_counter()
    cached = compute(teacher, samples, lambda done, total: None)
    cache_s = time.perf_counter() - began
    settings = recipe.networks["students"].fit.model_copy(update={"epochs": 1})
    few = Samples(samples.images[:10], samples.labels[:10], data.info, Views())

    with tempfile.TemporaryDirectory() as folder:
        loader = _loader(Path(folder), data, flip, size)
        plain_teacher, plain_students = _plain(teacher), [_plain(member) for member in students.members]
        optimizers = [torch.optim.Adam(student.parameters()) for student in plain_students]

        def user_loop() -> int:
            chunk = round_number % len(plain_students)
            _user_epoch(loader, plain_teacher, plain_students[chunk], optimizers[chunk], chunk)
            return IMAGES

        def our_loop() -> int:
            fit(
                students,
                [(MSE(source="teacher"), cached)],
                samples,
                few,
                settings,
                seed=round_number,
                checkpoint=Path(folder) / "checkpoint",
                checkpoint_every_s=1e9,
                watch=lambda seen: None,
                stop=lambda: False,
            )
            return IMAGES * len(students.members)

        user, ours = [], []
        for round_number in range(rounds + 1):  # the first warms both up and is not counted
            user.append(_per_s(user_loop))
            ours.append(_per_s(our_loop))
    user, ours = user[1:], ours[1:]
    ratios = [b / a for a, b in zip(user, ours, strict=True)]
    return {
        "user_loop_images_per_s": round(statistics.median(user)),
        "kdedge_images_per_s": round(statistics.median(ours)),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "rounds": rounds,
        "batch_size": size,
        # Computing the targets is paid once a teacher: so many seconds for each epoch's worth of images and view.
        "cache_images_per_s": round(samples.views.count * IMAGES / cache_s),
        "threads": torch.get_num_threads(),
        "device": device(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }


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
        loss.backward()
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


def _plain(module: nn.Module) -> nn.Module:
    """The same backbone as a tutorial has it: default memory layout, ReLU before pooling, nothing in place."""
    backbone = module.members[0] if hasattr(module, "members") else module
    layers: list[nn.Module] = []
    for layer in backbone:
        kind = type(layer).__name__
        if kind == "ReLUMaxPool":
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        elif kind == "Conv2d":
            layers.append(nn.Conv2d(layer.in_channels, layer.out_channels, 3))
        elif kind == "Linear":
            layers.append(nn.Linear(layer.in_features, layer.out_features))
        else:
            layers.append(nn.ReLU() if kind == "ReLU" else nn.Flatten())
    return nn.Sequential(*layers)


def _per_s(work: Callable[[], int]) -> float:
    began = time.perf_counter()
    images = work()
    return images / (time.perf_counter() - began)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    arguments = parser.parse_args()
    keep_freed_memory()
    result = train(arguments.rounds)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"user's loop   {result['user_loop_images_per_s']:>7,} images/s")
        print(f"kdedge        {result['kdedge_images_per_s']:>7,} images/s")
        print(
            f"ratio         {result['ratio']:>7} ({result['ratio_min']} to {result['ratio_max']} in {result['rounds']} rounds)"
        )


if __name__ == "__main__":
    main()
