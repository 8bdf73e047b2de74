"""Where the kernels can run, by what PyTorch and Triton say of the machine; no device of these is needed."""

import os
from pathlib import Path

import pytest
import torch

from tests.helpers import run_python
from triton_mgiou import backends, box_mgiou_loss, mgiou_loss
from triton_mgiou.backends import kernels_unavailable, triton_version

launch = pytest.importorskip("triton_mgiou.launch")
GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def machine(monkeypatch):
    """One GPU that can, with a Triton that can."""
    monkeypatch.setattr(backends, "_reasons", {})
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.9.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    return monkeypatch


@pytest.mark.usefixtures("machine")
def test_a_gpu_that_can():
    assert kernels_unavailable(GPU) is None
    assert kernels_unavailable(torch.device("cpu")) == "the tensors are on cpu, and the kernels need an NVIDIA GPU"
    assert kernels_unavailable(torch.device("cuda", 1)) == "PyTorch finds 1 NVIDIA GPUs, and the device is cuda:1"


def test_the_interpreter_needs_memory_that_is_there(machine):
    machine.setattr(launch, "INTERPRETED", True)
    assert [kernels_unavailable(each) for each in (torch.device("cpu"), GPU)] == [None, None]
    assert kernels_unavailable(torch.device("cuda", 1)) == "PyTorch finds 1 NVIDIA GPUs, and the device is cuda:1"
    assert kernels_unavailable(torch.device("meta")) == "the tensors are on meta, and the kernels need an NVIDIA GPU"


def test_rocm_is_refused(machine):
    """Its GPUs are called cuda, and may tell a capability of 9.4."""
    machine.setattr(torch.version, "hip", "6.4.43484")
    machine.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    assert kernels_unavailable(GPU) == "this PyTorch is built for ROCm, and the kernels need an NVIDIA GPU"


@pytest.mark.parametrize("function", [mgiou_loss, box_mgiou_loss], ids=lambda each: each.__name__)
def test_the_reason_is_in_the_error(machine, function):
    machine.setattr(backends, "_reasons", {torch.device("cpu"): "this PyTorch is built for ROCm"})
    sides = torch.rand(2, 3, 4, 2) if function is mgiou_loss else torch.rand(2, 3, 5)
    with pytest.raises(RuntimeError, match=r'^backend="triton" cannot run: this PyTorch .* ROCm; expected a GPU .* or'):
        function(*sides, backend="triton")


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)])
def test_an_old_gpu(machine, capability):
    machine.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    number = ".".join(map(str, capability))
    assert kernels_unavailable(GPU) == f"cuda:0 has compute capability {number}, and the kernels need 8.0"


@pytest.mark.parametrize(
    ("version", "reason"), [("3.3.1", "and 3.3.1 is installed"), ("3.4.0", None), ("3.10.0", None)]
)
def test_versions_of_triton(machine, version, reason):
    machine.setattr(pytest.importorskip("triton"), "__version__", version)
    found = kernels_unavailable(GPU)
    assert (found is None) if reason is None else found == f"the kernels need Triton 3.4, {reason}"


@pytest.mark.parametrize("version", ["3.7.1", "3.8.0", "3.10.0"])
def test_versions_of_triton_in_the_interpreter(machine, version):
    machine.setattr(launch, "INTERPRETED", True)
    machine.setattr(pytest.importorskip("triton"), "__version__", version)
    found = kernels_unavailable(torch.device("cpu"))
    refused = "the kernels need Triton 3.8 in Triton's interpreter, and 3.7.1 is installed"
    assert found == (refused if version == "3.7.1" else None)


MINIMUM = """
import torch, triton, triton.language as tl

from triton_mgiou.backends import kernels_unavailable

@triton.jit
def kernel(pointer):
    tl.store(pointer + 1, tl.minimum(tl.load(pointer), 1.0))
    tl.store(pointer + 2, tl.maximum(1.0, tl.load(pointer)))

numbers = torch.full((3,), float("nan"))
kernel[(1,)](numbers)
print(numbers[1:].tolist() == [1.0, 1.0], kernels_unavailable(numbers.device) is None)
"""


def test_an_interpreter_that_lets_nan_win_is_refused(tmp_path):
    """On a GPU the minimum and maximum of NaN and 1 are 1, and the kernels count on it where a mask leaves out."""
    (tmp_path / "minimum.py").write_text(MINIMUM, encoding="utf-8")
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    done = run_python(str(tmp_path / "minimum.py"), environment={"TRITON_INTERPRET": "1"} | paths)
    assert done.returncode == 0, done.stderr
    is_right, is_taken = done.stdout.split()
    assert is_right == is_taken


@pytest.mark.skipif(triton_version() < (3, 8), reason="the interpreter of Triton before 3.8 is refused")
@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        ("mgiou_loss(torch.rand(1, 4, 2), torch.rand(1, 4, 2)", "polygons"),
        ("box_mgiou_loss(torch.rand(1, 5), torch.rand(1, 5)", "boxes"),
        ("box_mgiou(torch.rand(1, 5), torch.rand(1, 5)", "pairs"),
        ("polygon_mgiou(torch.rand(1, 4, 2), torch.rand(1, 4, 2)", "polygon_pairs"),
    ],
)
def test_a_call_imports_no_kernel_but_its_own(call, kernel):
    """Triton reads a kernel's source when that is imported, which takes a tenth of a second for some."""
    code = (
        f"import sys, torch, triton_mgiou; triton_mgiou.{call}, backend='triton'); "
        "print(*(name.rpartition('.')[2] for name in sys.modules if name.startswith('triton_mgiou.kernels.')))"
    )
    done = run_python("-c", code, environment={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    kernels = {"polygons", "boxes", "pairs", "pairs_gradient", "polygon_pairs"}
    assert kernels & set(done.stdout.split()) == {kernel}
