"""Speed of our own code against what a user would write, side by side in one run, as ratios.

    python tools/benchmark.py train [--rounds 5] [--json]

`train` teaches the four students of recipes/tcn4.yaml the teacher's dense vector, on the CPU:
  (a) as in a tutorial: torchvision's dataset and transforms, a DataLoader, the live teacher, one student at a time;
  (b) with kdedge's own loop: cached targets, images as uint8 tensors, the siblings side by side.
Both do the same work on the same images in batches of the same size. They take turns, each in a process of its own, because
how a process keeps its memory is its own too, and is part of (b). The targets of (b) are computed before, once a teacher. (b) is in
bfloat16 where the CPU multiplies it. An "image" is one image seen by one student. In the JSON, what stands beside the `rows` is of
batches of 64, the size in PyTorch's quickstart; the recipe has 32.

    python tools/benchmark.py deploy [--rounds 5] [--json]

`deploy` measures exported files in ONNX Runtime, batch 1 on one thread, interleaved in one process a round: the teacher in
fp32, and a student or a group in one graph, in fp32 and int8, plain and as `kdedge export` rewrites it (models/rewriting.py).
Ratios are of p50 to the teacher's in the same round. Weights are untrained and pixels random; trained files can differ
(docs/lab-notes.md). Where openvino is installed, the same files are run in it as well, its ratios being to its own time of
the teacher's file. `tcn4_edge/tcn4` is tcn4_edge beside the teacher of tcn4.

    python tools/benchmark.py calibrate [--images 512] [--json]

`calibrate` looks for the ranges of a ResNet-50's activations on images of 224x224, random ones, by each calibrator in a process of
its own: seconds, and the peak of its memory.
"""

from __future__ import annotations

import argparse
import json

from benchmarks import calibrate, deploy, train


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, tool, options in (
        ("train", train, {"rounds": 5}),
        ("deploy", deploy, {"rounds": 5}),
        ("calibrate", calibrate, {"images": 512}),
    ):
        command = commands.add_parser(name, help=tool.__doc__)
        command.set_defaults(tool=tool)
        for option, value in options.items():
            command.add_argument(f"--{option}", type=_count, default=value, help=f"default: {value}")
        command.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    given = vars(parser.parse_args())
    tool, as_json, _ = given.pop("tool"), given.pop("json"), given.pop("what")
    result = tool.measure(**given)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        tool.show(result)


def _count(text: str) -> int:
    if not text.isdecimal() or (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, given {text!r}")
    return number


if __name__ == "__main__":
    main()
