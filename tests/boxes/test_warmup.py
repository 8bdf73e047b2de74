"""`warmup` of the kernel of boxes, in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import triton_mgiou
from tests.conftest import INTERPRETED
from triton_mgiou import box_mgiou_loss, launch, warmup
from triton_mgiou.box_formats import FORMATS
from triton_mgiou.cli import main, table
from triton_mgiou.tuning import layouts


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter or a GPU")
def test_triton_cpu_what_is_warmed_up_is_what_training_takes(monkeypatch):
    made = []
    monkeypatch.setattr(launch, "box_plan", lambda key, make=launch.box_plan: made.append(key) or make(key))
    options = {"angle": "degrees", "clockwise": False, "weight": True, "boundary_weight": 0.5}
    results = warmup((), (2,), device="cpu", boxes=("cxcywhr",), box_options=options)
    assert [(each.fmt, each.gradient, each.source) for each in results] == [
        ("cxcywhr", True, "default"),
        ("cxcywhr", False, "default"),
    ]
    known = len(made)
    given = options | {"weight": torch.ones(2), "backend": "triton"}
    pred = torch.rand(2, 5, requires_grad=True)
    box_mgiou_loss(pred, torch.rand(2, 5), **given).backward()
    box_mgiou_loss(pred.detach(), torch.rand(2, 5), **given)
    box_mgiou_loss(torch.rand(2, 9)[:, ::2].requires_grad_(), torch.rand(2, 5), **given)
    assert len(made) == known
    lines = table(results).splitlines()
    assert [line.split()[0] for line in lines] == ["vertices", "cxcywhr", "cxcywhr"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"boxes": ("xyxyxyxy",)}, ValueError, "boxes must be one of .*'cxcywhr'.*got 'xyxyxyxy'"),
        ({"boxes": ("cxcywhr",), "box_options": {"fmt": "xyxy"}}, ValueError, "box_options must hold options of box"),
        ({"box_options": {"weight": 2}}, TypeError, r"box_options\['weight'\]"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        warmup(**{"vertices": (), "batch_sizes": (4,), "device": "cpu"} | arguments)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt != "xyxyxyxy"])
@pytest.mark.parametrize("is_double", [False, True])
def test_every_layout_covers_the_batch(fmt, is_double):
    """A lane for each box, up to as many programs as run at once; from there on each goes on."""
    numbers = 24 if fmt == "corners3d" else FORMATS[fmt].shape[0]
    for each in layouts.box_candidates(numbers, is_double, 132):
        assert each.lanes == 32 * each.num_warps
        assert each.programs <= layouts.MAX_PROGRAMS  # there is room for their sums
        assert each.grid(2**20)[0] == each.programs
        for batch in (1, 511, 513):
            assert each.grid(batch)[0] == math.ceil(batch / each.lanes)


@pytest.mark.parametrize(("numbers", "multiprocessors", "programs"), [(5, 132, 2112), (5, 108, 1728), (24, 132, 1584)])
def test_no_program_waits_for_others_to_end(numbers, multiprocessors, programs):
    """Warps on a multiprocessor, by NVIDIA's occupancy calculator: 32 at 64 registers a thread, 12 at 168."""
    assert layouts.box_candidates(numbers, False, multiprocessors)[0].programs == programs


def test_the_command_line_hands_boxes_on(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(triton_mgiou, "warmup", lambda *_, **named: calls.append(named) or [])
    options = '{"angle": "degrees", "weight": true}'
    assert main(["warmup", "--vertices", "--boxes", "cxcywhr", "xyxy", "--box-options", options, "--no-tune"]) == 0
    given = {"angle": "degrees", "weight": True}
    want = {"tune": False, "boxes": ["cxcywhr", "xyxy"], "box_options": given, "pairs": []}
    assert {name: calls[0][name] for name in want} == want
    capsys.readouterr()
