"""The arithmetic of the benchmarks, and that nothing is timed that does not agree with its definition."""

from __future__ import annotations

import json
import math

import mgiou
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bench import heads, measure, peers, report, roofline, speed
from tests.helpers import convex, generator, rectangle_corners, run_python
from triton_mgiou import PAPER, mgiou_loss

CPU = torch.device("cpu")
RATES = {"copy_bytes": 1e12, "multiply_add": 4e12, "min_max": 1e12, "compare_select": 1e12, "half_of_each": 4e12}


def peer_of(loss, exact=peers.exact_mgiou, **options):
    return peers.Peer("peer", peers.MGIOU, loss, exact, **options)


def errors(loss, batch=2 * peers.BLOCK, **options):
    return peers.errors(peer_of(loss, **options), batch, 4, torch.float32, CPU)


def row_of(peer, batch, vertices, step, **more):
    row = {
        "peer": peer,
        "quantity": "MGIoU loss",
        "dtype": "float32",
        "batch": batch,
        "vertices": vertices,
        "group": "large",
    }
    times = {"wall_us": {"step": step, "forward": step / 2}, "wall_ratio": {"step": 1.0, "forward": 1.0}}
    return {**row, "value_error": 1e-8, "gradient_error": 2e-7, **times, **more}


def result_of(rows, **more):
    about = {"command": "c", "commit": "abc", "date": "2026-01-01", "device": "D", "cpus": 2, "threads": 1}
    versions = {"python": "3.12", "versions": {"torch": "2.6"}}
    return {**about, **versions, "missing": {}, "rates": {}, "left_out": [], "rows": rows, **more}


def test_operations_by_hand():
    # v = 7: 14 + 28 + 98 + 56 and 24 + 14 + 70 + 14
    assert roofline.operations(3, 4, gradient=False) == (196, 122)
    # 3 (3 + 8) = 33 pairs of axis and vertex: 70 + 132 + 42 + 54 + 6 more, and 28 + 66
    assert roofline.operations(3, 4, gradient=True) == (500, 216)


def test_bytes_by_hand():
    assert roofline.moved_bytes(4, 6, gradient=False, element_bytes=4) == 10 * 8
    assert roofline.moved_bytes(4, 6, gradient=True, element_bytes=4) == 10 * 8 + 4 * 8
    assert roofline.moved_bytes(4, 6, gradient=True, element_bytes=2) == 10 * 4 + 4 * 8


def test_bounds_by_hand():
    bounds = roofline.bound_us(10**6, 3, 4, True, 4, RATES)
    assert bounds == pytest.approx({"memory": 80.0, "issue": 716 / 4, "min, max, compare": 216.0})


def test_share_of_the_bound():
    times = {"value": 244.0, "value and gradient": None}
    rows = [row_of("kernel", 10**6, 4, 1.0, launch_us=times), row_of("L1", 10**6, 4, 1.0)]
    (found,) = report.roofline_rows(rows, RATES)
    # v = 8: 16 + 32 + 128 + 64 and 28 + 16 + 96 + 16
    assert roofline.operations(4, 4, gradient=False) == (240, 156)
    assert (found["limit"], found["gradient"]) == ("min, max, compare", False)
    assert found["fraction"] == pytest.approx(156 / 244)


def test_exponent():
    assert report.exponent([(x, 3 * x**1.5) for x in (8, 16, 64)]) == pytest.approx(1.5)
    # Least squares of 0, 1, 1 over 0, 1, 2: the slope is 1/2.
    assert report.exponent([(1, 1), (10, 10), (100, 10)]) == pytest.approx(0.5)


def test_growth_is_fitted_where_the_machine_is_busy():
    rows = [row_of("L1", batch, 8, max(50.0, 0.001 * batch)) for batch in (128, 512, 2**16, 2**18, 2**20, 2**22)]
    rows += [row_of("L1", 2**16, n, n**2.0) for n in (3, 4, 16, 32)]
    (line,) = report.growth_table(rows).splitlines()[2:]
    assert line.startswith("| L1 | 1.00 (65536 to 4194304) | ")
    gpu = [{**row, "gpu_us": {"step": 1e-9 * row["batch"] ** 2 * row["vertices"] ** 3}} for row in rows]
    assert report.growth_table(gpu).splitlines()[2:] == ["| L1 | 2.00 (65536 to 4194304) | 3.00 (8 to 32) |"]


def test_numbers():
    assert [report.number(value) for value in (None, 1234.5, 56.78, 0.1234)] == ["-", "1234", "56.8", "0.12"]
    assert [report.short(value) for value in (128, 4096, 1000, 2**22)] == ["128", "4K", "1000", "4M"]


def test_parts_of_one_measurement():
    parts = [
        result_of([row_of("kernel", 128, 8, 1.0)], launches={"kernel": 3, "batch": 1, "vertices": 2}),
        result_of([row_of("kernel", 128, 8, 2.0), row_of("compiled", 128, 8, 3.0)], launches={"compiled": 9}),
    ]
    refused, slow, late = (
        {"peer": peer, "batch": 128, "vertices": 8, "dtype": "float32", "reason": "R"}
        for peer in ("L1", "reference", "compiled")  # the last one is in the other part
    )
    parts[0]["left_out"], parts[1]["left_out"] = [refused, late], [refused, slow]
    whole = report.merged(parts)
    assert [(row["peer"], row["wall_us"]["step"]) for row in whole["rows"]] == [("kernel", 1.0), ("compiled", 3.0)]
    assert whole["left_out"] == [refused, slow]
    assert whole["launches"] == {"kernel": 3, "batch": 1, "vertices": 2, "compiled": 9}
    assert len(whole["runs"]) == 2
    with pytest.raises(ValueError, match="expected results of one machine, got device 'D' and 'E'"):
        report.merged([parts[0], {**parts[1], "device": "E"}])
    with pytest.raises(ValueError, match=r"expected results of one version of torch, got 2\.6 and 2\.7"):
        report.merged([parts[0], {**parts[1], "versions": {"torch": "2.7"}}])


def test_a_part_with_a_package_that_another_lacks():
    lacks, has = result_of([row_of("kernel", 128, 8, 1.0)]), result_of([row_of("mgiou MGIoU2D", 128, 8, 9.0)])
    lacks["missing"] = {"mgiou MGIoU2D": "no mgiou", "mmcv rotated IoU": "no mmcv"}
    has["missing"] = {"mmcv rotated IoU": "no mmcv"}
    has["versions"] = {"torch": "2.6", "mgiou": "0.1.0"}
    whole = report.merged([lacks, has])
    assert whole["versions"] == has["versions"]
    assert whole["missing"] == has["missing"]
    assert [row["peer"] for row in whole["rows"]] == ["kernel", "mgiou MGIoU2D"]


def test_definitions_by_hand():
    boxes = np.array([0.0, 0.0, 1.0, 1.0]), np.array([2.0, 0.0, 3.0, 1.0])
    assert peers.exact_box_giou(*boxes) == pytest.approx(1 + 1 / 3)
    assert peers.exact_box_giou(boxes[0], np.array([0.0, 0.0, 2.0, 1.0])) == pytest.approx(0.5)
    turned = np.array([0.0, 0.0, 1.0, 1.0, math.pi / 4])  # common: a regular octagon of area 2 (sqrt 2 - 1)
    assert peers.exact_rotated_iou(np.array([0.0, 0.0, 1.0, 1.0, 0.0]), turned) == pytest.approx(1 - math.sqrt(0.5))
    vertices = torch.tensor([[[0.0, 1.0], [2.0, 3.0], [1.0, 5.0]]])
    assert peers.enclosing_boxes(vertices).tolist() == [[0.0, 1.0, 2.0, 5.0]]
    assert peers.rotated_boxes(vertices).tolist() == [[1.0, 3.0, 2.0, 4.0, pytest.approx(math.pi / 4)]]
    corners = rectangle_corners(torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.3]], dtype=torch.float64))[0]
    assert np.allclose(peers._corners(1.0, 2.0, 3.0, 4.0, 0.3), corners)


def test_definitions_against_their_packages():
    rng = generator(1)
    pred, target = convex(8, 4, rng), convex(8, 4, rng)
    for exact, loss in [
        (peers.exact_l1, F.l1_loss),
        (peers.exact_smooth_l1, F.smooth_l1_loss),
        (peers.exact_two_axes, mgiou.MGIoU2D("corner", reduction="sum")),
        (peers.exact_mgiou, mgiou.MGIoU2DPlus()),
    ]:
        each = [exact(p, g) for p, g in zip(pred.numpy(), target.numpy(), strict=True)]
        assert loss(pred, target).item() == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize("vertices", [3, 4, 8])
def test_the_starting_point_of_this_project_is_the_same_number_on_convex_polygons(vertices):
    peer = peer_of(peers.angle_sorted_loss)
    value, gradient = peers.errors(peer, 2 * peers.BLOCK, vertices, torch.float32, CPU)
    assert value < 1e-6
    assert gradient < 1e-4


def test_the_starting_point_sorts_and_masks():
    square = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]]])
    bow_tie, target = square[:, [0, 2, 1, 3]], square + 1
    torch.testing.assert_close(peers.angle_sorted_loss(bow_tie, target), mgiou_loss(square, target, **PAPER))
    repeated = square[:, [0, 1, 2, 3, 3]]
    torch.testing.assert_close(peers.angle_sorted_loss(repeated, target), mgiou_loss(square, target, **PAPER))


def test_input_has_no_vertices_that_are_one_extreme_up_to_rounding():
    """A corner that is pulled out of a triangle's side, next to which it would tie, and a side parallel to another."""
    triangle = torch.tensor([[[0.0, 0.0], [4.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)
    other = torch.tensor([[[0.2, 0.1], [3.0, 2.5], [0.5, 4.0]]], dtype=torch.float64)
    blunt = torch.tensor([[[0.0, 0.0], [2.0, 0.5 - 1e-7], [4.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)
    parallel = torch.tensor([[[0.0, 0.0], [2.0, 0.5 + 1e-7], [0.5, 4.0]]], dtype=torch.float64)
    assert not peers._have_ties(triangle, other)
    assert peers._have_ties(blunt, other)
    assert peers._have_ties(triangle, parallel)
    assert peers._have_ties(parallel, triangle)
    assert not peers._have_ties(*(side.double() for side in peers._block(128, torch.float32))).any()


def test_input_is_the_same_block_again_and_again():
    pred, target = peers.polygons(3 * peers.BLOCK, 5, torch.float32, CPU)
    assert pred.shape == target.shape == (3 * peers.BLOCK, 5, 2)
    blocks = pred.split(peers.BLOCK)
    assert torch.equal(blocks[0], blocks[2])
    assert not torch.equal(pred, target)
    assert len(blocks[0].unique(dim=0)) == peers.BLOCK
    with pytest.raises(ValueError, match="batch must be a multiple of 32, got 40"):
        peers.polygons(40, 5, torch.float32, CPU)


def wrong_in_the_last_sample(pred, target):
    loss = mgiou_loss(pred, target, reduction="none", **PAPER)
    return torch.cat((loss[:-1], 0.5 * loss[-1:])).mean()


def gradient_of(change):
    """The value of the loss with another gradient."""

    def wrong(pred, target):
        value = peers.reference(pred, target)
        return value.detach() + change(value - value.detach())

    return wrong


WRONG = {
    "value": lambda pred, target: peers.reference(pred, target) + 3e-6,
    "NaN": lambda pred, target: peers.reference(pred, target) * torch.nan,
    "one sample of many": wrong_in_the_last_sample,
    "no gradient": gradient_of(lambda slope: 0.0 * slope),
    "gradient": gradient_of(lambda slope: 1.001 * slope),
    "axes held": lambda pred, target: mgiou_loss(pred, target, **PAPER | {"axis_grad": False}),
    "another loss": F.l1_loss,
}


def test_what_agrees_is_measured():
    peer = peer_of(peers.reference)
    value, gradient, reason = speed.checked(peer, 4 * peers.BLOCK, 4, torch.float32, CPU)
    assert reason is None
    assert value < 1e-7
    assert gradient < 1e-5


def test_the_defaults_agree_with_their_own_definition():
    options = {"exact": peers.exact_defaults, "holds": True}
    value, gradient = errors(mgiou_loss, **options)
    assert value < 1e-7
    assert gradient < 1e-5
    value, _ = errors(peers.reference, **options)
    assert value > 0.01
    _, gradient = errors(lambda pred, target: mgiou_loss(pred, target, axis_grad=True), **options)
    assert gradient > 0.01


@pytest.mark.parametrize("loss", WRONG.values(), ids=WRONG)
def test_what_disagrees_is_left_out(loss):
    group = speed.Group([(2 * peers.BLOCK, 4)], rounds=1)
    rows, left_out = speed.measure_size([peer_of(loss)], 2 * peers.BLOCK, 4, group, CPU)
    assert rows == []
    assert [row["peer"] for row in left_out] == ["peer"]
    assert left_out[0]["reason"].startswith("disagrees with its definition: value by ")


def test_what_raises_is_left_out():
    def broken(pred, target):  # noqa: ARG001
        raise RuntimeError("no such\nkernel")

    assert speed.checked(peer_of(broken), peers.BLOCK, 4, torch.float32, CPU)[2] == "RuntimeError: no such"


def test_steps_take_turns():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    times = measure.wall_us(steps, CPU, rounds=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert turns == ["a", "b", "a", "b", "a", "b"]  # to find out how many steps take 10 ms, then to and fro and to


def test_a_turn_begins_with_a_repetition_that_does_not_count(monkeypatch):
    seen = iter([5.0, 100.0, 900.0, 3.0, 1.0, 2.0, 900.0, 6.0, 4.0, 5.0])  # one, to find the count, and two rounds
    monkeypatch.setattr(measure, "_loop_us", lambda *_: next(seen))
    assert measure.wall_us({"a": int}, CPU, rounds=2) == {"a": [2.0, 5.0]}


def test_from_the_measurement_to_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "CPU_GROUPS", {"training": speed.Group([(64, 4), (128, 8)], rounds=1)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "cpu.json"
    speed.main(["--out", str(out)])
    result = json.loads(out.read_text())
    assert list(tmp_path.iterdir()) == [out]
    assert result["command"] == "python -m bench.speed --out cpu.json"
    names = {(row["peer"], row["vertices"]) for row in result["rows"]}
    assert {("reference", 4), ("reference", 8), ("L1", 8), ("mgiou MGIoU2D", 4), ("angle-sorted", 8)} <= names
    assert "kernel" in result["missing"]
    (refused,) = result["left_out"]
    assert (refused["peer"], refused["batch"], refused["reason"]) == ("mgiou MGIoU2D", 128, "takes four corners")
    report.main([str(out)])
    text = (tmp_path / "cpu.md").read_text()
    table = [line for line in text.splitlines() if line.startswith(("| 64 x 4 ", "| 128 x 8 "))]
    assert len(table) == len(result["rows"])
    assert f"- kernel: {result['missing']['kernel']}" in text
    assert "- mgiou MGIoU2D at 128 x 8: takes four corners" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"cpu_batch.png", "cpu_vertices.png"}
    with pytest.raises(SystemExit, match=r"bench\.report: .*nothing\.json"):
        report.main([str(tmp_path / "nothing.json")])


def test_a_report_from_a_gpu(tmp_path):
    rows = [
        row_of(
            name,
            batch,
            8,
            100.0,
            memory_bytes=batch * 64,
            graph_us=batch / 1000 + 5,
            gpu_us={"step": 7.0 + batch / 1000, "forward": 6.0},
            launch_us={"value": 6.0, "value and gradient": 8.0},
        )
        for name in ("kernel", "L1")
        for batch in (128, 2**16, 2**20)
    ]
    whole = report.merged([result_of(rows, rates=RATES, launches={"batch": 4096, "vertices": 8, "kernel": 3})])
    text = report.markdown(whole)
    assert "| 1048576 x 8 | float32 | kernel | 50.0 | 100 | 1.00 | 6.00 | 1056 | 1054 | 64.0 | 1e-08 | 2e-07 |" in text
    # 2^20 pairs: 3244 operations over 4 * 10^12 a second, and 1020 of selection over 10^12
    assert "| 1048576 x 8 | 6.00 | 8.00 | 13369 % | 1056 | - | - | 64.0 | - | - |" in text
    assert "4.0 multiply-add, 1.0 min or max" in text
    assert "one step at 4096 x 8:\n\n- kernel: 3\n" in text
    assert text.endswith("Every peer ran at every size.\n")
    names = [path.name for path in report.figures(whole, tmp_path / "gpu")]
    assert names == ["gpu_batch.png", "gpu_vertices.png", "gpu_memory.png", "gpu_roofline.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)


@pytest.mark.parametrize(
    ("dtype", "vertices", "names"),
    [("bfloat16", 8, []), ("float32", 4, ["vertices"]), ("float32", 8, ["batch", "vertices"])],
)
def test_a_report_of_a_part_has_no_empty_figures(dtype, vertices, names, tmp_path):
    """As `bench.speed --only bfloat16` writes it."""
    rows = [row_of(peer, 512, vertices, 100.0, dtype=dtype) for peer in ("reference", "L1")]
    path = tmp_path / "part.json"
    command = "python -m bench.speed --out \N{GREEK SMALL LETTER OMEGA}.json"
    path.write_text(json.dumps(result_of(rows, command=command), ensure_ascii=False), encoding="utf-8")
    done = run_python(
        "-m", "bench.report", str(path), environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "part.md").read_text(encoding="utf-8")
    assert f"| 512 x {vertices} | {dtype} | L1 | 50.0 | 100 |" in text
    assert command in text
    assert {figure.name for figure in tmp_path.glob("*.png")} == {f"part_{name}.png" for name in names}


def test_a_step_of_a_head_trains_it():
    step = heads.step_of(F.l1_loss, 32, "eager", CPU)
    losses = [step().item() for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]


def test_steps_of_a_head_are_compared_in_one_run():
    row = heads.measured(32, "eager", CPU, rounds=1)
    assert row["us"].keys() == row["ratio"].keys() == heads.LOSSES.keys()
    assert row["ratio"]["smooth L1"] == 1.0
    assert row["ratio"]["default"] == pytest.approx(row["us"]["default"] / row["us"]["smooth L1"], rel=0.01)
