"""Run a kernel's PTX on a CPU, so that what the compiler made of the source is tested without a GPU.

The threads of a program are the elements of numpy arrays, and programs run one after the other. Of a program's threads
those that are at the first instruction of all go on: none runs ahead, so barriers and fences have nothing to do.
Approximate instructions are rounded correctly here, so this says nothing about the last bits of a GPU's results, nor
does it find races. Only what the kernels of this package are compiled to is known; anything else is an error.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

TYPES: dict[str, type[np.generic]] = {
    "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "b8": np.uint8, "u8": np.uint8,
    "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32,
    "u64": np.uint64, "s64": np.int64, "b64": np.uint64, "f64": np.float64,
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # what registers hold, by bytes
SHARED_BYTES = 2**16
WARP = 32
NOTHING = ("bar", "membar", "fence", "fence.proxy")

COMPARED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
FLOATS: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
    "sqrt": np.sqrt, "rcp": np.reciprocal, "ex2": np.exp2,
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype),
    "fma": lambda x, y, z: (x.astype(np.longdouble) * y + z).astype(x.dtype),
}  # fmt: skip
INTEGERS: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": lambda x, y, z: x * y + z, "neg": np.negative,
    "abs": np.abs, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "rem": np.remainder, "div": np.floor_divide,
}  # fmt: skip


class Instruction(NamedTuple):
    """`@guard name.modifiers arguments`; the last modifier is the type."""

    guard: str
    wants: bool  # the guard's value
    words: list[str]
    arguments: list[str]
    text: str

    @property
    def kind(self) -> str:
        """The type."""
        return self.words[-1]

    @property
    def space(self) -> str:
        """The memory that is loaded from or stored to."""
        return self.words[1].split("::")[0]


class Code:
    """The instructions of a kernel's PTX."""

    def __init__(self, ptx: str) -> None:
        found = re.search(r"\.reqntid (\d+)", ptx)
        assert found is not None
        self.threads = int(found[1])
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        start = ptx.index("{", found.end())
        for line in re.sub(r"//.*", "", ptx[start + 1 : ptx.index("\n}", start)]).splitlines():
            if label := re.fullmatch(r"\s*(\$[\w$]+):\s*", line):
                self.labels[label[1]] = len(self.instructions)
            for statement in line.replace("\t", " ").split(";"):
                text = statement.strip().removeprefix("{ ").strip()
                if text and text not in "{}" and text[0] not in ".$":
                    self.instructions.append(_parsed(text))


def _parsed(text: str) -> Instruction:
    guard = re.match(r"@(!?)(%p\d+) +", text)
    operation, _, rest = text[guard.end() if guard else 0 :].partition(" ")
    arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
    return Instruction(guard[2] if guard else "", not (guard and guard[1]), operation.split("."), arguments, text)


def launch(kernel: Any, arguments: Mapping[str, Any], grid: int) -> None:
    """Run a compiled kernel on CPU tensors and numbers, by the names of its arguments; tensors change in place.

    Memory around the tensors must not be touched: it is checked behind each of them.
    """
    code = Code(kernel.asm["ptx"])
    memory = np.zeros(256 + sum(t.nbytes + 512 for t in arguments.values() if isinstance(t, torch.Tensor)), np.uint8)
    places: dict[str, int] = {}
    top = 256
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            assert value.is_contiguous()
            places[name] = top
            memory[top : top + value.nbytes] = value.view(-1).view(torch.uint8).numpy()
            top += -(-value.nbytes // 256) * 256 + 256
    before = memory.copy()
    parameters = [places.get(name, arguments[name]) for name in kernel.src.fn.arg_names if name in arguments]
    with np.errstate(all="ignore"):
        for program in range(grid):
            _Program(code, memory, [*parameters, 0, 0], program, grid).run()  # two pointers that Triton adds
    inside = np.zeros(memory.shape, bool)
    for name, place in places.items():
        tensor = arguments[name]
        inside[place : place + tensor.nbytes] = True
        tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(memory[place : place + tensor.nbytes].copy()))
    assert np.array_equal(memory[~inside], before[~inside]), "wrote behind a tensor"


class _Program:
    """The state of one program: registers by name, as bits; shared memory; where each thread is."""

    def __init__(self, code: Code, memory: Array, parameters: list[Any], program: int, grid: int) -> None:
        self.code = code
        self.parameters = parameters
        self.memory = {"global": memory, "shared": np.zeros(SHARED_BYTES, np.uint8)}
        self.thread = np.arange(code.threads)
        self.lane = self.thread % WARP
        self.warp = self.thread - self.lane  # its first thread
        self.special = {
            "%tid.x": self.thread,
            "%ctaid.x": self.thread * 0 + program,
            "%nctaid.x": self.thread * 0 + grid,
        }
        self.registers: dict[str, Array] = {}
        self.at = np.zeros(code.threads, np.int64)
        self.active = np.ones(code.threads, bool)

    def run(self) -> None:
        """Until every thread has returned."""
        end = len(self.code.instructions)
        while (place := int(self.at.min())) < end:
            here = self.at == place
            instruction = self.code.instructions[place]
            self.active = here
            if instruction.guard:
                self.active = here & (self.registers[instruction.guard].astype(bool) == instruction.wants)
            self.at[here] = place + 1
            name = instruction.words[0]
            if name == "bra":
                self.at[self.active] = self.code.labels[instruction.arguments[0]]
            elif name == "ret":
                self.at[self.active] = end
            elif name not in NOTHING and self.active.any():
                self.step(name, instruction)

    def step(self, name: str, instruction: Instruction) -> None:
        """One instruction of the active threads."""
        words, kind, (to, *inputs) = instruction.words, instruction.kind, instruction.arguments
        special = getattr(self, f"_{name}", None)
        if special is not None:
            special(instruction)
        elif kind[0] == "f":
            values = [self.get(each, kind) for each in inputs]
            if name in ("min", "max"):
                keeps_nan = "NaN" in words
                result = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[name][keeps_nan](*values)
            else:
                result = FLOATS[name](*values)
            self.put(to, np.clip(result, 0, 1) if "sat" in words else result)
        elif "wide" in words:
            first, second = (self.get(each, kind).astype(TYPES[kind[0] + "64"]) for each in inputs[:2])
            self.put(to, first * second + (self.get(inputs[2], kind[0] + "64") if name == "mad" else 0))
        elif "hi" in words:
            first, second = (self.get(each, kind).astype(object) for each in inputs)
            self.put(to, ((first * second) >> int(kind[1:])).astype(TYPES[kind]))
        elif name in INTEGERS:
            self.put(to, INTEGERS[name](*(self.get(each, kind) for each in inputs)))
        else:
            raise NotImplementedError(instruction.text)

    def get(self, argument: str, kind: str) -> Array:
        """A register or a constant as numbers of a type."""
        if kind == "pred":
            known = self.registers.get(argument)
            return np.full(self.thread.shape, int(argument) != 0) if known is None else known.astype(bool)
        dtype = np.dtype(TYPES[kind])
        bits = BITS[dtype.itemsize]
        if argument in self.special:
            return self.special[argument].astype(dtype)
        if argument.startswith("%"):
            return self.registers[argument].astype(bits).view(dtype)
        if argument[:2] in ("0f", "0d"):
            number = int(argument[2:], 16)
        else:
            number = 0 if argument == "global_smem" else int(argument, 0) & (2 ** (8 * dtype.itemsize) - 1)
        return np.full(self.thread.shape, number, bits).view(dtype)

    def put(self, register: str, values: Array) -> None:
        """Set a register of the active threads."""
        values = np.ascontiguousarray(values)
        bits = values if values.dtype == bool else values.view(BITS[values.dtype.itemsize])
        old = self.registers.get(register, np.zeros_like(bits))
        self.registers[register] = np.where(self.active, bits, old)

    def place(self, argument: str) -> Array:
        """The address in `[register + constant]`; shared memory begins at 0."""
        register, constant = re.findall(r"[%\w]+", f"{argument} 0")[:2]
        base = self.registers[register].astype(np.int64) if register.startswith("%") else self.thread * 0
        return np.where(self.active, base + int(constant), 0)

    def load(self, space: str, place: Array, size: int) -> Array:
        """Bits of `size` bytes."""
        memory = self.memory[space]
        assert (place >= 0).all()
        assert (place + size <= len(memory)).all()
        return memory[place[:, None] + np.arange(size)].view(BITS[size]).ravel()

    def _mov(self, given: Instruction) -> None:
        to, value = given.arguments
        if to.startswith("{"):  # apart
            parts = _names(to)
            half = BITS[np.dtype(TYPES[given.kind]).itemsize // len(parts)]
            for part, values in zip(
                parts, self.get(value, given.kind).view(half).reshape(-1, len(parts)).T, strict=True
            ):
                self.put(part, values)
        elif value.startswith("{"):  # together
            parts = _names(value)
            whole = np.dtype(TYPES[given.kind])
            half_kind = f"b{8 * whole.itemsize // len(parts)}"
            self.put(to, np.stack([self.get(part, half_kind) for part in parts], 1).view(whole).ravel())
        else:
            self.put(to, self.get(value, given.kind))

    def _ld(self, given: Instruction) -> None:
        to, source = given.arguments
        dtype = np.dtype(TYPES[given.kind])
        if given.space == "param":
            found = re.search(r"param_(\d+)", source)
            assert found is not None
            value = self.parameters[int(found[1])]
            number = struct.unpack("<Q", struct.pack("<d", value))[0] if isinstance(value, float) else value
            self.put(to, np.full(self.thread.shape, number & (2 ** (8 * dtype.itemsize) - 1), BITS[dtype.itemsize]))
            return
        place = self.place(source)
        for index, register in enumerate(_names(to)):
            values = self.load(given.space, place + index * dtype.itemsize, dtype.itemsize)
            self.put(register, values.astype(np.uint32) if dtype.itemsize == 1 else values)

    def _st(self, given: Instruction) -> None:
        size = np.dtype(TYPES[given.kind]).itemsize
        place = self.place(given.arguments[0])
        for index, register in enumerate(_names(given.arguments[1])):
            self._write(given.space, place + index * size, self.get(register, given.kind))

    def _write(self, space: str, place: Array, values: Array) -> None:
        values = np.ascontiguousarray(values)
        parts = values.view(np.uint8).reshape(len(values), -1)
        self.memory[space][(place[:, None] + np.arange(parts.shape[1]))[self.active]] = parts[self.active]

    def _rows(self, place: Array, matrix: int) -> Array:
        """Where a thread's four bytes of a matrix of eight rows are, the addresses of which eight lanes have."""
        row: Array = place[self.warp + 8 * matrix + self.lane // 4]
        return row + 4 * (self.lane % 4)

    def _ldmatrix(self, given: Instruction) -> None:
        assert "trans" not in given.words
        place = self.place(given.arguments[1])
        for matrix, register in enumerate(_names(given.arguments[0])):
            self.put(register, self.load("shared", self._rows(place, matrix), 4))

    def _stmatrix(self, given: Instruction) -> None:
        assert "trans" not in given.words
        place = self.place(given.arguments[0])
        for matrix, register in enumerate(_names(given.arguments[1])):
            self._write("shared", self._rows(place, matrix), self.get(register, "b32"))

    def _shfl(self, given: Instruction) -> None:
        values, by = self.get(given.arguments[1], "b32"), self.get(given.arguments[2], "s32")
        segment = self.get(given.arguments[3], "s32") >> 8 & WARP - 1
        lane = {
            "bfly": self.lane ^ by,
            "idx": (self.lane & segment) | (by & ~segment & WARP - 1),
            "up": np.where(self.lane >= by, self.lane - by, self.lane),
            "down": np.where(self.lane + by < WARP, self.lane + by, self.lane),
        }[given.words[2]]
        self.put(given.arguments[0], values[self.warp + lane])

    def _redux(self, given: Instruction) -> None:
        values = self.get(given.arguments[1], given.kind).reshape(-1, WARP)
        reductions: dict[str, Callable[..., Array]] = {"min": np.min, "max": np.max, "add": np.sum}
        reduced = reductions[given.words[2]](values, axis=1)
        self.put(given.arguments[0], np.repeat(reduced, WARP).astype(values.dtype))

    def _setp(self, given: Instruction) -> None:
        first, second = self.get(given.arguments[1], given.kind), self.get(given.arguments[2], given.kind)
        name = given.words[1]
        unordered = np.isnan(first) | np.isnan(second) if given.kind[0] == "f" else np.zeros(first.shape, bool)
        if name in ("nan", "num"):
            result = unordered == (name == "nan")
        elif name in ("ne", "neu"):
            result = (first != second) & (~unordered | (name == "neu"))
        else:
            is_unordered = name.endswith("u") and given.kind[0] == "f"
            result = COMPARED[name.removesuffix("u") if is_unordered else name](first, second)
            result = result | unordered if is_unordered else result
        if len(given.words) == 4:  # with another predicate
            other = self.get(given.arguments[3].removeprefix("!"), "pred") ^ given.arguments[3].startswith("!")
            result = INTEGERS[given.words[2]](result, other)
        self.put(given.arguments[0], result)

    def _selp(self, given: Instruction) -> None:
        to, yes, no, predicate = given.arguments
        self.put(to, np.where(self.get(predicate, "pred"), self.get(yes, given.kind), self.get(no, given.kind)))

    def _cvt(self, given: Instruction) -> None:
        values = self.get(given.arguments[1], given.kind)
        target = np.dtype(TYPES[given.words[-2]])
        if given.kind[0] == "f" and target.kind != "f":
            values = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[given.words[1]](values)
        self.put(given.arguments[0], values.astype(target))

    def _shl(self, given: Instruction) -> None:
        values, by = self.get(given.arguments[1], given.kind), self.get(given.arguments[2], "u32")
        bits = 8 * values.dtype.itemsize
        self.put(
            given.arguments[0],
            np.where(by < bits, values << np.minimum(by, bits - 1).astype(values.dtype), 0).astype(values.dtype),
        )

    def _shr(self, given: Instruction) -> None:
        values, by = self.get(given.arguments[1], given.kind), self.get(given.arguments[2], "u32")
        bits = 8 * values.dtype.itemsize
        shifted = values >> np.minimum(by, bits - 1).astype(values.dtype)
        self.put(
            given.arguments[0],
            shifted if given.kind[0] == "s" else np.where(by < bits, shifted, 0).astype(values.dtype),
        )

    def _bfe(self, given: Instruction) -> None:
        """Some bits of a number, the first of which is its sign where the type has one."""
        start, count = (int(self.get(each, "u32")[0]) for each in given.arguments[2:])
        values = self.get(given.arguments[1], "u32").astype(np.int64) >> start & 2**count - 1
        if given.kind == "s32":
            values = np.where(values >> count - 1 & 1, values - 2**count, values)
        self.put(given.arguments[0], values.astype(TYPES[given.kind]))

    def _prmt(self, given: Instruction) -> None:
        """Bytes of two numbers; each hexadecimal digit of a constant says which, the last one first."""
        numbers = [self.get(each, "b32").view(np.uint8).reshape(-1, 4) for each in given.arguments[1:3]]
        which = given.arguments[3].removesuffix("U")
        digits = [int(which, 0) >> 4 * place & 15 for place in range(4)]
        assert max(digits) < 8, "a sign instead of a byte"
        self.put(given.arguments[0], np.hstack(numbers)[:, digits].copy().view(np.uint32).ravel())

    def _atom(self, given: Instruction) -> None:
        assert "add" in given.words
        place, values = self.place(given.arguments[1]), self.get(given.arguments[2], given.kind)
        old = np.zeros_like(values)
        for thread in np.flatnonzero(self.active):
            number = self.memory["global"][place[thread] : place[thread] + values.itemsize].view(values.dtype)
            old[thread] = number[0]
            number += values[thread]
        self.put(given.arguments[0], old)


def _names(argument: str) -> list[str]:
    """The registers in braces, or the one that stands alone."""
    return re.findall(r"[^{},\s]+", argument)
