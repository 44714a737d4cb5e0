"""What would run on a GPU that is not there: csrc/cuda/plan.h over shapes and devices."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from fastrnn import _backend, _ops, info

pytestmark = pytest.mark.skipif(_ops.native_error is not None, reason=str(_ops.native_error))


def plan(
    device: str = "h200", kernel: str = "auto", persistent: bool = False, tf32: bool = False,
    **shape: Any,
) -> dict[str, Any]:
    native = importlib.import_module("fastrnn._C")
    given = {"cell": "lstm", "T": 256, "B": 32, "I": 512, "H": 512, "D": 1, "item_bytes": 2} | shape
    result: dict[str, Any] = native.plan(
        gpu=native.gpus()[device], kernel=kernel, persistent=persistent, tf32=tf32, **given
    )
    return result


# Shape -> units of a thread, threads of a direction, blocks, steps of a chunk, launches.
TABLE: list[tuple[dict[str, Any], tuple[int, int, int, int, int]]] = [
    ({}, (4, 4096, 16, 256, 515)),
    ({"D": 2}, (4, 4096, 32, 128, 521)),
    ({"H": 77, "B": 5}, (1, 385, 2, 256, 515)),
    ({"item_bytes": 8}, (2, 8192, 32, 128, 516)),
    ({"item_bytes": 8, "H": 1, "B": 1, "T": 1}, (1, 1, 1, 1, 5)),
    ({"H": 2048, "B": 128}, (4, 65536, 256, 16, 530)),
    ({"cell": "gru", "T": 10000, "B": 256, "H": 1024}, (4, 65536, 256, 21, 20479)),
]


@pytest.mark.parametrize(("shape", "expected"), TABLE)
@pytest.mark.parametrize("device", ["a100", "l40s", "h100", "h200", "b200"])
def test_sizes(device: str, shape: dict[str, Any], expected: tuple[int, ...]) -> None:
    found = plan(device, **shape)
    names = ("units", "threads", "blocks", "chunk_steps", "launches")
    assert tuple(found[name] for name in names) == expected
    assert found["kernel"] == "step"


def test_reasons_against_the_others() -> None:
    small, large = plan(H=64), plan(H=4096, item_bytes=4)
    kernels = ["step-graph", "persistent-block", "persistent-grid"]
    for found in (small, large):
        assert [reason.split(":")[0] for reason in found["against"]] == kernels
    assert "not measured yet" in small["against"][0]
    assert "not measured yet" in small["against"][1]
    assert "of 256 MiB" in large["against"][0]
    assert "not measured yet" in small["against"][2]
    assert "bfloat16 and float16" in large["against"][1]
    assert "do not fit" in large["against"][2]
    assert "up to H=128" in plan(H=130)["against"][1]
    assert "would fit into the 192 KiB" in small["weights"]
    assert "does not fit into the 192 KiB" in large["weights"]


# Shape -> threads of a block, blocks, launches of a pass.
BLOCKS: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
    ({"H": 64}, (128, 4, 4)),
    ({"H": 33}, (256, 4, 4)),
    ({"H": 66, "B": 1}, (256, 1, 4)),
    ({"H": 128, "B": 17, "D": 2}, (256, 6, 8)),
    ({"H": 128, "B": 1024, "T": 1000}, (256, 128, 66)),
]


@pytest.mark.parametrize(("shape", "expected"), BLOCKS)
def test_blocks(shape: dict[str, Any], expected: tuple[int, ...]) -> None:
    """Chosen by itself only where kernels may be that are not proven on a GPU."""
    assert plan(**shape)["kernel"] == "step"
    for found in (plan(kernel="persistent-block", **shape), plan(persistent=True, **shape)):
        assert found["kernel"] == "persistent-block"
        assert (found["threads"], found["blocks"], found["launches"]) == expected
    assert plan(persistent=True, **shape | {"item_bytes": 8})["kernel"] == "step"


# Shape -> blocks at a time, launches of a pass (states; of each direction its biases and weights;
# of each chunk the input products, the mailbox, the kernel); on a GPU of 132 multiprocessors.
GRIDS: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({}, (32 * 4, 6)),  # 4 tiles of 8 rows, each with blocks of its own
    ({"B": 33}, (32 * 3, 6)),  # 5 tiles: two, two and one are as fast as two, one, one and one
    ({"B": 1}, (32, 6)),
    ({"H": 1024, "B": 64, "D": 2}, (64 * 2, 1 + 2 + 2 + 2 + 1 + 1)),
    ({"H": 2048, "B": 8, "D": 2}, (128, 1 + 2 + 2 + 2 + 1 + 2)),  # one direction at a time
    ({"H": 1024, "B": 64, "T": 256}, (64 * 2, 1 + 1 + 1 + 4 * (1 + 1 + 1))),  # in four chunks
    ({"H": 2112, "B": 8}, (132, 6)),
    ({"H": 130, "B": 8, "cell": "gru"}, (9, 6)),
    ({"H": 256, "B": 8, "item_bytes": 4}, (16, 6)),
]


@pytest.mark.parametrize(("shape", "expected"), GRIDS)
def test_grids(shape: dict[str, Any], expected: tuple[int, int]) -> None:
    shape = {"T": 16} | shape
    assert plan(tf32=True, **shape)["kernel"] == "step"
    for found in (
        plan(kernel="persistent-grid", tf32=True, **shape),
        plan(persistent=True, tf32=True, **shape),
    ):
        assert found["kernel"] == "persistent-grid"
        assert found["threads"] == 256
        assert (found["blocks"], found["launches"]) == expected


# The model's tables (predicted, not measured): shape -> microseconds of a step as
# persistent-block, persistent-grid and step.
PREDICTED: list[tuple[dict[str, Any], tuple[float | None, float, float]]] = [
    ({"H": 64, "B": 8}, (0.34, 0.75, 5.0)),
    ({"H": 128, "B": 8}, (0.67, 0.78, 5.0)),
    ({"H": 512, "B": 8}, (None, 0.97, 5.0)),
    ({"H": 1024, "B": 8}, (None, 1.22, 5.0)),
    ({"H": 1024, "B": 64}, (None, 3.71, 5.62)),
    ({"H": 2048, "B": 128}, (None, 21.9, 16.3)),
    ({"H": 128, "B": 8 * 132 + 1}, (1.34, None, 5.0)),
    ({"H": 512, "B": 8, "item_bytes": 4}, (None, 2.3, 5.0)),
]


@pytest.mark.parametrize(("shape", "expected"), PREDICTED)
def test_predictions_choose(
    shape: dict[str, Any], expected: tuple[float | None, float | None, float]
) -> None:
    kernels = ("persistent-block", "persistent-grid", "step")
    found = {}
    for kernel, us in zip(kernels, expected, strict=True):
        if us is None:
            continue
        why = plan(kernel=kernel, **shape)["why"]
        found[kernel] = float(re.search(r"predicted ([\d.]+) us", why)[1])  # type: ignore[index]
        assert found[kernel] == pytest.approx(us, rel=0.1), kernel
    assert plan(persistent=True, **shape)["kernel"] == min(found, key=lambda name: found[name])


def test_what_a_grid_cannot_run() -> None:
    grid = {"kernel": "persistent-grid"}
    for reason, shape in (
        (r"133 blocks of 16 units do not fit on 132 multiprocessors", {"H": 2113}),
        (r"it has no float64", {"item_bytes": 8}),
        (r"a block needs 288 KiB of shared memory, of 227 KiB", {"item_bytes": 4, "H": 1536}),
        (r"a block needs 128 KiB of shared memory, of 99 KiB", {"H": 1792, "device": "l40s"}),
    ):
        with pytest.raises(ValueError, match=reason):
            plan(tf32=True, **grid, **shape)
    with pytest.raises(ValueError, match="a block needs 232 KiB of shared memory"):
        plan(H=1000, item_bytes=4, **grid)  # float as it is needs more
    for tf32, H in ((True, 1280), (False, 896)):
        assert plan(tf32=tf32, H=H, item_bytes=4, **grid)["kernel"] == "persistent-grid"


# Launches of a pass, as above but for the graphs: 16 steps each, the table before each of them.
GRAPHS: list[tuple[dict[str, Any], int]] = [
    ({}, 1 + 1 + 1 + 1 + 2 * 16),
    ({"T": 7}, 1 + 1 + 1 + 1 + 2 * 7),  # too few for a graph
    ({"T": 9}, 1 + 1 + 1 + 1 + 2),
    ({"T": 21}, 1 + 1 + 1 + 1 + 2 + 2 * 5),
    ({"D": 2, "T": 32}, 1 + 2 + 2 + 2 + 2 * 2),
]


@pytest.mark.parametrize(("shape", "launches"), GRAPHS)
def test_graphs(shape: dict[str, Any], launches: int) -> None:
    found = plan(kernel="step-graph", **shape)
    assert found["kernel"] == "step-graph"
    assert found["launches"] == launches
    assert found["against"][0].startswith("step: step-graph is asked for; predicted 5.0")


def test_requests() -> None:
    assert plan(kernel="step")["kernel"] == "step"
    with pytest.raises(ValueError, match="step-graph' cannot run this: weight_hh of 64 MiB"):
        plan(kernel="step-graph", H=2048, item_bytes=4)
    with pytest.raises(ValueError, match="there are auto, step"):
        plan(kernel="magic")
    for wrong in ({"T": 0}, {"B": 0}, {"H": -1}, {"D": 0}, {"I": -1}):
        with pytest.raises(ValueError, match="at least"):
            plan(**wrong)


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--explain", "256", "32", "512", "512", "lstm", "bfloat16", "h200"]
    assert info.main([*arguments, "--bidirectional"]) == 0
    text = capsys.readouterr().out
    assert "both directions on h200" in text
    assert "32 blocks on 132 multiprocessors" in text
    assert "persistent-grid: not measured yet" in text


def test_explain_asks_what_a_run_asks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--explain", "256", "32", "512", "512", "lstm", "bfloat16", "h200"]

    def text() -> str:
        assert info.main(arguments) == 0
        return capsys.readouterr().out

    monkeypatch.setenv("FASTRNN_PERSISTENT", "1")
    assert "kernel          persistent-grid" in text()
    assert "backward        persistent-grid" in text()
    monkeypatch.setenv("FASTRNN_MAX_SMS", "32")
    assert "32 blocks on 32 multiprocessors" in text()
    monkeypatch.setenv("FASTRNN_MAX_SMS", "31")
    assert "persistent-grid: H=512: its 32 blocks" in text()
    monkeypatch.delenv("FASTRNN_MAX_SMS")
    monkeypatch.setenv("FASTRNN_DISABLE_PERSISTENT", "1")
    assert "kernel          step" in text()
    for variable, value in (("FASTRNN_PERSISTENT", "yes"), ("FASTRNN_MAX_SMS", "0")):
        monkeypatch.setenv(variable, value)
        with pytest.raises(SystemExit):
            info.main(arguments)
        assert f"{variable} must be" in capsys.readouterr().err
        monkeypatch.delenv(variable)


@pytest.mark.parametrize(
    ("position", "word", "message"),
    [
        (1, "many", "invalid literal"), (1, "0", "at least 1"), (5, "lstmm", "unknown cell"),
        (6, "int8", "unknown dtype"), (7, "h300", "unknown device"),
    ],
)  # fmt: skip
def test_wrong_questions(
    position: int, word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--explain", "256", "32", "512", "512", "lstm", "bfloat16", "h200"]
    arguments[position] = word
    with pytest.raises(SystemExit):
        info.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("9.0", (9, 0), True), ("9.0", (8, 0), False), ("8.0", (8, 6), True),
        ("8.6", (8, 0), False), ("10.0", (9, 0), False), ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False), ("8.0+PTX", (9, 0), True), ("12.0+PTX", (10, 0), False),
    ],
)  # fmt: skip
def test_architectures(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert _backend._runs(built, capability) == runs
