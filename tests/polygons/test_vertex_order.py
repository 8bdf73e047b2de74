"""Polygons that cross themselves are found and put in order."""

import itertools

import pytest
import torch

from tests import helpers
from triton_mgiou import mgiou_loss
from triton_mgiou.vertex_order import crossed, order_vertices

QUADRANGLE = torch.tensor([[0.0, 0.0], [12.0, 1.0], [9.0, 7.0], [3.0, 5.0]])


def shuffled(polygons, rng):
    """Each polygon's vertices in an order of its own."""
    order = torch.rand(polygons.shape[:2], generator=rng).argsort(1)
    return polygons.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))


@pytest.mark.parametrize("order", itertools.permutations(range(4)), ids=str)
def test_a_quadrangle_in_any_order_has_loss_0_once_ordered(order):
    target = QUADRANGLE[list(order)].unsqueeze(0)
    jumps = abs(order[0] - order[1]) == 2 or abs(order[1] - order[2]) == 2  # along a diagonal
    assert bool(crossed(target)) == jumps
    pred = QUADRANGLE.unsqueeze(0).clone().requires_grad_()
    loss = mgiou_loss(pred, order_vertices(target))
    helpers.assert_zero(loss.detach())
    helpers.assert_zero(torch.autograd.grad(loss, pred)[0])


@pytest.mark.parametrize("size", [4, 5, 8])
def test_convex_polygons_are_put_in_their_order(size):
    rng = helpers.generator(7)
    polygons = helpers.convex(40, size, rng)
    ordered = order_vertices(shuffled(polygons, rng))
    assert not crossed(ordered).any()
    helpers.assert_close(mgiou_loss(polygons, ordered, reduction="none"), torch.zeros(40), atol=1e-12)


def test_what_does_not_cross_stays_as_it_is():
    polygons = torch.cat((helpers.star(20, 7, helpers.generator(8)), torch.ones(1, 7, 2).double()))
    assert not crossed(polygons).any()
    helpers.assert_same(order_vertices(polygons), polygons)


@pytest.mark.parametrize("size", [4, 5, 9])
def test_crossed_agrees_with_shapely(size):
    geometry = pytest.importorskip("shapely.geometry")
    polygons = helpers.crossing(200, size, helpers.generator(9))
    simple = torch.tensor([geometry.LinearRing(polygon.tolist()).is_simple for polygon in polygons])
    assert 0 < int(simple.sum()) < 200
    assert torch.equal(crossed(polygons), ~simple)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_padding_stays_where_it_is(dtype):
    crosswise = QUADRANGLE[[0, 2, 1, 3]].to(dtype)
    pad = torch.tensor([[torch.nan, torch.inf]], dtype=dtype)
    behind = torch.cat((crosswise, pad, pad)).unsqueeze(0)
    between = torch.cat((pad, crosswise[:1], pad, crosswise[1:])).unsqueeze(0)
    mask = torch.tensor([[False, True, False, True, True, True]])
    lengths = torch.tensor([4])
    assert crossed(behind, lengths)
    assert crossed(between, mask=mask)
    helpers.assert_same(order_vertices(behind, lengths)[:, :4], QUADRANGLE.to(dtype).unsqueeze(0))
    helpers.assert_same(order_vertices(behind, lengths)[:, 4:], behind[:, 4:])
    helpers.assert_same(order_vertices(between, mask=mask)[mask], QUADRANGLE.to(dtype))
    helpers.assert_same(order_vertices(between, mask=mask)[~mask], between[~mask])


def test_few_or_no_vertices():
    for shape in [(0, 4, 2), (3, 1, 2), (3, 2, 2), (3, 3, 2)]:
        polygons = torch.rand(shape, generator=helpers.generator(10))
        assert not crossed(polygons).any()
        helpers.assert_same(order_vertices(polygons), polygons)
    assert not crossed(torch.full((2, 5, 2), torch.nan)).any()
    assert not crossed(torch.rand(2, 5, 2, generator=helpers.generator(11)), torch.tensor([0, 2])).any()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"polygons: expected .*\(B, M, 2\), got torch.int64"):
        crossed(torch.zeros(1, 4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="lengths and mask"):
        order_vertices(torch.zeros(1, 4, 2), torch.tensor([4]), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: expected bool of shape \(1, 4\)"):
        order_vertices(torch.zeros(1, 4, 2), mask=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"lengths: expected integers of shape \(1,\)"):
        order_vertices(torch.zeros(1, 4, 2), torch.tensor([4.0]))
