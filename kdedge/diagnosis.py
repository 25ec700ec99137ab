"""The story of `diagnose`: which layers of a network int8 costs accuracy in.

Each layer is looked at in the whole int8 graph, then alone in int8 with all others in float32, then alone in float32 with
all others in int8. In float32 a layer computes with its own weights; its neighbours still round what they give and take.
All are computed here and without fusing: as the graphs read, and not as the kernels of this CPU add.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import BaseModel

from exporters.calibration import activations
from exporters.float32 import from_pixels
from exporters.int8 import quantize
from exporters.signals import Layer, Signal, apart, layers, signals
from kdedge import store
from kdedge.data.load import load_recorded
from kdedge.errors import RunError
from kdedge.pieces import quantizable, roles
from kdedge.progress import Quiet
from kdedge.recipe_reader import resolved_recipe
from kdedge.statistics import mcnemar, paired_drop
from kdedge.store import Run
from kdedge.wording import shorten

IMAGES = 500  # of the validation split, and so many tell a drop of a point from none
SURE = 0.05  # p-value below which two graphs are not the same


class Measured(BaseModel):
    """What one graph says of the images, against fp32."""

    accuracy: float  # percent
    drop_points: float
    drop_ci95_points: tuple[float, float]  # of the paired difference
    differing: int  # images that get another class than in fp32


class LayerRow(BaseModel):
    """One layer in int8. Null where it does not apply: the last layer's output is not rounded."""

    name: str
    operator: str
    sqnr_db: float | None  # of its output in the whole int8 graph; null without any noise
    clipped_percent: float | None  # of its values that lie beyond the range, in fp32
    range_used_percent: float | None  # part of the range that all but the rarest 1% of its values take
    alone: Measured  # this layer in int8, the others in fp32
    all_but: Measured  # this layer in fp32, the others in int8
    to_blame: bool  # whether all_but agrees with fp32 on more images than int8 does, by more than chance


class Diagnosis(BaseModel):
    """RUN/diagnosis/NETWORK.json."""

    recipe: str
    network: str
    quick: bool
    calibrated_by: str
    split: Literal["validation"] = "validation"
    n: int
    accuracy_fp32: float  # percent
    int8: Measured
    layers: list[LayerRow]


def diagnose(
    run: Run | Path | str, network: str, *, data_dir: Path | None = None, progress: Quiet | None = None
) -> Diagnosis:
    """Quantize a network of the run whole, and by layers, and measure each on the first 500 validation images.

    Writes RUN/diagnosis/NETWORK.json and, where matplotlib is installed, NETWORK.png. Raises RunError for a network that
    is not exported as a whole or that was trained quantized, and DataError.
    """
    progress = progress or Quiet()
    run = run if isinstance(run, Run) else store.open_run(Path(run))
    recipe = resolved_recipe(run.recipe, str(run.path / "run.json"))
    known = dict(roles(recipe))
    if network not in known:
        raise RunError(f"{run.path}: there is no network {network!r} to diagnose. Networks: {', '.join(known)}.")
    dataset = load_recorded(run.data, data_dir)
    chosen = run.data["validation"][:IMAGES]
    images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
    with store.lock(run.path):
        graph, ranges, pixels = quantizable(run, recipe, dataset, network, known[network])
        found, shape = layers(graph), dataset.info.shape
        variants = {"fp32": from_pixels(graph, pixels, shape), "int8": quantize(graph, ranges, pixels, shape)}
        for number, layer in enumerate(found):
            progress.update("diagnose", number, len(found), layer.name)
            for kind, in_float in (("alone", apart(graph, layer)), ("all but", layer.nodes)):
                variants[f"{kind} {layer.name}"] = quantize(graph, ranges, pixels, shape, in_float=in_float)
        progress.finish()
        progress.note(f"measuring {len(variants)} graphs on {len(labels)} validation images")
        classes = {name: _classes(variant, images) for name, variant in variants.items()}
        measured = {name: _measured(classes["fp32"], of, labels) for name, of in classes.items()}
        heard = signals(found, variants["fp32"], variants["int8"], images)
        diagnosis = Diagnosis(
            recipe=recipe.name,
            network=network,
            quick=run.quick,
            calibrated_by=recipe.deploy.int8.calibration,
            n=len(labels),
            accuracy_fp32=measured["fp32"].accuracy,
            int8=measured["int8"],
            layers=[_row(layer, heard[layer.name], measured, classes) for layer in found],
        )
        folder = run.path / "diagnosis"
        folder.mkdir(exist_ok=True)
        store.write_json(folder / f"{network}.json", diagnosis.model_dump(mode="json"))
        if (content := picture(diagnosis)) is None:
            progress.note("no picture: matplotlib is not installed (pip install 'kdedge[pictures]')")
        else:
            store.write_bytes(folder / f"{network}.png", content)
    return diagnosis


def _classes(graph: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The class that a graph gives each image, int64 [n]."""
    logits = graph.graph.output[0].name
    return np.concatenate([part[logits].argmax(1) for part in activations(graph, images, [logits])])


def _measured(fp32: NDArray[np.int64], of: NDArray[np.int64], labels: NDArray[np.int64]) -> Measured:
    drop = paired_drop(fp32 == labels, of == labels)
    return Measured(
        accuracy=round(100 * float((of == labels).mean()), 4),
        drop_points=round(drop.points, 4),
        drop_ci95_points=(round(drop.lower_points, 4), round(drop.upper_points, 4)),
        differing=int((of != fp32).sum()),
    )


def _row(layer: Layer, heard: Signal, measured: dict[str, Measured], classes: dict[str, NDArray[np.int64]]) -> LayerRow:
    alone, all_but = f"alone {layer.name}", f"all but {layer.name}"
    fp32, int8, without = (classes[name] for name in ("fp32", "int8", all_but))
    cured, spoilt = int(((without == fp32) & (int8 != fp32)).sum()), int(((without != fp32) & (int8 == fp32)).sum())
    return LayerRow(
        name=layer.name,
        operator=layer.operator,
        sqnr_db=round(heard.sqnr_db, 2) if np.isfinite(heard.sqnr_db) else None,
        clipped_percent=_percent(heard.clipped_share),
        range_used_percent=_percent(heard.used_share),
        alone=measured[alone],
        all_but=measured[all_but],
        to_blame=cured > spoilt and mcnemar(cured, spoilt) < SURE,
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 4)


def rows_to_print(diagnosis: Diagnosis) -> tuple[list[str], list[list[str]]]:
    """A line a layer, in the order of the graph."""

    def told(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def lost(one: Measured) -> str:
        return f"{one.drop_points:.2f} ({one.differing})"

    rows = [
        [
            _label(row),
            told(row.sqnr_db, ".1f"),
            told(row.clipped_percent, ".3f"),
            told(row.range_used_percent, ".0f"),
            lost(row.alone),
            lost(row.all_but),
        ]
        for row in diagnosis.layers
    ]
    return ["layer", "SQNR dB", "clipped %", "range %", "alone", "all but"], rows


def _label(row: LayerRow) -> str:
    return shorten(f"{row.name.removeprefix('node_')} ({row.operator})", 25)


def sentences(diagnosis: Diagnosis) -> list[str]:
    """What int8 costs, how to read the table, and which layers stand out."""
    whole, n = diagnosis.int8, diagnosis.n
    low, high = whole.drop_ci95_points
    said = [
        f"int8 loses {whole.drop_points:.2f} points on {n} validation images (95% interval {low:.2f} to {high:.2f}), "
        f"and gives {whole.differing} of them another class than fp32",
        "points lost, and images with another class: `alone` with this layer in int8 only, `all but` with this one in float",
    ]
    blamed = sorted((row for row in diagnosis.layers if row.to_blame), key=lambda row: row.all_but.differing)
    said += [
        f"{row.name} ({row.operator}) is to blame: with it in float {row.all_but.differing} of {n} images differ, "
        f"instead of {whole.differing}"
        for row in blamed
    ]
    if not blamed:
        said.append("no layer stands out: with any one of them in float, no more images agree with fp32 than by chance")
    return said


def picture(diagnosis: Diagnosis) -> bytes | None:
    """The table as a PNG, with a bar a layer; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = diagnosis.layers[::-1]  # the first one at the top
    places, names = np.arange(len(rows)), [_label(row) for row in rows]
    figure = Figure(figsize=(10, 2 + 0.32 * len(rows)), layout="constrained")
    noise, lost, used = figure.subplots(1, 3, sharey=True)
    noise.barh(places, [row.sqnr_db or 0 for row in rows], color="tab:blue", label="signal to quantization noise")
    noise.set_yticks(places, names)
    noise.set_xlabel("dB")
    lost.barh(
        places + 0.2, [row.alone.differing for row in rows], 0.4, color="tab:orange", label="this layer alone in int8"
    )
    lost.barh(places - 0.2, [row.all_but.differing for row in rows], 0.4, color="tab:gray", label="all but this layer")
    lost.axvline(diagnosis.int8.differing, color="black", linestyle=":", label="all layers")
    most = max(one.differing for one in (diagnosis.int8, *(both for row in rows for both in (row.alone, row.all_but))))
    lost.set_xlim(0, 1.05 * max(1, most))
    lost.set_xlabel(f"of {diagnosis.n} images, not the class of fp32")
    used.barh(
        places + 0.2,
        [row.range_used_percent or 0 for row in rows],
        0.4,
        color="tab:green",
        label="taken by 99% of values",
    )
    used.barh(places - 0.2, [row.clipped_percent or 0 for row in rows], 0.4, color="tab:red", label="values beyond it")
    used.set_xlabel("of the output's range, %")
    used.set_xlim(0, 100)
    for axes in (noise, lost, used):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small", frameon=False)
    drop = f"{diagnosis.int8.drop_points:.2f} points lost of {diagnosis.accuracy_fp32:.2f}%"
    figure.suptitle(f"{diagnosis.recipe}: {diagnosis.network} in int8, {drop}")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()
