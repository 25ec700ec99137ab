"""Latency of small networks beside their teachers, in ONNX Runtime and, where it is installed, in OpenVINO."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import MACHINE
from exporters.calibration import ranges
from exporters.float32 import PIXELS, PixelScale, from_pixels, to_graph
from exporters.int8 import quantize
from kdedge import devices
from kdedge.data.batches import normalise, pixel_scale
from kdedge.data.catalog import DATASETS
from kdedge.models.rewriting import for_float32, for_int8, rewritten
from kdedge.networks import new_network
from kdedge.store import sha256
from kdedge.validate import put_array
from kdedge.variants import load_recipes

RECIPES = Path(__file__).parents[2] / "recipes"
DEPLOYED = {  # case: recipe of the teacher, recipe of the network beside it, and which one that is
    "tcn4": ("tcn4", "tcn4", "students"),
    "ta4": ("ta_hierarchical", "ta_hierarchical", "four"),
    "S1": ("ta_hierarchical", "ta_hierarchical", "one"),
    "tcn4_edge": ("tcn4_edge", "tcn4_edge", "students"),
    "tcn4_edge/tcn4": ("tcn4", "tcn4_edge", "students"),
}
FORMS = ("plain_fp32", "merged_fp32", "plain_int8", "merged_int8")  # of a network in one file
SAMPLES = 64  # random images, for calibration and in turn for latency
SECONDS = 1.0  # for which each file is timed in each round
OPENVINO = importlib.util.find_spec("openvino") is not None

P50s = dict[str, list[float]]  # of each file, in ms, in every round


def measure(rounds: int) -> dict[str, Any]:
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
    conditions: dict[str, Any] = {
        "rounds": rounds,
        "seconds": SECONDS,
        "threads": 1,
        "batch": 1,
        "weights": "untrained",
    }
    versions = {name: version(name) for name in ("onnxruntime", "torch", *(["openvino"] if OPENVINO else []))}
    measured = {
        "own_cpu_share": round(own_cpu_share, 4),
        "device": {key: answers[0].device[key] for key in MACHINE},
        "versions": versions,
    }
    return {"rows": rows, **conditions, **measured}


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

    core = openvino.Core()
    # Left alone, it computes float32 files in bfloat16 where the CPU can.
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    inputs = [openvino.Tensor(np.ascontiguousarray(image[None])) for image in images]
    requests = {}
    for file, path in paths.items():
        model = core.read_model(path)
        model.reshape([1, *images.shape[1:]])
        requests[file] = core.compile_model(model, "CPU", settings).create_infer_request()
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


def show(result: dict[str, Any]) -> None:
    """Print the ratios as a table for each runtime."""
    width = max(len(row["case"]) for row in result["rows"])
    for runtime in ("onnxruntime", "openvino"):
        if runtime not in result["versions"]:
            continue
        print(f"{runtime}: p50 in ms, and to the teacher's in fp32")
        print(" " * width + "  teacher" + "".join(f"{form:>16}" for form in FORMS))
        for row in result["rows"]:
            found = row if runtime == "onnxruntime" else row[runtime]
            cells = [f"{found[f'{form}_ms_p50']:.3f} ({found[f'{form}_ratio']:.3f})" for form in FORMS]
            teacher = f"{found['teacher_fp32_ms_p50']:>9.3f}"
            print(f"{row['case']:{width}}{teacher}" + "".join(f"{cell:>16}" for cell in cells))
