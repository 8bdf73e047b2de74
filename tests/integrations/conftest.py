"""Ultralytics without a network, and two tiny data sets on disk: quadrangles as keypoints, and turned boxes."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest

HAS_ULTRALYTICS = importlib.util.find_spec("ultralytics") is not None
collect_ignore = [] if HAS_ULTRALYTICS else ["test_bench.py", "test_ultralytics.py"]

if HAS_ULTRALYTICS:
    os.environ.setdefault("YOLO_OFFLINE", "true")
    import cv2
    import numpy as np
    from ultralytics.utils import YAML

    from bench.detectors.nms import provide_nms

    provide_nms()
    if importlib.util.find_spec("polars") is None:  # 170 MB that are only needed to write results.csv into a checkpoint
        # On the path, which Ultralytics hands to the other processes of a training on several GPUs.
        _instead = tempfile.TemporaryDirectory()
        (Path(_instead.name) / "polars.py").touch()
        sys.path.append(_instead.name)

    SIDE = 96

    def write_data(folder, task):
        """Six training images, the last of them without objects, and three to validate on: label files and yaml."""
        rng = np.random.default_rng(0)
        for split, count in (("train", 6), ("val", 3)):
            for kind in ("images", "labels"):
                (folder / kind / split).mkdir(parents=True)
            for k in range(count):
                image = rng.integers(90, 110, (SIDE, SIDE, 3), dtype=np.uint8)
                lines = []
                for place in range(0 if (split, k) == ("train", 5) else 2):
                    half, turn = rng.uniform(10, 18, 2), rng.uniform(-0.5, 0.5)
                    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
                    corners = corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
                    corners += (24 + 48 * place, rng.uniform(30, 66))
                    cv2.fillPoly(image, [corners.round().astype(np.int32)], (250, 30 + 200 * place, 30))
                    relative = corners / SIDE
                    if task == "obb":
                        numbers = relative.ravel()
                    else:
                        low, high = relative.min(0), relative.max(0)
                        keypoints = np.concatenate((relative, np.full((4, 1), 2)), axis=1)
                        numbers = np.concatenate(((low + high) / 2, high - low, keypoints.ravel()))
                    lines.append(" ".join([str(place), *(f"{number:.6f}" for number in numbers)]))
                cv2.imwrite(str(folder / "images" / split / f"{k}.png"), image)
                (folder / "labels" / split / f"{k}.txt").write_text("\n".join(lines), encoding="utf-8")
        data = {"path": str(folder), "train": "images/train", "val": "images/val", "names": {0: "a", 1: "b"}}
        if task == "pose":
            data["kpt_shape"] = [4, 3]
        YAML.save(folder / "data.yaml", data)
        return folder / "data.yaml"

    @pytest.fixture(scope="session")
    def data(tmp_path_factory):
        """The yaml files of both tasks."""
        return {task: write_data(tmp_path_factory.mktemp(task), task) for task in ("pose", "obb")}
