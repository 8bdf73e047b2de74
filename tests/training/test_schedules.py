"""`AlphaSchedule`: going to a step is the same as so many steps, and what its numbers may be."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from triton_mgiou.training import AlphaSchedule


@pytest.mark.parametrize("kind", ["cosine", "linear", "step"])
@pytest.mark.parametrize("step", [0, 1, 4, 7, 8, 20, 2**70])
def test_a_run_that_is_resumed_goes_on(step, kind):
    resumed, gone_through = AlphaSchedule(8, kind), AlphaSchedule(8, kind)
    resumed.step()
    resumed.set(step)
    for _ in range(min(step, 20)):
        gone_through.step()
    assert resumed() == gone_through()
    resumed.step()
    gone_through.step()
    assert resumed() == gone_through()
    assert resumed.state_dict()["step_count"].dtype == torch.int64


def test_integers_of_numpy_are_integers():
    """As a table of results has them."""
    schedule = AlphaSchedule(np.int64(4), "linear", start=1.0, end=0.0)
    schedule.set(np.int32(1))
    assert schedule() == 0.75
    assert schedule.extra_repr().startswith("total_steps=4,")


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["cosine", "linear", "step"])
def test_the_type_does_not_depend_on_the_default_or_the_bounds(kind, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        value = AlphaSchedule(4, kind, start=1, end=0)()
    finally:
        torch.set_default_dtype(before)
    assert (value.dtype, value.item()) == (torch.float32, 1.0)


def test_the_most_steps():
    schedule = AlphaSchedule(2**63 - 1, "linear", start=1.0, end=0.0)
    schedule.set(2**62)
    assert schedule() == 0.5
    with pytest.raises(ValueError, match=r"^total_steps must be below 2\^63, got 9223372036854775808$"):
        AlphaSchedule(2**63)


@pytest.mark.parametrize("name", ["start", "end"])
def test_a_fraction_is_refused_at_once(name):
    """PyTorch cannot multiply it."""
    with pytest.raises(TypeError, match=f"^{name} must be a number, got Fraction$"):
        AlphaSchedule(4, **{name: Fraction(1, 2)})


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_numbers_of_numpy_are_numbers(kind):
    """Compiled code takes them for arrays, by which the value would be float64."""
    schedule = AlphaSchedule(4, "linear", start=kind(1), end=kind(0.5))
    schedule.step()
    compiled = torch.compile(schedule, backend="eager", fullgraph=True)()
    assert (schedule().item(), compiled.item()) == (0.875, 0.875)
    assert (schedule().dtype, compiled.dtype) == (torch.float32, torch.float32)
    assert repr(schedule) == "AlphaSchedule(total_steps=4, kind='linear', start=1.0, end=0.5)"


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (-1, ValueError, "step must be 0 or above, got -1"),
        (1.0, TypeError, "step must be an integer, got float"),
        (True, TypeError, "step must be an integer, got bool"),
    ],
)
def test_wrong_steps(step, error, message):
    with pytest.raises(error, match=message):
        AlphaSchedule(8).set(step)
