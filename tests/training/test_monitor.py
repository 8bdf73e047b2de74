"""`GradientMonitor`: its numbers against plain arithmetic, and when it warns."""

from __future__ import annotations

import csv
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import INF, NAN, generator
from triton_mgiou.training import GradientMonitor
from triton_mgiou.training import monitor as monitor_module


def make():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"backbone": nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)), "head": nn.Linear(4, 1)}
    )


def backward(model, index):
    model.zero_grad()
    output = model["head"](model["backbone"](torch.randn(16, 3, generator=generator(index))))
    output.square().mean().backward()


def flat(module, gradient=False):
    return torch.cat([(p.grad if gradient else p.detach()).double().flatten() for p in module.parameters()])


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def train(monitor, model, steps, lr=0.1, change=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for index in range(steps):
        backward(model, index)
        if change is not None:
            change(index)
        monitor.record()
        optimizer.step()


def test_the_numbers(tmp_path):
    """Norms, shares and ratios, and averages that weigh the k-th last record with 0.9^k."""
    model, writer = make(), Writer()
    monitor = GradientMonitor(model, decay=0.9, writer=writer)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    expected = {"backbone": [], "head": []}
    before = {}
    for index in range(5):
        backward(model, index)
        if index == 3:
            model["head"].bias.grad = None
        monitor.record(10 * index)
        if index == 3:
            model["head"].bias.grad = torch.zeros(1)
        for name, rows in expected.items():
            gradient, weights = flat(model[name], gradient=True), flat(model[name])
            ratio = (weights - before[name]).norm() / before[name].norm() if name in before else torch.tensor(NAN)
            rows.append([each.item() for each in (gradient.norm(), (gradient == 0).double().mean(), ratio)])
            before[name] = weights
        optimizer.step()

    monitor.to_csv(tmp_path / "gradients.csv")
    table = read(tmp_path / "gradients.csv")
    measures = ["grad_norm", "zero_share", "update_ratio"]
    assert list(table[0]) == ["step", "group", *measures, *(f"{measure}_average" for measure in measures)]
    for name, rows in expected.items():
        lines = [line for line in table if line["group"] == name]
        assert [line["step"] for line in lines] == ["0", "10", "20", "30", "40"]
        for index, line in enumerate(lines):
            for column, measure in enumerate(measures):
                history = [row[column] for row in rows[: index + 1] if not math.isnan(row[column])]
                if not history:
                    assert line[measure] == line[f"{measure}_average"] == ""
                    continue
                weights = [0.9 ** (len(history) - 1 - i) for i in range(len(history))]
                average = sum(w * value for w, value in zip(weights, history, strict=True)) / sum(weights)
                assert float(line[measure]) == pytest.approx(rows[index][column], rel=1e-5, abs=1e-12)
                assert float(line[f"{measure}_average"]) == pytest.approx(average, rel=1e-5, abs=1e-12)
                assert (f"{measure}/{name}", float(line[measure]), 10 * index) in writer.scalars
    assert len(writer.scalars) == 2 * (5 * 3 - 1), "no ratio in the first record"
    assert len({row[1] for row in expected["backbone"]}) > 1, "the ReLU makes zeros"


def test_the_summary():
    model = make()
    monitor = GradientMonitor(model)
    train(monitor, model, 3)
    head, *rows = (line.split() for line in monitor.summary().splitlines())
    assert head == ["group", "parameters", "grad_norm", "average", "zero_share", "update_ratio"]
    assert [row[:2] for row in rows] == [["backbone", "68"], ["head", "5"]]
    norm = flat(model["head"], gradient=True).norm()
    assert float(rows[1][2]) == pytest.approx(norm.item(), rel=1e-2)
    assert GradientMonitor(model).summary().split().count("nan") == 8, "no record yet"


@pytest.mark.parametrize(
    ("depth", "groups"),
    [
        (1, ["backbone", "head"]),
        (np.int64(2), ["backbone.0", "backbone.2", "head"]),
        (9, ["backbone.0", "backbone.2", "head"]),
    ],
)
def test_groups(depth, groups):
    model = nn.DataParallel(make())
    assert [line.split()[0] for line in GradientMonitor(model, depth=depth).summary().splitlines()[1:]] == groups
    names = [line.split()[0] for line in GradientMonitor(nn.Linear(2, 2)).summary().splitlines()[1:]]
    assert names == ["weight", "bias"]


def test_a_healthy_training_is_quiet():
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(GradientMonitor(model), model, 60)


def messages(monitor, model, steps, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(monitor, model, steps, **options)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_gradients_that_jump(scale):
    """Whatever the unit of the loss."""
    model = make()

    def jump(index):
        for parameter in model.parameters():
            parameter.grad.mul_(scale)
        for parameter in model["head"].parameters():
            parameter.grad.mul_(1e4 if index == 15 else 1)

    monitor = GradientMonitor(model)
    (message,) = messages(monitor, model, 20, lr=1e-4 / scale, change=jump)
    assert message.startswith("step 16: head: exploding: gradient norm ")
    assert "exploding" not in monitor.summary(), "it is over"


@pytest.mark.parametrize("jump", [9, 10])
def test_ten_records_are_the_measure_of_a_jump(jump):
    model = nn.Linear(1, 1, bias=False)
    monitor = GradientMonitor(model)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(11):
            model.weight.grad = torch.full((1, 1), 1e3 if index == jump else 1.0)
            with torch.no_grad():
                model.weight *= 1.001
            monitor.record()
            found += [index for _ in caught]
            caught.clear()
    assert found == ([10] if jump == 10 else [])


def test_gradients_that_are_nearly_zero_may_leap():
    """As where a run has converged: what counts is a thousandth of what they have been on average."""
    model = nn.Linear(1, 1, bias=False)
    monitor = GradientMonitor(model, decay=0.5)
    norms = [2.0] * 20 + [1e-7] * 60 + [2e-5, 1e-7, 0.19, 1e-7, 0.21]
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for norm in norms:
            model.weight.grad = torch.full((1, 1), norm)
            with torch.no_grad():
                model.weight *= 1.001
            monitor.record()
            found += [(norm, str(each.message)) for each in caught]
            caught.clear()
    assert found == [(0.21, "step 85: weight: exploding: gradient norm 0.21, its average was 0.002")]


def test_gradients_that_begin_late_do_not_explode():
    model = nn.Linear(1, 1, bias=False)
    monitor = GradientMonitor(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(20):
            model.weight.grad = torch.full((1, 1), float(index >= 15))
            with torch.no_grad():
                model.weight *= 1.001
            monitor.record()
    (message,) = (str(each.message) for each in caught)
    assert message.startswith("step 10: weight: vanishing: gradient norm 0 on average")


def test_gradients_that_grow_steadily():
    """Half as much again in each record: no jump, but after twelve records more than a hundred times."""
    model = make()

    def grow(index):
        for parameter in model["backbone"].parameters():
            parameter.grad.fill_(1e-2 * 1.5**index)

    monitor = GradientMonitor(model)
    (message,) = messages(monitor, model, 25, lr=1e-5, change=grow)
    step = int(message.split()[1].rstrip(":"))
    assert ": backbone: exploding: gradient norm " in message
    # The lowest average is that of the first ten records, which weighs them nearly alike.
    assert step == pytest.approx(1 + math.log(100 * sum(1.5**i for i in range(10)) / 10, 1.5), abs=1)
    assert "exploding" in monitor.summary()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_gradients_that_are_not_finite(bad):
    model = make()

    monitor = GradientMonitor(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(5):
            backward(model, index)
            if index in (2, 3):
                model["head"].weight.grad[0, 1] = bad
            monitor.record()
    (message,) = (str(each.message) for each in caught)
    assert message == f"step 3: head: exploding: gradient norm {bad}"
    assert "nan" not in monitor.summary().replace("update_ratio", ""), "they do not enter the averages"


def test_a_learning_rate_that_is_too_high():
    model = make()

    def keep_size(_):
        for parameter in model.parameters():
            parameter.grad.normal_(generator=generator(7))

    (first, *_) = messages(GradientMonitor(model), model, 12, lr=0.5, change=keep_size)
    assert "exploding: a step changes the weights by " in first
    assert first.startswith("step 10: ")


def test_a_group_whose_gradients_vanish():
    model = make()

    def shrink(_):
        for parameter in model["backbone"].parameters():
            parameter.grad.mul_(1e-7)

    (message,) = messages(GradientMonitor(model), model, 30, lr=1e-3, change=shrink)
    assert message.startswith("step 10: backbone: vanishing: gradient norm ")


def test_a_group_without_gradients():
    model = make()

    def detach(_):
        for parameter in model["head"].parameters():
            parameter.grad = None

    monitor = GradientMonitor(model)
    (message,) = messages(monitor, model, 12, lr=1e-3, change=detach)
    assert message.startswith("step 10: head: vanishing: gradient norm 0 on average")
    (head,) = (line for line in monitor.summary().splitlines() if line.startswith("head"))
    assert head.split()[2:5] == ["0", "0", "1"]


def test_mostly_zeros():
    model = nn.Linear(1000, 1, bias=False)

    def one(_):
        model.weight.grad = torch.zeros(1, 1000)
        model.weight.grad[0, 0] = 1

    monitor = GradientMonitor(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(10):
            one(index)
            with torch.no_grad():
                model.weight += 1e-3
            monitor.record()
    (message,) = (str(each.message) for each in caught)
    assert message == "step 10: weight: vanishing: 99.90% of the gradient are 0 on average"


def test_updates_that_rounding_swallows():
    model = make()
    (message,) = messages(GradientMonitor(model), model, 12, lr=1e-12)
    assert message.startswith("step 10: backbone: vanishing: a step changes the weights by ")
    assert "; head: vanishing: a step changes" in message


def without_start(kind):
    """Parts that start at 0 or near it, as offset heads, residual branches and adapters do."""
    model = make()
    with torch.no_grad():
        if kind == "head of zeros":
            nn.init.zeros_(model["head"].weight)
            nn.init.zeros_(model["head"].bias)
        elif kind == "head of 1e-6":
            nn.init.normal_(model["head"].weight, std=1e-6)
            nn.init.zeros_(model["head"].bias)
        elif kind == "scale of zeros":
            model["scale"] = nn.BatchNorm1d(1)
            nn.init.zeros_(model["scale"].weight)
        else:
            model["offset"] = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    return model


def fit(model, monitor, lr, steps, scale=1.0):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for index in range(steps):
        inputs = torch.randn(32, 3, generator=generator(index))
        output = model["head"](model["backbone"](inputs))
        if "scale" in model:
            output = model["scale"](output)
        if "offset" in model:
            output = output + model["offset"][0]
        optimizer.zero_grad()
        (scale * (output - inputs.sum(1, keepdim=True) - 1).square().mean()).backward()
        monitor.record()
        optimizer.step()


@pytest.mark.parametrize("lr", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("kind", ["head of zeros", "head of 1e-6", "scale of zeros", "offset of zeros"])
def test_weights_that_start_at_zero_may_grow(kind, lr):
    model = without_start(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, GradientMonitor(model), lr, 120, scale=1e-3 if lr == 1e-3 else 1.0)


def test_a_group_behind_a_layer_of_zeros_may_wake_up_late():
    """As in a warm-up of the learning rate: its gradient is far below the head's at first, and grows by 10000."""
    model = without_start("head of zeros")
    monitor = GradientMonitor(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exploding")
        warnings.filterwarnings("ignore", message=".*vanishing")  # which it does at first
        fit(model, monitor, 1e-7, 12)
        start = float(monitor.summary().splitlines()[1].split()[3])
        fit(model, monitor, 1e-2, 40)
    assert float(monitor.summary().splitlines()[1].split()[2]) > 1e4 * start


def test_a_group_behind_a_layer_of_zeros_may_grow_beyond_what_was_the_strongest_at_first():
    """As in a network with factors of 0 on a branch, which learns slowly: no gradient grows beyond all others."""
    generator_ = torch.Generator().manual_seed(0)
    branch = nn.Linear(8, 16)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.uniform_(-(8**-0.5), 8**-0.5, generator=generator_)
    head = nn.Linear(16, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.ModuleDict({"branch": branch, "head": head})
    monitor = GradientMonitor(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    norms = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(400):
            inputs = torch.randn(32, 8, generator=generator_)
            target = inputs @ torch.arange(16.0).reshape(8, 2) * 0.1 + 0.3
            optimizer.zero_grad()
            (head(branch(inputs).relu()) - target).square().mean().backward()
            monitor.record()
            norms.append([flat(part, gradient=True).norm() for part in (branch, head)])
            optimizer.step()
    branch_norms, head_norms = torch.tensor(norms).T
    assert branch_norms.max() > 100 * branch_norms[:10].mean()
    assert branch_norms.max() > head_norms[:50].mean()


def test_a_weak_group_may_not_explode():
    """It has a thousandth of the strongest group's gradient, and then twenty times as much as that."""
    model = make()

    def set_to(index):
        for name, value in (("backbone", 1e-3 if index < 15 else 20.0), ("head", 1.0)):
            parameters = list(model[name].parameters())
            count = sum(parameter.numel() for parameter in parameters)
            for parameter in parameters:
                parameter.grad.fill_(value / math.sqrt(count))

    (message,) = messages(GradientMonitor(model), model, 18, lr=1e-3, change=set_to)
    assert message.startswith("step 16: backbone: exploding: gradient norm 20, its average was 0.1")


@pytest.mark.parametrize("kind", ["head of zeros", "scale of zeros", "offset of zeros"])
def test_weights_that_start_at_zero_may_not_explode(kind):
    model = without_start(kind)
    with pytest.warns(RuntimeWarning, match=r"step 1\d: .*exploding: a step changes the weights by"):
        fit(model, GradientMonitor(model), 1.0, 20)


@pytest.mark.parametrize("zero", [False, True], ids=["", "weights of zeros"])
def test_no_parameter_has_changed(zero):
    """As with a GradScaler that skips every step: the gradients are finite, the weights stand still."""
    model = make()
    if zero:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    monitor = GradientMonitor(model)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(60):
            backward(model, index)
            if index == 30:
                with torch.no_grad():
                    model["head"].bias += 1e-4
            monitor.record()
            found += [(index, str(each.message)) for each in caught if "no parameter has changed" in str(each.message)]
            caught.clear()
    assert [index for index, _ in found] == [20, 50], "20 records without a change, and once more after one"
    assert "scaler.get_scale()" in found[0][1]


@pytest.mark.parametrize(("groups", "end"), [(3, " inf"), (8, "; and 5 more, see summary()")])
def test_a_warning_about_many_groups_is_short(groups, end):
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(groups)])
    monitor = GradientMonitor(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, INF)
    with pytest.warns(RuntimeWarning) as caught:
        monitor.record()
    (warning,) = caught
    assert warning.filename == __file__, "the place of the call"
    assert str(warning.message).count("exploding") == 3
    assert str(warning.message).endswith(end)
    assert monitor.summary().count("exploding") == groups


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        lambda model: nn.DataParallel(torch.compile(model)),
        lambda model: torch.compile(nn.DataParallel(model)),
        lambda model: nn.ModuleDict({name: torch.compile(part) for name, part in model.items()}),
    ],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_groups_of_a_compiled_model_are_those_of_the_model(wrap, depth):
    model = make()
    plain, wrapped = (GradientMonitor(each, depth=depth) for each in (model, wrap(model)))
    backward(model, 0)
    plain.record()
    wrapped.record()
    assert wrapped.summary() == plain.summary()


def test_parameters_without_elements_are_left_out():
    model = nn.ModuleDict({"head": nn.Linear(3, 1), "none": nn.Linear(0, 0)})
    monitor = GradientMonitor(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(25):
            optimizer.zero_grad()
            model["head"](torch.ones(4, 3)).sum().backward()
            optimizer.step()
            monitor.record()


def test_lazy_modules_are_left_out_until_they_have_been_run():
    model = nn.ModuleDict({"head": nn.Linear(3, 1), "lazy": nn.LazyLinear(2)})
    monitor = GradientMonitor(model)
    for parameter in model["head"].parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    monitor.record()
    rows = [line.split() for line in monitor.summary().splitlines()[1:]]
    assert [row[:3] for row in rows] == [["head", "4", "6"], ["lazy", "0", "nan"]]
    model["lazy"](torch.ones(4, 2)).sum().backward()
    monitor.record()
    rows = [line.split() for line in monitor.summary().splitlines()[1:]]
    assert [row[:3] for row in rows] == [["head", "4", "6"], ["lazy", "6", f"{math.sqrt(6 * 4**2):.3g}"]]


def test_parameters_that_take_turns_in_a_group():
    """As where a few random layers are trained at a time: the weights of others are no change of these."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})
    monitor = GradientMonitor(model)
    layers = list(model["layers"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(24):
            for number, layer in enumerate(layers):
                layer.requires_grad_(number == index // 3 % 4)
            layer = layers[index // 3 % 4]
            before = flat(layer)
            layer.zero_grad()
            layer(torch.ones(2, 8)).square().mean().backward()
            torch.optim.SGD(layer.parameters(), lr=1e-3).step()
            monitor.record()
            ratio = float(monitor.summary().splitlines()[1].split()[5])  # the average
            expected = ((flat(layer) - before).norm() / before.norm()).item()
            assert math.isnan(ratio) if index == 0 else ratio < 2 * expected


def test_a_model_without_anything_to_train():
    monitor = GradientMonitor(nn.Linear(2, 2).requires_grad_(False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(25):
            monitor.record()


def test_frozen_and_half_parameters():
    model = make().to(torch.bfloat16)
    for parameter in model["backbone"].parameters():
        parameter.requires_grad_(False)
    monitor = GradientMonitor(model)
    for _ in range(2):
        model["head"].weight.grad = torch.full((1, 4), 3.0, dtype=torch.bfloat16)
        model["head"].bias.grad = torch.zeros(1, dtype=torch.bfloat16)
        monitor.record()
    backbone, head = (line.split() for line in monitor.summary().splitlines()[1:])
    assert backbone[2:] == ["nan"] * 4
    assert head[2:] == ["6", "6", "0.2", "0"]


def test_wrong_arguments():
    model = make()
    for options, error, message in [
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"writer": print}, TypeError, r"writer must have add_scalar\(tag, value, step\), got builtin"),
        ({"depth": 0}, ValueError, "depth must be 1 or above, got 0"),
        ({"depth": 1.5}, TypeError, "depth must be an integer, got float"),
        ({"vanishing": "1e-5"}, TypeError, "vanishing must be a number, got str"),
        ({"max_update": True}, TypeError, "max_update must be a number, got bool"),
        ({"decay": 1.0}, ValueError, "decay must be in 0..1, 1 excluded, got 1.0"),
        ({"exploding": 1}, ValueError, "exploding must be above 1, got 1"),
        ({"vanishing": NAN}, ValueError, "vanishing must be in 0..1, 1 excluded, got nan"),
        ({"max_update": 0}, ValueError, "max_update must be above 0, got 0"),
    ]:
        with pytest.raises(error, match=message):
            GradientMonitor(**{"model": model, **options})
    for step, kind in (("1", "str"), (1.5, "float"), (True, "bool")):
        with pytest.raises(TypeError, match=f"step must be an integer, got {kind}"):
            GradientMonitor(model).record(step)


def test_the_ends_of_the_ranges():
    model = nn.Linear(2, 1, bias=False)
    monitor = GradientMonitor(model, decay=0, vanishing=0)
    for norm in (3.0, 4.0):
        model.weight.grad = torch.tensor([[norm, 0.0]])
        monitor.record()
    assert monitor.summary().splitlines()[1].split()[2:4] == ["4", "4"], "the average is the last one"


def test_the_table_has_its_columns_one_below_the_other():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "a_name_longer_than_the_title": nn.Linear(2, 2)})
    monitor = GradientMonitor(model)
    model["a_name_longer_than_the_title"](model["a"](torch.ones(1, 2))).sum().backward()
    monitor.record()
    lines = monitor.summary().splitlines()
    ends = [[match.end() for match in re.finditer(r"\S+", line)][1:6] for line in lines]
    assert len(ends) == 3
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("layer", [nn.Linear(64, 300), nn.Conv2d(48, 96, 3), nn.Conv1d(8, 700, 5)], ids=type)
def test_a_usual_norm_is_that_of_pytorchs_weights_at_the_start(layer):
    torch.manual_seed(0)
    layer.reset_parameters()
    usual = monitor_module._usual_norm([layer.weight])
    assert usual == pytest.approx(layer.weight.norm().item(), rel=0.03)


def test_the_usual_norm_of_biases_is_that_of_numbers_of_a_tenth():
    parameters = [nn.Parameter(torch.zeros(size)) for size in (4, 5)]
    assert monitor_module._usual_norm(parameters) == pytest.approx(0.1 * 9**0.5)


def test_sparse_gradients_have_the_norm_and_the_zeros_of_dense_ones():
    model = nn.Embedding(4, 2, sparse=True)
    monitor = GradientMonitor(model)
    (model(torch.tensor([1, 1])) * torch.tensor([3.0, 4.0])).sum().backward()  # twice the same row
    monitor.record()
    assert [float(each) for each in monitor.summary().splitlines()[1].split()[2:5]] == [10, 10, 0.75]


def test_a_change_of_weights_of_0_has_no_ratio(tmp_path):
    model = nn.Linear(2, 1, bias=False)
    monitor = GradientMonitor(model)
    for weight in (0.0, 1.0, 1.5):
        nn.init.constant_(model.weight, weight)
        model.weight.grad = torch.ones(1, 2)
        monitor.record()
    monitor.to_csv(tmp_path / "gradients.csv")
    assert [row["update_ratio"] for row in read(tmp_path / "gradients.csv")] == ["", "", "0.5"]


def test_complex_weights_have_the_norms_of_their_parts():
    class Phases(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([3 + 4j, 0j]))

    model = Phases()
    monitor = GradientMonitor(model)
    for weight in ([3 + 4j, 0j], [3 + 4j, 1j]):
        model.weight.data = torch.tensor(weight)
        model.weight.grad = torch.tensor([6 + 8j, 0j])
        monitor.record()
    name, size, norm, _, zeros, ratio = monitor.summary().splitlines()[1].split()[:6]
    assert (name, size) == ("weight", "2")
    assert [float(each) for each in (norm, zeros, ratio)] == [10, 0.5, 0.2]
