"""Lets torchvision be imported beside a PyTorch that its operators were not built for.

PyPI's torchvision is built for PyPI's PyTorch; beside PyTorch's own CPU build its library does not load, and without
`nms` it cannot even be imported, which Ultralytics does before each validation and prediction.
"""

from __future__ import annotations

import importlib

import torch

MISSING = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: list[torch.library.Library] = []  # a definition lasts as long as its library


def provide_nms() -> None:
    """Import torchvision; where its operators are missing, put Ultralytics' own NMS in the place of its."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        _library.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]
        for schema in MISSING:
            _library[0].define(schema)  # type: ignore[no-untyped-call]
        torchvision = importlib.import_module("torchvision")
        torchvision.ops.nms = importlib.import_module("ultralytics.utils.nms").TorchNMS.nms
