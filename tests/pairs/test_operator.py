"""The matrix as an operator: torch.compile, opcheck, inference mode, autocast, graphs, large and odd sizes, errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers import assert_close, assert_does_not_wait, assert_gradient_close, assert_same, convex, generator
from tests.pairs import oracle
from tests.pairs.helpers import random_boxes
from tests.pairs.test_gradient import gradients
from tests.pairs.test_value import matrix
from triton_mgiou import box_mgiou, box_mgiou_loss, polygon_mgiou


def sets(backend, rows=4, columns=6):
    rng = generator(0)
    return [random_boxes(n, "cxcywhr", rng).float().to(backend.device) for n in (rows, columns)]


def test_compiles_whole(backend):
    first, second = (each.requires_grad_() for each in sets(backend))
    mask = torch.tensor([1, 0, 1, 1, 1, 1], device=backend.device).bool()

    def loss(first, second, mask):
        value = box_mgiou(first, second, over="depth", mask2=mask, backend=backend.name)
        return (0.1 + value).relu().sum()

    expected = torch.autograd.grad(loss(first, second, mask), (first, second))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, want in zip(torch.autograd.grad(compiled(first, second, mask), (first, second)), expected, strict=True):
        assert_close(actual, want, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_once_for_all_sizes(backend):
    """Each image has another number of objects; a compiler that counts each anew gives up after eight."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(first, second):
        return box_mgiou(first, second, backend=backend.name).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows, columns in [(4, 3), (5, 6), (6, 17), (8, 9)]:
        first, second = (each.requires_grad_() for each in sets(backend, rows, columns))
        expected = torch.autograd.grad(loss(first, second), (first, second))
        for actual, want in zip(torch.autograd.grad(compiled(first, second), (first, second)), expected, strict=True):
            assert_gradient_close(actual, want, rtol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", [box_mgiou, polygon_mgiou])
def test_compiles_a_set_that_a_mask_selects(backend, function):
    """Of how many there are the compiler knows nothing, and there may be none."""
    fmt = "xyxyxyxy" if function is polygon_mgiou else "cxcywhr"
    rng = generator(0)
    first, second = (random_boxes(n, fmt, rng).float().to(backend.device) for n in (5, 6))
    if function is polygon_mgiou:
        first, second = first.unflatten(1, (4, 2)), second.unflatten(1, (4, 2))
    has_gradient = not (backend.name == "triton" and function is polygon_mgiou)
    first.requires_grad_(has_gradient)

    def total(first, second, is_first, is_second):
        return function(first[is_first], second[is_second], backend=backend.name).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for rows, columns in [(3, 4), (0, 4), (3, 0), (5, 1)]:
            masks = [torch.arange(5) < rows, torch.arange(6) < columns]
            given = (first, second, *(mask.to(backend.device) for mask in masks))
            value, expected = compiled(*given), total(*given)
            assert_close(value, expected, atol=1e-5)
            if has_gradient:
                actual, want = (torch.autograd.grad(each, first)[0] for each in (value, expected))
                assert_close(actual, want, atol=1e-6)


@pytest.mark.parametrize("fmt", ["cxcywhr", "xyxyxyxy"])
@pytest.mark.parametrize("batched", [False, True])
def test_an_exported_program_takes_any_number_of_boxes(backend, fmt, batched):
    """As many as there are sets too, whether each set has a mask or all have one."""

    class Matrix(torch.nn.Module):
        def forward(self, first, second, mask):
            return box_mgiou(first, second, fmt=fmt, mask2=mask, backend=backend.name)

    def given(rows, columns):
        rng = generator(rows)
        first, second = (random_boxes(2 * n, fmt, rng).float().unflatten(0, (2, n)) for n in (rows, columns))
        mask = torch.rand(2, columns, generator=rng) > 0.3
        return [each.to(backend.device) for each in (first, second, mask if batched else mask[0])]

    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    shapes = {1: rows}, {1: columns}, {1: columns} if batched else {0: columns}
    program = torch.export.export(Matrix(), tuple(given(5, 7)), dynamic_shapes=shapes).module()
    for sizes in ((5, 7), (3, 2), (2, 1)):
        assert_close(program(*given(*sizes)), Matrix()(*given(*sizes)), atol=1e-6)


def test_the_operators_are_sound(backend):
    if backend.name != "triton":
        pytest.skip("eager has no operator of its own")
    import triton_mgiou.pairs  # noqa: F401, PLC0415 - registers the operators; needs Triton

    operators = torch.ops.triton_mgiou
    first, second = (each.unsqueeze(0).requires_grad_() for each in sets(backend))
    options = ("cxcywhr", "radians", True, "mean", "uniform")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.box_matrix.default, (first, second, None, None, *options), test_utils=tests)
    upstream = torch.ones(1, 4, 6, device=backend.device)
    arguments = (first.detach(), second.detach(), None, None, upstream, *options)
    torch.library.opcheck(operators.box_matrix_gradient.default, arguments, test_utils=tests)
    quadrangles = [each.detach()[..., :4, None].expand(-1, -1, -1, 2).contiguous() for each in (first, second)]
    arguments = (*quadrangles, None, None, None, None, "mean", "uniform")
    torch.library.opcheck(operators.polygon_matrix.default, arguments, test_utils=tests)


def test_inference_mode_and_autocast_change_nothing(backend):
    first, second = sets(backend)
    expected = box_mgiou(first, second, backend=backend.name)
    with torch.inference_mode():
        assert_same(box_mgiou(first, second, backend=backend.name), expected)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert_same(box_mgiou(first, second, backend=backend.name), expected)


def test_tensors_that_negate_when_read_are_read_so(backend):
    """Memory has the opposite of the imaginary part of a conjugate."""
    first, second = sets(backend)
    upstream = torch.rand(4, 6, generator=generator(4)).to(backend.device)

    def lazily(values):
        result = torch.complex(torch.zeros_like(values), -values).conj().imag
        assert result.is_neg()
        return result

    for own, other in ((lazily(first), second), (first, lazily(second))):
        assert_same(matrix(backend, own, other), matrix(backend, first, second))
        corners = [each[:, :4].unflatten(1, (2, 2)) for each in (own, other, first, second)]
        assert_same(matrix(backend, *corners[:2]), matrix(backend, *corners[2:]))
    leaves = [each.clone().requires_grad_() for each in (first, second)]
    for sides in ((leaves[0], leaves[1]), (lazily(leaves[0]), lazily(leaves[1]))):
        value = box_mgiou(*sides, backend=backend.name)
        for actual, want in zip(
            torch.autograd.grad(value, leaves, lazily(upstream)),
            gradients(backend, first, second, upstream),
            strict=True,
        ):
            assert_same(actual.cpu(), want)
    first, second = first[:4], second[:4]
    expected = box_mgiou_loss(first, second, weight=upstream[:, 0], backend=backend.name)
    for own, other in ((lazily(first), second), (first, lazily(second))):
        actual = box_mgiou_loss(own, other, weight=lazily(upstream)[:, 0], backend=backend.name)
        assert_same(actual, expected)


def test_a_second_derivative_is_refused_by_the_kernel(backend):
    first, second = (each.requires_grad_() for each in sets(backend))
    value = box_mgiou(first, second, backend=backend.name).sum()
    if backend.name == "triton":
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(value, first, create_graph=True)
    else:
        (grad,) = torch.autograd.grad(value, first, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), second)[0].abs().sum() > 0


def test_the_gradient_of_polygons_is_never_dropped(backend):
    rng = generator(1)
    first, second = (random_boxes(n, "xyxyxyxy", rng).reshape(n, 4, 2).to(backend.device) for n in (3, 4))
    first.requires_grad_()
    if backend.name == "triton":
        with pytest.raises(
            RuntimeError, match=r'no kernel for the gradient of pairs of polygons; expected backend "auto"'
        ):
            polygon_mgiou(first, second, backend="triton")
    assert torch.autograd.grad(polygon_mgiou(first, second).sum(), first)[0].abs().sum() > 0


def test_shapes_of_no_kernel_are_told(backend):
    if backend.name != "triton":
        pytest.skip("of the kernels")
    corners = random_boxes(2, "corners3d", generator(2)).to(backend.device)
    with pytest.raises(RuntimeError, match=r"no kernel for pairs of 'corners3d'; expected backend \"auto\""):
        box_mgiou(corners, corners, fmt="corners3d", backend="triton")


def test_more_batches_than_a_grid_has(backend, monkeypatch):
    if backend.name != "triton":
        pytest.skip("of the kernels")
    from triton_mgiou import pairs  # noqa: PLC0415 - needs Triton

    rng = generator(3)
    batches = [random_boxes(10 * n, "cxcywhr", rng).reshape(10, n, 5).float() for n in (3, 4)]
    first, second = (each.to(backend.device).requires_grad_() for each in batches)
    mask = torch.rand(10, 3, generator=rng).to(backend.device) > 0.3
    results = []
    for most in (pairs.MOST_BATCHES, 4):
        monkeypatch.setattr(pairs, "MOST_BATCHES", most)
        value = box_mgiou(first, second, mask1=mask, backend="triton")
        results.append((value.detach(), *torch.autograd.grad(value.square().sum(), (first, second))))
        corners = first.detach()[..., :4].unflatten(-1, (2, 2))
        results[-1] += (polygon_mgiou(corners, corners, mask2=mask, backend="triton"),)
    for one, parts in zip(*results, strict=True):
        assert_same(parts, one)


def test_more_shapes_than_32_bits_count_are_refused(backend):
    if backend.name != "triton":
        pytest.skip("of the kernels")
    many, one = torch.ones(1, 1, device=backend.device).expand(2**31, 4), torch.ones(1, 4, device=backend.device)
    for sides in ((many, one), (one, many)):
        with pytest.raises(ValueError, match=r"each set must have at most .* got (1 and )?2147483648"):
            box_mgiou(*sides, fmt="xyxy", backend="triton")
        with pytest.raises(ValueError, match=r"each set must have at most"):
            polygon_mgiou(*(each.unflatten(1, (2, 2)) for each in sides), backend="triton")


BOXES = torch.ones(3, 5)
ERRORS = {
    "first is no tensor": (TypeError, "boxes1 must be a torch.Tensor, got list", ([1.0], BOXES), {}),
    "second is integer": (TypeError, "boxes2 must be floating .*, got torch.int64", (BOXES, BOXES.long()), {}),
    "one number": (ValueError, r"boxes1 must have shape .* got \(\)", (torch.tensor(1.0), BOXES), {}),
    "corners of one box": (
        ValueError,
        r"boxes2 must have shape \(P, 8, 3\) .* got \(8,\)",
        (torch.ones(2, 8, 3), torch.ones(8)),
        {"fmt": "corners3d"},
    ),
    "four numbers": (ValueError, r"boxes2 must have shape .*5.* got \(3, 4\)", (BOXES, BOXES[:, :4]), {}),
    "one box": (ValueError, r"boxes1 must have shape .* got \(5,\)", (BOXES[0], BOXES), {}),
    "one batch": (ValueError, "boxes2 must have a batch if and only if", (BOXES[None], BOXES), {}),
    "batches": (ValueError, "batch size 1, got 2", (BOXES[None], BOXES[None].repeat(2, 1, 1)), {}),
    "over": (ValueError, "over must be one of .*'depth', got 'max'", (BOXES, BOXES), {"over": "max"}),
    "weights": (ValueError, "axis_weight must be one of", (BOXES, BOXES), {"axis_weight": "none"}),
    "array": (ValueError, r"over must be one of .* got array\(", (BOXES, BOXES), {"over": np.array(["min", "max"])}),
    "array of one": (ValueError, r"fmt must be one of .* got array\(", (BOXES, BOXES), {"fmt": np.array("cxcywhr")}),
    "backend": (ValueError, "backend must be one of", (BOXES, BOXES), {"backend": "cuda"}),
    "format": (ValueError, "fmt must say which of two", (BOXES, BOXES), {"fmt": "xywhr"}),
    "mask of floats": (TypeError, "mask1 must be torch.bool", (BOXES, BOXES), {"mask1": torch.ones(3)}),
    "long mask": (ValueError, r"mask2 must have shape \(3,\)", (BOXES, BOXES), {"mask2": torch.ones(4).bool()}),
    "long mask beside batches": (
        ValueError,
        r"mask2 must have shape \(1, 3\) or \(3,\), got \(4,\)",
        (BOXES[None], BOXES[None]),
        {"mask2": torch.ones(4).bool()},
    ),
    "mask elsewhere": (
        ValueError,
        "mask1 must be on boxes1's device cpu, got meta",
        (torch.ones(3, 8), torch.ones(3, 8)),
        {"fmt": "xyxyxyxy", "mask1": torch.ones(3, dtype=torch.bool, device="meta")},
    ),
    "space": (
        ValueError,
        "axis_weight must be one of 'uniform', got 'length'",
        (torch.ones(2, 7), torch.ones(2, 7)),
        {"fmt": "cxcyczlwhr", "axis_weight": "length"},
    ),
}
POLYGONS = torch.ones(3, 4, 2)
POLYGON_ERRORS = {
    "no vertex": (ValueError, "polygons1 must have shape .* N >= 1", (POLYGONS[:, :0], POLYGONS), {}),
    "space": (ValueError, "polygons2 must have shape", (POLYGONS, torch.ones(3, 4, 3)), {}),
    "one vertex": (ValueError, r"polygons1 must have shape .* got \(2,\)", (POLYGONS[0, 0], POLYGONS), {}),
    "lengths": (TypeError, "lengths1 must be integers", (POLYGONS, POLYGONS), {"lengths1": torch.ones(3)}),
    "uint16": (
        TypeError,
        "lengths2 must be integers .int8 to int64, or uint8., got torch.uint16",
        (POLYGONS, POLYGONS),
        {"lengths2": torch.tensor([4, 4, 4], dtype=torch.uint16)},
    ),
    "few": (ValueError, r"lengths2 must have shape \(3,\)", (POLYGONS, POLYGONS), {"lengths2": torch.tensor([4])}),
    "mask": (ValueError, r"mask1 must have shape \(3,\)", (POLYGONS, POLYGONS), {"mask1": torch.ones(3, 4).bool()}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_boxes_are_told(name):
    error, message, arguments, options = ERRORS[name]
    with pytest.raises(error, match=message):
        box_mgiou(*arguments, **options)


@pytest.mark.parametrize("name", POLYGON_ERRORS)
def test_wrong_polygons_are_told(name):
    error, message, arguments, options = POLYGON_ERRORS[name]
    with pytest.raises(error, match=message):
        polygon_mgiou(*arguments, **options)


@pytest.mark.gpu
def test_a_step_does_not_wait_and_a_graph_holds_it():
    backend = type("Gpu", (), {"device": "cuda", "name": "triton"})
    first, second = (each.requires_grad_() for each in sets(backend, 400, 500))
    upstream = torch.randn(400, 500, device="cuda")

    def step():
        leaves = [each.detach().requires_grad_() for each in (first, second)]
        value = box_mgiou(*leaves, backend="triton")
        return (value, *torch.autograd.grad(value, leaves, upstream))

    expected = step()
    assert_does_not_wait(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    with torch.no_grad():
        for each in (first, upstream):
            each.copy_(each.flip(0))
    graph.replay()
    for actual, want in zip(result[:2], expected[:2], strict=True):
        assert_same(actual.detach().flip(0).cpu(), want.detach().cpu())


@pytest.mark.gpu
def test_only_the_matrix_takes_memory():
    backend = type("Gpu", (), {"device": "cuda", "name": "triton"})
    first, second = (each.requires_grad_() for each in sets(backend, 2000, 5000))
    upstream = torch.ones(2000, 5000, device="cuda")
    for measured in (False, True):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = box_mgiou(first, second, backend="triton")
        torch.autograd.grad(value, (first, second), upstream)
        if measured:
            assert torch.cuda.max_memory_allocated() - before <= value.nbytes + 2**20
        del value


@pytest.mark.gpu
def test_more_than_2_to_the_31_pairs():
    backend = type("Gpu", (), {"device": "cuda", "name": "triton"})
    rows, columns = 70000, 31000
    first, second = sets(backend, rows, columns)
    value = box_mgiou(first, second, backend="triton")
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, 17)):
        assert_same(value[row, column], box_mgiou(first[row : row + 1], second[column : column + 1])[0, 0])


def away_from_kinks(first, second):
    """Pairs whose gradient does not jump nearby, by float64 of slightly moved boxes: what rounding can't take over."""
    sides = [each.double().unsqueeze(dim).expand(len(first), len(second), 5) for dim, each in ((1, first), (0, second))]
    rng = torch.Generator(first.device).manual_seed(1)

    def each_gradient(move):
        leaves = [
            (side * (1 + move * torch.randn(side.shape, generator=rng, device=side.device, dtype=side.dtype))).flatten(
                0, 1
            )
            for side in sides
        ]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        loss = box_mgiou_loss(*leaves, reduction="sum", boundary_weight=0.0, backend="eager")
        return torch.cat(torch.autograd.grad(loss, leaves), dim=1)

    here = each_gradient(0.0)
    jumps = torch.zeros(len(here), dtype=torch.bool, device=here.device)
    for _ in range(16):
        jumps |= ((each_gradient(2e-6) - here).abs() > 1e-3).any(1)
    return ~jumps.view(len(first), len(second))


@pytest.mark.gpu
def test_the_interpreters_sizes_are_not_the_only_ones(backend):
    """Several tiles of rows and columns, and rows of the matrix that start anywhere."""
    if (backend.name, backend.device) != ("triton", "cuda"):
        pytest.skip("is about the compiled kernels")
    eager = replace(backend, name="eager")
    for rows, columns in ((1, 1), (63, 257), (1025, 1030), (3000, 700)):
        first, second = sets(backend, rows, columns)
        exact = first.double(), second.double()
        assert_close(matrix(backend, first, second), matrix(eager, *exact), atol=2e-6)
        upstream = away_from_kinks(first, second).double()
        assert upstream.mean() > 0.99
        expected = gradients(eager, *exact, upstream)
        for actual, want in zip(gradients(backend, first, second, upstream.float()), expected, strict=True):
            assert_gradient_close(actual, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tile", [(8, 16), (4, 32), (1, 128), (8, 32), (4, 64)])
@pytest.mark.parametrize("columns", [36, 37])
def test_a_program_goes_down_its_columns_tile_by_tile(backend, monkeypatch, tile, columns):
    """In the tiles that a GPU has, all of them in as few programs as may be."""
    if backend.name != "triton" or not backend.is_slow:
        pytest.skip("of the kernels in the interpreter; on a GPU other tests have enough boxes")
    from triton_mgiou import launch  # noqa: PLC0415 - needs Triton
    from triton_mgiou.tuning import layouts  # noqa: PLC0415

    first, second = sets(backend, 27, columns)
    first[11] = 0  # a point, which takes the long way
    masks = {"mask1": torch.arange(27) % 5 != 1, "mask2": torch.arange(columns) % 7 != 2}
    expected = [matrix(backend, first, second, **options) for options in ({}, masks)]
    monkeypatch.setattr(layouts, "pair_candidates", lambda *_: [layouts.PairLayout(*tile, 1, 255)])
    monkeypatch.setattr(layouts, "ENOUGH_PROGRAMS", 1)
    launch.forget_plans()
    try:
        for options, want in zip(({}, masks), expected, strict=True):
            assert_same(matrix(backend, first, second, **options), want)
    finally:
        launch.forget_plans()


def test_a_program_goes_along_its_rows_tile_by_tile(backend, monkeypatch):
    """Two programs take the five tiles of a row, of which the last one is not full; there are three rows of tiles."""
    if backend.name != "triton":
        pytest.skip("of the kernel")
    from triton_mgiou import launch  # noqa: PLC0415 - needs Triton
    from triton_mgiou.tuning import layouts  # noqa: PLC0415

    layout = layouts.PolygonPairLayout(4, 8, 1, 255)
    monkeypatch.setattr(layouts, "polygon_pair_candidates", lambda *_: [layout])
    monkeypatch.setattr(layouts.PolygonPairLayout, "grid", lambda *_: (3, 2, 2))
    rng = generator(16)
    first, second = (convex(2 * n, 3, rng).reshape(2, n, 3, 2) for n in (9, 35))
    expected = [oracle.polygon_matrix(*pair) for pair in zip(first.numpy(), second.numpy(), strict=True)]
    launch.forget_plans()
    try:
        actual = polygon_mgiou(first.to(backend.device), second.to(backend.device), backend=backend.name)
        assert_close(actual, np.stack(expected), atol=1e-13)
    finally:
        launch.forget_plans()
