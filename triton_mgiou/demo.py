"""Train a small network with `MGIoULoss` on real images and show the result.

The task: given one of scikit-learn's digit images (8 x 8 pixels, scans of handwriting), predict the 12 vertices of
the convex hull of its strokes. The hulls have 4 to 12 vertices, so the targets are a padded batch with lengths.
Coordinates are in units of the image's side: x to the right, y down, both in 0..1.

How a result is judged: every predicted polygon is read in the order of its vertices, and where it crosses itself it
covers what the even-odd rule says (a point is inside if a ray from it crosses the outline an odd number of times).
A crossing thus costs area. Reading the predicted hull, or repairing the polygon first, would hide wrong orders.

Under `torch.distributed.run` each process takes a share of every batch, and all together train the network that one
process alone would train.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from triton_mgiou.backends import kernels_unavailable
from triton_mgiou.console import print_out
from triton_mgiou.functional import mgiou_loss
from triton_mgiou.metrics import polygon_iou
from triton_mgiou.modules import MGIoULoss
from triton_mgiou.options import PAPER

EXTRAS = ("matplotlib.figure", "shapely", "sklearn.datasets")  # imported only by a demo that runs

SIDE = 8  # pixels
FULL_INK = 16  # the darkest value of a pixel
STROKE_INK = 4  # from a quarter of the full ink on, a pixel belongs to the stroke
TEST_EVERY = 5  # the first of every five images is a test image, whatever the seed
VERTICES = 12
LEARNING_RATE = 3e-3

Points = NDArray[np.float64]


class DemoError(Exception):
    """The demo cannot run here; the text is one line for the user."""


class Digits(NamedTuple):
    """S images and the hulls of their strokes."""

    images: Tensor  # (S, 1, 8, 8), float32, ink in 0..1
    targets: Tensor  # (S, M, 2), float32; NaN behind the real vertices
    lengths: Tensor  # (S,), int64, how many vertices are real


class Scores(NamedTuple):
    """The predictions on the test images and their IoU with the targets."""

    polygons: NDArray[np.float32]  # (S, 12, 2), the predictions
    ious: Points  # (S,), polygon IoU of each


def run(*, epochs: int, seed: int, device: str, batch_size: int, out: Path) -> dict[str, Any]:
    """Load the data, train, evaluate, print a table and write `demo.png` and `result.json`.

    Where several processes train together, only the first one prints and writes.

    Args:
        epochs: Passes over the training images, 1 or above.
        seed: Seed of the first weights and of the order of the images; the split does not depend on it.
        device: A torch device, or "auto" for "cuda" where there is one, else "cpu".
        batch_size: Images a step, 1 or above.
        out: Folder for the files; made if it does not exist.

    Returns:
        What `result.json` holds: `polygon_iou` (mean over the test images), `ap50`, `ap75`, `ap90` (see
        `average_precision`), `loss_first` and `loss_last` (training loss, see `loss_at`), `seconds` (loading,
        training and evaluation), `device`, `backend` and `options` (those of the loss, and the run's settings).

    Raises:
        DemoError: A library of the `demo` extra is missing, the device is not there, or `out` cannot be written.
    """
    start = time.perf_counter()
    for name in EXTRAS:
        _extra(name)
    chosen_device = pick_device(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot write to {out}: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise DemoError(f"cannot write to {out}: no permission")

    train_data, test_data = load_data()
    backend = pick_backend(chosen_device)
    loss = MGIoULoss(backend=backend)
    with _one_thread(), _process_group(chosen_device):
        rank, processes = _rank_and_processes()
        network, losses = train(train_data, loss, epochs=epochs, seed=seed, batch_size=batch_size, device=chosen_device)
        scores = evaluate(network, test_data, chosen_device)
    result = {
        "polygon_iou": float(scores.ious.mean()),
        "ap50": average_precision(scores.ious, 0.50),
        "ap75": average_precision(scores.ious, 0.75),
        "ap90": average_precision(scores.ious, 0.90),
        "loss_first": loss_at(losses, 0),
        "loss_last": loss_at(losses, 1),
        "seconds": time.perf_counter() - start,
        "device": str(chosen_device),
        "backend": backend,
        "options": {
            **{name: inspect.signature(mgiou_loss).parameters[name].default for name in PAPER},
            "epochs": epochs,
            "seed": seed,
            "batch_size": batch_size,
            "learning_rate": LEARNING_RATE,
            "vertices": VERTICES,
            "train_images": len(train_data.images),
            "test_images": len(test_data.images),
            "processes": processes,
        },
    }
    if rank > 0:
        return result
    picture, numbers = out / "demo.png", out / "result.json"
    try:
        draw(picture, test_data, scores, losses, epochs)
        numbers.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DemoError(f"cannot write to {error.filename or out}: {error.strerror}") from None
    print_out(f"{table(result, loss_at(losses, 1 / 3))}\nwritten: {picture}, {numbers}")
    return result


def load_data() -> tuple[Digits, Digits]:
    """Load the training and the test images: every fifth image is a test image, which gives 1437 and 360."""
    images = _extra("sklearn.datasets").load_digits().images
    hulls = [stroke_hull(image) for image in images]
    lengths = torch.tensor([len(hull) for hull in hulls])
    targets = torch.full((len(hulls), int(lengths.max()), 2), math.nan)
    for target, hull in zip(targets, hulls, strict=True):
        target[: len(hull)] = torch.from_numpy(hull)
    digits = Digits(torch.from_numpy(images / FULL_INK).float().unsqueeze(1), targets, lengths)
    is_test = torch.arange(len(images)) % TEST_EVERY == 0
    return _select(digits, ~is_test), _select(digits, is_test)


def stroke_hull(image: Points) -> Points:
    """The convex hull of the stroke's pixels, corners included.

    Args:
        image: Ink of the pixels, shape (8, 8), 0..16; at least one pixel belongs to the stroke.

    Returns:
        The hull's vertices in order, shape (K, 2), in units of the image's side; no three on a line.
    """
    shapely = _extra("shapely")
    row, column = np.nonzero(image >= STROKE_INK)
    pixels = np.stack((column, row), axis=1)
    corners = np.concatenate([pixels + corner for corner in ((0, 0), (0, 1), (1, 0), (1, 1))]) / SIDE
    outline: Points = shapely.get_coordinates(shapely.convex_hull(shapely.multipoints(corners)))
    return outline[:-1]  # the last repeats the first


def make_network() -> nn.Module:
    """A network from (B, 1, 8, 8) images to (B, 12, 2) vertices, with weights from the global generator.

    It starts from (nearly) the circle that touches the sides of the image: vertices that start far apart and in order
    stay so, those that start at random first have to be untangled. No layer looks at the batch as a whole, so a share
    of the batch gives its share of the gradient.
    """
    angle = torch.arange(VERTICES) * (2 * math.pi / VERTICES)
    circle = 0.5 + 0.5 * torch.stack((angle.cos(), angle.sin()), dim=-1)
    head = nn.Linear(128, 2 * VERTICES)
    with torch.no_grad():
        head.weight.mul_(0.1)
        head.bias.copy_(circle.flatten())
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 2) ** 2, 128),
        nn.ReLU(),
        head,
        nn.Unflatten(1, (VERTICES, 2)),
    )


def train(
    data: Digits, loss: MGIoULoss, *, epochs: int, seed: int, batch_size: int, device: torch.device
) -> tuple[nn.Module, list[float]]:
    """Train a network and return it with the loss of every step; `batch_size` is that of all processes together."""
    from tqdm import tqdm  # noqa: PLC0415 - not with the package

    rank, processes = _rank_and_processes()
    torch.manual_seed(seed)
    network = make_network().to(device)
    model = DistributedDataParallel(network) if processes > 1 else network
    images, targets, lengths = (tensor.to(device) for tensor in data)
    steps = epochs * math.ceil(len(images) / batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)

    losses: list[Tensor] = []  # one tensor an epoch: reading a loss waits for the device, so not in every step
    with tqdm(total=steps, desc="training", unit="step", disable=rank > 0) as progress:
        for _ in range(epochs):
            epoch_losses = []
            for batch in torch.split(torch.randperm(len(images), device=device), batch_size):
                share = batch[rank::processes]
                # Gradients are averaged over the processes: that of the batch's sum comes out divided by their number.
                given = {"target_lengths": lengths[share], "avg_factor": len(batch) / processes}
                value = loss(model(images[share]), targets[share], **given)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                epoch_losses.append(value.detach())
            step_losses = torch.stack(epoch_losses) / processes
            if processes > 1:
                dist.all_reduce(step_losses)
            losses.append(step_losses.cpu())
            progress.update(len(epoch_losses))
            progress.set_postfix(loss=f"{losses[-1].mean():.4f}")
    return network, torch.cat(losses).tolist()


def evaluate(network: nn.Module, data: Digits, device: torch.device) -> Scores:
    """The network's polygons for all images, and their IoU with the targets."""
    network.eval()
    with torch.no_grad():
        polygons = network(data.images.to(device)).cpu().numpy()
    targets = [target[:length].numpy() for target, length in zip(data.targets, data.lengths, strict=True)]
    ious = [polygon_iou(polygon, target) for polygon, target in zip(polygons, targets, strict=True)]
    return Scores(polygons, np.array(ious))


def average_precision(ious: Points, threshold: float) -> float:
    """The share of the images whose IoU is at least `threshold`.

    Every image has one object and one prediction, so there is nothing to rank, and the average precision of a
    detector comes down to this share.

    Args:
        ious: Shape (S,), S >= 1.
        threshold: In 0..1.
    """
    return float((ious >= threshold).mean())


def loss_at(losses: list[float], position: float) -> float:
    """The training loss at the start (`position` 0), the end (1) or between: the mean of 2 % of the steps there."""
    window = max(1, len(losses) // 50)
    first = round(position * (len(losses) - window))
    return sum(losses[first : first + window]) / window


def table(result: dict[str, Any], loss_third: float) -> str:
    """The result as text, one line a number."""
    options = result["options"]
    rows = [
        ("train loss, start", f"{result['loss_first']:.4f}"),
        ("train loss, after a third", f"{loss_third:.4f}"),
        ("train loss, end", f"{result['loss_last']:.4f}"),
        ("test polygon IoU", f"{result['polygon_iou']:.4f}"),
        ("test AP50", f"{result['ap50']:.4f}"),
        ("test AP75", f"{result['ap75']:.4f}"),
        ("test AP90", f"{result['ap90']:.4f}"),
        ("time", f"{result['seconds']:.1f} s"),
    ]
    return "\n".join(
        (
            f"{options['train_images']} training and {options['test_images']} test images, {options['epochs']} epochs, "
            f"device {result['device']}, backend {result['backend']}"
            + (f", {options['processes']} processes" if options["processes"] > 1 else ""),
            *(f"  {name:<26}{value:>8}" for name, value in rows),
            "IoU: vertices in their order, even-odd rule. AP: share of the test images (one object each) at that IoU.",
        )
    )


def draw(path: Path, data: Digits, scores: Scores, losses: list[float], epochs: int) -> None:
    """Draw 12 test images, evenly spread from the worst IoU to the best, and the loss curve into a PNG file."""
    figure = _extra("matplotlib.figure").Figure(figsize=(15, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1))

    left.suptitle(f"Test images, from the worst IoU to the best (mean of all: {scores.ious.mean():.3f})")
    shown = np.argsort(scores.ious)[np.linspace(0, len(scores.ious) - 1, 12).round().astype(int)]
    for axes, index in zip(left.subplots(3, 4).flat, shown, strict=True):
        target = data.targets[index, : data.lengths[index]].numpy()
        axes.imshow(data.images[index, 0].numpy(), cmap="gray_r", vmin=0, vmax=1.6, extent=(0, 1, 1, 0))
        axes.fill(*target.T, fill=False, edgecolor="tab:green", linewidth=4, alpha=0.7, label="target hull")
        axes.fill(*scores.polygons[index].T, fill=False, edgecolor="tab:red", linewidth=1.5)
        axes.plot(*scores.polygons[index].T, "o", color="tab:red", markersize=3)
        axes.plot([], [], "o-", color="tab:red", markersize=3, label="prediction")  # line and vertices in the legend
        axes.set_title(f"IoU {scores.ious[index]:.3f}", fontsize=10)
        axes.set(xlim=(-0.06, 1.06), ylim=(1.06, -0.06), xticks=[], yticks=[])
    handles, labels = axes.get_legend_handles_labels()
    left.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)

    axes = right.subplots()
    epoch = np.arange(1, len(losses) + 1) * (epochs / len(losses))
    means = np.array(losses).reshape(epochs, -1).mean(1)
    axes.plot(epoch, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(np.arange(epochs) + 0.5, means, color="tab:blue", linewidth=2, label="mean of an epoch")
    axes.set(yscale="log", xlabel="epoch", ylabel="MGIoU loss with boundary term", title="Training loss")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def pick_device(name: str) -> torch.device:
    """The device called `name`, or the best one for "auto"; one GPU for each process.

    Raises:
        DemoError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]  # PyTorch's may go on for pages
        raise DemoError(f"device {name!r} is not available: {reason}") from None
    return device


def pick_backend(device: torch.device) -> str:
    """The backend that "auto" takes on this device: "triton" on a GPU where the kernels run, else "eager"."""
    return "triton" if device.type == "cuda" and kernels_unavailable(device) is None else "eager"


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes, where `torch.distributed.run` started this one."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rank_and_processes() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one CPU thread: for tensors this small a second one gains little, and stalls if its core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _select(digits: Digits, chosen: Tensor) -> Digits:
    return Digits(*(tensor[chosen] for tensor in digits))


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DemoError(f'the demo needs {error.name}; install it with: pip install "triton-mgiou[demo]"') from None
