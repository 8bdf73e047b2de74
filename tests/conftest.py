"""The backends that every test body with the fixture `backend` runs on.

    pytest                                          eager on the CPU
    TRITON_INTERPRET=1 pytest -k triton-cpu         the kernels in Triton's interpreter on the CPU
    pytest -m gpu                                   eager and the kernels on a GPU

`pytest --hypothesis-profile thorough` looks for new counterexamples instead of repeating the known examples.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings

from triton_mgiou import mgiou_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_KERNELS = importlib.util.find_spec("triton_mgiou.ops") is not None

settings.register_profile("default", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("interpreter", max_examples=8, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("interpreter" if INTERPRETED else "default")


@dataclass(frozen=True)
class Backend:
    """Where a test body runs."""

    name: str
    device: str

    def loss(self, pred, target, **options):
        return mgiou_loss(pred, target, backend=self.name, **options)

    def value_and_gradient(self, pred, target, upstream=None, wrt=("pred",), **options):
        """Return the loss and, for each name in `wrt`, a gradient; the tensors go to the device first."""
        tensors = {"pred": pred, "target": target}
        tensors = {name: t.detach().to(self.device).requires_grad_(name in wrt) for name, t in tensors.items()}
        options = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        value = self.loss(tensors["pred"], tensors["target"], **options)
        if upstream is None:
            upstream = torch.ones_like(value)
        gradients = torch.autograd.grad(value, [tensors[name] for name in wrt], upstream.to(self.device))
        return value.detach(), *gradients

    def batch(self, size):
        """A batch size, cut to what the interpreter can do in a moment."""
        return min(size, 16) if INTERPRETED and self.name == "triton" else size


def _backends():
    yield pytest.param(Backend("eager", "cpu"), id="eager-cpu")
    if INTERPRETED and HAS_KERNELS:
        yield pytest.param(Backend("triton", "cpu"), id="triton-cpu")
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    no_kernels = pytest.mark.skipif(INTERPRETED or not HAS_KERNELS, reason="needs compiled kernels")
    yield pytest.param(Backend("eager", "cuda"), id="eager-gpu", marks=[pytest.mark.gpu, no_gpu])
    yield pytest.param(Backend("triton", "cuda"), id="triton-gpu", marks=[pytest.mark.gpu, no_gpu, no_kernels])


@pytest.fixture(scope="session", params=list(_backends()))
def backend(request):
    return request.param
