"""Batches for Ultralytics' trainer, augmented on the device where the images lie: no loader that could be waited for.

Augmentation is of the same kind as Ultralytics' own: a mosaic of four images around a random centre, scaled by 0.5 to
1.5, moved by up to a tenth, with random colours; in the last tenth of the epochs single images. A vertex that comes to
lie out of the image is not visible, a box is clipped, and what keeps less than a tenth of its box is left out; an
oriented box stays whole while its centre is in the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from bench.detectors.scenes import BOXES, Scenes

GREY = 114
SCALE, SHIFT, COLOUR = 0.5, 0.1, 0.4
KEPT = 0.1  # share of a box


class Dataset:
    """What Ultralytics asks a data set for: its length, and whether there are still mosaics."""

    def __init__(self, scenes: Scenes, mosaic: bool) -> None:
        self.size = len(scenes.images)
        self.mosaic = mosaic

    def __len__(self) -> int:
        return self.size


class Loader:
    """Batches of a task, new ones each time it is iterated over.

    Args:
        scenes: The images and their objects.
        task: Their task.
        batch_size: Images in a batch; the last one of training is full too.
        device: Where images and batches lie.
        training: Shuffle and augment.
        seed: Of both.
    """

    num_workers = 0
    drop_last = False

    def __init__(
        self, scenes: Scenes, task: str, batch_size: int, device: torch.device, *, training: bool, seed: int
    ) -> None:
        self.dataset = Dataset(scenes, training)
        self.sampler = self.dataset
        self.batch_size = batch_size
        self.is_boxes = task in BOXES
        self.training = training
        self.device = device
        self.random = torch.Generator(device).manual_seed(seed)
        self.images = torch.from_numpy(scenes.images).to(device)
        self.side = self.images.shape[-1]
        self.polygons = torch.from_numpy(scenes.polygons).to(device)
        self.boxes = torch.from_numpy(scenes.boxes).to(device)
        counts = torch.from_numpy(scenes.counts).to(device)
        self.real = torch.arange(self.polygons.shape[1], device=device) < counts[:, None]  # (I, 8)

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def reset(self) -> None:
        """Nothing to do: the next iteration sees `dataset.mosaic`."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.training:
            for chosen in torch.split(torch.arange(len(self.dataset), device=self.device), self.batch_size):
                size = len(chosen)
                zero, one = torch.zeros(size, 1, 2, device=self.device), torch.ones(size, 1, device=self.device)
                whole = torch.tensor([[0.0, 0.0], [self.side, self.side]], device=self.device).expand(size, -1, -1)
                yield {"img": self.images[chosen], **self.labels(chosen[:, None], zero, one, whole)}
            return
        order = torch.randperm(len(self.dataset), generator=self.random, device=self.device)
        missing = len(self) * self.batch_size - len(order)
        for chosen in torch.split(torch.cat((order, order[:missing])), self.batch_size):
            yield self.augmented(chosen)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Random numbers in low..high."""
        return low + (high - low) * torch.rand(shape, generator=self.random, device=self.device)

    def augmented(self, chosen: Tensor) -> dict[str, Any]:
        """A batch from the images (B,) and, for a mosaic, three more for each."""
        size, side = len(chosen), self.side
        scale = self.uniform(size, 1, low=1 - SCALE, high=1 + SCALE)  # (B, 1)
        moved = side / 2 + self.uniform(size, 2, low=-SHIFT, high=SHIFT) * side  # (B, 2)
        if self.dataset.mosaic:
            others = torch.randint(len(self.dataset), (size, 3), generator=self.random, device=self.device)
            chosen = torch.cat((chosen[:, None], others), 1)  # (B, 4): upper left, upper right, lower left, lower right
            # On a canvas of twice the side all four meet in a point; (side, side) of it goes to `moved`.
            meeting = self.uniform(size, 2, low=side / 2, high=3 * side / 2)
            corner = torch.tensor([[-1.0, -1], [0, -1], [-1, 0], [0, 0]], device=self.device) * side
            origin = (meeting[:, None] + corner - side) * scale[:, None] + moved[:, None]  # (B, 4, 2)
            canvas = torch.stack((-side * scale + moved, side * scale + moved), 1)  # (B, 2, 2): its two corners
        else:
            chosen = chosen[:, None]
            origin = (-side / 2 * scale + moved)[:, None]
            canvas = torch.stack((origin[:, 0], origin[:, 0] + side * scale), 1)
        labels = self.labels(chosen, origin, scale, canvas.clamp(0, side))
        return {"img": self.drawn(chosen, origin, scale, canvas), **labels}

    def drawn(self, chosen: Tensor, origin: Tensor, scale: Tensor, canvas: Tensor) -> Tensor:
        """The images (B, P) with their origins at (B, P, 2), as one image each, (B, 3, S, S), uint8."""
        at = torch.arange(self.side, device=self.device) + 0.5
        result = torch.full((len(chosen), 3, self.side, self.side), float(GREY), device=self.device)
        for part in range(chosen.shape[1]):
            source = (at - origin[:, part, :, None]) / (scale[..., None] * self.side)  # (B, 2, S), 0..1 inside
            on_canvas = (at >= canvas[:, 0, :, None]) & (at < canvas[:, 1, :, None])
            inside = (source >= 0) & (source < 1) & on_canvas
            x, y = (2 * source - 1).unbind(1)
            shape = (len(chosen), self.side, self.side)
            grid = torch.stack((x[:, None, :].expand(shape), y[:, :, None].expand(shape)), -1)  # (B, S, S, 2)
            piece = grid_sample(self.images[chosen[:, part]].float(), grid, padding_mode="border", align_corners=False)
            result = torch.where((inside[:, 0, None, :] & inside[:, 1, :, None])[:, None], piece, result)
        result = result * self.uniform(len(chosen), 3, 1, 1, low=1 - COLOUR, high=1 + COLOUR)
        return result.clamp(0, 255).to(torch.uint8)

    def labels(self, chosen: Tensor, origin: Tensor, scale: Tensor, window: Tensor) -> dict[str, Any]:
        """What can be seen in the windows (B, 2, 2) of the objects of the images (B, P), in Ultralytics' form."""
        side = self.side
        polygons = self.polygons[chosen] * scale[..., None, None, None] + origin[:, :, None, None]  # (B, P, 8, K, 2)
        first, last = (window[:, end, None, None] for end in (0, 1))  # (B, 1, 1, 2)
        visible = ((polygons >= first[:, :, None]) & (polygons <= last[:, :, None])).all(-1)
        if self.is_boxes:
            boxes = self.boxes[chosen].clone()
            boxes[..., :4] *= scale[..., None, None]
            boxes[..., :2] += origin[:, :, None]
            kept = self.real[chosen] & ((boxes[..., :2] > first) & (boxes[..., :2] < last)).all(-1)
            boxes[..., :4] /= side
        else:
            low, high = polygons.amin(3), polygons.amax(3)
            low_in, high_in = low.clamp(first, last), high.clamp(first, last)
            seen, whole = (high_in - low_in).prod(-1), (high - low).prod(-1)
            kept = self.real[chosen] & (seen > KEPT * whole) & ((high_in - low_in) > 2).all(-1)
            boxes = torch.cat(((low_in + high_in) / 2, high_in - low_in), -1) / side
        image, *_ = index = kept.nonzero(as_tuple=True)
        keypoints = torch.cat((polygons / side, 2 * visible[..., None].to(polygons.dtype)), -1)
        keypoints = torch.where(visible[..., None], keypoints, torch.zeros_like(keypoints))
        size = len(chosen)
        return {
            "batch_idx": image.float(),
            "cls": torch.zeros(len(image), 1, device=self.device),
            "bboxes": boxes[index],
            "keypoints": keypoints[index],
            "im_file": [f"{k}.png" for k in range(size)],
            "ori_shape": [(side, side)] * size,
            "ratio_pad": [((1.0, 1.0), (0.0, 0.0))] * size,
        }
