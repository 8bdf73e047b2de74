"""The backends that every test body with the fixture `backend` runs on.

    pytest                                          eager on the CPU
    TRITON_INTERPRET=1 pytest -k triton-cpu         the kernels in Triton's interpreter on the CPU
    pytest -m gpu                                   eager and the kernels on a GPU

The interpreter takes a fifth of a second for a launch, so there each test runs with every value of every parameter at
least once instead of every combination, which EVERY_CASE=1 brings back.
`pytest --hypothesis-profile thorough` looks for new counterexamples instead of repeating the known examples.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

from tests import helpers
from triton_mgiou import PAPER, mgiou_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_KERNELS = importlib.util.find_spec("triton") is not None

settings.register_profile("default", max_examples=40, deadline=None, derandomize=True)
settings.register_profile(
    "interpreter", max_examples=3, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("interpreter" if INTERPRETED else "default")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill whatever `torch.empty` gives with NaN, so that an element that nothing wrote to shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass(frozen=True)
class Backend:
    """Where a test body runs."""

    name: str
    device: str

    def loss(self, pred: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The paper's loss, and the options: `oracle.loss` has the same defaults."""
        return mgiou_loss(pred, target, backend=self.name, **PAPER | options)

    def value_and_gradient(
        self,
        pred: Tensor,
        target: Tensor,
        upstream: Tensor | None = None,
        wrt: Sequence[str] = ("pred",),
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Return the loss and, for each name in `wrt`, a gradient; the tensors go to the device first."""
        pred, target = pred.to(self.device), target.to(self.device)
        upstream = None if upstream is None else upstream.to(self.device)
        options = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in options.items()}
        with poisoned_memory():
            return helpers.value_and_gradient(self.loss, pred, target, upstream, wrt, **options)

    @property
    def is_slow(self) -> bool:
        """Whether a call takes a fifth of a second or more."""
        return INTERPRETED and self.name == "triton"

    def batch(self, size: int) -> int:
        """A batch size, cut to what the interpreter can do in a moment."""
        return min(size, 64) if self.is_slow else size


BACKENDS = [pytest.param(Backend("eager", "cpu"), id="eager-cpu")]
if torch.cuda.is_available():
    BACKENDS.append(pytest.param(Backend("eager", "cuda"), id="eager-gpu", marks=pytest.mark.gpu))
    if HAS_KERNELS and not INTERPRETED:
        BACKENDS.append(pytest.param(Backend("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu))
if INTERPRETED and HAS_KERNELS:
    BACKENDS.append(pytest.param(Backend("triton", "cpu"), id="triton-cpu"))


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


@pytest.fixture
def fresh_compiler(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What was compiled before counts for nothing."""
    caplog.set_level(logging.WARNING, "torch.__trace")  # or a failure is reported below thousands of empty lines
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")  # NaN, Inf, x / 0
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch.jit")  # in the compiler's own code


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have `-k triton-cpu` choose tests that need the interpreter but no `backend`: no function's name has a dash."""
    if item.name.startswith("test_triton_cpu"):
        item.extra_keyword_matches.add("triton-cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none, and most of what would be slow in the interpreter.

    As skips they would be two lines out of three of the report.
    """
    kept = list(items)
    if not torch.cuda.is_available():
        kept = [item for item in kept if not item.get_closest_marker("gpu")]
    if INTERPRETED and os.environ.get("EVERY_CASE") != "1":
        slow = [item for item in kept if hasattr(item, "callspec") and "triton-cpu" in item.callspec.id]
        needless = set(slow) - set(every_value_once(slow))
        kept = [item for item in kept if item not in needless]
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


def every_value_once(items: Iterable[Any]) -> Iterator[Any]:
    """Choose cases of each test such that every value of every parameter is in one of them."""
    cases: dict[Any, list[Any]] = {}
    for item in items:
        cases.setdefault(item.function, []).append(item)
    for same_test in cases.values():
        random.Random(0).shuffle(same_test)
        values = {item: {(name, id(value)) for name, value in item.callspec.params.items()} for item in same_test}
        missing = set().union(*values.values())
        while missing:
            best = max(same_test, key=lambda item: len(missing & values[item]))
            missing -= values[best]
            yield best
