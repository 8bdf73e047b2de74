"""The fixture `boxes`: `box_mgiou_loss` on each of the backends of `tests/conftest.py`."""

from __future__ import annotations

import pytest

from tests.conftest import Backend
from triton_mgiou import box_mgiou_loss


class BoxBackend(Backend):
    """Where a test body runs, with the loss of boxes and its own defaults."""

    def loss(self, pred, target, **options):
        return box_mgiou_loss(pred, target, backend=self.name, **options)


@pytest.fixture(scope="session")
def boxes(backend):
    return BoxBackend(backend.name, backend.device)
