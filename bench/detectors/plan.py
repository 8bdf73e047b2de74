"""Which trainings there are, in the order in which they matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bench.detectors.scenes import BOXES
from triton_mgiou import PAPER

SEEDS = (0, 1, 2)
MORE_SEEDS = tuple(range(3, 12))  # of what was tried
CLOSE = ("boxes", "long")  # where few seeds and images leave open which loss is ahead
CLOSE_SEEDS = tuple(range(18, 30))  # on which nothing about the losses compared there was chosen
ABLATION = ("corners", 2)  # task and epochs


class Size(NamedTuple):
    """How large a run of the bench is."""

    images: int  # for training
    test_images: int
    side: int
    batch_size: int
    keypoint_epochs: int
    box_epochs: int
    seeds: tuple[int, ...]
    more_seeds: tuple[int, ...] = ()
    close_seeds: tuple[int, ...] = ()
    close_test_images: int = 0
    all_losses: bool = True  # else one of each kind


FULL = Size(1500, 300, 320, 64, 40, 30, SEEDS, MORE_SEEDS, CLOSE_SEEDS, 1500)
TOY = Size(24, 8, 96, 8, 1, 1, SEEDS[:1], (), CLOSE_SEEDS[:1], 12, all_losses=False)
KINDS = {  # what the toy size trains, beside the table
    ("reports", "reported"),
    ("reports", "reported, float32"),
    ("rest", "mgiou, L2 below 3 visible"),
    ("rest", "hybrid, alpha .9 to 0"),
    ("rest", "mgiou, gain 1"),
}


class Job(NamedTuple):
    """A training."""

    part: str  # "reports", "table", "close", "rest", "tried", "choice", or "speed": the step times
    task: str
    loss: str
    seed: int
    epochs: int
    watch: bool = False  # judge it on the way too

    @property
    def name(self) -> str:
        """Names its file."""
        words = (self.part, self.task, self.loss, f"seed {self.seed}")
        return "-".join("".join(c if c.isalnum() or c in ".+" else "_" for c in word) for word in words)


THEIRS = "ProbIoU + angle"  # Ultralytics' own loss of boxes
OURS = "mgiou, floor assigns, root weighs"  # `MGIoUOBBTrainer` as it comes
SPEED = Job("speed", "steps", "all", 0, 0)
SPEED_LOSSES = {
    "corners": ("OKS", "mgiou", "hybrid"),
    "boxes": (THEIRS, OURS + " + angle", OURS),
}

# ---- the ablation of the reports: the loss of the reports, what is changed of it, and how the training computes

REPORTED: dict[str, Mapping[str, Any]] = {
    "reported": {},
    "reported, no nan_to_num": {"nan_to_num": False},
    "reported, no clamp": {"clamp": False},
    "reported, conditional mask": {"mask": "conditional"},
    "reported, soft mask": {"mask": "soft"},
    "reported, epsilon 1e-3": {"epsilon": 1e-3},
    "reported, float32 projections": {"full_precision": True},
    "reported, not sorted": {"sort": False},
}
PRECISIONS: dict[str, str] = {
    "reported, bfloat16": "bf16",
    "reported, float32": "fp32",
    "reported, no loss scale": "fp16 without scaler",
}

# ---- losses of keypoints: attributes of `MGIoUPoseTrainer`, and the bench's own "few", "float32" and, for YOLO26,
# "assigner": "squared" for the square of the trainer's own, or "OKS"; None for Ultralytics' own

KEYPOINT_LOSSES: dict[str, Mapping[str, Any] | None] = {
    "OKS": None,
    "mgiou": {"mode": "mgiou"},
    "hybrid": {"mode": "hybrid"},
    "paper": {"mode": "mgiou", "options": PAPER},
    "mgiou, L2 below 3 visible": {"mode": "mgiou", "few": True},
    "hybrid, alpha .9 to 0": {"mode": "hybrid", "schedule": {"end": 0.0}},
    "hybrid, alpha .5": {"mode": "hybrid", "alpha": 0.5},
    "hybrid, sigma .35": {"mode": "hybrid", "sigmas": 0.35},
    "mgiou, boundary .5": {"mode": "mgiou", "options": {"boundary_weight": 0.5}},
    "mgiou, float32 decode": {"mode": "mgiou", "float32": True},
    "hybrid, float32 decode": {"mode": "hybrid", "float32": True},
    "YOLO26, mgiou": {"mode": "mgiou"},
    "YOLO26, mgiou, squared assigns": {"mode": "mgiou", "assigner": "squared"},
    "YOLO26, mgiou, OKS assigns": {"mode": "mgiou", "assigner": "OKS"},
}

# ---- losses of boxes: attributes of `MGIoUOBBTrainer`, and the bench's own "quadratic", "saturating", "centre",
# "float32", "root" for the root of the score as a box's weight, and "assigner", see training.py, MGIoU itself where it
# is not given; None for ProbIoU

BOUNDARY: dict[str, Any] = {"options": PAPER | {"boundary_weight": 0.25}}
BOX_LOSSES: dict[str, Mapping[str, Any] | None] = {
    THEIRS: None,
    "ProbIoU": None,
    "mgiou + angle": {},
    "mgiou": {},
    "mgiou, gain 1": {"gain": 1.0},
    "mgiou, squared assigns + angle": {"assigner": "squared"},
    "mgiou, squared assigns": {"assigner": "squared"},
    "mgiou, squared assigns, gain 1 + angle": {"assigner": "squared", "gain": 1.0},
    "mgiou, squared assigns, centre .5 + angle": {"assigner": "squared", "centre": 0.5},
    "mgiou, squared assigns, saturating + angle": {"assigner": "squared", "saturating": True},
    "mgiou, squared assigns, saturating": {"assigner": "squared", "saturating": True},
    "mgiou, power 1.5 assigns": {"assigner": "power 1.5"},
    "mgiou, Jaccard assigns": {"assigner": "Jaccard"},
    "mgiou, shifted assigns": {"assigner": "shifted"},
    "mgiou, exponential 3 assigns": {"assigner": "exponential 3"},
    "mgiou, exponential 4 assigns": {"assigner": "exponential 4"},
    "mgiou, floor assigns": {"assigner": "floor"},
    "mgiou, floor .7 assigns": {"assigner": "floor .7"},
    "mgiou, squared assigns, root weighs": {"assigner": "squared", "root": True},
    "mgiou, shifted assigns, root weighs": {"assigner": "shifted", "root": True},
    OURS: {"assigner": "floor", "root": True},
    OURS + " + angle": {"assigner": "floor", "root": True},
    "mgiou, squared assigns, float32 decode": {"assigner": "squared", "float32": True},
    "mgiou, ProbIoU assigns + angle": {"assigner": "ProbIoU"},
    "mgiou, quadratic + angle": {"quadratic": True},
    "mgiou, quadratic": {"quadratic": True},
    "mgiou, squared assigns, quadratic + angle": {"assigner": "squared", "quadratic": True},
    "mgiou, squared assigns, quadratic, gain 1.75 + angle": {"assigner": "squared", "quadratic": True, "gain": 1.75},
    "mgiou, squared assigns, quadratic, saturating + angle": {
        "assigner": "squared",
        "quadratic": True,
        "saturating": True,
    },
    "mgiou, squared assigns, quadratic, saturating": {
        "assigner": "squared",
        "quadratic": True,
        "saturating": True,
    },
    "mgiou, ProbIoU assigns, quadratic, saturating + angle": {
        "assigner": "ProbIoU",
        "quadratic": True,
        "saturating": True,
    },
    "boundary + angle": BOUNDARY,
    "boundary": BOUNDARY,
    "boundary, gain 1 + angle": {**BOUNDARY, "gain": 1.0},
    "boundary, gain 1": {**BOUNDARY, "gain": 1.0},
    "boundary, gain 4 + angle": {**BOUNDARY, "gain": 4.0},
    "boundary, gain 4": {**BOUNDARY, "gain": 4.0},
    "boundary, ProbIoU assigns + angle": {**BOUNDARY, "assigner": "ProbIoU"},
    "boundary, centre .5 + angle": {**BOUNDARY, "centre": 0.5},
    "boundary, saturating + angle": {**BOUNDARY, "saturating": True},
}

TRIED = {  # looking for a better loss or assigner; tasks, and with how many seeds
    THEIRS: {"boxes": 12, "long": 12},
    "YOLO26, mgiou": {"hulls": 3},
    "YOLO26, mgiou, squared assigns": {"hulls": 3},
    "YOLO26, mgiou, OKS assigns": {"hulls": 3},
    "mgiou": {"squares": 3, "boxes": 3, "long": 3},
    "mgiou, power 1.5 assigns": {"squares": 3, "boxes": 6, "long": 6},
    "mgiou, Jaccard assigns": {"boxes": 9, "long": 9},
    "mgiou, squared assigns, float32 decode": {"boxes": 12, "long": 12, "squares": 9},
    "mgiou, squared assigns": {"squares": 9, "boxes": 12, "long": 12},
    "mgiou, exponential 3 assigns": {"squares": 3},
    "mgiou, exponential 4 assigns": {"squares": 3},
    "mgiou, float32 decode": {"hulls": 3},
    "hybrid, float32 decode": {"corners": 3},
    "boundary + angle": {"boxes": 3, "squares": 1, "long": 1},
    "boundary": {"boxes": 1, "squares": 3, "long": 1},
    "boundary, gain 1 + angle": {"boxes": 1},
    "boundary, gain 1": {"squares": 1},
    "boundary, gain 4 + angle": {"boxes": 3, "long": 1},
    "boundary, gain 4": {"squares": 3},
    "boundary, ProbIoU assigns + angle": {"boxes": 3},
    "boundary, centre .5 + angle": {"boxes": 3, "long": 1},
    "boundary, saturating + angle": {"boxes": 3},
    "mgiou, squared assigns + angle": {"boxes": 3, "long": 3},
    "mgiou + angle": {"boxes": 3, "long": 3},
    "mgiou, squared assigns, gain 1 + angle": {"boxes": 3, "long": 1},
    "mgiou, squared assigns, centre .5 + angle": {"boxes": 3, "long": 1},
    "mgiou, squared assigns, saturating + angle": {"boxes": 3, "long": 1},
    "mgiou, squared assigns, saturating": {"boxes": 3, "long": 2},
    "mgiou, ProbIoU assigns + angle": {"boxes": 3, "long": 1},
    "mgiou, squared assigns, quadratic, saturating + angle": {"boxes": 3, "long": 3},
    "mgiou, squared assigns, quadratic, saturating": {"boxes": 3},
    "mgiou, squared assigns, quadratic + angle": {"boxes": 3, "long": 1},
    "mgiou, quadratic + angle": {"boxes": 3, "long": 1},
    "mgiou, quadratic": {"squares": 3},
    "mgiou, squared assigns, quadratic, gain 1.75 + angle": {"boxes": 3},
    "mgiou, ProbIoU assigns, quadratic, saturating + angle": {"boxes": 3, "long": 1},
}

CHOICE = {  # looking further on `boxes` and `long`, judged by more images: with how many seeds, from FIRST on
    THEIRS: 6,
    "mgiou, squared assigns": 12,
    "mgiou, shifted assigns": 12,
    "mgiou, exponential 3 assigns": 6,
    "mgiou, exponential 4 assigns": 6,
    "mgiou, squared assigns, root weighs": 6,
    "mgiou, shifted assigns, root weighs": 6,
    "mgiou, floor assigns": 6,
    "mgiou, floor .7 assigns": 4,
    OURS: 4,
}
FIRST = 12


def jobs(size: Size) -> list[Job]:
    """All trainings, the most important ones first."""
    task, epochs = ABLATION
    found = [SPEED, *(Job("reports", task, name, 0, epochs) for name in [*REPORTED, *PRECISIONS, "mgiou", "hybrid"])]
    table = [
        *(("hulls", name) for name in ("OKS", "mgiou")),
        *(("corners", name) for name in ("OKS", "mgiou", "hybrid")),
        *(("squares", name) for name in (THEIRS, OURS)),
        *(("tops", name) for name in ("OKS", "mgiou")),
    ]
    for seed in size.seeds:
        found += [_job("table", task, name, seed, size, watch=(seed, task) == (0, "corners")) for task, name in table]
        if seed == 0:
            found.append(_job("table", "corners", "reported", 0, size, watch=True))
    found += [
        _job("close", task, name, seed, size) for seed in size.close_seeds for task in CLOSE for name in (THEIRS, OURS)
    ]
    rest = [
        ("corners", "paper"),
        ("hulls", "paper"),
        ("outlines", "OKS"),
        ("outlines", "mgiou"),
        ("outlines", "hybrid"),
        ("squares", "ProbIoU"),
        ("squares", "mgiou, gain 1"),
        ("squares", "mgiou + angle"),
        ("boxes", "ProbIoU"),
        ("hulls", "hybrid"),
        ("corners", "hybrid, sigma .35"),
        ("corners", "hybrid, alpha .9 to 0"),
        ("corners", "hybrid, alpha .5"),
        ("corners", "mgiou, L2 below 3 visible"),
        ("hulls", "mgiou, L2 below 3 visible"),
        ("hulls", "mgiou, boundary .5"),
    ]
    found += [_job("rest", task, name, 0, size) for task, name in rest]
    tabled = {(job.task, job.loss, job.seed) for job in found}
    found += [
        _job("tried", task, name, seed, size)
        for name, places in TRIED.items()
        for task, count in places.items()
        for seed in (*size.seeds, *size.more_seeds)[:count]
        if (task, name, seed) not in tabled
    ]
    found += [
        _job("choice", task, name, seed, size)
        for name, count in CHOICE.items()
        for task in CLOSE
        for seed in range(FIRST, FIRST + count)
    ]
    parts = {"speed", "table", "close"}
    return [job for job in found if size.all_losses or job.part in parts or (job.part, job.loss) in KINDS]


def images_to_judge_by(job: Job, size: Size) -> int:
    """How many scenes a training is judged by, the first ones."""
    return size.close_test_images if job.part in {"close", "choice"} else size.test_images


def tasks(chosen: Iterable[Job], size: Size) -> dict[str, int]:
    """The tasks whose scenes these trainings and the step times need, and how many to judge by."""
    needed: dict[str, int] = {}
    for job in chosen:
        for task in SPEED_LOSSES if job == SPEED else (job.task,):
            needed[task] = max(images_to_judge_by(job, size), needed.get(task, 0))
    return needed


def _job(part: str, task: str, loss: str, seed: int, size: Size, *, watch: bool = False) -> Job:
    epochs = size.box_epochs if task in BOXES else size.keypoint_epochs
    return Job(part, task, loss, seed, epochs, watch)
