"""Tables of losses and metrics as trainers write them: columns by name, from CSV, plain text and JSON."""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

READ = (
    "CSV (Ultralytics, Lightning, TensorBoard), YOLOv5's results.txt, "
    "JSON (MMEngine, detectron2, DETR, Keras, Transformers)"
)

CLOCK = re.compile(r"(trainer/)?(global_|_)?(epochs?|steps?|iter(ation)?s?)")
NO_NUMBERS = ("wall time", "unnamed: 0", "index", "")  # of a training
EXTREMES = ("__MIN", "__MAX")  # Weights and Biases exports them beside each column
MISSING = ("", "-", "none", "null", "n/a", "na")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# What the libraries of C write: nan(ind), nan(0x8000), 1.#QNAN, -1.#IND, 1.#INF
C_NAN = re.compile(r"[-+]?(nan\(\w*\)|1\.#(QNAN|SNAN|IND)\d*)", re.IGNORECASE)
C_INF = re.compile(r"[-+]?1\.#INF\d*", re.IGNORECASE)
DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+([eE][-+]?\d+)?")
DECIMAL_POINT = re.compile(r"[-+]?[\d,]*\.\d+([eE][-+]?\d+)?")
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}((,\d{3}){2,}|,\d{3}(?=\.))(\.\d*)?")
UNCLEAR = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")  # has a decimal comma, or one between thousands
TENSOR = re.compile(r"tensor\(([^,()]*)(,.*)?\)")  # as PyTorch prints a scalar that was logged without `item()`
YOLO = re.compile(r"\d+/\d+|[\d.,]+[GM]")  # the epoch as `0/299`, then the memory as `7.37G`
LARGEST = 1e300  # a finite number beyond it counts as this
BROKEN_SHARE = 0.02  # of the rows may be broken, as a kill leaves them

Row = dict[str, float | None]
Cells = dict[str, Any]  # numbers, or text that may stand for one


class TableError(Exception):
    """The text is no table; the message says why."""


class Column(NamedTuple):
    """A column of numbers.

    Attributes:
        name: What it is called.
        rows: The indices of the rows in which it has a number.
        epochs: What the table's clock says there: epoch, step or iteration; the number of the row without one.
        values: The numbers, NaN and Inf among them.
    """

    name: str
    rows: list[int]
    epochs: list[float]
    values: list[float]


class Table(NamedTuple):
    """The columns of a table, without its clocks; how many rows it has, and what was left out of it.

    `words` are the columns without a number, each with the first of its words, "" where all cells are empty; `epochs`
    the epoch of each row, None where it has none.
    """

    columns: list[Column]
    rows: int
    notes: list[str]
    words: dict[str, str]
    epochs: list[float | None]


def read_table(path: Path) -> Table:
    """Read a table.

    Raises:
        TableError: It is none, or damaged.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith(UTF_16) else "utf-8-sig"  # of the shell of Windows
    try:
        text = content.decode(encoding).rstrip("\0")  # a crash of the machine leaves zeros at the end
    except UnicodeDecodeError:
        raise TableError("is no table: it is not UTF-8 text") from None
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]  # names may hold what else ends lines
    if lines and re.fullmatch("sep=.", lines[0]):  # for Excel
        lines.pop(0)
    if not lines:
        raise TableError("is empty")
    notes: list[str] = []
    words: dict[str, str] = {}
    lines[0] = lines[0].lstrip("# ") or lines[0]  # numpy.savetxt
    is_json = lines[0].startswith(("{", "["))
    read = _json_rows if is_json else _text_rows
    rows = read(lines, notes, words, _tag(path))
    names = dict.fromkeys(name for row in rows for name in row)
    clocks = [name for name in names if CLOCK.fullmatch(name.lower())]
    clocks.sort(key=lambda name: "epoch" not in name.lower())
    columns = list(_columns(rows, list(names), clocks))
    known = {column.name for column in columns}
    words = {name: word for name, word in words.items() if name not in known}
    of_epochs = [name for name in clocks if "epoch" in name.lower()]
    epochs = [next((value for name in of_epochs if (value := row.get(name)) is not None), None) for row in rows]
    return Table(columns, len(rows), notes, words, epochs)


def _columns(rows: list[Row], names: list[str], clocks: list[str]) -> Iterator[Column]:
    found = False
    for name in names:
        filled = {index: value for index, row in enumerate(rows) if (value := row.get(name)) is not None}
        is_beside = name.endswith(EXTREMES) and name.rpartition("__")[0] in names
        if not filled or name in clocks or name.lower() in NO_NUMBERS or is_beside:
            continue
        found = True
        epochs = [_first(rows[index], clocks, index + 1) for index in filled]
        yield Column(name, list(filled), epochs, [_summable(value) for value in filled.values()])
    if not found:
        raise TableError("has no column of numbers")


def _first(row: Row, names: list[str], default: float) -> float:
    return next((value for name in names if (value := row.get(name)) is not None), default)


def _json_rows(lines: list[str], notes: list[str], words: dict[str, str], tag: str) -> list[Row]:
    """The rows of a file that has an object a line, or is an object or a list, as TensorBoard's of threes."""
    objects: Any = _json("\n".join(lines))
    if objects is None:
        objects = [_json(line) for line in lines]
        broken = [f"line {number} is no JSON, or cut off" for number, each in enumerate(objects, 1) if each is None]
        _refuse_or_note(broken, len(lines), notes)
        objects = [each for each in objects if each is not None]
    elif isinstance(objects, dict):
        objects = _rows_of_object(objects)
    elif isinstance(objects, list) and all(_is_list_of_numbers(each) and len(each) == 3 for each in objects):
        objects = [{"step": step, tag: value} for _, step, value in objects]
    rows: list[Cells] = []
    for each in objects if isinstance(objects, list) else ():
        if not isinstance(each, dict):
            raise TableError(f"has no objects of numbers, but {type(each).__name__}")
        mode = each.get("mode")
        prefix = f"{mode}/" if isinstance(mode, str) and mode != "train" else ""
        row: Cells = {}
        for name, value in _leaves(each):
            full = name if CLOCK.fullmatch(name.lower()) else prefix + name
            number = _number(value) if isinstance(value, str) else value  # some write numbers as text
            if isinstance(number, float):
                row[full] = value
            elif value is None or isinstance(value, str):
                word = "" if value is None or value.lower() in MISSING else value
                words[full] = words.get(full) or word
        if "env_info" not in each and row:
            rows.append(row)
    return _values(rows)


def _rows_of_object(whole: dict[str, Any]) -> Any:
    """The rows of an object: `log_history` of Transformers, those of pandas by their index, or those of its columns.

    It has columns if it holds nothing but lists of numbers, as the `history` of Keras, or if one of them is a loss.
    Else it is a row itself; so is what has a part for each class of the data, by its number, and no loss.
    """
    if "log_history" in whole:
        return whole["log_history"]
    columns = dict(_columns_in(whole))
    losses = [numbers for name, numbers in columns.items() if "loss" in name.lower()]
    if losses and _is_numbered(whole) and all(isinstance(row, dict) for row in whole.values()):
        return list(whole.values())
    has_lists = any(len(numbers) > 1 for numbers in losses) or all(map(_is_list_of_numbers, whole.values()))
    return _rows_of_columns(columns) if columns and has_lists else [whole]


def _columns_in(whole: dict[str, Any], name: str = "") -> Iterator[tuple[str, list[float | None]]]:
    """Its numbers and lists of them, named as by `_leaves`; pandas' lists are objects, ClearML's have places in x."""
    for key, value in whole.items():
        full = f"{name}/{key}" if name else key
        numbers: Any = value
        if isinstance(value, dict):
            numbers = list(value.values()) if _is_numbered(value) else value.get("y") if "x" in value else None
        if _is_list_of_numbers(numbers):
            yield full, numbers
        elif isinstance(value, float):
            yield full, [value]
        elif isinstance(value, dict):
            yield from _columns_in(value, full)


def _is_numbered(value: dict[str, Any]) -> bool:
    return bool(value) and all(map(str.isdecimal, value))


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(each is None or isinstance(each, float) for each in value)


def _rows_of_columns(columns: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    """The rows of columns that end together, a shorter one with a number in every second row or every fifth."""
    count = max(map(len, columns.values()))
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, values in columns.items():
        for place, value in enumerate(reversed(values)):
            rows[count - 1 - place * (count // len(values))][name] = value
    return rows


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What objects within an object hold, as `val/mAP`, and the numbers of lists, by their place: `AP/0`."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        parts = value.items()
    elif _is_list_of_numbers(value):
        parts = enumerate(value)
    else:
        yield name, value
    for key, part in parts:
        yield from _leaves(part, f"{name}/{key}" if name else str(key))


def _refuse_or_note(broken: list[str], count: int, notes: list[str]) -> None:
    """Few rows that a kill has cut off are left out; more, or all, are damage."""
    if len(broken) > max(1, BROKEN_SHARE * count) or len(broken) == count:
        raise TableError(f"is damaged: {broken[0]}")
    notes += [f"left out: {each}" for each in broken]


def _json(text: str) -> Any:
    """What the text stands for, or None."""
    try:
        return json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        return None


def _text_rows(lines: list[str], notes: list[str], words: dict[str, str], tag: str) -> list[Row]:
    unquoted = re.sub('"[^"]*"', "", lines[0])  # names may hold what elsewhere stands between them
    delimiters = sorted((each for each in (";", "\t", ",") if each in unquoted), key=unquoted.count, reverse=True)
    if not unquoted:  # one name
        delimiters = [","]
    spaced = lines[0].split()
    if len(spaced) > 1 and all(YOLO.fullmatch(cell) or _number(cell) is not None for cell in spaced):
        delimiters = []
    splits = {each: _split(lines, each) for each in delimiters} or {" ": [line.split() for line in lines]}
    if not delimiters and len(lines) > 2 and all(len(cells) == 1 for cells in splits[" "][1:]):
        splits[" "][0] = [lines[0].strip()]  # a name of several words
    delimiter, *others = splits
    if others:
        delimiter = max(splits, key=lambda each: _share_of_numbers(splits[each]))
    split = splits[delimiter]
    if len(split[0]) > 8 and all(map(YOLO.fullmatch, split[0][:2])):
        split = [[cells[0].partition("/")[0], *cells[2:]] for cells in split]
        head = _yolo_head(split)
    elif _is_head(split[0]):
        head = _distinct(split.pop(0))
        if not split:
            raise TableError("has a head and no rows")
    else:
        head = [f"column {index + 1}" for index in range(len(split[0]))]
    if "Wall time" in head:
        head = [tag if name == "Value" else name for name in head]

    rows: list[Cells] = []
    broken = []
    for number, row in enumerate(split, 1):
        cells = row if any(row[len(head) :]) else row[: len(head)]  # some end each row in a comma
        if _is_head(cells) and not set(cells).isdisjoint(head):  # after a resume
            head = _distinct(cells)
        elif len(cells) == len(head):
            rows.append(dict(zip(head, cells, strict=True)))
        else:
            broken.append(f"row {number} has {len(cells)} cells instead of {len(head)}")
    _refuse_or_note(broken, len(split), notes)
    return _numbers(rows, notes, words, comma="." if delimiter == ";" else None)


def _split(lines: list[str], delimiter: str) -> list[list[str]]:
    """The cells of each row, without the blanks around them; a quoted cell may go on over several lines.

    A last row that is cut off in a quote is without that cell.
    """
    rows: list[list[str]] = []
    ended = [f"{line}\n" for line in (*lines, "")]  # the last one is a row of its own if no quote is open
    reader = csv.reader(ended, delimiter=delimiter, skipinitialspace=True)  # blanks before a quote too
    start = 0
    try:
        for cells in reader:
            end = reader.line_num
            if end > len(lines):
                if end - start > 2:
                    raise _open_quote(lines[start])
                if not cells:
                    break
                cells.pop()
            elif end - start > 1:
                _check_lines_of_row(lines[start:end], delimiter, len(rows[0]) if rows else 0)
            rows.append([cell.strip() for cell in cells])
            start = end
    except csv.Error as error:
        raise TableError(f"is no table: {error}") from None
    return rows


def _check_lines_of_row(lines: list[str], delimiter: str, width: int) -> None:
    """Refuse lines of which a quote that is not closed makes one row: it ends at the next quote, wherever that is.

    Behind a quote that closes a cell stands a delimiter; and where each of the first two lines is a whole row but for
    the quote that is open, they are two rows.
    """
    options: Any = {"delimiter": delimiter, "skipinitialspace": True}
    try:
        next(csv.reader([f"{line}\n" for line in lines], strict=True, **options))
    except csv.Error:
        raise _open_quote(lines[0]) from None
    (*first, opened), second = (next(csv.reader([line], **options)) for line in lines[:2])
    first += next(csv.reader([opened], **options))
    if all(len(cells) == width and not _is_head(cells) for cells in (first, second)):
        raise _open_quote(lines[0])


def _open_quote(line: str) -> TableError:
    return TableError(f"is damaged: a quote is not closed in {line[:60]!r}")


def _share_of_numbers(split: list[list[str]]) -> float:
    """How many of the cells are numbers, without those of rows that are shorter than the first one."""
    numbers = sum(_number(cell) is not None for row in split if len(row) >= len(split[0]) for cell in row)
    return numbers / sum(map(len, split))


def _numbers(rows: list[Cells], notes: list[str], words: dict[str, str], comma: str | None) -> list[Row]:
    """The numbers of the cells; a column of nothing but words goes to `words`, a word among numbers is damage."""
    numbers = _values(rows, comma)
    has_numbers = {name for row in numbers for name, value in row.items() if value is not None}
    for index, (row, cells) in enumerate(zip(numbers, rows, strict=True)):
        for name in [name for name, value in row.items() if value is None]:
            if cells[name].lower() in MISSING:
                words.setdefault(name, "")
            elif name not in has_numbers:
                words[name] = words.get(name) or cells[name]
            elif index < len(rows) - 1 or name != list(row)[-1]:
                raise TableError(f"is damaged: {cells[name]!r} in the column {name!r} is no number")
            else:
                notes.append(f"left out: the last row, which ends in {cells[name]!r}")
                return numbers[:-1]
    return numbers


def _values(rows: list[Cells], comma: str | None = None) -> list[Row]:
    """The numbers of the cells, None for words; `comma` is what that of `1,234` stands for if no other number tells."""
    commas = _commas(rows, comma)
    return [
        {name: _number(cell, commas.get(name, ".")) if isinstance(cell, str) else cell for name, cell in row.items()}
        for row in rows
    ]


def _commas(rows: list[Cells], default: str | None) -> dict[str, str]:
    """What the comma of numbers such as `1,234` stands for: ".", or nothing between thousands; by column.

    Another number of the column, or else of the table, tells: `0,5` has a decimal comma, `0.5` and `1,234.5` a point.
    """
    unclear = {
        name: cell for row in rows for name, cell in row.items() if isinstance(cell, str) and UNCLEAR.fullmatch(cell)
    }
    commas = {}
    for name, cell in unclear.items():
        for cells in ([row.get(name) for row in rows], [each for row in rows for each in row.values()]):
            texts = [str(each) for each in cells if each is not None]
            has_point = any(DECIMAL_POINT.fullmatch(text) or THOUSANDS.fullmatch(text) for text in texts)
            has_comma = any(DECIMAL_COMMA.fullmatch(text) and not UNCLEAR.fullmatch(text) for text in texts)
            if has_point != has_comma:
                commas[name] = "" if has_point else "."
                break
        else:
            if default is None:
                both = cell.replace(",", "."), cell.replace(",", "")
                raise TableError(f"is unclear: {cell!r} in the column {name!r} may be {both[0]} or {both[1]}")
            commas[name] = default
    return commas


def _distinct(head: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    names = []
    for name in head:
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _yolo_head(split: list[list[str]]) -> list[str]:
    """Names for YOLOv5's and YOLOv7's columns: losses, labels and size of the images, four metrics, losses again."""
    width = len(split[0])

    def is_size(cell: str) -> bool:
        return cell.isdigit() and int(cell) >= 32

    whole = [cells for cells in split if len(cells) == width]
    places = [index for index in range(3, width - 4) if all(is_size(cells[index]) for cells in whole)]
    size = places[-1] if places else None
    if size is None:
        raise TableError("is no results.txt of YOLOv5: it has no column of image sizes")
    losses = [f"train/loss {index}" for index in range(1, size - 1)]
    if len(losses) == 4:
        losses = [f"train/{name}_loss" for name in ("box", "obj", "cls", "total")]
    metrics = [f"metrics/{name}" for name in ("precision", "recall", "mAP50", "mAP50-95")]
    rest = width - size - 5
    val = [f"val/loss {index}" for index in range(1, rest + 1)]
    if rest == 3:
        val = [f"val/{name}_loss" for name in ("box", "obj", "cls")]
    return ["epoch", *losses, "labels", "image size", *metrics, *val]


def _tag(path: Path) -> str:
    """The tag in the name that TensorBoard gives to a download: `run-NAME-tag-TAG.csv`."""
    return re.split(r"tag-", path.stem)[-1]


def _is_head(cells: list[str]) -> bool:
    """Whether most cells are names."""
    named = [cell for cell in cells if cell.lower() not in MISSING]
    return 2 * sum(_number(cell) is None for cell in named) > len(named)


def _summable(value: float) -> float:
    """A number of which many add up to a finite one if it is finite."""
    return math.copysign(min(abs(value), LARGEST), value) if math.isfinite(value) else value


def _number(cell: str, comma: str = ".") -> float | None:
    """The number that a text stands for; `comma` is what that of `1,234` stands for."""
    if C_NAN.fullmatch(cell):
        return math.nan
    if C_INF.fullmatch(cell):
        return -math.inf if cell.startswith("-") else math.inf
    if tensor := TENSOR.fullmatch(cell):
        cell = tensor[1]
    if THOUSANDS.fullmatch(cell):
        cell = cell.replace(",", "")
    elif DECIMAL_COMMA.fullmatch(cell):
        cell = cell.replace(",", comma if UNCLEAR.fullmatch(cell) else ".")
    try:
        return float(cell)
    except ValueError:
        return None
