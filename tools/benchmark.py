"""Speed of our own code against what a user would write, side by side in one run, as ratios.

    python tools/benchmark.py train [--rounds 5] [--batch-size N] [--json]

`train` teaches the four students of recipes/tcn4.yaml the teacher's dense vector, on the CPU:
  (a) as in a tutorial: torchvision's dataset and transforms, a DataLoader, the live teacher, one student at a time;
  (b) with kdedge's own loop: cached targets, images as uint8 tensors, the siblings side by side.
Both do the same work on the same images in batches of the same size. They take turns, each in a process of its own, because
how a process keeps its memory is its own too, and is part of (b). The targets of (b) are computed before, once a teacher.
An "image" is one image seen by one student.

    python tools/benchmark.py deploy [--rounds 5] [--json]

`deploy` measures exported files in ONNX Runtime, batch 1 on one thread, interleaved in one process a round: the teacher in
fp32, and a student or a group in one graph, in fp32 and int8, plain and as `kdedge export` rewrites it (models/rewriting.py).
Ratios are of p50 to the teacher's in the same round. Weights are untrained and pixels random. Trained files can differ, and why
is open: tcn4 in int8 had 0.515 here, and 0.62 by `kdedge bench` on trained weights and test images (docs/lab-notes.md).
Where openvino is installed, the same files are run in it as well, on one thread, its ratios being to its own time of the
teacher's file.

    python tools/benchmark.py calibrate [--images 512] [--json]

`calibrate` looks for the ranges of a ResNet-50's activations on images of 224x224, random ones, by each calibrator in a process of
its own: seconds, and the peak of its memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import FashionMNIST
from torchvision.models import resnet50

from exporters.calibration import Calibration, ranges
from exporters.float32 import PIXELS, PixelScale, from_pixels, to_graph
from exporters.int8 import quantize
from kdedge import devices
from kdedge.data.batches import Samples, Views, normalise, pixel_scale
from kdedge.data.catalog import DATASETS
from kdedge.data.load import Dataset, load
from kdedge.devices.runner import device, peak_rss_bytes
from kdedge.fit import Learner, Taught, fit
from kdedge.losses.dense import MSE
from kdedge.machine import keep_freed_memory
from kdedge.models.layers import ReLUMaxPool
from kdedge.models.rewriting import for_float32, for_int8, rewritten
from kdedge.networks import new_network
from kdedge.store import sha256
from kdedge.targets import compute
from kdedge.validate import put_array
from kdedge.variants import load_recipe, load_recipes

IMAGES = 4096  # an epoch of each loop, short enough to take turns often
RECIPES = Path(__file__).parent.parent / "recipes"
RECIPE = load_recipe(RECIPES / "tcn4.yaml")
STUDENTS = RECIPE.networks["students"]
DEPLOYED = {  # case: recipe of the teacher, recipe of the network beside it, and which one that is
    "tcn4": ("tcn4", "tcn4", "students"),
    "ta4": ("ta_hierarchical", "ta_hierarchical", "four"),
    "S1": ("ta_hierarchical", "ta_hierarchical", "one"),
    "tcn4_edge": ("tcn4_edge", "tcn4_edge", "students"),
    "tcn4_edge, by tcn4's teacher": ("tcn4", "tcn4_edge", "students"),
}
OPENVINO = importlib.util.find_spec("openvino") is not None
SAMPLES = 64  # random images, for calibration and in turn for latency
IMAGENET = (3, 224, 224)
SECONDS = 1.0  # for which each file is timed in each round

P50s = dict[str, list[float]]  # of each file, in ms, in every round

Epoch = Callable[[int], int]  # trains once over the images, with that seed; gives the number of images seen by students


def train(rounds: int, batch_size: int) -> dict[str, Any]:
    """Images per second of both loops, and their ratio, as medians over rounds."""
    turns = [_process(_user_loop, batch_size), _process(_our_loop, batch_size)]
    speeds: list[list[float]] = [[], []]
    for number in range(rounds + 1):  # the first warms both up and is not counted
        for turn, speed in zip(turns, speeds, strict=True):
            turn.send(number)
            speed.append(turn.recv())
    user, ours = speeds[0][1:], speeds[1][1:]
    ratios = [b / a for a, b in zip(user, ours, strict=True)]
    return {
        "user_loop_images_per_s": round(statistics.median(user)),
        "kdedge_images_per_s": round(statistics.median(ours)),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "rounds": rounds,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "device": device(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
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


def deploy(rounds: int) -> dict[str, Any]:
    """p50 of the files of each case, and the median over rounds of their ratios to the teacher's."""
    rows, own_cpu_share = [], 1.0
    for case, which in DEPLOYED.items():
        with tempfile.TemporaryDirectory() as folder:
            images, paths = _write_files(Path(folder), *which)
            p50_ms, answers = _onnxruntime_ms(Path(folder), images, paths, rounds)
            row = {"case": case, **_ratios(p50_ms)}
            if OPENVINO:
                row["openvino"] = _ratios(_openvino_ms(images, paths, rounds))
        rows.append(row)
        own_cpu_share = min(own_cpu_share, *(answer.own_cpu_share for answer in answers))
    conditions = {"rounds": rounds, "seconds": SECONDS, "threads": 1, "batch": 1, "weights": "untrained"}
    versions = {name: version(name) for name in ("onnxruntime", "torch", *(["openvino"] if OPENVINO else []))}
    measured = {"own_cpu_share": round(own_cpu_share, 4), "device": _machine(answers[0].device), "versions": versions}
    return {"rows": rows, **conditions, **measured}


def _machine(described: dict[str, Any]) -> dict[str, Any]:
    """What of a device outlasts the measurement."""
    return {key: described[key] for key in ("cpu", "cpu_class", "cores", "python")}


def _ratios(p50_ms: P50s) -> dict[str, Any]:
    """The median p50 of each file, and how it stands to the teacher's of the same round; `ratio` is what export ships in int8."""
    teacher = p50_ms["teacher_fp32"]
    row = {f"{file}_ms_p50": round(statistics.median(ms), 4) for file, ms in p50_ms.items()}
    ratios = {
        file: [own / theirs for own, theirs in zip(ms, teacher, strict=True)]
        for file, ms in p50_ms.items()
        if ms is not teacher
    }
    row |= {f"{file}_ratio": round(statistics.median(found), 3) for file, found in ratios.items()}
    ours = ratios["merged_int8"]
    return row | {"ratio": row["merged_int8_ratio"], "ratio_min": round(min(ours), 3), "ratio_max": round(max(ours), 3)}


def _write_files(folder: Path, teachers: str, recipe: str, name: str) -> tuple[np.ndarray, dict[str, Path]]:
    """The files of a case, untrained, and random images for them, uint8 [SAMPLES, C, H, W]."""
    teachers_recipe, described = (load_recipes(RECIPES / f"{one}.yaml")[0] for one in (teachers, recipe))
    info = DATASETS[described.data.name]
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, *info.shape), np.uint8)
    inputs = normalise(torch.from_numpy(images), info)
    pixels = PixelScale(info.mean, pixel_scale(info))
    teacher, network = new_network(teachers_recipe, "teacher").eval(), new_network(described, name).eval()
    modules = {
        "teacher_fp32": teacher,
        "plain_fp32": network,
        "merged_fp32": rewritten(network, inputs[:2], for_float32),
        "plain_int8": network,
        "merged_int8": rewritten(network, inputs[:2], for_int8),
    }
    paths = {}
    for file, module in modules.items():
        graph = to_graph(module, inputs[:2], PIXELS, "logits")
        if file.endswith("int8"):
            graph = quantize(graph, ranges(graph, np.ascontiguousarray(inputs.numpy())), pixels, info.shape)
        else:
            graph = from_pixels(graph, pixels, info.shape)
        paths[file] = folder / f"{file}.onnx"
        paths[file].write_bytes(graph.SerializeToString())
    return images, paths


def _onnxruntime_ms(
    folder: Path, images: np.ndarray, paths: dict[str, Path], rounds: int
) -> tuple[P50s, list[devices.LatencyAnswer]]:
    """The files in ONNX Runtime, in turns in a fresh process a round, and what the runner said in each."""
    sent = {path.name: path for path in paths.values()}
    job: dict[str, Any] = {"task": "latency", "seconds": SECONDS, "min_runs": 100, "graphs": []}
    job["images"] = put_array(folder / "images.npy", images, sent)
    for file, path in paths.items():
        members = [{"path": path.name, "sha256": sha256(path)}]
        job["graphs"].append({"name": file, "members": members, "head": None, "threads": 1})
    answers = [devices.ask("cpu", job, sent, devices.LatencyAnswer) for _ in range(rounds)]
    p50_ms = {
        file: [statistics.median(answer.graphs[number].latencies_ns) / 1e6 for answer in answers]
        for number, file in enumerate(paths)
    }
    return p50_ms, answers


def _openvino_ms(images: np.ndarray, paths: dict[str, Path], rounds: int) -> P50s:
    """The files in OpenVINO, in turns in this process, each warmed up on all images in each round."""
    import openvino

    core, one_thread = openvino.Core(), {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    inputs = [openvino.Tensor(np.ascontiguousarray(image[None])) for image in images]
    requests = {}
    for file, path in paths.items():
        model = core.read_model(path)
        model.reshape([1, *images.shape[1:]])
        requests[file] = core.compile_model(model, "CPU", one_thread).create_infer_request()
    p50_ms: P50s = {file: [] for file in paths}
    for _ in range(rounds):
        for file, request in requests.items():
            for tensor in inputs:
                request.infer({0: tensor}, share_outputs=True)
            runs_ns, end = list[int](), time.perf_counter() + SECONDS
            while time.perf_counter() < end:
                tensor = inputs[len(runs_ns) % SAMPLES]
                began = time.perf_counter_ns()
                request.infer({0: tensor}, share_outputs=True)
                runs_ns.append(time.perf_counter_ns() - began)
            p50_ms[file].append(statistics.median(runs_ns) / 1e6)
    return p50_ms


def calibrate(images: int) -> dict[str, Any]:
    """Seconds and peak memory of each calibrator on a ResNet-50 of torchvision, untrained."""
    spawn, rows = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as folder:
        graph = to_graph(resnet50().eval(), torch.zeros(2, *IMAGENET), PIXELS, "logits")
        (path := Path(folder) / "resnet50.onnx").write_bytes(graph.SerializeToString())
        for method in get_args(Calibration):
            with spawn.Pool(1) as pool:
                seconds, peak_rss_bytes = pool.apply(_calibrated, (path, images, method))
            row = {"calibrator": method, "seconds": round(seconds, 1), "peak_rss_bytes": peak_rss_bytes}
            rows.append(row)
    versions = {name: version(name) for name in ("onnxruntime", "torch", "torchvision", "numpy")}
    return {"rows": rows, "images": images, "shape": list(IMAGENET), "device": _machine(device()), "versions": versions}


def _calibrated(path: Path, images: int, method: Calibration) -> tuple[float, int]:
    """Seconds that a calibrator takes, and the peak of this process's memory, in bytes, the images being a part of it."""
    samples = np.random.default_rng(0).standard_normal((images, *IMAGENET), np.float32)
    began = time.perf_counter()
    ranges(onnx.load(path), samples, method)
    return time.perf_counter() - began, peak_rss_bytes()


def _print_train(result: dict[str, Any]) -> None:
    print(f"user's loop   {result['user_loop_images_per_s']:>7,} images/s")
    print(f"kdedge        {result['kdedge_images_per_s']:>7,} images/s")
    spread = f"{result['ratio_min']} to {result['ratio_max']} in {result['rounds']} rounds"
    print(f"ratio         {result['ratio']:>7} ({spread})")


def _print_deploy(result: dict[str, Any]) -> None:
    forms = ["plain_fp32", "merged_fp32", "plain_int8", "merged_int8"]
    for runtime in ("onnxruntime", "openvino"):
        if runtime not in result["versions"]:
            continue
        print(f"{runtime}: p50 in ms, and to the teacher's")
        width = max(len(row["case"]) for row in result["rows"])
        print(f"{'':{width}} teacher_fp32  " + "  ".join(f"{form:>14}" for form in forms))
        for row in result["rows"]:
            found = row if runtime == "onnxruntime" else row[runtime]
            cells = [f"{found[f'{form}_ms_p50']:.3f} ({found[f'{form}_ratio']:.3f})" for form in forms]
            print(
                f"{row['case']:6} {found['teacher_fp32_ms_p50']:>12.3f}  " + "  ".join(f"{cell:>14}" for cell in cells)
            )


def _print_calibrate(result: dict[str, Any]) -> None:
    print(f"ResNet-50, {result['images']} images of {'x'.join(map(str, result['shape']))}")
    for row in result["rows"]:
        print(f"{row['calibrator']:12} {row['seconds']:>8.1f} s  {row['peak_rss_bytes'] / 2**30:>6.2f} GiB")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "deploy", "calibrate"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--batch-size", type=int, default=STUDENTS.fit.batch_size, help="of both training loops; default: the recipe's"
    )
    parser.add_argument("--images", type=int, default=512, help="to calibrate on; default: 512")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    arguments = parser.parse_args()
    if arguments.what == "train":
        result, show = train(arguments.rounds, arguments.batch_size), _print_train
    elif arguments.what == "deploy":
        result, show = deploy(arguments.rounds), _print_deploy
    else:
        result, show = calibrate(arguments.images), _print_calibrate
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
