"""Judge the curves of a run: whether it has learnt, and whether it has lost again what it had learnt."""

from __future__ import annotations

import math
import re
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import NamedTuple

from triton_mgiou.training.checkpoints import LOWEST_SCALE
from triton_mgiou.training.tables import Column, Table

LOWER_IS_BETTER = re.compile(r"loss|error|nll|perplexity|(?<![a-z])(err|mae|mse|rmse|wer|cer|ppl)(?![a-z])")
LOSS_SCALE = re.compile(r"(loss|grad|amp|scaler?)[_/ .]*scaler?$|(^|/)scaler?$")
SCALER_AT = 16.0  # a scale that never gets there is no GradScaler's, which begins at 65536
# The last are detectron2's, of heads on their proposals, DETR's number of objects, which it does not train, and
# mmdetection's, of all metrics once more as one text
NO_CURVE = re.compile(
    r"(?<![a-z])(lr|weights?|scaler?|(?<!dice_)coef|gain|time|thres(h(olds?)?)?|map_size)(\d*|/\d+)$|(^|/)best[_ ]"
    r"|(fast|mask)_rcnn/.*accuracy|cardinality_error|_copypaste$"
)
TRAINING = re.compile(r"(?<![a-z])train")  # no constraint and no strain
VALIDATION = re.compile(r"(?<![a-z])(val(?!ue)|test|eval)")  # no interval and no retrieval
TOTAL = re.compile(r"(train[/_. ])?(total_?loss|loss_?total|loss)(_epoch|_step)?")  # the last are Lightning's
KL = re.compile(r"(?<![a-z])kl(d|_?div|_?divergence)?(?![a-z])")
# The losses of a GAN: those of its two sides, and what goes with them
GENERATOR = re.compile(r"(?<![a-z0-9])(g|gen|generator|adv|adversarial|gan)(?![a-z0-9])|lossg(?![a-z])")
DISCRIMINATOR = re.compile(r"(?<![a-z0-9])(d|disc|discriminator|critic)(?![a-z0-9])|lossd(?![a-z])")
PENALTY = re.compile(r"(?<![a-z0-9])(real|fake|gp|r1|penalty)(?![a-z])")
# By what they say of a run: each kind is judged where there is none of the kinds before. An accuracy beside mAP is
# that of a head on its proposals, and high at once.
METRICS = (
    re.compile(
        r"(?<![a-z])((hbb|obb|coco)?m?ap[sml]?(?![a-z])|f1|fitness|m?dice|auc|pck|oks|hmean|io_u(?![a-z])|pq(?![a-z]))"
        r"|iou(?![a-z])|f1_?score|jaccard"
        r"|coco_eval_[a-z]+/0$"  # DETR's list of COCO's twelve numbers begins with AP
    ),
    re.compile(r"(?<![a-z])[am]?acc(?![a-z])|accuracy|(?<![a-z])top.?[15](?!\d)"),
    re.compile(r"precision|recall|(?<![a-z])m?ar(?![a-z])"),
)
PERCENT = re.compile(r"^((bbox|segm|keypoints)/AP|(sem|panoptic)_seg/)")  # detectron2

FEWEST = 5  # numbers that a curve must have to be judged
SETTLED, LONG = 10, 30  # rows, or 30 epochs, after which a metric at 0 is a fault: if no loss falls any more, or anyway
LEARNT = 1e-3  # of the full metric: one that never gets there has never learnt
HARDLY, USEFUL = 0.01, 0.05  # of the full metric: below, it may be chance; above, it says that the run is sound
FULL = 0.95  # of the full metric: one that stands still there has converged
FLAT, FLAT_BESIDE_NOTHING = 0.05, 0.1  # of its mean: a loss that stays within is flat; the second, if metrics are 0 too
GOOD, GONE = 0.85, 0.01  # of its best: a metric that ends below has fallen, or collapsed
RISE = 0.3  # of its best, and of what it had fallen by: a loss that rises by more has fallen from its best
EXPLODED = 10.0  # times its start: a loss of the training that ends above has collapsed, however good the metrics
MANIFOLD = 3.0  # times its best, by size: a loss that has risen to it, and ends above its start, has collapsed
NOISE = 3.0  # standard deviations from row to row: less is no rise and no fall

LAST_SHARE = 0.3  # converged and oscillating are judged in the last 30 % of the rows, at least 5
PLATEAU_GAIN = 0.01  # their best value beats the best one before them by less than 1 %
OSCILLATION_TURNS = 0.6  # the curve turns in 60 % of these rows,
OSCILLATION_STEP = 0.1  # and goes 10 % of its mean magnitude from row to row

NO_STEP = (
    "are flat and no metric has moved: most likely no step of the optimizer is taken. A GradScaler skips "
    "each step whose gradient has NaN or Inf while the loss stays finite: print scaler.get_scale() after 20 steps, it "
    "falls below 1 then. If it does not, the gradients may be 0: compare the units of predictions and targets. Or the "
    "learning rate is far too high: GradientMonitor tells how much a step changes the weights. See "
    "triton_mgiou/training/README.md, When training goes wrong"
)


NO_RUN = "has neither a loss nor a metric by name"
NAN_AS_EMPTY = "(some libraries write NaN so)"
# Columns of tables that have one run a row: those of Weights and Biases, MLflow (of its page, and of its Python), Ray
RUNS = ({"Name", "State"}, {"Run ID", "Status"}, {"run_id", "status"}, {"trial_id", "logdir"})
TUNED = re.compile(r"hyperparameters/.*|lrf")  # Ultralytics' `tune` has the fitness of a training in each row


class NothingToJudgeError(Exception):
    """The table has no loss and no metric."""


class Curve(NamedTuple):
    """A loss or a metric in figures.

    Attributes:
        column: Its numbers.
        is_lower_better: Whether it is a loss.
        start: Mean of its first 3 values.
        best: The best of its values, each smoothed with its neighbours.
        at: The epoch of it.
        end: Median of its last values; of fewer than 100 values the last one, if that is better.
        noise: Standard deviation of a value.
    """

    column: Column
    is_lower_better: bool
    start: float
    best: float
    at: float
    end: float
    noise: float

    @property
    def name(self) -> str:
        """The column's name."""
        return self.column.name

    @property
    def values(self) -> list[float]:
        """The column's values."""
        return self.column.values


def judge(table: Table) -> tuple[list[str], list[str]]:
    """Say what is wrong with a run, and what is worth knowing.

    Losses are columns with "loss", "error" or the like in their names; metrics those with mAP, AP, F1, IoU, fitness
    and so on; accuracy counts where there is none of these, precision and recall where there is no accuracy either.
    Metrics of one kind, as mAP50 and mAP50-95 of boxes, are judged together, by the highest. They are in 0..1 or in
    percent; -1, and NaN in all rows, stand for "not defined". What has fewer than 5 numbers is not judged. "mgiou"
    beside "l2" is a part of `PolygonLoss`, a loss. Beside the metrics of polygons, (G), of this package's validator
    Ultralytics' own of keypoints, (P), are not judged: they compare vertex i with vertex i. A row in which all metrics
    and all losses of the validation are 0 does not count where the last row has numbers: Ultralytics and YOLOv5 write
    so what they do not validate.

    Losses and metrics without a number, such as percentages with their sign, are named and not judged. Where there are
    losses of a generator and of a discriminator (or critic), these, their penalties and their accuracies are named too
    and judged only if they are one number in all rows: each side works against the other, so that they may stay flat,
    or get worse, as the samples get better. Nor is a KL term judged otherwise, beside another loss that falls and no
    metric: that of a VAE rises as its latent variables are used. (Beside metrics it may be the loss of rotated boxes
    that has this name.)

    - NaN or Inf in a loss, or in a metric after it had a number, is a fault; in other columns, as the norm of a
      gradient, if it stays so until the end. So is a loss or metric that is empty at the end while what was written
      beside it goes on, and the scale of a GradScaler that ends below 1.
    - never learnt: a metric stays below 0.1 % for 30 rows or epochs, or for 10 rows if no loss falls any more; a loss,
      or from 10 rows on a metric, is the same number in all rows (0 in a loss is by definition, unless all losses are
      0, or all of the training while those of the validation stand still; 95 % in a metric is enough; beside a good
      metric a loss counts from 10 rows on too); all losses stay within 5 % from the first row to the last, and there is
      no metric, or within 10 %, and none gets to 1 %.
    - fell from its best: a metric ends below 85 % of its best by more than its noise; a loss ends above its best
      by 30 %, and by 30 % of what it had fallen, or above its start by 5 % (from 10 rows on), while no metric is good
      (5 %, and not fallen) and it is no part of a training loss whose total has fallen.
    - collapsed: a metric ends below 1 % of its best, be it in the last row only; a loss ends at three times its
      best (below 0: at its size) and above its start; a training loss at ten times its start, however good a metric.
    - converged (no fault): the last 30 % of the rows are less than 1 % better than the best before.
    - oscillation (no fault by itself): in the last 30 % of the rows a loss turns in 60 % of them and goes 10 % of its
      mean from row to row.

    Returns:
        The faults, and the notes.

    Raises:
        NothingToJudgeError: There is neither a loss nor a metric, and no NaN or Inf; or each row is another run.
    """
    if _is_of_runs(table):
        raise NothingToJudgeError("has one run a row, and no curve of a run")
    table = _where_validated(table)
    problems: list[str] = []
    losses: list[Curve] = []
    metrics: list[Column] = []
    is_run = any(kind_of(column.name) for column in table.columns)
    names = {column.name for column in table.columns}
    for column in table.columns:
        kind = kind_of(column.name)
        if column.name.endswith("mgiou") and column.name.removesuffix("mgiou") + "l2" in names:
            kind = "loss"  # the parts of `PolygonLoss`
        if kind == "metric":
            metrics.append(column)
            continue
        if is_run and not kind and "grad" not in column.name and not any(map(math.isfinite, column.values)):
            continue  # not defined for this data
        trouble = _not_finite(column, always=kind == "loss") or (_ends_early(column, table) if kind else "")
        trouble = trouble or (_fallen_scale(column.values) if LOSS_SCALE.search(column.name.lower()) else "")
        if trouble:
            problems.append(f"{column.name}: {trouble}")
        elif kind == "loss" and len(column.values) >= FEWEST:
            losses.append(curve_of(column, lower=True))
    if any(column.name.endswith("(G)") for column in metrics):
        metrics = [column for column in metrics if not column.name.endswith("(P)")]
    curves = _families(metrics, table, problems)
    words = [
        f"{name}: holds no number, but {word[:40]!r}" if word else f"{name}: empty in all rows {NAN_AS_EMPTY}"
        for name, word in table.words.items()
        if kind_of(name)
    ]
    if not problems and not is_run:
        raise NothingToJudgeError(f"has nothing to judge: {words[0]}" if words else NO_RUN)

    gan = _of_a_gan([*losses, *curves], names)
    curves = [curve for curve in curves if curve.name not in gan]
    falls = any(_falls(loss.values) for loss in losses)
    faults = {curve.name: fault for curve in curves if (fault := _fault_of_metric(curve, table, falls))}
    good = [curve.name for curve in curves if curve.name not in faults and curve.best >= USEFUL * full(curve)]
    others_good = [name for name in good if not _is_of_training(name)]
    has_none = not any(curve.best >= HARDLY * full(curve) for curve in curves)
    losses = [loss for loss in losses if loss.name not in gan]
    still = _standing_still(losses, FLAT_BESIDE_NOTHING if curves else FLAT) if has_none else []
    total_falls = any(TOTAL.fullmatch(loss.name.lower()) and loss.end < loss.start for loss in losses)
    if not curves:
        losses = [loss for loss in losses if not _is_kl_of_a_vae(loss, losses)]
    for loss in losses:
        is_part = not TOTAL.fullmatch(loss.name.lower()) and not _is_of_validation(loss.name)
        is_excused = bool(good if _is_of_training(loss.name) else others_good) or (is_part and total_falls)
        fault = _fault_of_loss(loss, losses, is_excused, loss.name in still)
        if fault:
            faults[loss.name] = fault
    problems += [f"{column.name}: {faults[column.name]}" for column in table.columns if column.name in faults]
    if still:
        which = " but those of the GAN" if gan else ""
        which = " of the training" if any(map(_is_of_training, still)) else which
        problems.append(f"all losses{which} {NO_STEP}")
    notes = [f"{c.name}: {note}" for c in (*losses, *curves) if c.name not in faults and (note := _converged(c))]
    notes += [f"{loss.name}: {note}" for loss in losses if (note := _oscillation(loss.values))]
    if gan:
        notes.insert(
            0, f"{', '.join(gan)}: of a GAN, whose losses tell little of how it learns: only NaN and Inf count"
        )
    return problems, [*words, *notes]


def _is_of_runs(table: Table) -> bool:
    names = {column.name for column in table.columns}
    is_of_tune = "fitness" in names and any(map(TUNED.fullmatch, names))
    return is_of_tune or any(run <= table.words.keys() for run in RUNS)


def _where_validated(table: Table) -> Table:
    """Leave out the zeros of rows that were not validated."""
    metrics = [column for column in table.columns if kind_of(column.name) == "metric"]
    losses = [c for c in table.columns if kind_of(c.name) == "loss" and _is_of_validation(c.name)]
    zeros = _rows_of_zeros(metrics) & _rows_of_zeros(losses)
    if not zeros or max(column.rows[-1] for column in losses) in zeros:
        return table
    is_zero = not any(any(column.values) for column in metrics)  # where it was validated, too
    names = {column.name for column in (losses if is_zero else (*losses, *metrics))}
    columns = [_without(column, zeros) if column.name in names else column for column in table.columns]
    return table._replace(columns=[column for column in columns if column.rows])


def _rows_of_zeros(columns: list[Column]) -> set[int]:
    """The rows in which they have numbers, but only zeros."""
    cells = [(row, value) for column in columns for row, value in zip(column.rows, column.values, strict=True)]
    return {row for row, _ in cells} - {row for row, value in cells if value != 0}


def _without(column: Column, rows: set[int]) -> Column:
    kept = [index for index, row in enumerate(column.rows) if row not in rows]
    epochs, values = ([numbers[index] for index in kept] for numbers in (column.epochs, column.values))
    return Column(column.name, [column.rows[index] for index in kept], epochs, values)


def _is_of_training(name: str) -> bool:
    return TRAINING.search(_in_words(name)) is not None


def _is_of_validation(name: str) -> bool:
    return VALIDATION.search(_in_words(name)) is not None


def _in_words(name: str) -> str:
    """The name in lower case, with its words apart: those of `lossTrain` and `losstrain` too."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=loss)(?=[a-z])", "_", name).lower()


def kind_of(name: str) -> str:
    """Whether a column is a "loss", a "metric" or, as far as its name says, neither: ""."""
    name = name.lower()
    if NO_CURVE.search(name):
        return ""
    if LOWER_IS_BETTER.search(name):
        return "loss"
    return "metric" if any(pattern.search(name) for pattern in METRICS) else ""


def curve_of(column: Column, *, lower: bool) -> Curve:
    """The figures of a column."""
    best = min if lower else max
    values = column.values
    width = len(values) // 50  # rows on either side, beside the median of 3
    sums = [0.0, *accumulate(median(values[i - 1 : i + 2]) if i else values[0] for i in range(len(values)))]
    ends = [(max(0, i - width), min(len(values), i + width + 1)) for i in range(len(values))]
    smoothed = [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]
    at = smoothed.index(best(smoothed))
    end = median(values[-max(3 if len(values) < 20 else 5, width) :])
    if len(values) < 100:  # a last value that is good is one, as where only the last epoch is validated
        end = best(end, values[-1])
    noise = 1.05 * median(abs(b - a) for a, b in pairwise(values)) if len(values) > 1 else 0.0
    return Curve(column, lower, fmean(values[:3]), smoothed[at], column.epochs[at], end, noise)


def full(curve: Curve) -> float:
    """The highest value that the metric can have: 1, or 100 in percent."""
    return 100.0 if max(curve.values) > 1.5 or PERCENT.search(curve.name) else 1.0


def _families(metrics: list[Column], table: Table, problems: list[str]) -> list[Curve]:
    """The curve with the highest values of each kind of metric; what is wrong with single ones goes to `problems`."""
    numbers: list[Column] = []
    undefined: list[Column] = []
    for column in metrics:
        defined = [i for i, value in enumerate(column.values) if not value < 0]  # -1: no such objects in the data
        first = next((i for i in defined if math.isfinite(column.values[i])), None)
        if first is None:
            undefined += [column] if defined else []
            continue
        kept = [i for i in defined if i >= first]
        rows, epochs, values = ([each[i] for i in kept] for each in (column.rows, column.epochs, column.values))
        shorter = Column(column.name, rows, epochs, values)  # type: ignore[arg-type]
        trouble = _not_finite(shorter, always=True) or _ends_early(shorter, table)
        if trouble:
            problems.append(f"{column.name}: {trouble}")
        else:
            numbers.append(shorter)
    # NaN in all metrics of the kind that says most: nothing is predicted. In some: there are no such objects.
    most = next((pattern for pattern in METRICS if any(pattern.search(c.name.lower()) for c in metrics)), None)
    if most and not any(most.search(column.name.lower()) for column in numbers):
        problems += [f"{column.name}: {_not_finite(column, always=True)}" for column in undefined]
    highest: dict[str, Curve] = {}
    for pattern in METRICS:
        for column in numbers:
            name = column.name.lower()
            match = pattern.search(name)
            if match is None or len(column.values) < FEWEST:
                continue
            curve = curve_of(column, lower=False)
            word = "ap" if "ap" in match[0] else match[0]
            family = name[: match.start()] + word + "".join(re.findall(r"\(\w+\)", name))
            known = highest.get(family)
            if known is None or (curve.best, len(curve.values)) > (known.best, len(known.values)):
                highest[family] = curve
        if highest:
            break
    return list(highest.values())


def _fault_of_metric(curve: Curve, table: Table, losses_fall: bool) -> str:
    rows, highest = len(curve.values), max(curve.values)
    epochs = [epoch for row in curve.column.rows if (epoch := table.epochs[row]) is not None]
    is_long = rows >= LONG or (len(epochs) == rows and max(epochs) - min(epochs) >= LONG)  # validated now and then
    if highest < LEARNT * full(curve) and (is_long or (rows >= SETTLED and not losses_fall)):
        return f"never learnt: {'0' if highest == 0 else f'at most {highest:.3g}'} in all {rows} rows"
    if rows >= SETTLED and highest == min(curve.values) and LEARNT * full(curve) <= highest < FULL * full(curve):
        return f"never learnt: {highest:.4g} in all {rows} rows"
    if highest < LEARNT * full(curve):
        return ""
    is_gone_at_last = curve.values[-1] < GONE * curve.best and curve.noise < 0.1 * curve.best
    after = f"{min(curve.end, curve.values[-1]):.4g} at the end, after {curve.best:.4g} at epoch {curve.at:g}"
    if curve.end < GONE * curve.best or is_gone_at_last:
        return f"collapsed: {after}"
    if curve.end < GOOD * curve.best and curve.best - curve.end > NOISE * curve.noise:
        return f"fell from its best: {after}"
    return ""


def _of_a_gan(curves: list[Curve], names: set[str]) -> list[str]:
    """The curves of a generator and a discriminator, if there are losses of both, but for those of one number."""
    sides = (GENERATOR, DISCRIMINATOR)
    of_losses = [name.lower() for name in names if kind_of(name) == "loss"]
    if not all(any(map(side.search, of_losses)) for side in sides):
        return []
    kinds = (*sides, PENALTY)
    own = [c for c in curves if any(each.search(c.name.lower()) for each in (kinds if c.is_lower_better else sides))]
    return [curve.name for curve in own if min(curve.values) < max(curve.values)]


def _is_kl_of_a_vae(loss: Curve, losses: list[Curve]) -> bool:
    """Whether it is a KL term that moves while another loss of the same data, training or validation, falls."""
    if not KL.search(loss.name.lower()) or min(loss.values) == max(loss.values):
        return False
    others = [each for each in losses if _is_of_validation(each.name) == _is_of_validation(loss.name)]
    return any(
        each.end < each.start and not _is_flat(each, FLAT) for each in others if not KL.search(each.name.lower())
    )


def _fault_of_loss(loss: Curve, losses: list[Curve], is_excused: bool, stands_still: bool) -> str:
    values = loss.values
    if min(values) == max(values):
        is_defined_so = values[0] == 0 and not stands_still and any(any(other.values) for other in losses)
        is_rounded = is_excused and len(values) < SETTLED
        return "" if is_defined_so or is_rounded else f"never learnt: {values[0]:.4g} in all {len(values)} rows"
    if stands_still:
        return f"never learnt: {loss.start:.4g} at the start, {loss.end:.4g} at the end"
    rise, fallen = loss.end - loss.best, max(loss.start - loss.best, 0)
    after = f"{loss.end:.4g} at the end, after {loss.best:.4g} at epoch {loss.at:g}"
    is_training = not _is_of_validation(loss.name)
    if is_excused:
        return f"collapsed: {after}" if is_training and loss.end > EXPLODED * max(abs(loss.start), loss.best) else ""
    if rise > (MANIFOLD - 1) * abs(loss.best) and loss.end > loss.start:
        return f"collapsed: {after}"
    is_rise = rise > RISE * max(abs(loss.best), fallen)
    ends_above_start = len(values) >= SETTLED and loss.end > loss.start + FLAT * abs(loss.start)
    is_real = rise > NOISE * loss.noise
    return f"fell from its best: {after}" if is_real and (is_rise or ends_above_start) else ""


def _standing_still(losses: list[Curve], within: float) -> list[str]:
    """The names of those that stay where they are, if that is all, or all of the training.

    0 says nothing, but where all that there is of the training is 0: then there may be nothing that it learns from.
    """
    zeros = [loss.name for loss in losses if not (any(loss.values) or _is_of_validation(loss.name))]
    losses = [loss for loss in losses if any(loss.values)]
    still = [loss.name for loss in losses if _is_flat(loss, within)]
    trained = [loss.name for loss in losses if _is_of_training(loss.name)] or [loss.name for loss in losses]
    if not still or not set(trained) <= set(still):
        return []
    return [*zeros, *still] if all(_is_of_validation(loss.name) for loss in losses) else still


def _is_flat(loss: Curve, within: float) -> bool:
    values = loss.values
    share = len(values) / 5
    means = [fmean(values[round(i * share) : round((i + 1) * share)]) for i in range(5)]
    mean = fmean(values)
    at_start = abs(loss.start - mean) <= max(within * abs(mean), NOISE * loss.noise / math.sqrt(3))
    return at_start and max(means) - min(means) <= within * abs(mean)


def _falls(values: list[float]) -> bool:
    """Whether a loss still falls in the last third of its rows."""
    third = len(values) // 3
    return third > 0 and fmean(values[-third:]) < 0.95 * fmean(values[-2 * third : -third])


def _not_finite(column: Column, *, always: bool) -> str:
    """How many NaN and Inf there are; unless `always`, only if it ends so."""
    bad = [index for index, value in enumerate(column.values) if not math.isfinite(value)]
    last = 3 if "grad" in column.name.lower() else 1  # a norm of gradients is Inf where a GradScaler searches
    if not bad or not (always or all(not math.isfinite(value) for value in column.values[-last:])):
        return ""
    nan = sum(math.isnan(column.values[index]) for index in bad)
    return f"{nan} NaN and {len(bad) - nan} Inf, the first at epoch {column.epochs[bad[0]]:g}"


def _ends_early(column: Column, table: Table) -> str:
    """Whether it is empty at the end, for longer than ever before, while what was written beside it goes on.

    That is what stands in most of its rows, or in some if there is no such column. Rows with a number that never stands
    beside it are of another kind, such as those of a validation among those of the training. Other runs in the same
    table, as in W&B's `RUN - NAME`, may be longer.
    """
    own, last = set(column.rows), column.rows[-1]
    if last == table.rows - 1 or len(column.values) < FEWEST:
        return ""
    run = column.name.rpartition(" - ")[0]
    others = [c.rows for c in table.columns if c.name != column.name and c.name.rpartition(" - ")[0] == run]
    shared = [len(own.intersection(rows)) for rows in others]
    least = len(own) / 2 if any(2 * count > len(own) for count in shared) else 0
    beside = {row for rows, count in zip(others, shared, strict=True) if count > least for row in rows}
    rows = sorted(beside.difference(*(rows for rows, count in zip(others, shared, strict=True) if not count)))
    gaps, gap = [0], 0
    for row in rows:
        gap = 0 if row in own else gap + 1
        gaps.append(gap)
    after = sum(row > last for row in rows)
    if not after or after <= max(gaps[: len(gaps) - after]):
        return ""
    empty = table.rows - 1 - last
    return f"empty in the last {empty} rows, after epoch {column.epochs[-1]:g} {NAN_AS_EMPTY}"


def _fallen_scale(values: list[float]) -> str:
    if not (max(values) >= SCALER_AT and values[-1] < LOWEST_SCALE):
        return ""
    way = f"from {max(values):.3g} to {values[-1]:.3g}"
    return f"the scale of this GradScaler fell {way}, so nearly every step was skipped"


def _converged(curve: Curve) -> str:
    values = curve.values
    window = max(FEWEST, math.ceil(LAST_SHARE * len(values)))
    if len(values) < 2 * window or min(values) == max(values):
        return ""
    sign = -1 if curve.is_lower_better else 1
    before, last = (max(sign * value for value in part) for part in (values[:-window], values[-window:]))
    if last - before >= PLATEAU_GAIN * abs(before):
        return ""
    best, at = curve.best, curve.at
    if sign * curve.end > sign * best:  # which is smoothed
        best, at = curve.end, curve.column.epochs[-1]
    return f"converged: {curve.end:.4g} at the end, best {best:.4g} at epoch {at:g}"


def _oscillation(values: list[float]) -> str:
    window = max(FEWEST, math.ceil(LAST_SHARE * len(values)))
    last = values[-window:]
    if len(values) < 2 * window:
        return ""
    steps = [after - value for value, after in pairwise(last)]
    turns = sum(a * b < 0 for a, b in pairwise(steps)) / (window - 2)
    step, mean = fmean(map(abs, steps)), fmean(map(abs, last))
    if turns < OSCILLATION_TURNS or step < OSCILLATION_STEP * mean:
        return ""
    return (
        f"oscillation: in the last {window} rows it turns in {turns:.0%} of them and goes {step:.4g} from row to row, "
        f"{step / mean:.0%} of its mean {mean:.4g}"
    )
