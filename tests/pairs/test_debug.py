"""Debug mode of the matrices: NaN and Inf in sets, matrix and gradients are named; off, nothing is looked at."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import INF, NAN, assert_same, convex, generator
from tests.pairs.helpers import FORMATS, random_boxes
from triton_mgiou import box_mgiou, polygon_mgiou
from triton_mgiou.training import NonFiniteError, debug


def boxes(fmt="cxcywhr", device="cpu"):
    rng = generator(21)
    return [random_boxes(count, fmt, rng).float().to(device) for count in (3, 4)]


def polygons():
    rng = generator(22)
    return [convex(count, size, rng).float() for count, size in ((3, 5), (4, 6))]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_bad_box_is_named_unless_it_is_not_there(fmt, batched):
    first, second = boxes(fmt)
    second[1].view(-1)[2] = NAN
    mask = torch.tensor([True, False, True, True])
    if batched:
        first, second, mask = (torch.stack((each, each.flip(0))) for each in (first, second, mask))
    name = "polygon_mgiou, input: polygons2" if fmt == "xyxyxyxy" else "box_mgiou, input: boxes2"
    with debug():
        with pytest.raises(NonFiniteError, match=f"{name}: {1 + batched} NaN and 0 Inf"):
            box_mgiou(first, second, fmt=fmt)
        assert box_mgiou(first, second, fmt=fmt, mask2=mask).isfinite().all()
    assert box_mgiou(first, second, fmt=fmt).isnan().any()


@pytest.mark.parametrize("batched", [False, True])
def test_a_bad_vertex_is_named_unless_it_is_padding(batched):
    first, second = polygons()
    first[1, 4] = torch.tensor([NAN, INF])
    lengths, mask = torch.tensor([5, 4, 9]), torch.tensor([True, False, True])
    if batched:
        first, second, lengths, mask = (each.unsqueeze(0) for each in (first, second, lengths, mask))
    with debug():
        for given in ({}, {"lengths1": lengths + 1}, {"mask1": ~mask}):
            with pytest.raises(NonFiniteError, match="polygon_mgiou, input: polygons1: 1 NaN and 1 Inf") as caught:
                polygon_mgiou(first, second, **given)
            assert caught.value.report.first[0][-3:] == (1, 4, 0)
        for given in ({"lengths1": lengths}, {"mask1": mask}, {"lengths1": lengths, "mask1": mask}):
            assert polygon_mgiou(first, second, **given).isfinite().all()
        second.view(-1, 6, 2)[3, 5] = NAN  # padding of one that is there, and a real vertex of one that is not
        second.view(-1, 6, 2)[0, 0] = NAN
        given = {"lengths2": torch.tensor([6, 6, 6, 5]), "mask2": torch.tensor([False, True, True, True])}
        given |= {"mask1": mask}
        if batched:
            given |= {name: each.unsqueeze(0) for name, each in given.items() if name != "mask1"}
        assert polygon_mgiou(first, second, **given).isfinite().all()


@pytest.mark.parametrize("fmt", ["cxcywhr", "cxcyczlwhr"])
def test_degrees_given_as_radians_are_warned_of(fmt):
    first, second = boxes(fmt)
    second[1, -1] = 90.0
    there = torch.tensor([True, False, True, True])
    with debug(), pytest.warns(RuntimeWarning, match=r"box_mgiou, input: 1 of 4 angles of boxes2 .*90.*degrees"):
        box_mgiou(first, second, fmt=fmt)
    with debug(), pytest.warns(RuntimeWarning, match=r"1 of 8 angles of boxes1"):
        box_mgiou(torch.stack((second, second[[0, 2, 3, 0]])), torch.stack((first, first)), fmt=fmt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        box_mgiou(first, second, fmt=fmt)
        with debug():
            box_mgiou(first, second, fmt=fmt, angle="degrees")
            box_mgiou(first, second, fmt=fmt, mask2=there)


def test_values_and_gradients_are_the_same_and_bad_ones_named(backend):
    leaves = [each.requires_grad_() for each in boxes(device=backend.device)]
    upstream = torch.rand(3, 4, generator=generator(23)).to(backend.device)
    results = []
    for enabled in (False, True):
        with debug(enabled):
            value = box_mgiou(*leaves, over="depth", backend=backend.name)
        results.append((value.detach(), *torch.autograd.grad(value, leaves, upstream)))
    for off, on in zip(*results, strict=True):
        assert_same(on, off)
    with debug():
        value = box_mgiou(*leaves, backend=backend.name)
    upstream[1, 2] = INF
    message = r"box_mgiou, backward, from what uses the matrix: gradient of the matrix: 0 NaN and 1 Inf .* \[1, 2\]"
    with pytest.raises(NonFiniteError, match=message):
        torch.autograd.grad(value, leaves, upstream)


def test_only_the_gradient_of_the_matrix_is_checked():
    first, second = boxes()
    first.requires_grad_()
    with debug():
        value = box_mgiou(first, second).sum()
    (value + (first * torch.tensor(INF)).sum()).backward()
    assert not first.grad.isfinite().any()


def test_off_nothing_more_is_computed():
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, _types, arguments=(), keywords=None):
            names.append(str(operation))
            return operation(*arguments, **keywords or {})

    sets = boxes(), polygons()
    seen = []
    for enabled in (False, True, False):
        names = []
        with debug(enabled), Operations():
            box_mgiou(*sets[0])
            polygon_mgiou(*sets[1])
        seen.append(names)
    assert seen[0] == seen[2]
    assert not any("_local_scalar_dense" in name for name in seen[0])
    assert any("_local_scalar_dense" in name for name in seen[1])


def test_transforms_pass():
    first, second = boxes()
    with debug():
        each = torch.func.vmap(lambda box: box_mgiou(box[None], second)[0])(first)
    torch.testing.assert_close(each, box_mgiou(first, second))
