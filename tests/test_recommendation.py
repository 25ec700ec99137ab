"""Which way to run a group is recommended, on times that are known."""

from typing import Any

from kdedge.recommendation import FormRow, recommend

DEVICE = {"cpu": "A CPU", "cpu_class": "x86-vnni"}
SHIPS = {"x86-vnni": ["m.onnx", "0.onnx", "1.onnx", "head.onnx"]}


def way(form: Any, precision: Any, threads: int, p50_ms: float, **changes: Any) -> FormRow:
    files = ["m.onnx"] if form == "one graph" else ["0.onnx", "1.onnx", "head.onnx"]
    steps = [-2, 1, 0, 2, -1]
    turn = threads + 2 * (form == "members")  # else the ratio of two ways would be the same in every round
    rounds = [p50_ms * (1 + step / 100) for step in steps[turn:] + steps[:turn]]
    known = FormRow(
        network="students",
        form=form,
        precision=precision,
        threads=threads,
        n=1000,
        latency_ms_p50=p50_ms,
        latency_ms_p50_ci95=None,
        round_p50_ms=rounds,
        files=files,
        file_bytes=235_000 if precision == "fp32" else 62_000,
        settled=True,
    )
    return known.model_copy(update=changes)


def test_the_fastest_way_is_recommended_and_int8_judged_by_its_best_way() -> None:
    rows = [way("one graph", "fp32", 1, 0.2), way("one graph", "int8", 1, 0.12), way("members", "int8", 2, 0.1)]
    (found,) = recommend(rows, DEVICE, SHIPS)
    assert (found.form, found.precision, found.threads, found.latency_ms_p50) == ("members", "int8", 2, 0.1)
    assert (found.files, found.cpu, found.cpu_class) == (["0.onnx", "1.onnx", "head.onnx"], "A CPU", "x86-vnni")
    assert found.why == (
        "students: run members in int8 on 2 threads here, 0.100 ms; the slowest of 3 ways takes 0.200 ms. "
        "int8 is worth it here (0.100 against 0.200 ms, 62 against 235 kB)."
    )


def test_of_ways_that_are_as_fast_the_simplest_is_recommended() -> None:
    rows = [way("members", "fp32", 2, 0.1000), way("one graph", "fp32", 2, 0.1001), way("one graph", "fp32", 1, 0.1002)]
    (found,) = recommend(rows, DEVICE, SHIPS)
    assert (found.form, found.threads) == ("one graph", 1)
    slower = rows[2].model_copy(update={"round_p50_ms": [1.1 * ms for ms in rows[2].round_p50_ms]})
    (found,) = recommend([*rows[:2], slower], DEVICE, SHIPS)
    assert (found.form, found.threads) == ("one graph", 2)


def test_a_way_whose_times_tell_nothing_is_not_taken_for_a_fast_one() -> None:
    noisy = way("one graph", "int8", 1, 0.3, round_p50_ms=[0.1, 0.6, 0.2, 0.5, 0.3], file_bytes=1)
    (found,) = recommend([way("one graph", "fp32", 2, 0.17), noisy, way("one graph", "int8", 2, 0.18)], DEVICE, SHIPS)
    assert (found.precision, found.threads, found.latency_ms_p50) == ("fp32", 2, 0.17)


def test_int8_is_judged_by_the_way_that_is_chosen() -> None:
    """In int8 one thread would be as fast as two; of all ways it is not."""
    rows = [way("one graph", "fp32", 2, 0.1), way("one graph", "int8", 2, 0.104), way("one graph", "int8", 1, 0.108)]
    (found,) = recommend(rows, DEVICE, SHIPS)
    assert (found.precision, found.threads) == ("int8", 2)
    assert found.why.endswith("int8 is not worth it here but for its size (0.104 against 0.100 ms, 62 against 235 kB).")


def test_int8_that_is_faster_but_not_chosen_is_not_worth_it() -> None:
    """On one thread float32 is nearly as fast as int8 on two."""
    (found,) = recommend([way("one graph", "fp32", 1, 0.104), way("one graph", "int8", 2, 0.1)], DEVICE, SHIPS)
    assert (found.precision, found.threads) == ("fp32", 1)
    assert "int8 is not worth it here but for its size (0.100 against 0.104 ms" in found.why


def test_int8_that_is_faster_but_not_for_certain_is_left_open() -> None:
    varying = way("one graph", "int8", 2, 0.124, round_p50_ms=[0.1, 0.18, 0.12, 0.17, 0.11])
    (found,) = recommend([way("one graph", "fp32", 2, 0.151), varying], DEVICE, SHIPS)
    said = "int8 may be worth it here (0.124 against 0.151 ms, 62 against 235 kB): its times vary too much to tell."
    assert (found.precision, found.why.endswith(said)) == ("int8", True)


def test_int8_that_does_not_ship_for_this_class_is_not_recommended() -> None:
    rows = [way("one graph", "fp32", 1, 0.2), way("one graph", "int8", 1, 0.1), way("members", "int8", 1, 0.1)]
    (found,) = recommend(rows, DEVICE, {"arm64": SHIPS["x86-vnni"]})
    assert found.precision == "fp32"
    assert found.why.endswith("takes 0.200 ms. 2 more in int8 did not count: their files do not ship for x86-vnni.")
    (found,) = recommend(rows, DEVICE, {"x86-vnni": ["m.onnx"]})
    assert (found.form, found.precision) == ("one graph", "int8")


def test_int8_that_is_not_faster_is_not_worth_it() -> None:
    (found,) = recommend([way("one graph", "fp32", 1, 0.35), way("one graph", "int8", 1, 0.4)], DEVICE, SHIPS)
    assert found.precision == "fp32"
    assert found.why.endswith("int8 is not worth it here but for its size (0.400 against 0.350 ms, 62 against 235 kB).")


def test_two_rounds_recommend_nothing() -> None:
    rows = [way("one graph", "fp32", 1, 0.35, round_p50_ms=[0.3, 0.4])]
    assert recommend(rows, DEVICE, SHIPS) == recommend([], DEVICE, SHIPS) == []
