"""`python -m triton_mgiou diagnose`: the verdict on runs and checkpoints in the formats that trainers write."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import pathlib
import pickle
import random
import struct
import tempfile
import warnings
import zlib

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from torch import nn

from tests.helpers import INF, NAN
from triton_mgiou.cli import main
from triton_mgiou.training.diagnose import READ


def noisy(values, noise, seed=0):
    chance = random.Random(seed)
    return [value * (1 + noise * chance.gauss(0, 1)) for value in values]


def fall(rows, start=2.0, end=0.5, rate=0.05, noise=0.01, seed=0):
    return noisy([end + (start - end) * math.exp(-rate * row) for row in range(rows)], noise, seed)


def rise(rows, top=0.82, rate=0.06, noise=0.01, seed=0):
    return noisy([top * (1 - math.exp(-rate * row)) for row in range(rows)], noise, seed)


def flat(rows, value, noise=0.002, seed=0):
    return noisy([value] * rows, noise, seed)


def stuck(values):
    """As the box loss of the second report: 0.754 to 0.758 over the run."""
    return noisy([values[0] * (1 + 0.005 * row / len(values)) for row in range(len(values))], 0.003)


# Files, as the trainers write them


def detect(rows, **changes):
    """The columns of Ultralytics' results.csv from 8.3 on."""
    columns = {
        "epoch": range(1, rows + 1),
        "time": [17.3 * (row + 1) for row in range(rows)],
        **{f"train/{name}_loss": fall(rows, 2 + i, 0.6 + i / 3, seed=i) for i, name in enumerate(PARTS)},
        **{f"metrics/{name}(B)": rise(rows, top, noise=0.02, seed=5) for name, top in METRICS.items()},
        **{f"val/{name}_loss": fall(rows, 2 + i, 0.7 + i / 3, seed=i + 9) for i, name in enumerate(PARTS)},
        **{f"lr/pg{i}": [0.01 * (1 - row / rows) for row in range(rows)] for i in range(3)},
    }
    return columns | changes


PARTS = ("box", "cls", "dfl")
METRICS = {"precision": 0.85, "recall": 0.78, "mAP50": 0.82, "mAP50-95": 0.6}


def with_losses(columns, change):
    return {name: change(name, values) if "loss" in name else values for name, values in columns.items()}


def with_metrics(columns, change):
    return {name: change(name, list(values)) if "metrics" in name else values for name, values in columns.items()}


def pose(rows, **changes):
    columns = detect(rows)
    columns |= {f"{part}/pose_loss": fall(rows, 9, 2, seed=3) for part in ("train", "val")}
    columns |= {f"{part}/kobj_loss": [0] * rows for part in ("train", "val")}  # no visibility, no such loss
    columns |= {f"metrics/{name}(P)": rise(rows, top - 0.1, noise=0.02, seed=8) for name, top in METRICS.items()}
    return columns | changes


def polygons(rows, of_keypoints, **changes):
    """Those of `MGIoUPoseTrainer`: metrics of boxes, keypoints and polygons."""
    columns = {k: of_keypoints(v) if "(P)" in k else v for k, v in pose(rows).items()}
    return columns | {f"metrics/{name}(G)": rise(rows, top, seed=9) for name, top in METRICS.items()} | changes


def csv_text(columns, delimiter=",", padded=False, decimal=".", digits=5):
    def cell(value):
        if isinstance(value, str):
            return value
        text = f"{value:.{digits}g}" if isinstance(value, float) else str(value)
        return text.replace(".", decimal)

    lines = [list(columns), *([cell(value) for value in row] for row in zip(*columns.values(), strict=True))]
    lines = [[f"{text:>23}" if padded else text for text in line] for line in lines]
    return "\n".join(delimiter.join(line) for line in lines) + "\n"


def yolov5_text(rows, losses=4, metrics=None, loss=None):
    """`%10s` twice, then `%10.4g`: no head, the epoch of how many, the memory."""
    columns = [loss or fall(rows, 0.07 + i / 100, 0.02, seed=i) for i in range(losses)]
    columns += [[24.0 + row % 7 for row in range(rows)], [640.0] * rows]
    columns += [metrics or rise(rows, top, seed=5) for top in METRICS.values()]
    columns += [loss or fall(rows, 0.07 + i / 100, 0.03, seed=i + 5) for i in range(3)]
    lines = [
        f"{f'{row}/{rows - 1}':>10}{'7.37G':>10}" + "".join(f"{column[row]:10.4g}" for column in columns)
        for row in range(rows)
    ]
    return "\n".join(lines) + "\n"


def lightning_text(val=None, test_rows=True):
    """30 epochs of 4 steps. Each `log` call has a row of its own; `trainer.test()` adds one at the end."""
    epochs, steps = 30, 4
    train = fall(epochs * steps, 1.5, 0.3, 0.03, 0.1)
    val, score = val or fall(epochs, 1.4, 0.4), rise(epochs, 0.7)
    lines = ["epoch,val_map,lr-AdamW,step,test_loss,test_map,train_loss_epoch,train_loss_step,val_loss"]
    for epoch in range(epochs):
        of_epoch = range(epoch * steps, (epoch + 1) * steps)
        lines += [f"{epoch},,0.001,{step},,,,{train[step]}," for step in of_epoch]
        lines.append(f"{epoch},{score[epoch]},,{epoch * steps + steps - 1},,,,,{val[epoch]}")
        lines.append(f"{epoch},,,{epoch * steps + steps - 1},,,{sum(train[epoch * steps :][:steps]) / steps},,")
    if test_rows:
        lines.append(f"{epochs},,,{epochs * steps},0.41,0.69,,,")
    return "\n".join(lines) + "\n"


def tensorboard_text(values):
    lines = [f"{1654943296.2 + 17 * step},{step * 50},{value}" for step, value in enumerate(values)]
    return "\n".join(["Wall time,Step,Value", *lines]) + "\n"


def json_text(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


def mmengine(epochs, loss=None, metric=None):
    loss, metric = loss or fall(epochs * 4, 1.9, 0.5, 0.03, 0.05), metric or rise(epochs, 0.45)
    rows = []
    for epoch in range(epochs):
        for part in range(4):
            value = loss[4 * epoch + part]
            rows.append({"lr": 0.02, "data_time": 0.05, "loss": value, "loss_cls": value / 2, "loss_bbox": value / 2,
                         "acc": 90.0 + epoch % 3, "time": 0.3, "epoch": epoch + 1, "iter": 4 * epoch + part,
                         "memory": 4821, "step": 4 * epoch + part})  # fmt: skip
        rows.append({"coco/bbox_mAP": metric[epoch], "coco/bbox_mAP_50": 1.5 * metric[epoch], "coco/bbox_mAP_s": -1.0,
                     "data_time": 0.01, "time": 0.05, "step": epoch + 1})  # fmt: skip
    return rows


def mmdetection(epochs, **options):
    """The `.log.json` of mmdetection 2: the environment first, then `mode`; the metrics once more as text."""
    rows = [{"env_info": "sys.platform: linux", "seed": 0, "exp_name": "atss.py"}]
    for row in mmengine(epochs, **options):
        if "loss" in row:
            rows.append({"mode": "train", **row})
        else:
            value = row["coco/bbox_mAP"]
            rows.append({"mode": "val", "epoch": row["step"], "iter": 500, "lr": 0.02, "bbox_mAP": value,
                         "bbox_mAP_copypaste": f"{value:.3f} 0.1 0.2"})  # fmt: skip
    return rows


def detectron2(evaluations, loss=None, metric=None):
    loss = loss or fall(evaluations * 5, 3.0, 0.8, 0.04, 0.1)
    metric = metric or rise(evaluations, 38.0)
    rows = []
    for index in range(evaluations * 5):
        row = {"data_time": 0.01, "eta_seconds": 900.0 - index, "iteration": 20 * index + 19,
               "loss_box_reg": loss[index] / 3, "loss_cls": loss[index] / 2, "lr": 0.001, "time": 0.3,
               "total_loss": loss[index]}  # fmt: skip
        row["fast_rcnn/cls_accuracy"] = 0.9 + 0.001 * (index % 9)
        if index % 5 == 4:
            value = metric[index // 5]
            row |= {"bbox/AP": value, "bbox/AP50": 1.6 * value, "bbox/APs": NAN, "bbox/AP-boat": 0.0}
        rows.append(row)
    return rows


def table(text):
    return lambda path: path.write_text(text, encoding="utf-8")


def binary(content):
    return lambda path: path.write_bytes(content)


def saved(content, **options):
    return lambda path: torch.save(content, path, **options)


# Checkpoints


def network(broken=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    if broken:
        model[1].running_var[2] = NAN
    return model


def scaler_state(scale):
    return {"scale": scale, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 3}


def ultralytics(broken=False, scale=512.0):
    """Whole pickled modules, in half precision, beside plain things."""
    return {
        "epoch": -1, "best_fitness": np.float64(0.61), "model": None, "ema": network(broken).half(), "updates": 3200,
        "optimizer": None, "scaler": scaler_state(scale), "train_args": {"imgsz": 640, "dir": pathlib.Path("runs")},
        "train_results": {"epoch": [1, 2], "metrics/mAP50(B)": [0.1, 0.2]}, "date": "2026-01-01", "version": "8.4.0",
    }  # fmt: skip


def lightning(broken=False, scale=65536.0):
    return {
        "epoch": 9, "global_step": 1000, "pytorch-lightning_version": "2.4.0",
        "state_dict": network(broken).state_dict(),
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {
            "best_model_score": torch.tensor(0.31), "kth_value": torch.tensor(INF), "best_k_models": {}},
            "EarlyStopping": {"wait_count": 0, "best_score": torch.tensor(INF)}},
        "MixedPrecision": scaler_state(scale), "hyper_parameters": argparse.Namespace(lr=0.1),
    }  # fmt: skip


def mmengine_checkpoint(scale=512.0):
    message_hub = {"log_scalars": {}, "runtime_info": {"epoch": 12}, "resumed_keys": {}}
    return {
        "meta": {"epoch": 12, "iter": 6000, "seed": np.int64(3)}, "state_dict": network().state_dict(),
        "message_hub": message_hub, "optimizer": {"state": {}, "param_groups": [], "loss_scaler": scaler_state(scale)},
    }  # fmt: skip


def safetensors(tensors):
    """Eight bytes of length, a JSON head, the numbers."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
             torch.float8_e4m3fn: "F8_E4M3"}  # fmt: skip
    head, content = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        stored = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        places = [len(content), len(content) + len(stored)]
        head[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        content += stored
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + content


def dcp(content):
    def write(path):
        path = path.parent if path.suffix else path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.distributed.checkpoint.save(content, checkpoint_id=path, no_dist=True)

    return write


def quantised(scale):
    return {"w": torch.quantize_per_tensor(torch.rand(4), scale, 0, torch.qint8)}


def nested(value):
    return {"w": torch.nested.nested_tensor([torch.ones(2), torch.tensor([1.0, value, 2.0])])}


FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)
FLOAT8 = torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn)


N = 150
EIGHT = N - 8

CASES = {
    # Healthy tables
    "Ultralytics, converged": ("results.csv", table(csv_text(detect(N))), 0, "metrics/mAP50(B): converged"),
    "Ultralytics, old heads": ("results.csv", table(csv_text(detect(N), padded=True)), 0, None),
    "Ultralytics, still learning": ("results.csv", table(csv_text(detect(25))), 0, None),
    "Ultralytics, three epochs": (
        "results.csv",
        table(csv_text(with_metrics(detect(3), lambda _, __: [0.0] * 3))),
        0,
        None,
    ),
    "Ultralytics, slow start": (
        "results.csv",
        table(csv_text(with_metrics(detect(20, **{"train/box_loss": fall(20, rate=0.08)}), lambda _, __: [0.0] * 20))),
        0,
        None,
    ),
    "Ultralytics pose": ("results.csv", table(csv_text(pose(N))), 0, None),
    "Ultralytics OBB": ("results.csv", table(csv_text(detect(N, **{"train/angle_loss": flat(N, 0.02)}))), 0, None),
    "Ultralytics classify": (
        "results.csv",
        table(
            csv_text({"epoch": range(N), "train/loss": fall(N), "metrics/accuracy_top1": rise(N), "val/loss": fall(N)})
        ),
        0,
        None,
    ),
    "a loss near the end of float64, and falling": (
        "results.csv",
        table(csv_text(detect(N, **{"train/box_loss": [value * 1e299 for value in fall(N)]}))),
        0,
        None,
    ),
    "one class": (
        "results.csv",
        table(csv_text(detect(N, **{"train/cls_loss": [0] * N, "val/cls_loss": [0] * N}))),
        0,
        None,
    ),
    "small data, noisy mAP": (
        "results.csv",
        table(csv_text(with_metrics(detect(N), lambda _, v: noisy(v, 0.12, 7)))),
        0,
        None,
    ),
    "overconfident: val/cls_loss rises, mAP stays": (
        "results.csv",
        table(csv_text(detect(N, **{"val/cls_loss": [*fall(50), *(0.6 + 0.01 * i for i in range(100))]}))),
        0,
        None,
    ),
    "fine-tuned: all flat, mAP good from the start": (
        "results.csv",
        table(
            csv_text(
                with_metrics(with_losses(detect(60), lambda _, v: flat(60, v[-1])), lambda _, __: flat(60, 0.8, 0.01))
            )
        ),
        0,
        None,
    ),
    "saturated": (
        "results.csv",
        table(csv_text(with_metrics(detect(60), lambda _, __: [0.1, 0.6, *[0.995] * 58]))),
        0,
        None,
    ),
    "last row cut off": ("results.csv", table(csv_text(detect(N))[:-60]), 0, "left out"),
    "zeros after a crash": ("results.csv", binary(csv_text(detect(N)).encode() + b"\0" * 300), 0, None),
    "head again after a resume": (
        "results.csv",
        table(csv_text(detect(N)) + csv_text({k: list(v)[40:] for k, v in detect(N).items()})),
        0,
        None,
    ),
    "semicolons and decimal commas": ("results.csv", table(csv_text(detect(N), ";", decimal=",")), 0, None),
    "tabs": ("results.tsv", table(csv_text(detect(N), "\t")), 0, None),
    "byte order mark, Windows lines": (
        "results.csv",
        binary(b"\xef\xbb\xbf" + csv_text(detect(N)).replace("\n", "\r\n").encode()),
        0,
        None,
    ),
    "YOLOv5": ("results.txt", table(yolov5_text(300)), 0, "metrics/mAP50: converged"),
    "YOLOv5, one class": ("results.txt", table(yolov5_text(300)), 0, None),
    "YOLOv5, only the last epoch validated": (
        "results.txt",
        table(yolov5_text(60, metrics=[0.0] * 59 + [0.7])),
        0,
        None,
    ),
    "YOLOv7 with keypoints": ("results.txt", table(yolov5_text(300, losses=6)), 0, None),
    "Lightning, tested at the end": ("metrics.csv", table(lightning_text()), 0, None),
    "Lightning, no test": ("metrics.csv", table(lightning_text(test_rows=False)), 0, None),
    "TensorBoard loss": ("run-exp1-tag-Loss_train.csv", table(tensorboard_text(fall(1000, noise=0.15))), 0, None),
    "TensorBoard mAP": (
        "run-exp1-tag-metrics_mAP_0.5.csv",
        table(tensorboard_text(rise(100, rate=0.1))),
        0,
        "metrics_mAP_0.5: conv",
    ),
    "TensorBoard, quick start": (
        "run-a-tag-loss.csv",
        table(tensorboard_text([2.3, 1.9, 1.2, *flat(900, 0.3, 0.1)])),
        0,
        None,
    ),
    "MMEngine": ("scalars.json", table(json_text(mmengine(24))), 0, None),
    "MMEngine, killed while writing": ("scalars.json", table(json_text(mmengine(24))[:-30]), 0, "cut off"),
    "mmdetection 2": ("20260101_1200.log.json", table(json_text(mmdetection(24))), 0, None),
    "detectron2": ("metrics.json", table(json_text(detectron2(20))), 0, None),
    "Transformers": (
        "trainer_state.json",
        table(
            json.dumps(
                {
                    "log_history": [
                        {"epoch": i / 10, "grad_norm": INF if i < 3 else 2.0, "loss": value, "step": i}
                        for i, value in enumerate(fall(60))
                    ]
                }
            )
        ),
        0,
        None,
    ),
    "negative log likelihood": ("log.csv", table(csv_text({"epoch": range(80), "nll": fall(80, 1, -2)})), 0, None),
    "a value logged once": (
        "log.csv",
        table("epoch,loss,final_loss\n" + "".join(f"{i},{v},\n" for i, v in enumerate(fall(40))) + "40,,0.9\n"),
        0,
        None,
    ),
    "a hundred thousand steps": (
        "run-a-tag-loss.csv",
        table(tensorboard_text([2 / (1 + i / 1e4) + i % 7 / 100 for i in range(100_000)])),
        0,
        None,
    ),
    "mAP 0 when only the last epoch is validated, then good": (
        "results.csv",
        table(csv_text(with_metrics(detect(40), lambda _, v: [0.0] * 39 + v[-1:]))),
        0,
        None,
    ),
    "decimal commas, no head": ("results.txt", table(yolov5_text(100).replace(".", ",")), 0, None),
    "a comma behind each row": (
        "log.csv",
        table("epoch,loss\n" + "".join(f"{i},{v},\n" for i, v in enumerate(fall(40)))),
        0,
        None,
    ),
    "numpy.savetxt, mAP the same number": (
        "log.txt",
        table("# epoch loss mAP\n" + "".join(f"{i} {v} {0.5}\n" for i, v in enumerate(fall(40)))),
        1,
        "mAP: never learnt",
    ),
    "Keras and fastai": (
        "history.csv",
        table(
            "epoch,train_loss,valid_loss,accuracy,time\n"
            + "".join(
                f"{i},{a},{b},{c},00:1{i % 10}\n"
                for i, (a, b, c) in enumerate(zip(fall(30), fall(30), rise(30), strict=True))
            )
        ),
        0,
        None,
    ),
    "detectron2, killed and resumed": (
        "metrics.json",
        table(json_text(detectron2(10)) + '{"iteration": 999, "loss_b' + json_text(detectron2(10))),
        0,
        "left out",
    ),
    # Broken tables
    "a loss at the end of float64": (
        "results.csv",
        table(csv_text(detect(N, **{"train/box_loss": [1e308] * N}))),
        1,
        "train/box_loss",
    ),
    "NaN": ("results.csv", table(csv_text(detect(30, **{"train/box_loss": [*fall(20), *[NAN] * 10]}))), 1, "10 NaN"),
    "NaN, old heads": (
        "results.csv",
        table(csv_text(detect(30, **{"val/dfl_loss": [*fall(20), *[INF] * 10]}), padded=True)),
        1,
        "10 Inf",
    ),
    "all losses up tenfold, mAP 0 in the last 8 epochs": (
        "results.csv",
        table(
            csv_text(
                with_metrics(
                    with_losses(detect(N), lambda _, v: [*v[:EIGHT], *(10 * x for x in v[EIGHT:])]),
                    lambda _, v: [*v[:EIGHT], *[0.0] * 8],
                )
            )
        ),
        1,
        "metrics/mAP50(B): collapsed",
    ),
    "mAP 0 in 300 epochs, no head": (
        "results.txt",
        table(yolov5_text(300, metrics=[0.0] * 300)),
        1,
        "metrics/mAP50: never learnt: 0 in all 300 rows",
    ),
    "all flat and mAP 0, no head": (
        "results.txt",
        table(yolov5_text(100, metrics=[0.0] * 100, loss=flat(100, 0.07))),
        1,
        "scaler.get_scale()",
    ),
    "one number in all rows": (
        "log.csv",
        table("epoch,loss\n" + "".join(f"{i},0.7012\n" for i in range(40))),
        1,
        "never learnt",
    ),
    "mAP under 1e-4": (
        "results.csv",
        table(csv_text(with_metrics(detect(60), lambda _, __: noisy([4e-5] * 60, 0.3)))),
        1,
        "never learnt: at most",
    ),
    "the reports: all losses flat, box loss too, mAP 0": (
        "results.csv",
        table(csv_text(with_metrics(with_losses(pose(50), lambda _, v: stuck(v)), lambda _, __: [0.0] * 50))),
        1,
        "training/README.md",
    ),
    "six epochs of it": (
        "results.csv",
        table(csv_text(with_metrics(with_losses(detect(6), lambda _, v: flat(6, v[0])), lambda _, __: [0.0] * 6))),
        1,
        "get_scale",
    ),
    "keypoints never learnt, boxes good": (
        "results.csv",
        table(csv_text({k: [0.0] * N if "(P)" in k else v for k, v in pose(N).items()})),
        1,
        "(P): never learnt",
    ),
    "mAP falls by half": (
        "results.csv",
        table(
            csv_text(
                with_metrics(detect(N), lambda _, v: [*v[:100], *(x * (1 - 0.01 * i) for i, x in enumerate(v[100:]))])
            )
        ),
        1,
        "metrics/mAP50(B): fell from its best",
    ),
    "mAP falls by half, old heads, cut off": (
        "results.csv",
        table(csv_text(with_metrics(detect(N), lambda _, v: [*v[:75], *(x / 2 for x in v[75:])]), padded=True)[:-31]),
        1,
        "fell from its best",
    ),
    "mAP 0 in the last epoch": (
        "results.csv",
        table(csv_text(with_metrics(detect(N), lambda _, v: [*v[:-1], 0.0]))),
        1,
        "mAP50(B): collapsed: 0 at",
    ),
    "weights stand still: mAP the same number": (
        "results.csv",
        table(csv_text(with_metrics(detect(40), lambda _, __: [0.3712] * 40))),
        1,
        "0.3712 in all 40 rows",
    ),
    "overfitting, no metric": (
        "log.csv",
        table(
            csv_text(
                {
                    "epoch": range(80),
                    "train_loss": fall(80),
                    "val_loss": [*fall(40), *(0.7 + 0.03 * i for i in range(40))],
                }
            )
        ),
        1,
        "val_loss: fell from its best",
    ),
    "loss explodes, semicolons": (
        "log.csv",
        table(csv_text({"epoch": range(N), "loss": [*fall(N)[:EIGHT], *[40.0] * 8]}, ";", decimal=",")),
        1,
        "loss: collapsed",
    ),
    "all losses are 0": ("log.csv", table(csv_text({"epoch": range(20), "loss": [0.0] * 20})), 1, "0 in all 20 rows"),
    "Lightning, NaN": ("metrics.csv", table(lightning_text(val=[*fall(20), *[NAN] * 10])), 1, "val_loss: 10 NaN"),
    "Lightning, flat": (
        "metrics.csv",
        table(
            "epoch,step,train_loss,val_loss\n"
            + "".join(
                f"{i},{i},{a},\n{i},{i},,{b}\n"
                for i, (a, b) in enumerate(zip(flat(40, 0.7), flat(40, 0.71, seed=3), strict=True))
            )
        ),
        1,
        "never learnt",
    ),
    "empty where NaN was": (
        "log.csv",
        table("epoch,loss,mAP\n" + "".join(f"{i},{v if i < 30 else ''},{v / 9}\n" for i, v in enumerate(rise(40)))),
        1,
        "empty in the last 10 rows",
    ),
    "TensorBoard, flat": (
        "run-a-tag-train_loss.csv",
        table(tensorboard_text(flat(200, 0.754, 0.002))),
        1,
        "train_loss: never",
    ),
    "MMEngine, NaN": ("scalars.json", table(json_text(mmengine(24, loss=[*fall(80), *[NAN] * 16]))), 1, "loss: 16 NaN"),
    "MMEngine, mAP 0": (
        "scalars.json",
        table(json_text(mmengine(36, metric=[0.0] * 36))),
        1,
        "never learnt: 0 in all 36",
    ),
    "mmdetection 2, collapsed": (
        "a.log.json",
        table(json_text(mmdetection(30, metric=[*rise(22), *[0.001] * 8]))),
        1,
        "val/bbox_mAP: collapsed",
    ),
    "detectron2, flat": (
        "metrics.json",
        table(json_text(detectron2(40, loss=flat(200, 2.1), metric=[0.0] * 40))),
        1,
        "get_scale",
    ),
    # No tables
    "not a run": ("iris.csv", table("sepal,petal\n5.1,1.4\n4.9,1.4\n"), 2, "neither a loss nor a metric"),
    "prose": ("notes.txt", table("The run went well.\nNext time with more data.\n"), 2, "diagnose reads"),
    "an empty file": ("results.csv", table(""), 2, "is empty"),
    "a picture": ("results.png", binary(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256))), 2, "diagnose reads"),
    "settings": ("args.yaml", table("task: pose\nmode: train\nepochs: 100\n"), 2, "diagnose reads"),
    "a JSON of something else": ("a.json", table('{"categories": ["cat"], "info": {}}'), 2, "no column of numbers"),
    "JSON of names": ("a.json", table('["a", "b"]'), 2, "diagnose reads"),
    # Healthy checkpoints
    "plain": ("last.pt", saved(network().state_dict()), 0, None),
    "plain, old format": ("last.pt", saved(network().state_dict(), _use_new_zipfile_serialization=False), 0, None),
    "Ultralytics' best.pt": ("best.pt", saved(ultralytics()), 0, "torch.nn.modules"),
    "Lightning's": ("epoch=9.ckpt", saved(lightning()), 0, None),
    "MMEngine's": ("epoch_12.pth", saved(mmengine_checkpoint()), 0, None),
    "a mask of -Inf": ("last.pt", saved({"mask": torch.full((3, 3), -INF).triu(1), "w": torch.ones(2)}), 0, None),
    "pickle protocol 4": ("last.pt", saved(ultralytics(), pickle_protocol=4), 0, None),
    "safetensors file": (
        "model.safetensors",
        binary(safetensors({"a": torch.ones(3), "i": torch.arange(3), "b": torch.ones(2).half()})),
        0,
        None,
    ),
    "DCP folder": (
        "step_100",
        dcp({"model": network().state_dict(), "step": 3, "scaler": scaler_state(1024.0)}),
        0,
        None,
    ),
    "sparse": ("w.pt", saved({"w": torch.eye(3).to_sparse()}), 0, None),
    "quantised tensor": ("w.pt", saved(quantised(0.1)), 0, None),
    "nested": ("w.pt", saved(nested(3.0)), 0, None),
    "float8": ("w.pt", saved({"w": torch.ones(3).to(torch.float8_e4m3fn)}), 0, None),
    "a path with an apostrophe": ("bob's best.pt", saved(ultralytics()), 0, None),
    # Broken checkpoints
    "plain, NaN": ("last.pt", saved(network(broken=True).state_dict()), 1, "1.running_var: 1 NaN"),
    "Ultralytics, NaN": (
        "best.pt",
        saved(ultralytics(broken=True)),
        1,
        "ema.1.running_var: 1 NaN and 0 Inf in shape (4,)",
    ),
    "Ultralytics, NaN, old format": (
        "best.pt",
        saved(ultralytics(broken=True), _use_new_zipfile_serialization=False),
        1,
        "ema.1.running_var: 1 NaN",
    ),
    "Ultralytics, scale 0": (
        "last.pt",
        saved(ultralytics(scale=0.0)),
        1,
        "scaler.scale: the scale of this GradScaler is 0,",
    ),
    "Lightning's, NaN": ("a.ckpt", saved(lightning(broken=True)), 1, "state_dict.1.running_var"),
    "Lightning, scale Inf": ("a.ckpt", saved(lightning(scale=INF)), 1, "the scale of this GradScaler is inf"),
    "Lightning, scale of numpy": ("a.ckpt", saved(lightning(scale=np.float32(1e-10))), 1, "MixedPrecision.scale"),
    "Lightning, scale 1e-10": ("a.ckpt", saved(lightning(scale=1e-10)), 1, "MixedPrecision.scale"),
    "MMEngine, scale 1e-10": ("a.pth", saved(mmengine_checkpoint(scale=1e-10)), 1, "optimizer.loss_scaler.scale"),
    "a whole GradScaler": (
        "a.pt",
        saved({"w": torch.ones(1), "scaler": torch.amp.GradScaler("cpu", init_scale=1e-10)}),
        1,
        "the scale of this GradScaler is 1e-10",
    ),
    "a weight of -Inf": ("last.pt", saved({"model": {"w": torch.tensor([1.0, -INF])}}), 1, "model.w: 0 NaN and 1 Inf"),
    "numpy array with NaN": ("last.pt", saved({"w": torch.ones(2), "mean": np.array([1.0, NAN])}), 1, "mean: 1 NaN"),
    "safetensors, NaN": (
        "m.safetensors",
        binary(safetensors({"i": torch.arange(3), "a": torch.ones(3).half(), "b": torch.tensor([NAN, 1])})),
        1,
        "b: 1 NaN",
    ),
    "safetensors, float8": ("m.safetensors", binary(safetensors({"a": FLOAT8})), 1, "a: 1 NaN"),
    "DCP folder, NaN": ("step_100", dcp({"model": network(broken=True).state_dict()}), 1, "model.1.running_var: 1 NaN"),
    "DCP shard, NaN": ("step_100/__0_0.distcp", dcp({"w": torch.tensor([NAN])}), 1, "w: 1 NaN"),
    "a bias of 0 and -Inf": ("last.pt", saved({"bias": torch.tensor([0.0, -INF])}), 1, "bias: 0 NaN and 1 Inf"),
    "DCP folder, scale 0": (
        "step_100",
        dcp({"model": {"w": torch.ones(1)}, "scaler": scaler_state(0.0)}),
        1,
        "scaler.scale",
    ),
    "sparse, NaN": ("w.pt", saved({"w": torch.tensor([[0, NAN], [0, 1]]).to_sparse()}), 1, "first at [0, 1]"),
    "quantised with a scale of NaN": ("w.pt", saved(quantised(NAN)), 1, "w: 4 NaN"),
    "nested, Inf": ("w.pt", saved(nested(INF)), 1, "w: 0 NaN and 1 Inf"),
    "float8, NaN": ("w.pt", saved({"w": FLOAT8}), 1, "w: 1 NaN"),
    "complex, NaN": ("w.pt", saved({"w": torch.tensor([1j, complex(NAN, 0)])}), 1, "w: 1 NaN"),
    # No checkpoints
    "a folder": ("runs", lambda path: path.mkdir(), 2, "without the .metadata"),
    "a shard alone": ("__0_0.distcp", binary(b"PK\x03\x04"), 2, "without the .metadata"),
    "a zip of something else": ("a.pt", binary(b"PK\x05\x06" + b"\0" * 18), 2, "none of torch.save"),
    "no tensor": ("a.pt", saved({"epoch": 3}), 2, "holds no tensor"),
    "words": ("a.pt", table("no pickle at all"), 2, "diagnose reads"),
    "safetensors cut off": ("m.safetensors", binary(safetensors({"a": torch.ones(30)})[:-9]), 2, "is damaged"),
    "safetensors of 3 bytes": ("m.safetensors", binary(b"abc"), 2, "no safetensors file"),
    "nothing there": ("missing.csv", lambda _: None, 2, "No such file"),
}
if FLOAT4 is not None:
    CASES["float4"] = ("w.pt", saved({"w": torch.zeros(4, dtype=torch.uint8).view(FLOAT4)}), 0, None)


def run(columns, status, words=None, name="results.csv", **options):
    return name, table(csv_text(columns, **options)), status, words


def text(content, status, words=None, name="log.csv"):
    return name, table(content) if isinstance(content, str) else binary(content), status, words


def checkpoint(content, status, words=None, name="last.pt", **options):
    return name, saved(content, **options), status, words


def plain(**columns):
    """A table of any trainer; each column as long as the longest."""
    return {"epoch": range(max(map(len, columns.values()))), **columns}


def segment(rows):
    columns = detect(rows) | {f"{part}/seg_loss": fall(rows, 3, 1.2, seed=9) for part in ("train", "val")}
    return columns | {f"metrics/{name}(M)": rise(rows, top - 0.05, noise=0.02) for name, top in METRICS.items()}


def yolov5(rows, top=1.0):
    """The columns of YOLOv5's results.csv, from 6.0 on."""
    return {
        "epoch": range(rows),
        **{f"train/{name}_loss": fall(rows, 0.1, 0.03, seed=i) for i, name in enumerate(("box", "obj", "cls"))},
        **{f"metrics/{name}": rise(rows, 0.7 * top) for name in ("precision", "recall", "mAP_0.5", "mAP_0.5:0.95")},
        **{f"val/{name}_loss": fall(rows, 0.1, 0.04, seed=i + 5) for i, name in enumerate(("box", "obj", "cls"))},
        **{f"x/lr{i}": [0.01 * (1 - row / rows) for row in range(rows)] for i in range(3)},
    }


def rtdetr(rows, **changes):
    names = ("giou_loss", "cls_loss", "l1_loss")
    losses = {
        f"{part}/{name}": fall(rows, 1.2, 0.3, seed=i) for part in ("train", "val") for i, name in enumerate(names)
    }
    return {"epoch": range(1, rows + 1), **losses, "metrics/mAP50(B)": rise(rows, 0.6)} | changes


def weights_and_biases(values):
    """An export of a chart: the run's name before each column, its minimum and maximum beside it."""
    head = ",".join(f'"{name}"' for name in ("Step", *(f"run - train/loss{end}" for end in ("", "__MIN", "__MAX"))))
    return "\n".join([head, *(f'"{i}","{v}","{v}","{v}"' for i, v in enumerate(values))]) + "\n"


def transformers(losses, evaluated, accuracy):
    rows = [{"loss": value, "step": step, "epoch": step / 10} for step, value in enumerate(losses)]
    rows += [
        {"eval_loss": value, "eval_accuracy": right, "step": 10 * step}
        for step, (value, right) in enumerate(zip(evaluated, accuracy, strict=True))
    ]
    return json.dumps({"log_history": rows})


def classifier(losses, top1):
    """MMPretrain, in percent."""
    rows = []
    for epoch, (loss, right) in enumerate(zip(losses, top1, strict=True)):
        rows.append({"lr": 0.1, "loss": loss, "epoch": epoch + 1, "iter": epoch, "step": epoch})
        rows.append({"accuracy/top1": right, "accuracy/top5": min(5 * right, 99.0), "step": epoch + 1})
    return json_text(rows)


def quoted(values, scores):
    """Decimal commas between quotes, as spreadsheets write them."""
    cells = [(f"{v:.4f}".replace(".", ","), f"{w:.4f}".replace(".", ",")) for v, w in zip(values, scores, strict=True)]
    return "epoch,loss,mAP\n" + "".join(f'{i},"{v}","{w}"\n' for i, (v, w) in enumerate(cells))


def per_channel(scale):
    scales, zeros = torch.tensor([0.1, scale]), torch.tensor([0, 0])
    return {"w": torch.quantize_per_channel(torch.rand(2, 3), scales, zeros, 0, torch.qint8)}


def cut_shard(path):
    dcp({"w": torch.ones(9999)})(path)
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-500])


def message_hub(history):
    """What MMEngine keeps beside the weights; a HistoryBuffer is no class of ours, a namespace stands for it."""
    buffer = argparse.Namespace(_log_history=np.array(history), _count_history=np.ones(len(history)))
    return {"log_scalars": {"train/grad_norm": buffer}, "runtime_info": {"iter": 20}}


class Evil:
    """Writes a file where it is unpickled by anything that runs its code."""

    def __reduce__(self):
        return exec, (f"open({EVIL!r}, 'w').write('x')",)


EVIL = str(pathlib.Path(tempfile.gettempdir()) / f"evil-{random.SystemRandom().random()}")
SHORT = list(zip(fall(40), rise(40), strict=True))
C_TEXTS = (
    "-nan",
    "NAN",
    "nan(ind)",
    "-nan(ind)",
    "nan(0x8000000000000)",
    "1.#QNAN",
    "-1.#IND00",
    "1.#INF",
    "-Infinity",
)

CASES |= {
    # Healthy tables
    "segment": run(segment(N), 0),
    "YOLO26 pose: RLE loss falls below 0": run(pose(N, **{"train/rle_loss": fall(N, 2, -1.4)}), 0),
    "YOLOv5's csv": run(yolov5(100), 0, padded=True),
    "RT-DETR": run(rtdetr(N), 0),
    "one row": run(detect(1), 0),
    "two rows": run(detect(2), 0),
    "a thousand rows": run(detect(1000), 0),
    "UTF-16, from a shell of Windows": text(csv_text(detect(N)).encode("utf-16"), 0),
    "sep=; for Excel": text("sep=;\n" + csv_text(detect(N), ";", decimal=","), 0),
    "quoted decimal commas": text(quoted(fall(40), rise(40)), 0),
    "YOLOv5, byte order mark, Windows lines": text(
        b"\xef\xbb\xbf" + yolov5_text(100).replace("\n", "\r\n").encode(), 0, name="results.txt"
    ),
    "MMEngine, byte order mark, Windows lines": text(
        b"\xef\xbb\xbf" + json_text(mmengine(24)).replace("\n", "\r\n").encode(), 0, name="scalars.json"
    ),
    "cut off at a comma": text(csv_text(detect(N)).rstrip().rpartition(",")[0] + ",", 0),
    "blank lines": text(csv_text(detect(N)).replace("\n", "\n\n"), 0),
    "resumed with more columns": text(csv_text(detect(60)) + csv_text(pose(60)), 0),
    "YOLOv5, epochs again after a resume": text(
        yolov5_text(100) + "\n".join(yolov5_text(100).splitlines()[60:]), 0, name="results.txt"
    ),
    "YOLOv5 on a CPU": text(yolov5_text(100).replace("7.37G", "   0G"), 0, name="results.txt"),
    "Weights and Biases": text(weights_and_biases(fall(80)), 0),
    "Keras": run(plain(accuracy=rise(30, 0.93), loss=fall(30), val_accuracy=rise(30, 0.9), val_loss=fall(30)), 0),
    "names in capitals": run(plain(**{"Train Loss": fall(60), "Val Loss": fall(60), "Val mAP@0.5": rise(60)}), 0),
    "mAP in percent": run(plain(loss=fall(60), mAP50=rise(60, 82.0)), 0),
    "mIoU in percent": run(plain(loss=fall(60), mIoU=rise(60, 70.0)), 0),
    "torchmetrics: -1 for small objects": run(
        plain(train_loss=fall(60), val_map=rise(60, 0.4), val_map_small=[-1.0] * 60, val_mar_100=rise(60, 0.5)), 0
    ),
    "an image scale below 1": run(plain(loss=fall(40), mAP=rise(40), image_scale=[1.5, 0.5] * 20), 0),
    "a scale that is learnt": run(plain(loss=fall(40), mAP=rise(40), **{"train/scale": fall(40, 1.2, 0.8)}), 0),
    "a loss scale that lives": run(plain(loss=fall(40), mAP=rise(40), loss_scale=[65536.0, 256.0] * 20), 0),
    "restarts of the learning rate": run(
        with_metrics(detect(N), lambda _, v: [x * (0.7 if i in {40, 41, 80, 81} else 1) for i, x in enumerate(v)]), 0
    ),
    "mAP 5 % below its best": run(
        with_metrics(detect(N), lambda _, v: [x * (1 if i < 90 else 0.95) for i, x in enumerate(v)]), 0
    ),
    "mAP 0 in the first 25 epochs": run(with_metrics(detect(N), lambda _, v: [0.0] * 25 + v[:-25]), 0),
    "MMPretrain": text(classifier(fall(30), rise(30, 76.0)), 0, name="scalars.json"),
    "Transformers with evaluations": text(
        transformers(fall(60), fall(12), rise(12, 0.9)), 0, name="trainer_state.json"
    ),
    "validation loss explodes, mAP good": run(detect(N, **{"val/cls_loss": [*fall(N - 10), *[60.0] * 10]}), 0),
    # Broken tables
    "masks never learnt, boxes good": run(
        {k: [0.0] * N if "(M)" in k else v for k, v in segment(N).items()}, 1, "(M): never learnt"
    ),
    "YOLOv5's csv, mAP 0": run(yolov5(100, top=0.0), 1, "never learnt", padded=True),
    "RT-DETR, NaN in a validation loss": run(rtdetr(N, **{"val/l1_loss": [*fall(90), *[NAN] * 60]}), 1, "60 NaN"),
    "one NaN in a validation loss": run(detect(N, **{"val/box_loss": [*fall(60), NAN, *fall(89, 0.6)]}), 1, "1 NaN"),
    "UTF-16, NaN": text(
        csv_text(detect(30, **{"train/box_loss": [*fall(20), *[NAN] * 10]})).encode("utf-16"), 1, "10 N"
    ),
    "quoted decimal commas, flat": text(quoted(flat(40, 0.7), [0.0] * 40), 1, "get_scale"),
    "Weights and Biases, flat": text(weights_and_biases(flat(80, 0.7)), 1, "never learnt"),
    "Keras, at chance": run(
        plain(
            accuracy=flat(60, 0.1, 0.01), loss=flat(60, 2.302, 3e-4), val_accuracy=[0.1] * 60, val_loss=flat(60, 2.303)
        ),
        1,
        "never learnt",
    ),
    "MMPretrain, at chance": text(
        classifier(flat(40, 4.605, 5e-4), [1.0] * 40), 1, "never learnt", name="scalars.json"
    ),
    "Transformers, at chance": text(
        transformers(flat(60, 0.693), flat(12, 0.693), [0.5] * 12), 1, "never learnt", name="trainer_state.json"
    ),
    "torchmetrics, mAP 0": run(plain(train_loss=fall(60), val_map=[0.0] * 60, val_mar_100=[0.0] * 60), 1, "never"),
    "IoU 0 beside an IoU loss that falls": run(
        plain(iou_loss=fall(40), val_iou=[0.0] * 40), 1, "val_iou: never learnt"
    ),
    "detectron2: NaN where nothing is predicted": text(
        json_text([{k: v for k, v in row.items() if "boat" not in k} for row in detectron2(20, metric=[NAN] * 20)]),
        1,
        "bbox/AP: 20 NaN",
        name="metrics.json",
    ),
    "MMEngine, norm of the gradient NaN to the end": text(
        json_text([row | ({"grad_norm": NAN} if "loss" in row else {}) for row in mmengine(24)]), 1, "grad_norm: 96 NaN"
    ),
    "NaN as text in JSON": text(
        json_text([{"epoch": i, "loss": v if i < 30 else "nan", "mAP": w} for i, (v, w) in enumerate(SHORT)]),
        1,
        "10 NaN",
    ),
    "a loss scale that dies": run(
        plain(loss=noisy([0.7] * 40, 0.05), **{"scaler/scale": [65536 * 0.5**i for i in range(40)]}),
        1,
        "GradScaler fell",
    ),
    "training loss explodes, mAP good": run(
        detect(N, **{"train/box_loss": [*fall(N - 10), *[60.0] * 10]}), 1, "train/box_loss: collapsed"
    ),
    "a negative loss that stands still": run(plain(loss=flat(60, -0.7)), 1, "never learnt"),
    "beyond the largest number": text(
        "epoch,loss\n" + "".join(f"{i},{v}\n" for i, v in enumerate([*fall(50), "1e400"])), 1, "1 Inf"
    ),
    **{
        f"{word} as C writes it": text(
            "epoch,loss,mAP\n" + "".join(f"{i},{v if i < 20 else word},{i / 100}\n" for i, v in enumerate(fall(30))),
            1,
            "loss: 0 NaN and 10 Inf" if "inf" in word.lower() else "loss: 10 NaN",
        )
        for word in C_TEXTS
    },
    # No tables
    "a head alone": text(csv_text(detect(3)).splitlines()[0], 2, "no rows"),
    "packed": ("results.csv.gz", binary(gzip.compress(csv_text(detect(9)).encode())), 2, "diagnose reads"),
    "packed under a table's name": (
        "results.csv",
        binary(gzip.compress(csv_text(detect(9)).encode())),
        2,
        "diagnose reads",
    ),
    "a table in Markdown": text("| epoch | loss |\n|---|---|\n| 1 | 0.5 |\n", 2, "diagnose reads", name="results.md"),
    "a page of an error": text("<!DOCTYPE html><html><body>404</body></html>", 2, "diagnose reads"),
    "an index of weights": text(
        json.dumps({"metadata": {"total_size": 5}, "weight_map": {"a": "b"}}), 2, name="model.safetensors.index.json"
    ),
    "a learning rate alone": (
        "run-a-tag-lr.csv",
        table(tensorboard_text([0.01] * 50)),
        2,
        "neither a loss nor a metric",
    ),
    "a folder of a run": (
        "exp",
        lambda path: (path.mkdir(), (path / "results.csv").write_text(csv_text(detect(5)))),
        2,
        "without the .meta",
    ),
    # Healthy checkpoints
    "per channel": checkpoint(per_channel(0.2), 0),
    "compressed rows, blocks": checkpoint(
        {"a": torch.eye(4).to_sparse_csr(), "b": torch.eye(4).to_sparse_bsr((2, 2))}, 0
    ),
    "observers before the first batch": checkpoint(
        {"w": torch.ones(2), "act.min_val": torch.tensor(INF), "act.max_val": torch.tensor(-INF)}, 0
    ),
    "states of random generators": checkpoint(
        {"model": network().state_dict(), "torch": torch.get_rng_state(), "numpy": np.random.default_rng(0)}, 0
    ),
    "a whole optimizer": checkpoint({"m": network(), "o": torch.optim.Adam(network().parameters())}, 0),
    "MMEngine's log of a search for the scale": checkpoint(
        {"state_dict": network().state_dict(), "message_hub": message_hub([INF, INF, 2.0])}, 0
    ),
    "a numpy pickle": ("model.pkl", binary(pickle.dumps({"w": np.ones(3)})), 0, None),
    "code that must not run": checkpoint({"w": torch.ones(2), "x": [Evil()]}, 0, "not run"),
    "safetensors without numbers": (
        "m.safetensors",
        binary(safetensors({"a": torch.zeros(0), "b": torch.ones(())})),
        0,
        None,
    ),
    "a view of one number": checkpoint({"w": torch.ones(1).expand(1000, 1000)}, 0),
    # Broken checkpoints
    "bfloat16, Inf": checkpoint({"w": torch.tensor([1.0, INF]).bfloat16()}, 1, "0 NaN and 1 Inf"),
    "float8 with Inf": checkpoint({"w": torch.tensor([1.0, INF]).to(torch.float8_e5m2)}, 1, "1 Inf"),
    "per channel, a scale of NaN": checkpoint(per_channel(NAN), 1, "w: 3 NaN"),
    "compressed rows, NaN": checkpoint({"w": torch.tensor([[0, NAN], [1, 0]]).to_sparse_csr()}, 1, "w: 1 NaN"),
    "moments of NaN": checkpoint(
        {"model": network().state_dict(), "optimizer": {"state": {0: {"exp_avg": torch.tensor([NAN])}}}}, 1, "exp_avg"
    ),
    "a scale of NaN": checkpoint({"w": torch.ones(1), "scaler": scaler_state(NAN)}, 1, "GradScaler is nan"),
    "a scale as a tensor": checkpoint({"w": torch.ones(1), "s": scaler_state(torch.tensor(1e-12))}, 1, "is 1e-12"),
    "an average of the weights": checkpoint(
        torch.optim.swa_utils.AveragedModel(network(broken=True)), 1, "running_var"
    ),
    "objects in an array": checkpoint({"o": np.array([torch.tensor([NAN]), None], dtype=object)}, 1, "1 NaN"),
    "code that must not run, NaN, old format": checkpoint(
        {"w": torch.tensor([NAN]), "x": Evil()}, 1, "w: 1 NaN", _use_new_zipfile_serialization=False
    ),
    "code that must not run, a numpy pickle": (
        "model.pkl",
        binary(pickle.dumps({"x": Evil(), "w": np.array([NAN])})),
        1,
        "w: 1 NaN",
    ),
    "safetensors, bfloat16, Inf": (
        "m.safetensors",
        binary(safetensors({"a": torch.tensor([1.0, INF]).bfloat16()})),
        1,
        "1 Inf",
    ),
    # No checkpoints
    "TorchScript": ("m.pt", lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), 2, "TorchScript"),
    "arrays of numpy": ("w.npz", lambda path: np.savez(path, w=np.ones(3)), 2, "none of torch.save"),
    "a checkpoint cut off": (
        "w.pt",
        lambda path: (torch.save({"w": torch.ones(99)}, path), path.write_bytes(path.read_bytes()[:-300])),
        2,
        None,
    ),
    "a shard cut off": ("step_100", cut_shard, 2, "ends before w"),
    "safetensors with a head beyond the end": (
        "m.safetensors",
        binary(struct.pack("<Q", 1 << 40) + b"{}"),
        2,
        "damaged",
    ),
    "a folder of safetensors": (
        "exp",
        lambda path: (path.mkdir(), (path / "m.safetensors").write_bytes(safetensors({}))),
        2,
        "without the .meta",
    ),
    "a link to itself": ("a.pt", lambda path: path.symlink_to(path), 2, "cannot read"),
}


def two_runs(values, shorter):
    """An export of a chart of two runs; the one that was stopped has empty cells."""
    cells = [f'"{i}","{v}","{shorter[i] if i < len(shorter) else ""}"' for i, v in enumerate(values)]
    return "\n".join(['"Step","run-1 - train/loss","run-2 - train/loss"', *cells]) + "\n"


def not_validated(columns, last):
    """Ultralytics with val=False, YOLOv5 with --noval: 0 in all rows but the last ones."""
    return {
        name: [0.0] * (len(values) - last) + list(values)[-last:] if name.startswith(("metrics/", "val/")) else values
        for name, values in columns.items()
    }


def last_evaluated_alone(rows):
    """The evaluation after detectron2's last step has a row of its own; those before stand in rows of the training."""
    return [*rows, {k: v for k, v in rows[-1].items() if "bbox/" in k} | {"iteration": rows[-1]["iteration"] + 1}]


def parts(rows, box, **more):
    """detectron2 before an evaluation: the loss of the boxes rises first, as more of them count."""
    others = {"loss_cls": fall(rows, 1.2, 0.35), "loss_rpn_cls": fall(rows, 0.2, 0.03, seed=3)}
    total = [a + b + c for a, b, c in zip(box, *others.values(), strict=True)]
    return plain(iteration=range(rows), loss_box_reg=box, total_loss=total, **others, **more)


def without_shard(path):
    dcp({"w": torch.ones(3)})(path)
    (path / "__0_0.distcp").unlink()


def compressed_shard(path):
    """As an extension of a FileSystemWriter compresses each tensor."""
    dcp({"w": torch.ones(3)})(path)
    shard = path / "__0_0.distcp"
    whole = shard.read_bytes()
    shard.write_bytes(zlib.compress(whole).ljust(len(whole), b"\0"))


def of_python_2(values):
    """An array in a pickle of Python 2, as detectron2's model zoo has them: bytes are text there."""
    return (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + b"K" + bytes([len(values)]) + b"\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
        + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb\x89U" + bytes([4 * len(values)])
        + np.array(values, "<f4").tobytes() + b"tbs."
    )  # fmt: skip


def rtdetr_head(anchors):
    """Ultralytics keeps anchors and mask as attributes, RT-DETRv2 and D-FINE as buffers."""
    head = nn.Linear(2, 2)
    head.anchors = torch.tensor(anchors).reshape(1, -1, 1).repeat(1, 1, 2)
    head.valid_mask = torch.tensor([False, True, False]).reshape(1, -1, 1)
    return head


def fields(value):
    """A structured array of numbers, words, an array and a structure."""
    kinds = [("word", "U5"), ("inner", [("x", "i2"), ("y", ">f8")]), ("pair", "f4", (2,))]
    return np.array([("a", (1, value), (0.5, value))], dtype=kinds)


def fnuz(values):
    """float8 of AMD's GPUs: 0x80 is NaN, and there is no -0."""
    head = json.dumps(
        {"w": {"dtype": "F8_E4M3FNUZ", "shape": [len(values)], "data_offsets": [0, len(values)]}}
    ).encode()
    return struct.pack("<Q", len(head)) + head + bytes(values)


def yolov5_obb(rows, top, precision):
    """YOLOv5 for oriented boxes has mAP by their bounding boxes."""
    columns = {name: values for name, values in yolov5(rows).items() if "mAP" not in name}
    maps = {f"metrics/HBBmAP.5{end}": rise(rows, top / (1 + i)) for i, end in enumerate(("", ":.95"))}
    return columns | maps | {"metrics/precision": precision}


def of_runs(head, row, name="runs.csv"):
    """The result of another run in each row."""
    rows = [row.format(i=i, loss=0.3 + i / 50, score=0.8 - i / 20) for i in range(12)]
    return name, table("\n".join([head, *rows] if head else rows)), 2, "has one run a row"


PROPOSALS = {"fast_rcnn/fg_cls_accuracy": 0.0, "fast_rcnn/cls_accuracy": 0.95, "mask_rcnn/accuracy": 0.5}
FOREIGN = {"p": pathlib.Path("runs")}

CASES |= {
    # Healthy tables
    "Ultralytics, only the last of 150 epochs validated": run(not_validated(detect(N), 1), 0),
    "YOLOv5, only the last of 300 epochs validated": run(not_validated(yolov5(300), 1), 0),
    "Ultralytics, the last 20 epochs validated": run(not_validated(detect(N), 20), 0),
    "two runs, one stopped earlier": text(two_runs(fall(60), fall(30)), 0),
    "MMEngine, first validation": text(
        json_text([row for row in mmengine(3)[:-1] if "loss" in row] + mmengine(3)[-1:]), 0, name="scalars.json"
    ),
    "detectron2, the last evaluation in a row of its own": text(
        json_text(last_evaluated_alone(detectron2(20))), 0, name="metrics.json"
    ),
    "detectron2, the loss of the boxes rises": run(parts(80, fall(80, 0.4, 0.65)), 0),
    "DETR counts objects": run(
        plain(train_loss=fall(60, 18, 9), test_loss=fall(60, 18, 11), test_cardinality_error_0=fall(60, 7, 16)), 0
    ),
    "detectron2 before the first objects are found": text(
        json_text([{k: v for k, v in row.items() if "bbox/" not in k} | PROPOSALS for row in detectron2(8)]),
        0,
        name="metrics.json",
    ),
    "YOLOv5 for oriented boxes, precision falls as recall rises": run(
        yolov5_obb(60, 0.5, fall(60, 0.9, 0.4)), 0, padded=True
    ),
    "the parts of PolygonLoss": run(plain(**{"train/l2": fall(N, 0.9, 0.2), "train/mgiou": fall(N, 0.5, 0.02)}), 0),
    # Broken tables
    "the parts of PolygonLoss, rising": run(
        plain(**{"train/l2": flat(N, 0.5), "train/mgiou": fall(N, 0.1, 0.7)}), 1, "train/mgiou: collapsed"
    ),
    "Ultralytics, the last 20 epochs validated, mAP 0": run(
        {k: [0.0] * N if "metrics" in k else v for k, v in not_validated(detect(N), 20).items()}, 1, "never learnt"
    ),
    "YOLOv5 for oriented boxes, mAP 0": run(yolov5_obb(60, 0.0, rise(60, 0.4)), 1, "HBBmAP.5: never", padded=True),
    "detectron2, the loss of the boxes explodes": run(parts(80, [*fall(70, 0.4, 0.3), *[5.0] * 10]), 1, "loss_box_reg"),
    "detectron2, the loss of the boxes ends in empty cells": text(
        json_text(
            [{k: v for k, v in row.items() if k != "loss_cls" or row["iteration"] < 1000} for row in detectron2(20)]
        ),
        1,
        "loss_cls: empty in the last 50 rows",
        name="metrics.json",
    ),
    "validation ends in zeros": run(
        {k: [*list(v)[:-30], *[0.0] * 30] if k.startswith(("metrics/", "val/")) else v for k, v in detect(N).items()},
        1,
        "collapsed",
    ),
    "two runs, one with NaN": text(two_runs(fall(60), [*fall(30), *[NAN] * 30]), 1, "run-2 - train/loss: 30 NaN"),
    "two runs, one with empty cells to the end": text(
        "Step,lr,loss\n" + "".join(f"{i},0.1,{v if i < 30 else ''}\n" for i, v in enumerate(fall(60))),
        1,
        "empty in the last 30",
    ),
    # Checkpoints
    "a scaler alone": checkpoint(scaler_state(512.0), 0, name="scaler.pt"),
    "a scaler alone, scale 1e-10": checkpoint(scaler_state(1e-10), 1, "scale: the scale of this GradScaler is 1e-10"),
    "quantised, beside foreign classes": checkpoint(quantised(0.1) | FOREIGN, 0),
    "per channel, beside foreign classes": checkpoint(per_channel(0.2) | FOREIGN, 0),
    "per channel, NaN, beside foreign classes": checkpoint(per_channel(NAN) | FOREIGN, 1, "w: 3 NaN"),
    "Lightning, a file kept with a loss of NaN": checkpoint(
        lightning() | {"callbacks": {"M": {"best_k_models": {"/runs/epoch=1.ckpt": torch.tensor(INF)}}}}, 0
    ),
    "numbers of numpy": checkpoint(
        {"model": network().state_dict(), "loss": np.float64(NAN), "lowest_loss": np.float32(INF)}, 0
    ),
    "RT-DETR, anchors at the edges left out": checkpoint({"ema": rtdetr_head([INF, 0.5, INF])}, 0),
    "RT-DETR, such anchors in a state": checkpoint(
        {f"decoder.{k}": v for k, v in vars(rtdetr_head([INF, 0.5, INF])).items() if torch.is_tensor(v)}, 0
    ),
    "RT-DETR, an anchor of NaN": checkpoint({"ema": rtdetr_head([INF, NAN, INF])}, 1, "ema.anchors: 2 NaN and 4 Inf"),
    "anchors of Inf alone": checkpoint({"anchors": torch.full((1, 3, 2), INF)}, 1, "anchors: 0 NaN and 6 Inf"),
    "fields of an array": checkpoint({"w": torch.ones(1), "a": fields(0.5)}, 0),
    "fields of an array, NaN": checkpoint({"w": torch.ones(1), "a": fields(NAN)}, 1, "a.inner.y: 1 NaN"),
    "fields of an array, a numpy pickle": (
        "a.pkl",
        binary(pickle.dumps({"a": fields(INF)})),
        1,
        "a.pair: 0 NaN and 1 Inf",
    ),
    "an array of Python 2": ("R-50.pkl", binary(of_python_2([1.0, -2.0])), 0, None),
    "an array of Python 2, NaN": ("R-50.pkl", binary(of_python_2([1.0, NAN])), 1, "w: 1 NaN"),
    "safetensors, float8 without -0": ("m.safetensors", binary(fnuz([0x00, 0x40, 0x7F])), 0, None),
    "safetensors, float8 without -0, NaN": ("m.safetensors", binary(fnuz([0x00, 0x80, 0x7F])), 1, "w: 1 NaN"),
    "polygons, vertices in no order": run(polygons(N, lambda v: [0.0] * len(v)), 0),
    "polygons, a few vertices right by chance": run(
        polygons(N, lambda v: noisy([0.02] * 9 + [0.001] * (len(v) - 9), 0.2)), 0
    ),
    "polygons that are not learnt": run(
        polygons(N, lambda v: v, **{f"metrics/{name}(G)": [0.0] * N for name in METRICS}),
        1,
        "metrics/mAP50(G): never learnt: 0 in all",
    ),
    "two metrics at 0, the first of them in every fifth row": (
        "log.csv",
        table(csv_text({"mAP50": [0.0 if row % 5 == 4 else "" for row in range(30)], "mAP50-95": [0.0] * 30})),
        1,
        "mAP50-95: never learnt: 0 in all 30 rows",
    ),
    "tensors in the place of numbers, NaN": (
        "log.csv",
        table(csv_text({"loss": ["tensor(nan)"] * N, "val_loss": fall(N)})),
        1,
        f"loss: {N} NaN",
    ),
    "tensors with their device": (
        "log.csv",
        table(
            csv_text(
                {
                    "lr": [0.1] * 10,
                    "loss": [f"\"tensor({v}, device='cuda:0', grad_fn=<MulBackward0>)\"" for v in (*fall(9), INF)],
                }
            )
        ),
        1,
        "loss: 0 NaN and 1 Inf, the first at epoch 10",
    ),
    "YOLOX, AP 0": run(
        plain(**{"train/total_loss": fall(60), "val/COCOAP50": [0.0] * 60, "val/COCOAP50_95": [0.0] * 60}),
        1,
        "val/COCOAP50: never learnt",
    ),
    "DETR, mAP 0": (
        "log.txt",
        table(
            json_text(
                [{"train_loss": v, "test_coco_eval_bbox": [0.0] * 12, "epoch": i} for i, v in enumerate(fall(60))]
            )
        ),
        1,
        "test_coco_eval_bbox/0: never learnt",
    ),
    "DETR": (
        "log.txt",
        table(
            json_text(
                [
                    {"train_loss": v, "test_coco_eval_bbox": [w, 2 * w, 0.0, -1.0], "epoch": i}
                    for i, (v, w) in enumerate(zip(fall(60), rise(60, 0.4), strict=True))
                ]
            )
        ),
        0,
        None,
    ),
    "a metric within an object, 0": (
        "log.json",
        table(json_text([{"epoch": i, "train_loss": v, "val": {"mAP": 0.0}} for i, v in enumerate(fall(60))])),
        1,
        "val/mAP: never learnt",
    ),
    "the history of Keras, validated in every fifth epoch": (
        "history.json",
        table(json.dumps({"loss": fall(62), "val_loss": fall(12), "val_accuracy": rise(12)})),
        0,
        None,
    ),
    "the history of Keras, accuracy 0": (
        "history.json",
        table(json.dumps({"loss": fall(60), "accuracy": [0.0] * 60})),
        1,
        "accuracy: never learnt",
    ),
    "TensorBoard's JSON, NaN": (
        "run-a-tag-train_loss.json",
        table(json.dumps([[1e9 + i, 50 * i, v] for i, v in enumerate([*fall(40), NAN])])),
        1,
        "train_loss: 1 NaN and 0 Inf, the first at epoch 2000",
    ),
    "Weights and Biases' table of runs": (
        "wandb_export.csv",
        table(
            '"Name","State","Notes","val/mAP"\n'
            + "".join(f'"run-{i}","finished","-","{0.8 - i / 20}"\n' for i in range(12))
        ),
        2,
        "has one run a row",
    ),
    "MLflow's table of runs": of_runs(
        "Start Time,Run ID,Name,Status,lr,loss,mAP", "2026-01-01 10:00:00,ab{i},run-{i},FINISHED,0.1,{loss},{score}"
    ),
    "MLflow's table of runs, of search_runs": of_runs(
        "run_id,status,metrics.loss,metrics.mAP,params.lr", "ab{i},FINISHED,{loss},{score},0.1"
    ),
    "Ray's table of trials": of_runs(
        "loss,mAP,done,trial_id,config/lr,logdir", "{loss},{score},True,ab_{i},0.1,ab_{i}", "results.csv"
    ),
    "Ultralytics' tune": of_runs("fitness,lr0,lrf,momentum", "{score},0.01,0.01,0.937", "tune_results.csv"),
    "Ultralytics' tune, of 8.4": of_runs(
        None, '{{"iteration": {i}, "fitness": {score}, "hyperparameters": {{"lr0": 0.01}}}}', "tune_results.ndjson"
    ),
    "a fitness beside learning rates": run(
        plain(loss=flat(60, 0.7), fitness=[0.0] * 60, lr0=[0.1] * 60), 1, "get_scale"
    ),
    "Ray's progress of one trial": (
        "progress.csv",
        table(csv_text({"loss": flat(60, 0.7), "training_iteration": range(60), "trial_id": ["ab_0"] * 60})),
        1,
        "loss: never learnt",
    ),
    "a loss that is empty in all rows": (
        "log.csv",
        table(csv_text({"epoch": range(60), "loss": [""] * 60, "mAP": [0.0] * 60})),
        1,
        "loss: empty in all rows (some libraries write NaN so)",
    ),
    "a loss that is null in all rows, and nothing else": (
        "log.json",
        table(json_text([{"epoch": i, "loss": None, "lr": 0.1} for i in range(60)])),
        2,
        "has nothing to judge: loss: empty in all rows",
    ),
    "a history with a number beside, flat": (
        "history.json",
        table(json.dumps({"best_epoch": 3, "train_loss": flat(60, 0.7), "val_mAP": [0.0] * 60})),
        1,
        "get_scale",
    ),
    "a history with a number beside": (
        "history.json",
        table(json.dumps({"best_loss": 0.5, "train_loss": fall(60), "val_loss": fall(60), "val_mAP": rise(60)})),
        0,
        "rows: 60, columns of numbers: 4",
    ),
    "a history with a number beside, NaN": (
        "history.json",
        table(json.dumps({"train_loss": fall(60), "test_loss": NAN})),
        1,
        "test_loss: 1 NaN and 0 Inf, the first at epoch 60",
    ),
    "a table of pandas as JSON, mAP 0": (
        "log.json",
        table(json.dumps({"loss": dict(enumerate(fall(60))), "mAP": dict.fromkeys(range(60), 0.0)})),
        1,
        "mAP: never learnt: 0 in all 60 rows",
    ),
    "ClearML's scalars": (
        "scalars.json",
        table(json.dumps({"loss": {"train": {"name": "train", "x": list(range(60)), "y": fall(60)}}})),
        0,
        "rows: 60, columns of numbers: 1",
    ),
    "shares of errors fall": run(
        plain(loss=fall(60), top1_err=fall(60, 90, 25), top5_err=fall(60, 70, 8), val_err=fall(60, 90, 30)), 0
    ),
    "an error of the validation that rises": run(
        plain(train_err=fall(60, 90, 10), val_err=[*fall(30, 90, 40), *fall(30, 40, 80)]), 1, "val_err: fell from"
    ),
    "detectron2, panoptic quality 0": text(
        json_text([{"iteration": i, "total_loss": v, "panoptic_seg/PQ": 0.0} for i, v in enumerate(fall(60))]),
        1,
        "panoptic_seg/PQ: never learnt",
        name="metrics.json",
    ),
    "detectron2, IoU of segments below 1 percent": text(
        json_text([{"iteration": i, "total_loss": v, "sem_seg/mIoU": 0.9} for i, v in enumerate(flat(60, 0.7))]),
        1,
        "get_scale",
        name="metrics.json",
    ),
    "a column of the run's name": (
        "log.csv",
        table("epoch,Name,loss\n" + "".join(f"{i},exp-1,0.7\n" for i in range(20))),
        1,
        "loss: never learnt",
    ),
    "a metric with its sign of percent": (
        "log.csv",
        table(csv_text({"loss": fall(N), "acc": ["0.0%"] * N})),
        0,
        "acc: holds no number, but '0.0%'",
    ),
    "words alone, but for the time": (
        "log.csv",
        table(csv_text({"time": range(N), "accuracy": ["0.0%"] * N})),
        2,
        "has nothing to judge: accuracy: holds no number, but '0.0%'",
    ),
    "JSON lines, words in the place of numbers": (
        "log.json",
        table(json_text([{"loss": 1 / (row + 1), "acc": "high"} for row in range(20)])),
        0,
        "acc: holds no number, but 'high'",
    ),
    "JSON lines, numbers as text, NaN": (
        "log.json",
        table(json_text([{"epoch": row, "lr": 0.1, "loss": f"{v:.4f}"} for row, v in enumerate((*fall(9), NAN))])),
        1,
        "loss: 1 NaN and 0 Inf, the first at epoch 9",
    ),
    "JSON lines, numbers as text, flat": (
        "log.json",
        table(json_text([{"loss": "0.7500", "lr": 0.1}] * 20)),
        1,
        "loss: never learnt: 0.75 in all 20 rows",
    ),
    "JSON lines, a name with what ends lines elsewhere": (
        "log.json",
        table("".join(f'{{"loss": {1 / (row + 1)}, "note": "a\u2028b\x85c"}}\n' for row in range(20))),
        0,
        "rows: 20",
    ),
    "an empty file": ("last.pt", binary(b""), 2, "is empty"),
    **{
        f"a pointer of Git LFS for {name}": (
            name,
            table("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"),
            2,
            "it is a pointer of Git LFS",
        )
        for name in ("best.pt", "model.safetensors", "results.csv")
    },
    "a compressed shard": (
        "step_100",
        compressed_shard,
        2,
        "has a shard that is compressed, of safetensors, or damaged",
    ),
    "a shard that is not there": ("step_100", without_shard, 2, "__0_0.distcp: No such file"),
}


@pytest.mark.parametrize(("name", "write", "status", "words"), CASES.values(), ids=CASES)
def test_verdict(name, write, status, words, tmp_path, capsys):
    path = tmp_path / name
    write(path)
    actual = main(["diagnose", str(path)])
    out, err = capsys.readouterr()
    assert actual == status, out + err
    if words is not None:
        assert words in out + err
    assert (len(err.splitlines()), out) == (1, "") if status == 2 else err == ""
    if status == 2:
        assert str(path) in err
        assert f"diagnose reads {READ}" in err or "cannot read" in err


def test_no_code_has_run():
    """After the cases above, whatever their order: those with code in them are looked at once more."""
    for content in ({"w": torch.ones(2), "x": [Evil()]}, {"k": Evil()}):
        path = pathlib.Path(EVIL + ".pt")
        torch.save(content, path)
        main(["diagnose", str(path)])
        path.unlink()
    assert not pathlib.Path(EVIL).exists()


def test_zeros_before_the_first_validation(tmp_path, capsys):
    """YOLOv5 and its kin skip the first ones: a loss that starts with them has not collapsed."""
    columns = yolov5(40, top=0.0)
    columns |= {name: [0.0] * 3 + list(values)[3:] for name, values in columns.items() if name.startswith("val/")}
    (tmp_path / "results.csv").write_text(csv_text(columns), encoding="utf-8")
    assert main(["diagnose", str(tmp_path / "results.csv")]) == 1
    out = capsys.readouterr().out
    assert "metrics/mAP_0.5: never learnt" in out
    assert "collapsed" not in out


def test_metrics_once_more_as_text_are_not_mentioned(tmp_path, capsys):
    """As mmdetection 2 has them, to be pasted elsewhere."""
    path = tmp_path / "20260101_1200.log.json"
    path.write_text(json_text(mmdetection(24)), encoding="utf-8")
    assert main(["diagnose", str(path)]) == 0
    assert "copypaste" not in capsys.readouterr().out
