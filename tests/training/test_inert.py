"""The unpickler that runs no code: what it builds is what pickle builds, and what it does not know stays inert."""

from __future__ import annotations

import contextlib
import enum
import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import NAN
from triton_mgiou.training import inert
from triton_mgiou.training.checkpoints import read
from triton_mgiou.training.inert import Array, StandIn, Unpickler, load_bytes


def load(content, foreign=None):
    return Unpickler(io.BytesIO(content), foreign=[] if foreign is None else foreign).load()


ARRAYS = {
    "C order": np.arange(6.0).reshape(2, 3),
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.array([1.0, -2.0], dtype=">f4"),
    "half": np.array([1.5, NAN], dtype=np.float16),
    "complex": np.array([1 + 2j]),
    "bool": np.array([True, False]),
    "no dimension": np.array(7, dtype=np.int16),
    "empty": np.zeros((0, 4), dtype=np.uint8),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays(array, protocol):
    foreign: list[str] = []
    loaded = load(pickle.dumps(array, protocol=protocol), foreign)
    assert isinstance(loaded, Array)
    assert foreign == []
    assert loaded.value.dtype == array.dtype
    np.testing.assert_array_equal(loaded.value, array)


def test_fields_of_structured_arrays_that_are_numbers():
    """At their offsets; dates and texts are left out, and a field may be an array."""
    kind = [("date", "M8[s]"), ("x", ">f4"), ("name", "U3"), ("box", "f8", (2, 2)), ("day", "M8[s]", (2,))]
    array = np.zeros(2, dtype=kind)
    array["x"], array["box"] = [1.0, NAN], np.arange(8).reshape(2, 2, 2)
    loaded = load(pickle.dumps(array)).value
    assert loaded.dtype.names == ("x", "box")
    for name in ("x", "box"):
        np.testing.assert_array_equal(loaded[name], array[name])


OTHERS = {
    "text": np.array(["a", "bc"]),
    "bytes": np.array([b"a", b"bc"]),
    "dates": np.array(["2026-01-01"], dtype="M8[s]"),
    "a field of objects": np.array([(1.0, {"a": 1})], dtype=[("x", "f4"), ("o", "O")]),
}
if hasattr(np, "dtypes") and hasattr(np.dtypes, "StringDType"):
    OTHERS["texts of any length"] = np.array(["a", "bc"], dtype=np.dtypes.StringDType())


@pytest.mark.parametrize("array", OTHERS.values(), ids=OTHERS)
def test_arrays_of_other_things_are_no_arrays(array):
    assert not isinstance(load(pickle.dumps(array)).value, np.ndarray)


def test_scalars():
    for number in (np.float64(0.5), np.float32(NAN), np.int64(-3), np.bool_(True), np.complex64(1 - 2j)):
        loaded = load(pickle.dumps(number))
        assert type(loaded) is type(number.item())
        np.testing.assert_equal(loaded, number.item())
    assert isinstance(load(pickle.dumps(np.str_("a"))), bytes)


class Rows(list):
    pass


class Names(set):
    pass


class Fields(dict):
    pass


class Keyed:
    def __new__(cls, *, weights):
        made = super().__new__(cls)
        made.kept = weights
        return made

    def __getnewargs_ex__(self):
        return (), {"weights": self.kept}

    def __getstate__(self):
        return None


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("make", [Rows, lambda items: Fields(enumerate(items)), Names], ids=["list", "dict", "set"])
def test_what_a_container_of_an_unknown_class_holds_is_seen(make, protocol, tmp_path):
    fine, bad = torch.ones(1), torch.tensor([NAN])
    torch.save({"kept": make([fine, bad])}, tmp_path / "c.pt", pickle_protocol=max(protocol, 1))
    assert sum(bool(tensor.isnan().any()) for tensor in read(tmp_path / "c.pt").tensors.values()) == 1


@pytest.mark.parametrize("protocol", [2, 4])
def test_keywords_that_an_object_is_made_from_are_seen(protocol, tmp_path):
    """Before protocol 4 they stand in a `functools.partial`, which is called."""
    torch.save({"kept": Keyed(weights=torch.tensor([NAN]))}, tmp_path / "c.pt", pickle_protocol=protocol)
    assert len(read(tmp_path / "c.pt").tensors) == 1


def test_what_an_unknown_object_is_called_with_is_seen():
    call = b"cother\nfunction\nK\x01\x85RK\x02\x85R."  # function(1)(2)
    made, argument = load(call).__dict__["parts"]
    assert (made.__dict__["parts"], argument) == ([1], 2)


def test_keys_of_an_unknown_class_have_its_name(tmp_path):
    torch.save({Colour.RED: torch.tensor([NAN])}, tmp_path / "c.pt")
    assert list(read(tmp_path / "c.pt").tensors) == ["Colour"]


def test_names_of_a_dtype_count_in_torch_only():
    foreign: list[str] = []
    assert load(b"ctorch\nfloat32\n.", foreign) is torch.float32
    assert foreign == []
    assert issubclass(load(b"cother\nfloat32\n.", foreign), StandIn)
    assert issubclass(load(b"ctorch\nload\n.", foreign), StandIn)
    assert foreign == ["other.float32", "torch.load"]


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_tensor_of_an_unknown_class_and_a_parameter_with_attributes(new, tmp_path):
    with_attribute = nn.Parameter(torch.tensor([1.0, 2.0]))
    with_attribute.scale = torch.tensor([3.0])
    content = {"sub": torch.tensor([4.0, NAN]).as_subclass(Sub), "parameter": with_attribute, "more": Rows([1])}
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=new)
    tensors = read(tmp_path / "c.pt").tensors
    assert tensors["sub"].isnan().tolist() == [False, True]
    assert type(tensors["sub"]) is torch.Tensor
    assert tensors["parameter"].tolist() == [1.0, 2.0]


def test_the_parts_of_a_tensor_that_is_made_of_others_are_seen():
    """Its class is called with them."""
    parts = {"scale": 1}
    made = load(
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cother\nmake\ncother\nKind\n" + pickle.dumps(parts, 2)[2:-1] + b"NtR."
    )
    assert isinstance(made, StandIn)
    assert parts in made.__dict__["parts"]


class Malicious:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class Record:
    """A record of torch.save inside a pickle, as storages of old files are."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def saved(content, new=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_code_in_a_record_does_not_run(new, tmp_path):
    record = saved({"w": torch.ones(2), "more": Malicious(tmp_path / "marker")}, new)
    foreign: list[str] = []
    loaded = load(pickle.dumps(Record(record)), foreign)
    assert not (tmp_path / "marker").exists()
    assert loaded["w"].tolist() == [1.0, 1.0]
    assert foreign == [f"{os.mkdir.__module__}.mkdir"]
    torch.load(io.BytesIO(record), weights_only=False)
    assert (tmp_path / "marker").exists()


def test_a_program_in_a_record_is_refused():
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    for record in (file.getvalue(), b"no file of torch.save"):
        with pytest.raises(pickle.UnpicklingError, match=r"^no tensors of torch\.save in a record$"):
            load(pickle.dumps(Record(record)))


def test_a_record_of_a_gpu_is_read_without_one():
    record = saved(torch.tensor([1.0, 2.0]), new=False)
    name = struct.pack("<I", 3) + b"cpu"
    assert record.count(name) == 1
    loaded = load_bytes(record.replace(name, struct.pack("<I", 6) + b"cuda:0"), [])
    assert (loaded.device.type, loaded.tolist()) == ("cpu", [1.0, 2.0])


@pytest.mark.parametrize("name", inert._builders())
def test_a_file_sets_no_attribute_of_what_other_files_are_read_with(name):
    """By an attribute of PyTorch's storages, or by other defaults of a function, one would decide what is seen."""
    module, _, attribute = name.rpartition(".")
    target = f"c{module}\n{attribute}\n".encode()
    for setting in (b"X\x04\x00\x00\x00evilK\x01", b"X\x0c\x00\x00\x00__defaults__K\x01\x85"):
        with contextlib.suppress(AttributeError, TypeError):
            load(target + b"N}" + setting + b"s\x86b.")
    owner = {"torch.storage.UntypedStorage": torch.UntypedStorage, "numpy.dtype": np.dtype}
    for kept in (load(target + b"."), getattr(torch._utils, attribute, None), owner.get(name)):
        assert not hasattr(kept, "evil")
        assert getattr(kept, "__defaults__", None) != (1,)


def test_a_storage_without_a_type(tmp_path):
    """Which needs the unpickler, as what is unknown stands beside it."""
    for new in (True, False):
        torch.save(
            {"bytes": torch.tensor([1, 2], dtype=torch.uint8).untyped_storage(), "w": torch.ones(2), "more": Rows()},
            tmp_path / "c.pt",
            _use_new_zipfile_serialization=new,
        )
        assert read(tmp_path / "c.pt").tensors["w"].tolist() == [1.0, 1.0]
