"""The rules of `judge`, each number in its docstring from both sides, on curves without noise."""

from __future__ import annotations

import pytest

from tests.helpers import INF, NAN
from triton_mgiou.training.curves import judge, kind_of
from triton_mgiou.training.tables import Column, Table

FALLS = [2.0 - 0.04 * row for row in range(40)]  # to the end
RISES = [0.02 * row for row in range(40)]
FLAT = "are flat and no metric has moved"


def held(*parts):
    """Numbers that stay for some rows each: (value, rows)."""
    return [value for value, rows in parts for _ in range(rows)]


def alternating(mean, step, rows):
    return [mean + step * (-1) ** row for row in range(rows)]


def judged(columns):
    """The faults and the notes on columns; None where a cell is empty."""
    rows = max(map(len, columns.values()))
    kept = {name: [row for row, value in enumerate(values) if value is not None] for name, values in columns.items()}
    parts = [Column(name, kept[name], kept[name], [values[k] for k in kept[name]]) for name, values in columns.items()]
    return judge(Table(parts, rows, [], {}, [None] * rows))


CASES = {
    # A metric that has never learnt.
    "30 rows below 0.1 %": ({"loss": FALLS[:30], "mAP": [0.00099] * 15 + [0.0005] * 15}, ["mAP: never"]),
    "30 rows, then 0.1 %": ({"loss": FALLS[:30], "mAP": [0.0005] * 15 + [0.001] * 15}, []),
    "29 rows": ({"loss": FALLS[:29], "mAP": [0.0] * 29}, []),
    "10 rows, no loss falls": ({"loss": held((2, 3), (1, 7)), "mAP": [0.0] * 10}, ["mAP: never learnt: 0 in all 10"]),
    "9 rows, no loss falls": ({"loss": held((2, 3), (1, 6)), "mAP": [0.0] * 9}, []),
    "10 rows, a loss falls": ({"loss": FALLS[10:20], "mAP": [0.0] * 10}, []),
    "0.05 of 1": ({"loss": FALLS[:30], "AP": held((0.04, 15), (0.05, 15))}, []),
    "0.05 of 100": ({"loss": FALLS[:30], "bbox/AP": held((0.04, 15), (0.05, 15))}, ["bbox/AP: never"]),
    "one number in 10 rows": ({"mAP": [0.5] * 10}, ["mAP: never learnt: 0.5 in all 10 rows"]),
    "one number of 0.05 % in 10 rows": ({"loss": FALLS[10:20], "bbox/AP": [0.05] * 10}, []),
    "one number in 9 rows": ({"mAP": [0.5] * 9}, []),
    "94 % in all rows": ({"mAP": [0.94] * 10}, ["mAP: never"]),
    "95 % in all rows": ({"mAP": [0.95] * 10}, []),
    "94 in percent": ({"mAP": [94.0] * 10}, ["mAP: never"]),
    "95 in percent": ({"mAP": [95.0] * 10}, []),
    # A loss that stands still.
    "a loss of one number": ({"loss": [0.7] * 5}, ["loss: never learnt: 0.7 in all 5", f"all losses {FLAT}"]),
    "the same of 4 rows": ({"loss": [0.7] * 4, "mAP": RISES[:10]}, []),
    "the same beside a good metric, 9 rows": ({"loss": [0.7] * 9, "mAP": RISES[:9]}, []),
    "the same beside a good metric, 10 rows": ({"loss": [0.7] * 10, "mAP": RISES[:10]}, ["loss: never"]),
    "a loss that is 0 by definition": ({"box_loss": [0.0] * 10, "cls_loss": [*FALLS[:9], 0.0]}, []),
    "flat within 5 %": ({"loss": held((1, 20), (0.96, 20))}, ["loss: never", f"all losses {FLAT}"]),
    "not within 5 %": ({"loss": held((1, 20), (0.94, 20))}, []),
    "flat within 10 %, and a metric below 1 %": (
        {"loss": held((1, 20), (0.92, 20)), "mAP": held((0.004, 20), (0.009, 20))},
        ["loss: never", f"all losses {FLAT}"],
    ),
    "the same, a metric above 1 %": ({"loss": held((1, 20), (0.92, 20)), "mAP": held((0.004, 20), (0.011, 20))}, []),
    "the same in percent, below": (
        {"loss": held((100, 20), (92, 20)), "bbox/AP": held((0.4, 20), (0.9, 20))},
        ["loss: never", f"all losses {FLAT}"],
    ),
    "not within 10 %": ({"loss": held((1, 20), (0.89, 20)), "mAP": held((0.004, 20), (0.009, 20))}, []),
    "the loss of the training is flat": (
        {"train_loss": held((1, 20), (0.98, 20)), "val_loss": FALLS},
        ["train_loss: never", f"all losses of the training {FLAT}"],
    ),
    "that of the validation too": (
        {"val_loss": held((1, 20), (0.98, 20)), "Train Loss": held((1, 20), (0.98, 20))},
        ["val_loss: never", "Train Loss: never", f"all losses of the training {FLAT}"],
    ),
    "that of the validation is flat": ({"train_loss": FALLS, "val_loss": held((1, 20), (0.98, 20))}, []),
    # A metric that falls.
    "to 86 % of its best": ({"mAP": held((0.1, 5), (0.8, 20), (0.86 * 0.8, 10))}, []),
    "to 84 % of its best": ({"mAP": held((0.1, 5), (0.8, 20), (0.84 * 0.8, 10))}, ["mAP: fell from its best"]),
    "by more than three times its noise": (
        {"mAP": [0.1, *alternating(0.8, 0.03, 21), *alternating(0.6, 0.03, 21)]},
        ["mAP: fell"],
    ),
    "from its start on": ({"mAP": [*alternating(0.8, 0.03, 21), *alternating(0.6, 0.03, 21)]}, ["mAP: fell"]),
    "by less than that": ({"mAP": [0.1, *alternating(0.8, 0.05, 21), *alternating(0.6, 0.05, 21)]}, []),
    "to 1.1 % of its best": ({"mAP": held((0.1, 5), (0.8, 20), (0.0088, 10))}, ["mAP: fell"]),
    "to 0.9 % of its best": ({"mAP": held((0.1, 5), (0.8, 20), (0.0072, 10))}, ["mAP: collapsed"]),
    "the same in percent": ({"mAP": held((10, 5), (80, 20), (0.72, 10))}, ["mAP: collapsed"]),
    "to 0 in the last row": ({"mAP": [0.1, *alternating(0.8, 0.03, 29), 0]}, ["mAP: collapsed: 0 at the end"]),
    "to 0 in the last row of a noisy curve": ({"mAP": [0.1, *alternating(0.8, 0.05, 29), 0]}, []),
    "to 0, but for the last of 60 rows": ({"mAP": held((0.1, 5), (0.8, 45), (0, 9), (0.8, 1))}, []),
    "to 0, but for the last of 100 rows": ({"mAP": held((0.1, 5), (0.8, 85), (0, 9), (0.8, 1))}, ["mAP: collapsed"]),
    # A loss that rises.
    "by 29 % of what it had fallen by": ({"loss": held((10, 5), (1, 20), (3.6, 10))}, []),
    "by 31 % of what it had fallen by": ({"loss": held((10, 5), (1, 20), (3.8, 10))}, ["loss: fell from its best"]),
    "by 29 % of its best": ({"loss": held((1.3, 5), (1, 20), (1.29, 10))}, []),
    "by 31 % of its best": ({"loss": held((1.35, 5), (1, 20), (1.31, 10))}, ["loss: fell"]),
    "4 % above its start": ({"loss": held((1.1, 5), (1, 20), (1.04 * 1.1, 10))}, []),
    "6 % above its start": ({"loss": held((1.1, 5), (1, 20), (1.06 * 1.1, 10))}, ["loss: fell"]),
    "6 % above its start in 9 rows": ({"loss": held((1.1, 3), (1, 3), (1.06 * 1.1, 3))}, []),
    "6 % above its start in 10 rows": ({"loss": held((1.1, 3), (1, 4), (1.06 * 1.1, 3))}, ["loss: fell"]),
    "below 0, 4 % above its start": ({"nll": held((-1.1, 5), (-1.2, 20), (-0.96 * 1.1, 10))}, []),
    "below 0, 6 % above its start": ({"nll": held((-1.1, 5), (-1.2, 20), (-0.94 * 1.1, 10))}, ["nll: fell"]),
    "below 0, almost back": ({"nll": held((-1.1, 5), (-1.2, 20), (-1.11, 10))}, []),
    "below 0, by twice its best": ({"nll": held((-0.9, 5), (-1, 20), (1.1, 10))}, ["nll: collapsed"]),
    "within its noise": ({"loss": [2, *alternating(1, 0.2, 25), *alternating(1.4, 0.2, 15)]}, []),
    "to 2.9 times its best": ({"loss": held((1.5, 5), (1, 20), (2.9, 10))}, ["loss: fell"]),
    "to 3.1 times its best": ({"loss": held((1.5, 5), (1, 20), (3.1, 10))}, ["loss: collapsed"]),
    "the same, but not above its start": ({"loss": held((4, 5), (1, 20), (3.1, 10))}, ["loss: fell"]),
    "beside a metric of 6 %": ({"loss": held((1, 20), (2, 20)), "mAP": held((0, 20), (0.06, 20))}, []),
    "beside a metric of 4 %": ({"loss": held((1, 20), (2, 20)), "mAP": held((0, 20), (0.04, 20))}, ["loss: fell"]),
    "beside 4 in percent": ({"loss": held((1, 20), (2, 20)), "mAP": held((0, 20), (4, 20))}, ["loss: fell"]),
    "beside a metric that falls": (
        {"loss": held((1, 20), (2, 20)), "mAP": held((0, 5), (0.8, 20), (0.4, 15))},
        ["loss: fell", "mAP: fell"],
    ),
    "of the validation, beside a metric of the training": (
        {"val_loss": held((1, 20), (2, 20)), "train_mAP": held((0, 20), (0.5, 20))},
        ["val_loss: fell"],
    ),
    "of the training, 11 times its start, beside a good metric": (
        {"loss": held((1, 20), (11, 20)), "mAP": RISES},
        ["loss: collapsed"],
    ),
    "9 times": ({"loss": held((1, 20), (9, 20)), "mAP": RISES}, []),
    "from -1 to 11": ({"nll": held((-1, 20), (11, 20)), "mAP": RISES}, ["nll: collapsed"]),
    "from -1 to 9": ({"nll": held((-1, 20), (9, 20)), "mAP": RISES}, []),
    "of the validation, 11 times": ({"val_loss": held((1, 20), (11, 20)), "mAP": RISES}, []),
    "a part of one that falls": ({"loss_box": held((1, 20), (2, 20)), "loss": FALLS}, []),
    "a part of one that rises": (
        {"loss_box": held((1, 20), (2, 20)), "loss": held((1, 20), (2, 20))},
        ["loss_box: fell", "loss: fell"],
    ),
    "a part of one that falls, as Lightning names them": (
        {"train_box_loss_epoch": held((1, 20), (2, 20)), "train_loss_epoch": FALLS}, []
    ),
    "the same in steps": ({"train_box_loss_step": held((1, 20), (2, 20)), "train_loss_step": FALLS}, []),
    # The KL term of a VAE.
    "a KL term beside a reconstruction that falls": ({"recon_loss": FALLS, "kl_loss": held((0.1, 3), (9, 37))}, []),
    "of the validation too, beside its own": (
        {f"{part}{name}": values for part in ("", "val_") for name, values in
         (("loss", FALLS), ("KLD_loss", held((0.1, 3), (9, 37))))}, []
    ),
    "one that falls first": ({"recon_loss": FALLS, "kl_loss": held((10, 5), (1, 20), (9, 15))}, []),
    "one of one number": ({"recon_loss": FALLS, "kl_loss": [0.1] * 40}, ["kl_loss: never"]),
    "of rotated boxes, beside a metric": (
        {"train/kld_loss": held((1, 20), (4, 20)), "train/cls_loss": FALLS, "mAP": held((0, 20), (0.04, 20))},
        ["train/kld_loss: collapsed"],
    ),
    "beside that of the training only": (
        {"loss": FALLS, "val_loss": held((1, 40)), "val_kl_loss": held((0.1, 3), (9, 37))},
        ["val_loss: never", "val_kl_loss: collapsed"],
    ),
    "beside nothing": ({"kl_div_loss": held((0.1, 3), (9, 37))}, ["kl_div_loss: collapsed"]),
    "beside another KL term": ({"kl_loss": FALLS, "kl_2_loss": held((1, 20), (2, 20))}, ["kl_2_loss: fell"]),
    "beside one that falls by less than 5 %": (
        {"recon_loss": held((1, 20), (0.96, 20)), "kl_loss": held((1, 20), (2, 20))}, ["kl_loss: fell"]
    ),
    "beside one that rises": (
        {"recon_loss": held((1, 20), (2, 20)), "kl_loss": held((1, 20), (2, 20))}, ["recon_loss: fell", "kl_loss: fell"]
    ),
    "all of a VAE are flat": (
        {"recon_loss": held((1, 40)), "kl_loss": [1.0, *[1.01] * 39]},
        ["recon_loss: never", "kl_loss: never", "all losses are"],
    ),
    "NaN in a KL term": ({"loss": FALLS, "kl_loss": [*held((0.1, 3), (9, 36)), NAN]}, ["kl_loss: 1 NaN"]),
    # The losses of a GAN.
    "flat ones of a GAN": ({"g_loss": alternating(0.7, 0.01, 40), "d_loss": alternating(1.4, 0.01, 40)}, []),
    "rising ones, with their penalty": (
        {"Loss_G": RISES, "Loss_D": [-value for value in RISES], "gp_loss": alternating(0.1, 0.001, 40)}, []
    ),
    "in words": ({"generator loss": RISES, "val/critic_loss": held((1, 20), (2, 20))}, []),
    "of one number": (
        {"lossG": [0.7] * 40, "lossD": [1.4] * 40}, ["lossG: never", "lossD: never", "all losses are flat"]
    ),
    "the accuracy of its discriminator falls": (
        {"g_loss": RISES, "d_loss": FALLS, "d_acc": held((1, 20), (0.5, 20))}, []
    ),
    "another accuracy beside it falls": (
        {"g_loss": RISES, "d_loss": FALLS, "acc_real": held((1, 20), (0.5, 20))}, ["acc_real: fell from its best"]
    ),
    "the accuracy of a discriminator alone falls": (
        {"loss": FALLS, "d_acc": held((1, 20), (0.5, 20))}, ["d_acc: fell from its best"]
    ),
    "NaN in one": ({"g_loss": RISES, "d_loss": [*FALLS[:39], NAN]}, ["d_loss: 1 NaN"]),
    "a flat loss beside them": (
        {"g_loss": RISES, "d_loss": FALLS, "rec_loss": held((1, 39), (1.01, 1))},
        ["rec_loss: never", "all losses but those of the GAN are flat"],
    ),
    "one side only": ({"d_loss": held((1, 20), (2, 20))}, ["d_loss: fell"]),
    "no side: layers of a decoder, and a GIoU": (
        {"d0.loss_cls": held((1, 20), (2, 20)), "loss_giou": held((1, 20), (2, 20))},
        ["d0.loss_cls: fell", "loss_giou: fell"],
    ),
    # Which metrics count.
    "an accuracy of 0 beside mAP": ({"mAP": RISES, "accuracy": [0.0] * 40}, []),
    "an accuracy of 0": ({"accuracy": [0.0] * 40}, ["accuracy: never"]),
    "a recall of 0 beside an accuracy": ({"accuracy": RISES, "recall": [0.0] * 40}, []),
    "a recall of 0": ({"recall": [0.0] * 40, "precision": RISES}, ["recall: never"]),
    "mAP and AP are one kind": ({"AP50": [0.0] * 40, "mAP": RISES}, []),
    "mAP and F1 are two": ({"F1": [0.0] * 40, "mAP": RISES}, ["F1: never"]),
    "mAP of masks and of boxes are two": ({"mAP(M)": [0.0] * 40, "mAP(B)": RISES}, ["mAP(M): never"]),
    "mgiou without l2 is a metric": ({"mgiou": RISES}, []),
    # What is not finite or not there.
    "the losses of the training are 0, as where no object is left, and nothing moves": (
        {"train/box_loss": [0.0] * 10, "train/cls_loss": [0.0] * 10, "val/box_loss": [0.7] * 10},
        ["train/box_loss: never learnt: 0 in all 10", "train/cls_", "val/box_", f"all losses of the training {FLAT}"],
    ),
    "the same of a loss by no other name": (
        {"loss": [0.0] * 10, "eval_loss": [0.7] * 10},
        ["loss: never learnt: 0 in all 10", "eval_loss: never", f"all losses {FLAT}"],
    ),
    "one of several losses of the training is 0": (
        {"train/box_loss": [0.0] * 10, "train/cls_loss": [0.6] * 10, "val/box_loss": [0.7] * 10},
        ["train/cls_loss: never", "val/box_loss: never", f"all losses of the training {FLAT}"],
    ),
    "a loss of the training is 0 and that of the validation falls": ({"train_loss": [0.0] * 40, "val_loss": FALLS}, []),
    "NaN in all mAP": ({"mAP": [NAN] * 10, "mAP50": [NAN] * 10, "recall": RISES}, ["mAP: 10 NaN", "mAP50: 10 NaN"]),
    "NaN in one mAP": ({"mAP": RISES, "mAP_small": [NAN] * 10}, []),
    "NaN before the first mAP": ({"mAP": [NAN, INF, *RISES]}, []),
    "NaN after it": ({"mAP": [*RISES, NAN, *RISES]}, ["mAP: 1 NaN and 0 Inf, the first at epoch 40"]),
    "a norm of Inf in the last 2 rows": ({"loss": FALLS, "grad_norm": [*[1.0] * 38, INF, INF]}, []),
    "in the last 3 rows": ({"loss": FALLS, "grad_norm": [*[1.0] * 37, INF, INF, NAN]}, ["grad_norm: 1 NaN and 2 Inf"]),
    "a metric that ends early": (
        {"loss": FALLS, "mAP": [*RISES[:20], *[None] * 20]},
        ["mAP: empty in the last 20 rows, after epoch 19"],
    ),
    "a metric in every tenth row": ({"loss": FALLS, "mAP": [RISES[k] if k % 10 == 5 else None for k in range(40)]}, []),
}  # fmt: skip


@pytest.mark.parametrize(("columns", "faults"), CASES.values(), ids=CASES)
def test_faults(columns, faults):
    found, _ = judged(columns)
    assert len(found) == len(faults), found
    for fault, start in zip(found, faults, strict=True):
        assert fault.startswith(start), fault


@pytest.mark.parametrize(
    "name", ["scale", "train/scale", "scaler", "amp/scaler", "loss_scale", "Grad Scale", "amp.scale"]
)
def test_the_scale_of_a_grad_scaler(name):
    (fault,), _ = judged({"loss": FALLS, name: [65536.0, 2.0, 0.9]})
    assert fault.startswith(f"{name}: the scale of this GradScaler fell from 6.55e+04 to 0.9")
    for values in ([65536.0, 0.5, 1.0], [15.0, 0.5]):
        assert judged({"loss": FALLS, name: values})[0] == []


@pytest.mark.parametrize("name", ["image_scale", "scale_factor", "upscale"])
def test_other_scales(name):
    assert judged({"loss": FALLS, name: [65536.0, 2.0, 0.5]})[0] == []


def notes(values):
    found, told = judged({"loss": values})
    assert found == []
    return [note.partition(" ")[2].split(":")[0] for note in told]


def test_what_is_said_of_a_gan_and_of_a_kl_term():
    """That the losses of a GAN are not judged; neither is called converged where it rises."""
    columns = {"g_loss": held((0.7, 20), (2, 20)), "d_loss": alternating(1.4, 0.01, 40), "mAP": RISES}
    assert judged(columns)[1] == [
        "g_loss, d_loss: of a GAN, whose losses tell little of how it learns: only NaN and Inf count"
    ]
    assert judged({"loss": FALLS, "kl_loss": held((0.1, 3), (9, 37))})[1] == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (held((4, 10), (2, 25), (1.9801, 15)), True),
        (held((4, 10), (2, 25), (1.9799, 15)), False),
        (held((2, 34), (1, 16)), True),
        (held((2, 35), (1, 15)), False),
        (held((2, 3), (1, 7)), True),
        (held((2, 2), (1, 7)), False),
    ],
    ids=["less than 1 %", "more", "before the last 30 %", "in them", "5 of 10 rows", "5 of 9 rows"],
)
def test_converged(values, expected):
    assert ("converged" in notes(values)) == expected


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("mAP", [0.1, 0.3, 0.9, 0.3, 0.5, 0.4, 0.5, 0.4, 0.3, 0.6], 0.6),
        ("loss", [0.9, 0.7, 0.1, 0.7, 0.5, 0.6, 0.5, 0.6, 0.7, 0.4], 0.4),
    ],
)
def test_the_best_of_a_noisy_curve_is_not_worse_than_its_end(name, values, best):
    """A single value, as that in the third row, is not its best; the last one is its end."""
    _, noted = judged({name: values})
    assert noted[0] == f"{name}: converged: {best} at the end, best {best} at epoch 9"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([*FALLS[:4], *alternating(0.5, 0.1, 6)], True),
        ([*FALLS[:4], *alternating(0.5, 0.1, 5)], False),
        ([*FALLS[:20], *alternating(0.5, 0.026, 20)], True),
        ([*FALLS[:20], *alternating(0.5, 0.024, 20)], False),
        ([*FALLS[:35], *[0.8, 0.5] * 5, 0.4, 0.3, 0.2, 0.1, 0.05], True),
        ([*FALLS[:35], *[0.8, 0.5] * 4, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15], False),
    ],
    ids=["10 rows", "9 rows", "steps of 10.4 %", "steps of 9.6 %", "8 turns of 13", "6 turns of 13"],
)
def test_oscillating(values, expected):
    assert ("oscillation" in notes(values)) == expected


LOSSES = """loss train/box_loss error nll val_mae loss_size mse rmse wer cer perplexity ppl eval_loss top1_err
    val_err"""
OF_RUNS = """mAP mAP50-95(B) coco/bbox_mAP_s APl hbbmAP f1 fitness dice auc PCK oks mIoU acc accuracy top1 top-5
    AR mAR_100 precision recall val/COCOAP50_95 mean_io_u BinaryF1Score val_MulticlassJaccardIndex dice_coef mDice aAcc
    mAcc icdar/hmean test_coco_eval_bbox/0 panoptic_seg/PQ coco_panoptic/PQ_th"""
OTHERS = """lr lr0 weight_decay loss_weight loss_scale scaler cls_coef gain time data_time best_loss val/best_acc epoch
    fast_rcnn/cls_accuracy mask_rcnn/accuracy bbox_mAP_copypaste cardinality_error test_coco_eval_bbox/1 iou_threshold
    iou_thres iou_thresholds/0 loss_weights/1 lr/0 feature_map_size kl_coef capture salary camera cerium terr pqs"""


@pytest.mark.parametrize(("kind", "names"), [("loss", LOSSES), ("metric", OF_RUNS), ("", OTHERS)])
def test_which_columns_are_losses_and_metrics(kind, names):
    assert {name: kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


OF_TRAINING = [
    "train/loss_a",
    "Train Loss a",
    "trainLoss",
    "lossTrain",
    "losstrain",
    "training_loss",
    "run - train_loss",
]
OF_VALIDATION = ["val/loss", "Val Loss", "valLoss", "lossVal", "lossval", "test_loss", "eval/loss", "Validation loss"]
OF_NEITHER = [
    "box_loss",
    "constraint_loss",
    "strain_loss",
    "loss_interval",
    "retrieval_loss",
    "latest_loss",
    "value_loss",
]


@pytest.mark.parametrize("name", [*OF_TRAINING, *OF_VALIDATION, *OF_NEITHER])
def test_which_columns_are_of_the_training_and_of_the_validation(name):
    """All of the training may not stand still; a part of a training loss may rise as the total falls."""
    problems, _ = judged({name: held((1, 20), (0.98, 20)), "other_loss": FALLS})
    assert bool(problems) == (name in OF_TRAINING)
    problems, _ = judged({name: held((0.2, 20), (0.5, 20)), "total_loss": FALLS})
    assert bool(problems) == (name in OF_VALIDATION)
