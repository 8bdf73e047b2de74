"""How long a step of training takes with each loss: a fixed batch on the device, no loader, no other training."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils.torch_utils import autocast

from bench.detectors.loader import Loader
from bench.detectors.plan import SPEED, SPEED_LOSSES, Size
from bench.detectors.scenes import Scenes
from bench.detectors.training import make_trainer
from bench.measure import median_ratio
from triton_mgiou.integrations import ultralytics as adapter


def measure(
    scenes: dict[str, tuple[Scenes, Scenes]],
    size: Size,
    device: str,
    batch_sizes: tuple[int, ...],
    *,
    rounds: int,
    steps: int,
) -> list[dict[str, Any]]:
    """Time whole steps: forward, loss, backward, optimizer, average.

    The losses of a task take turns, so that a machine that changes its pace does so for all.

    Args:
        scenes: By task.
        size: Of the images.
        device: As `training.train` takes it.
        batch_sizes: To time.
        rounds: For each loss.
        steps: Of a round.

    Returns:
        For each task, batch size and loss the median and the fastest round in milliseconds a step, and the median of
        its ratios to Ultralytics' own in the same round.
    """
    rows = []
    for task, losses in SPEED_LOSSES.items():
        with tempfile.TemporaryDirectory() as folder:
            trainers = {loss: _trainer(loss, task, size, scenes[task], device, Path(folder)) for loss in losses}
            for batch_size in batch_sizes:
                first = trainers[losses[0]]
                loader = Loader(scenes[task][0], task, batch_size, first.device, training=True, seed=0)
                batch = first.preprocess_batch(next(iter(loader)))
                times: dict[str, list[float]] = {loss: [] for loss in losses}
                for turn in range(rounds + 1):
                    for loss, trainer in trainers.items():
                        # The first one warms up, longer than the scaler needs to find its scale.
                        seconds = _time(partial(_step, trainer, batch), steps if turn else 4 * steps)
                        if turn:
                            times[loss].append(1000 * seconds)
                rows += [
                    {
                        "task": task,
                        "batch": batch_size,
                        "loss": loss,
                        "ms": round(statistics.median(found), 3),
                        "fastest": round(min(found), 3),
                        "to_own": round(median_ratio(found, times[losses[0]]), 4),
                    }
                    for loss, found in times.items()
                ]
    return rows


def _trainer(loss: str, task: str, size: Size, scenes: tuple[Scenes, Scenes], device: str, folder: Path) -> Any:
    trainer = make_trainer(SPEED._replace(task=task, loss=loss, epochs=10), size, scenes, device, folder)
    trainer._setup_train()
    trainer.epoch = 0
    trainer._model_train()
    if isinstance(trainer, adapter.MGIoUPoseTrainer | adapter.MGIoUOBBTrainer):
        adapter.set_losses(trainer)
    return trainer


def _step(trainer: Any, batch: dict[str, Any]) -> None:
    with autocast(trainer.amp, device=trainer.device.type):
        loss, _ = trainer.model(dict(batch))
    trainer.scaler.scale(loss.sum()).backward()
    trainer.optimizer_step()


def _time(step: Callable[[], None], count: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count
