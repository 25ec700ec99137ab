"""What runs on the device: `python runner.py job.json` measures ONNX files and prints one JSON document on stdout.

This one file needs Python, numpy and onnxruntime and nothing of kdedge, so that every device runs the same code. A job
names its files by {"path", "sha256"}, relative to the job's folder; all are checked before anything is run.

    {"task": "accuracy", "threads": 2, "images": FILE, "labels": FILE, "batch": 50,
     "graphs": [{"name": "students head fp32", "members": [FILE, ...], "head": FILE or null}, ...]}
    {"task": "latency", "images": FILE, "seconds": 1.0, "min_runs": 100,
     "graphs": [{"name", "members", "head", "threads": 1}, ...]}
    {"task": "cold", "threads": 1, "images": FILE, "files": [] or [{"name", ...FILE}]}
    {"task": "fuse", "files": [{"name", ...FILE}, ...]}

Images are .npy, uint8 [n, C, H, W]; labels .npy, integers [n]. Graphs take `image` (uint8) or, as a head, `dense`
(float32) and give their outputs under the same names: `dense` or `logits`. A bad job ends with exit code 1 and one
line on stderr. Times are of `InferenceSession.run` alone, on inputs prepared beforehand.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.random import default_rng  # here, so that the empty runner has loaded it too

BLOCK_NS = 20_000_000  # of one file between two others: long against the cost of the change, short against drift
UNCOUNTED_RUNS = 3  # at the start of a block: they pay for the caches that the other file left behind
WARM_UP_BLOCK_RUNS = 25
WARM_UP_LIMIT_NS = 2_000_000_000
SETTLED = 0.05  # two successive warm-up medians closer than this: the times have settled


Feed = dict[str, np.ndarray]
Run = Callable[[Feed], Any]


class JobError(Exception):
    """The job cannot be done as it is written; `str()` is one line."""


def main(job_file: str) -> int:
    """Do the job in `job_file` and print the answer."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # only the answer may reach stdout, whatever native code prints
    try:
        answer = run(Path(job_file))
    except JobError as error:
        print(f"runner: {error}", file=sys.stderr)
        return 1
    with stdout:
        json.dump(answer, stdout)
    return 0


def run(job_file: Path) -> dict[str, Any]:
    """The answer to the job in `job_file`, with a description of the device. Raises JobError."""
    try:
        job = json.loads(job_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{job_file} cannot be read: {error}") from None
    task = need(job, "task", str)
    if task not in TASKS:
        raise JobError(f"job: task: expected one of {', '.join(TASKS)}, given {task!r}")
    described = device()  # before the work, which heats and loads the machine
    job["folder"] = job_file.resolve().parent
    return {"device": described, **TASKS[task](job)}


def accuracy(job: dict[str, Any]) -> dict[str, Any]:
    """For each graph: how many of the n images it gets right, and what it says of each."""
    images, labels = load(job, "images"), load(job, "labels")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise JobError(f"job: labels: expected {len(images)} integers, found {labels.dtype} {list(labels.shape)}")
    batch, threads = need(job, "batch", int), need(job, "threads", int)
    graphs = named_graphs(job)

    answers = []
    for _, name, members, head in graphs:
        said = predict(members, head, images, batch, threads)
        correct = int((said == labels).sum())
        answers.append({"name": name, "n": len(images), "correct": correct, "predictions": said.tolist()})
    return {"graphs": answers}


def predict(members: list[Path], head: Path | None, images: np.ndarray, batch: int, threads: int) -> np.ndarray:
    """Class of each image, int [n]: a whole network, or members whose outputs are joined and fed to the head.

    The threads share the batches, not the operators: on small networks that is faster, above all on a busy machine.
    """
    sessions = [session(path, 1) for path in members]
    last = session(head, 1) if head else None
    name = (head or members[0]).name

    def classes(start: int) -> Any:
        part = images[start : start + batch]
        outputs = [infer(one, path, {"image": part}) for one, path in zip(sessions, members, strict=True)]
        logits = infer(last, head, {"dense": np.concatenate(outputs, axis=1)}) if last and head else outputs[0]
        if logits.ndim != 2 or len(logits) != len(part) or not np.isfinite(logits).all():
            raise JobError(f"{name}: expected finite logits [{len(part)}, classes], found {one_line(logits)[:80]}")
        return logits.argmax(axis=1)

    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(classes, range(0, len(images), batch))))


def latency(job: dict[str, Any]) -> dict[str, Any]:
    """Nanoseconds of every counted run of each graph, batch 1.

    The inputs rotate over all images. The graphs take turns in short blocks, forwards and backwards, so that drift of
    clock and temperature hits all alike. `own_cpu_share` is below 1 when something else held this thread's core.
    """
    images, graphs = load(job, "images"), named_graphs(job)
    seconds, min_runs = need(job, "seconds", int, float), need(job, "min_runs", int)
    timed = [whole_run(members, head, need(graph, "threads", int), images) for graph, _, members, head in graphs]
    gc.freeze()
    gc.disable()
    warm = [warm_up(run, feeds) for run, feeds in timed]

    took: list[list[int]] = [[] for _ in timed]
    spent_ns = [0] * len(timed)
    order = list(range(len(timed)))
    wall_start, cpu_start = time.perf_counter_ns(), time.thread_time_ns()
    while any(spent_ns[i] < seconds * 1e9 or len(took[i]) < min_runs for i in order):
        for i in order:
            started = time.perf_counter_ns()
            block(*timed[i], took[i])
            spent_ns[i] += time.perf_counter_ns() - started
        order.reverse()
    wall_ns, cpu_ns = time.perf_counter_ns() - wall_start, time.thread_time_ns() - cpu_start
    answers = [
        {"name": name, "latencies_ns": ns, "warm_up_runs": runs, "settled": settled}
        for (_, name, _, _), ns, (runs, settled) in zip(graphs, took, warm, strict=True)
    ]
    return {"own_cpu_share": cpu_ns / max(1, wall_ns), "graphs": answers}


def whole_run(members: list[Path], head: Path | None, threads: int, images: np.ndarray) -> tuple[Run, list[Feed]]:
    """One run of a graph from a feed of batch 1 to its output, and the feeds; it was run once.

    The threads share the operators of a file; of members they share the members, each of which has one.
    """
    sessions = [session(path, threads if head is None else 1) for path in members]
    feeds = [inputs(one, images) for one in sessions]
    outputs = [infer(one, path, feed[0]) for one, path, feed in zip(sessions, members, feeds, strict=True)]
    if head is None:
        return partial(sessions[0].run, None), feeds[0]
    last = session(head, 1)
    infer(last, head, {"dense": np.concatenate(outputs, axis=1)})
    at_once = ThreadPoolExecutor(threads).map if threads > 1 else map

    def chain(feed: Feed) -> Any:
        dense = list(at_once(lambda one: one.run(None, feed)[0], sessions))
        return last.run(None, {"dense": np.concatenate(dense, axis=1)})

    return chain, feeds[0]


def block(run: Run, feeds: list[Feed], took_ns: list[int]) -> None:
    """Run for BLOCK_NS, at least once, and append what each run took."""
    for i in range(UNCOUNTED_RUNS):
        run(feeds[i % len(feeds)])
    end = time.perf_counter_ns() + BLOCK_NS
    while time.perf_counter_ns() < end:
        took_ns.append(timed_ns(run, feeds[len(took_ns) % len(feeds)]))


def timed_ns(run: Run, feed: Feed) -> int:
    """Nanoseconds of one run: what kdedge calls latency."""
    before = time.perf_counter_ns()
    run(feed)
    return time.perf_counter_ns() - before


def warm_up(run: Run, feeds: list[Feed]) -> tuple[int, bool]:
    """Run in blocks until the median settles, or for WARM_UP_LIMIT_NS: how many runs, and whether it settled."""
    end = time.perf_counter_ns() + WARM_UP_LIMIT_NS
    medians: list[float] = []
    while True:
        medians.append(statistics.median(timed_ns(run, feeds[i % len(feeds)]) for i in range(WARM_UP_BLOCK_RUNS)))
        settled = len(medians) > 1 and abs(medians[-1] - medians[-2]) <= SETTLED * medians[-2]
        if settled or (len(medians) > 1 and time.perf_counter_ns() > end):
            return len(medians) * WARM_UP_BLOCK_RUNS, settled


def cold(job: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of session creation and first run, and peak RSS of this fresh process.

    The file was just read for its hash, so it comes from the page cache. Without a file this is the empty runner: it
    has loaded Python, numpy, onnxruntime and the images.
    """
    images, files = load(job, "images"), named_files(job)
    if len(files) > 1:
        raise JobError(f"job: files: a cold start is of one file or of none, given {len(files)}")
    cold_start_ms = None
    for _, path in files:
        started = time.perf_counter_ns()
        one = session(path, need(job, "threads", int))
        infer(one, path, inputs(one, images[:1])[0])
        cold_start_ms = (time.perf_counter_ns() - started) / 1e6
    return {"cold_start_ms": cold_start_ms, "peak_rss_bytes": peak_rss_bytes()}


def fuse(job: dict[str, Any]) -> dict[str, Any]:
    """Each file as onnxruntime fuses it here: an ONNX graph without its weights, in hexadecimal digits."""
    answers = []
    for name, path in named_files(job):
        session(path, 1, fused := path.with_suffix(".fused"))
        answers.append({"name": name, "graph": fused.read_bytes().hex()})
    return {"files": answers}


TASKS = {"accuracy": accuracy, "latency": latency, "cold": cold, "fuse": fuse}


def session(path: Path, threads: int, fused: Path | None = None) -> onnxruntime.InferenceSession:
    """A session on the CPU with exactly `threads` threads, whatever the number of cores.

    With `fused`, the graph is left there as it is before its layout is changed for this CPU.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    if fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(fused)
        for key, value in (("file_name", f"{fused.name}.weights"), ("min_size_in_bytes", "0")):
            options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base for its own
        raise JobError(f"{path.name} cannot be loaded: {one_line(error)}") from None


def infer(one: onnxruntime.InferenceSession, path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    """The first output of one run."""
    try:
        return np.asarray(one.run(None, feed)[0])
    except Exception as error:
        raise JobError(f"{path.name} cannot be run: {one_line(error)}") from None


def inputs(one: onnxruntime.InferenceSession, images: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Feeds of batch 1: the images, or for a head as many dense vectors from a normal distribution (seed 0)."""
    wanted = one.get_inputs()[0]
    if wanted.name == "image":
        return [{"image": np.ascontiguousarray(image[None])} for image in images]
    width = wanted.shape[-1]
    if wanted.name != "dense" or not isinstance(width, int):
        raise JobError(f"expected an input `image` or `dense` of known width, found {wanted.name!r} {wanted.shape}")
    random = default_rng(0)
    return [{"dense": random.standard_normal((1, width), np.float32)} for _ in images]


def named_graphs(job: dict[str, Any]) -> list[tuple[dict[str, Any], str, list[Path], Path | None]]:
    """The job's graphs, their names, and their files, checked."""
    graphs = []
    for graph in need(job, "graphs", list):
        name, head = need(graph, "name", str), need(graph, "head", dict, type(None))
        members = [locate(job, member) for member in need(graph, "members", list)]
        if not members or (head is None and len(members) > 1):
            raise JobError(f"job: {name}: expected one member, or several and a head, given {len(members)} without")
        graphs.append((graph, name, members, head and locate(job, head)))
    return graphs


def named_files(job: dict[str, Any]) -> list[tuple[str, Path]]:
    """The job's files, checked."""
    return [(need(file, "name", str), locate(job, file)) for file in need(job, "files", list)]


def load(job: dict[str, Any], key: str) -> np.ndarray:
    """The array in the file that `job[key]` names; images are held to their form here."""
    path = locate(job, need(job, key, dict))
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise JobError(f"{path.name} cannot be read: {one_line(error)}") from None
    if key == "images" and (array.dtype != np.uint8 or array.ndim != 4 or not len(array)):
        raise JobError(f"{path.name}: expected uint8 [n, C, H, W], found {array.dtype} {list(array.shape)}")
    return array


def locate(job: dict[str, Any], entry: Any) -> Path:
    """Path of a file of the job, after its place and its SHA-256 were checked."""
    name, digest = need(entry, "path", str), need(entry, "sha256", str)
    path: Path = job["folder"] / name
    if not path.resolve().is_relative_to(job["folder"]):
        raise JobError(f"job: path {name!r} leads out of the job's folder")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise JobError(f"{name} cannot be read: {error.strerror}") from None
    if found != digest:
        raise JobError(f"{name} is not the file that was sent: SHA-256 {found}, expected {digest}")
    return path


def need(mapping: Any, key: str, *kinds: type) -> Any:
    """`mapping[key]`, when it is there and of one of the types; every number of a job is above 0."""
    if not isinstance(mapping, dict) or key not in mapping:
        raise JobError(f"job: expected an object with {key!r}, given {one_line(mapping)[:80]}")
    value = mapping[key]
    if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, (int, float)) and not value > 0):
        names = ("a number above 0" if kind in (int, float) else kind.__name__ for kind in kinds)
        raise JobError(f"job: {key}: expected {' or '.join(dict.fromkeys(names))}, given {value!r:.80}")
    return value


def device() -> dict[str, Any]:
    """What this runs on; what cannot be read is null."""
    cpuinfo = read("/proc/cpuinfo") or ""
    khz = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq") or ""  # in some places it says "<unknown>"
    mhz = int(khz) / 1000 if khz.isdecimal() else cpuinfo_value(cpuinfo, "cpu MHz")
    millidegrees = [read(str(zone)) or "" for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpuinfo_value(cpuinfo, "model name", "Model", "Hardware") or platform.processor() or None,
        "cpu_class": cpu_class(cpuinfo, platform.machine()),
        "cores": os.cpu_count(),
        "affinity": len(affinity(0)) if affinity else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "providers": ["CPUExecutionProvider"],
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "frequency_mhz": float(mhz) if mhz else None,
        "temperature_celsius": max((int(one) / 1000 for one in millidegrees if one.isdecimal()), default=None),
        "load_average_1min": os.getloadavg()[0],
    }


def cpu_class(cpuinfo: str, machine: str) -> str:
    """Which int8 arithmetic a CPU has, from the text of /proc/cpuinfo and `platform.machine()`.

    x86-avx2 adds pairs of 8-bit products in 16 bits, which saturates: the same int8 file gives other logits there than
    on the other classes, which are exact.
    """
    flags = set((cpuinfo_value(cpuinfo, "flags", "Features") or "").split())  # as x86 and as Arm calls them
    if machine.lower() in ("x86_64", "amd64", "i686"):
        if flags & {"avx512_vnni", "avx_vnni"}:
            return "x86-vnni"
        return "x86-avx2" if "avx2" in flags else "x86-sse" if "sse2" in flags else "unknown"
    if machine.lower() in ("aarch64", "arm64"):
        return "arm64-dotprod" if "asimddp" in flags else "arm64" if "asimd" in flags else "unknown"
    return "unknown"


def cpuinfo_value(cpuinfo: str, *keys: str) -> str | None:
    """Value of the first line `key : value` with one of the keys, in the order of the keys."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    return next((value.strip() for key in keys for name, _, value in lines if name.strip() == key), None)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process.

    VmHWM first: ru_maxrss survives exec on Linux, so a child of a big process reports its parent's size.
    """
    peak_kib = cpuinfo_value(read("/proc/self/status") or "", "VmHWM")
    if peak_kib:
        return int(peak_kib.split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read(path: str) -> str | None:
    """Text of a small system file without its last newline, or None where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def one_line(problem: object) -> str:
    """The text of an error or a value on one line: what reads stderr shows its last line."""
    return " ".join(str(problem).split())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
