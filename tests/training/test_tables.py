"""Tables as files hold them, and their columns written out by hand."""

from __future__ import annotations

import math

import pytest

from tests.helpers import INF, NAN
from triton_mgiou.training.tables import Column, TableError, read_table


@pytest.fixture
def read(tmp_path):
    """Read a text as a file of this name."""

    def from_text(text, name="results.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_table(path)

    return from_text


def same(found, expected):
    """Equal columns, where NaN is NaN."""
    return repr(found) == repr(expected)


def json_lines(*rows):
    return "\n".join(rows)


TWO = [Column("a", [0, 1], [1, 2], [1.0, 3.0]), Column("b", [0, 1], [1, 2], [2.0, 4.0])]
LOSS = [Column("loss", [0, 1], [3.0, 4.0], [0.5, 0.25])]
UNNAMED = [TWO[0]._replace(name="column 1"), TWO[1]._replace(name="column 2")]

TABLES = {
    "CSV": ("a,b\n1,2\n3,4\n", TWO),
    "blank lines": ("a,b\r\n\r\n1,2\r\n   \r\n3,4\r\n", TWO),
    "zeros at the end": ("a,b\n1,2\n3,4\n\0\0\0", TWO),
    "UTF-16": ("a,b\n1,2\n3,4\n".encode("utf-16"), TWO),
    "numpy.savetxt": ("# a b\n1 2\n3 4\n", TWO),
    "for Excel": ("sep=;\na;b\n1,0;2\n3,0;4\n", TWO),
    "a comma in the names": ("a;b\n1;2\n3;4\n", TWO),
    "other delimiters in quoted names": (
        '"a; lr=.1; seed=1","b; lr=.1; seed=2"\n1,2\n3,4\n',
        [TWO[0]._replace(name="a; lr=.1; seed=1"), TWO[1]._replace(name="b; lr=.1; seed=2")],
    ),
    "more semicolons in the names than commas": (
        "epoch,loss (x;y;z)\n3,0.5\n4,0.25\n", [LOSS[0]._replace(name="loss (x;y;z)")]
    ),
    "more commas in the names than semicolons": (
        "epoch;loss (x,y,z)\n3;0,5\n4;0,25\n", [LOSS[0]._replace(name="loss (x,y,z)")]
    ),
    "more commas in the names than tabs": (
        "epoch\tloss (x, y, z)\n3\t0.5\n4\t0.25\n", [LOSS[0]._replace(name="loss (x, y, z)")]
    ),
    "other delimiters in names, a comma behind each row": (
        "epoch,loss;x\n3,0.5,\n4,0.25,\n", [LOSS[0]._replace(name="loss;x")]
    ),
    "tabs behind the commas": ("a,\tb\n1,\t2\n3,\t4\n", TWO),
    "no head, more decimal commas than semicolons": ("1,0;2,0\n3,0;4,0\n", UNNAMED),
    "quoted numbers with a decimal comma": ('"1,0";2\n"3,0";4\n', UNNAMED),
    "one quoted name": ('"loss; all, of x"\n1\n3\n', [TWO[0]._replace(name="loss; all, of x")]),
    "blanks before quotes": (
        'a, "b, of the test"\n1, "2"\n 3, "4" \n', [TWO[0], TWO[1]._replace(name="b, of the test")]
    ),
    "tabs": ("a\tb\n1\t2\n3\t4\n", TWO),
    "a comma behind each row": ("a,b\n1,2,\n3,4,\n", TWO),
    "commas behind each row and the head": ("a,b,,\n1,2,,\n3,4,,\n", TWO),
    "no head": ("1,2\n3,4\n", UNNAMED),
    "no head and no commas": ("1 2\n3 4\n", UNNAMED),
    "no head, commas and blanks": ("1, 2\n3, 4\n", UNNAMED),
    "no head, a missing number": ("NA,2\n3,4\n", [Column("column 1", [1], [2], [3.0]), UNNAMED[1]]),
    "one name of several words": ("# a of the test\n1\n3\n", [TWO[0]._replace(name="a of the test")]),
    "one number a line": ("1\n3\n", UNNAMED[:1]),
    "names that end in numbers": (
        "loss 1,loss 2\n1,2\n3,4\n",
        [TWO[0]._replace(name="loss 1"), TWO[1]._replace(name="loss 2")],
    ),
    "one name three times": (
        "x,x,x\n1,2,5\n3,4,6\n",
        [TWO[0]._replace(name="x"), TWO[1]._replace(name="x (2)"), Column("x (3)", [0, 1], [1, 2], [5.0, 6.0])],
    ),
    "a clock": ("Epoch,loss\n3,0.5\n4,0.25\n", LOSS),
    "the epoch before the step": ("step,epoch,loss\n30,3,0.5\n40,4,0.25\n", LOSS),
    "an Epoch before the Step": ("Step,Epoch,loss\n30,3,0.5\n40,4,0.25\n", LOSS),
    "the step where there is no epoch": ("epoch,step,loss\n,3,0.5\n,4,0.25\n", LOSS),
    "no number of a training": ("Wall Time,Unnamed: 0,Index,epoch,loss\n1e9,0,0,3,0.5\n2e9,1,1,4,0.25\n", LOSS),
    "Weights and Biases: the lowest and highest are beside a column, or there is none that they are of": (
        "Step,run - loss,run - loss__MIN,run - loss__MAX,lr__MAX\n3,0.5,0.125,1,2\n4,0.25,0.125,1,3\n",
        [LOSS[0]._replace(name="run - loss"), Column("lr__MAX", [0, 1], [3.0, 4.0], [2.0, 3.0])],
    ),
    "a head again, with another column": (
        "epoch,loss\n3,0.5\nepoch,loss,mAP,mAP\n4,0.25,0.1,0.2\n",
        [*LOSS, Column("mAP", [1], [4.0], [0.1]), Column("mAP (2)", [1], [4.0], [0.2])],
    ),
    "a head again, at once": ("epoch,loss\nepoch,loss\n3,0.5\n4,0.25\n", LOSS),
    "most cells are words": ("epoch,host,split,state,loss\n3,a,train,ok,0.5\n4,b,train,ok,0.25\n", LOSS),
    "what is missing": ("epoch,loss\n1,NA\n2,None\n3,0.5\n4,0.25\n5,-\n6,\n7,n/a\n", [LOSS[0]._replace(rows=[2, 3])]),
    "a decimal comma": ("a;b\n1,5;-2,5e1\n", [Column("a", [0], [1], [1.5]), Column("b", [0], [1], [-25.0])]),
    "a decimal comma before three digits": (
        "a;b\n1,234;2\n2,345;4\n", [Column("a", [0, 1], [1, 2], [1.234, 2.345]), TWO[1]]
    ),
    "the same, by another number of the column": (
        'a,b\n"1,234",2.5\n"0,345",4.5\n',
        [Column("a", [0, 1], [1, 2], [1.234, 0.345]), Column("b", [0, 1], [1, 2], [2.5, 4.5])],
    ),
    "the same, by a number of another column": (
        'a,b\n"1,234","2,5"\n"2,345e1","-4,5"\n',
        [Column("a", [0, 1], [1, 2], [1.234, 23.45]), Column("b", [0, 1], [1, 2], [2.5, -4.5])],
    ),
    "thousands": (
        'step,loss,a,b,c\n"1,000",.5,"1,234,567","1,234.5","-12,345"\n"2,000",.25,"2,345,678.","345.5",1\n',
        [
            Column("loss", [0, 1], [1000.0, 2000.0], [0.5, 0.25]),
            Column("a", [0, 1], [1000.0, 2000.0], [1234567.0, 2345678.0]),
            Column("b", [0, 1], [1000.0, 2000.0], [1234.5, 345.5]),
            Column("c", [0, 1], [1000.0, 2000.0], [-12345.0, 1.0]),
        ],
    ),
    "thousands, by those of a larger number": (
        'step,a\n"1,000","1,234,567"\n"2,000","234"\n', [Column("a", [0, 1], [1000.0, 2000.0], [1234567.0, 234.0])]
    ),
    "thousands in JSON": (
        json_lines('{"step": "1,234", "loss": 0.5}', '{"step": "2,234", "loss": 0.25}'),
        [Column("loss", [0, 1], [1234.0, 2234.0], [0.5, 0.25])],
    ),
    "a cell of several lines": ('a,host,b\n1,"one\n, two\n\n",2\n3,x,4\n', TWO),
    "cells of several lines at the end and the start of a row": (
        'a,b,host\n1,2,"one\ntwo"\n3,4,x\n', TWO
    ),
    "one that ends as a row of words would": ('a,host\n1,"one\ntwo, three"\n3,x\n', TWO[:1]),
    "one with more cells in its lines than a row has": ('a,host\n1,"one, 2, 3\n4, 5, 6"\n3,x\n', TWO[:1]),
    "the same, quoted as a whole": ('"host","a","b"\n"one\ntwo","1","2"\n"x","3","4"\n', TWO),
    "NaN and Inf of C": (
        "a,b,c,d\n1.#QNAN,1.#INF,-1.#INF00,nan(ind)\n",
        [Column(name, [0], [1], [value]) for name, value in zip("abcd", (NAN, INF, -INF, NAN), strict=True)],
    ),
    "numbers as PyTorch prints them": ("a,b\ntensor(1.),2\n\"tensor(3., device='cuda:0')\",4\n", TWO),
    "numbers that do not add up": (
        "a,b\n1e305,-1e305\n-inf,-3\n",
        [Column("a", [0, 1], [1, 2], [1e300, -INF]), Column("b", [0, 1], [1, 2], [-1e300, -3.0])],
    ),
    "JSON lines": (json_lines('{"a": 1, "b": 2}', '{"a": 3, "b": "4.0", "c": true}'), TWO),
    "a list of JSON": ('[{"a": 1, "b": 2},\n {"a": 3, "b": 4}]', TWO),
    "one object of JSON": ('{"a": NaN}', [Column("a", [0], [1], [NAN])]),
    "log_history of Transformers": ('{\n "best": 7,\n "log_history": [{"a": 1, "b": 2}, {"a": 3, "b": 4}]}', TWO),
    "an object of columns": ('{"a": [1, 3],\n "b": [2, 4]}', TWO),
    "columns of other lengths, which end together": (
        '{"loss": [1, 2, 3, 4, 5], "mAP": [6, 7], "x": [], "y": [8]}',
        [
            Column("loss", [0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [1.0, 2.0, 3.0, 4.0, 5.0]),
            Column("mAP", [2, 4], [3, 5], [6.0, 7.0]),
            Column("y", [4], [5], [8.0]),
        ],
    ),
    "columns beside a number and within objects": (
        '{"test": {"mAP": 0.9, "names": ["a"]}, "train": {"loss": [1, 2, 3]}, "val": {"mAP": [0.5, null, 0.7]}}',
        [
            Column("train/loss", [0, 1, 2], [1, 2, 3], [1.0, 2.0, 3.0]),
            Column("val/mAP", [0, 2], [1, 3], [0.5, 0.7]),
            Column("test/mAP", [2], [3], [0.9]),
        ],
    ),
    "columns of pandas": (
        '{"epoch": {"0": 3, "1": 4}, "loss": {"0": 0.5, "1": 0.25}, "mAP": {"0": null, "1": 0.1}}',
        [*LOSS, Column("mAP", [1], [4.0], [0.1])],
    ),
    "rows of pandas by their index": (
        '{"0": {"epoch": 3, "loss": 0.5}, "1": {"epoch": 4, "loss": 0.25}}', LOSS
    ),
    "one row with a part for each class": (
        '{"0": {"AP": 0.9}, "1": {"AP": 0.1}}', [Column("0/AP", [0], [1], [0.9]), Column("1/AP", [0], [1], [0.1])]
    ),
    "scalars of ClearML": (
        '{"loss": {"train": {"name": "train", "x": [9, 7], "y": [0.5, 0.25]}}}',
        [Column("loss/train", [0, 1], [1, 2], [0.5, 0.25])],
    ),
    "one row with a list": (
        '{"epoch": 3, "train_loss": 0.5, "AP": [0.1], "x": {"0": 7}}',
        [Column(name, [0], [3.0], [value]) for name, value in (("train_loss", 0.5), ("AP/0", 0.1), ("x/0", 7.0))],
    ),
    "objects within objects, and lists of numbers": (
        json_lines(
            '{"epoch": 3, "train": {"loss": 0.5, "more": {"x": "1.5"}}, "AP": [0.1, null, 0.3], "names": ["a", "b"]}',
            '{"epoch": 4, "train": {"loss": 0.25}, "AP": [0.2, null, 0.4], "names": [{"a": 1}]}',
        ),
        [
            Column("train/loss", [0, 1], [3.0, 4.0], [0.5, 0.25]),
            Column("train/more/x", [0], [3.0], [1.5]),
            Column("AP/0", [0, 1], [3.0, 4.0], [0.1, 0.2]),
            Column("AP/2", [0, 1], [3.0, 4.0], [0.3, 0.4]),
        ],
    ),
    "an integer that is too large": (f'{{"a": {"1" * 400}}}', [Column("a", [0], [1], [INF])]),
    "JSON lines without a number": (json_lines('{"a": 1, "b": 2}', '{"c": "x"}', '{"a": 3, "b": 4}'), TWO),
    "of MMEngine": (
        json_lines(
            '{"env_info": "sys.platform: linux", "seed": 5}',
            '{"mode": "train", "Epoch": 3, "loss": 0.5}',
            '{"mode": "val", "Epoch": 3, "mAP": 0.1}',
            '{"mode": "train", "Epoch": 4, "loss": 0.25}',
        ),
        [Column("loss", [0, 2], [3.0, 4.0], [0.5, 0.25]), Column("val/mAP", [1], [3.0], [0.1])],
    ),
    "a mode that is a number": (
        '{"mode": 2, "a": 1}',
        [Column("mode", [0], [1], [2.0]), Column("a", [0], [1], [1.0])],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "columns"), TABLES.values(), ids=TABLES)
def test_columns(text, columns, read):
    table = read(text)
    assert same(table.columns, columns)
    assert table.notes == []


def test_the_epochs_of_the_rows(read):
    assert read("step,epoch,loss\n1,3,0.5\n2,,0.4\n3,4,0.3\n").epochs == [3.0, None, 4.0]
    assert read("step,loss\n1,0.5\n2,0.4\n").epochs == [None, None]
    assert read("Epoch,trainer/epoch,loss\n1,,0.5\n,2,0.4\n").epochs == [1.0, 2.0]


def test_the_tag_of_a_download_of_tensorboard_is_the_name(read):
    table = read("Wall time,Step,Value\n1e9,3,0.5\n2e9,4,0.25\n", "run-exp-tag-loss.csv")
    assert table.columns == LOSS
    assert read("Step,Value\n3,0.5\n4,0.25\n", "run-exp-tag-loss.csv").columns == [LOSS[0]._replace(name="Value")]
    assert read("[[1e9,3,0.5],[2e9,4,0.25]]", "run-exp-tag-loss.json").columns == LOSS


V5 = "{epoch}/299 7.37G 0.11 0.07 0.03 {total} 90 640 0.1 0.2 0.3 0.4 0.05 0.06 0.01"
V5_HEAD = """train/box_loss train/obj_loss train/cls_loss train/total_loss labels,image size,metrics/precision
    metrics/recall metrics/mAP50 metrics/mAP50-95 val/box_loss val/obj_loss val/cls_loss"""


def test_results_of_yolov5(read):
    """Three losses and their sum, labels, size of the images, precision, recall, mAP50, mAP and three losses."""
    rows = [V5.format(epoch=epoch, total=total) for epoch, total in ((3, 0.21), (4, 0.2))]
    table = read("\n".join(rows), "results.txt")
    names = [name for part in V5_HEAD.split() for name in part.split(",")]
    names = [*names[:4], "labels", "image size", *names[-7:]]
    assert [column.name for column in table.columns] == names
    values = [[0.11] * 2, [0.07] * 2, [0.03] * 2, [0.21, 0.2], [90.0] * 2, [640.0] * 2]
    values += [[each] * 2 for each in (0.1, 0.2, 0.3, 0.4, 0.05, 0.06, 0.01)]
    assert [column.values for column in table.columns] == values
    assert all(column.epochs == [3.0, 4.0] for column in table.columns)


def test_results_of_yolov5_with_other_losses(read):
    """The smallest size is 32, also where a count of labels is as large; a row that is cut off is left out."""
    rows = ["0/9 1G 0.5 40 32 0.1 0.2 0.3 0.4 0.6 0.7", "1/9 1G 0.4 7 32 0.1 0.2 0.3 0.4 0.6 0.7", "2/9 1G 0.3"]
    table = read("\n".join(rows), "results.txt")
    assert [column.name for column in table.columns] == [
        "train/loss 1", "labels", "image size", "metrics/precision", "metrics/recall", "metrics/mAP50",
        "metrics/mAP50-95", "val/loss 1", "val/loss 2",
    ]  # fmt: skip
    assert table.columns[0].values == [0.5, 0.4]
    assert table.columns[2].values == [32.0, 32.0]
    assert table.notes == ["left out: row 3 has 2 cells instead of 10"]
    assert [column.name for column in read(rows[0].rsplit(" ", 2)[0]).columns][-1] == "metrics/mAP50-95"


def test_words(read):
    """The first word of each column without a number."""
    table = read("epoch,host,loss,note,mAP\n1,a,0.5,,\n2,b,0.4,late,\n3,c,0.3,later,NA\n")
    assert table.words == {"host": "a", "note": "late", "mAP": ""}
    rows = '{"loss": "none", "host": "a", "x": "word"}', '{"loss": "NONE", "host": "b", "x": 1}', '{"loss": []}'
    table = read(json_lines(*rows))
    assert (table.words, table.rows) == ({"loss": "", "host": "a"}, 1)
    assert read(json_lines('{"loss": null, "x": 1}', '{"loss": "late", "x": 2}')).words == {"loss": "late"}


def lines(good, bad, row="1,2", broken="3"):
    """A table with some broken rows in its middle."""
    return "\n".join(["a,b", *[row] * (good // 2), *[broken] * bad, *[row] * (good - good // 2)])


@pytest.mark.parametrize(("good", "bad"), [(1, 1), (9, 1), (98, 2), (147, 3)])
def test_few_broken_rows_are_left_out(good, bad, read):
    table = read(lines(good, bad))
    assert table.rows == good
    assert table.notes == [f"left out: row {good // 2 + k + 1} has 1 cells instead of 2" for k in range(bad)]
    cut = '{"a": 1'
    table = read("\n".join(['{"a": 1}'] * good + [cut] * bad))
    assert table.notes == [f"left out: line {good + k + 1} is no JSON, or cut off" for k in range(bad)]


@pytest.mark.parametrize(("good", "bad"), [(0, 1), (8, 2), (97, 3)])
def test_more_are_damage(good, bad, read):
    with pytest.raises(TableError, match=f"^is damaged: row {good // 2 + 1} has 1 cells instead of 2$"):
        read(lines(good, bad))


def test_a_last_row_that_is_cut_off_in_a_number(read):
    table = read("a,b\n1,2\n3,4\n5,6e\n")
    assert same(table.columns, TWO)
    assert (table.rows, table.notes) == (2, ["left out: the last row, which ends in '6e'"])


def test_a_last_row_that_is_cut_off_in_a_quote(read):
    """How much of the cell is there is not known."""
    table = read('a,b,host\n1,2,x\n3,4,y\n5,6,"z')
    assert (table.columns, table.rows) == (TWO, 2)
    assert table.notes == ["left out: row 3 has 2 cells instead of 3"]
    assert read('a,b\n1,2\n3,4\n5,"6.').columns == TWO


HOSTS = "".join(f"{row},x,0.{row},y\n" for row in range(2, 9))


@pytest.mark.parametrize(
    "rows",
    [
        f'1,"x,0.1,y\n{HOSTS}',
        f'1,"x,0.1,y\n{HOSTS}9,"z",0.9,y\n10,x,1,y\n',
        f'1,"x,0.1,y\n{HOSTS}9,z",0.9,y\n10,x,1,y\n',
        f'{HOSTS}9,"x,0.9,y\n10,x,1,y\n',
        f'1,"x,0.1,y\n2,x",0.2,y\n{HOSTS}',
    ],
    ids=["to the end", "to where another one opens", "to a stray one", "to the last row", "to the next row"],
)
def test_a_quote_that_is_not_closed_loses_no_rows(rows, read):
    with pytest.raises(TableError, match=r"^is damaged: a quote is not closed in '\d,\"x,0\.\d,y'$"):
        read(f"epoch,host,loss,user\n{rows}")


def test_a_quote_that_is_not_closed_loses_no_rows_of_words(read):
    rows = "".join(f"{row},p,q,x,0.{row}\n" for row in range(2, 9))
    with pytest.raises(TableError, match=r"^is damaged: a quote is not closed in '1,\"p,q,x,0\.1'$"):
        read(f'epoch,user,project,host,loss\n1,"p,q,x,0.1\n{rows}9,p,q,"x",0.9\n')


@pytest.mark.parametrize("text", ['a,b\n1,"2,345"\n2,"3,456"\n', 'a,b,c\n1.5,"2,345","0,5"\n', '{"a": "2,345"}'])
def test_a_comma_before_three_digits_may_be_unclear(text, read):
    with pytest.raises(TableError, match=r"^is unclear: '\d,\d+' in the column '[ab]' may be \d\.\d+ or \d{4}$"):
        read(text)


@pytest.mark.parametrize(
    ("text", "cell"),
    [("a,b\n1,2\n3e,4\n", "3e"), ("a,b\n1,2e\n3,4\n", "2e"), ('a,b\n1,"2\n3"\n3,4\n', r"2\\n3")],
    ids=["not the last column", "not the last row", "a number of two lines"],
)
def test_another_word_among_numbers_is_damage(text, cell, read):
    with pytest.raises(TableError, match=f"^is damaged: '{cell}' in the column '[ab]' is no number$"):
        read(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("sep=;\n", "is empty"),
        ("# \n", "has a head and no rows"),
        ("a,b\n", "has a head and no rows"),
        ("a,b\nx,y\n", "has no column of numbers"),
        ("epoch\n1\n", "has no column of numbers"),
        ('{"a": "x"}', "has no column of numbers"),
        ('{"log_history": 3}', "has no column of numbers"),
        ("[1, 2]", "has no objects of numbers, but float"),
        ("[[1, 2, 3], [1, 2]]", "has no objects of numbers, but list"),
        ('{"a": []}', "has no column of numbers"),
        ("{}", "has no column of numbers"),
        ("a,b\n1," + "x" * 200_000, r"is no table: field larger than field limit \(131072\)"),
        (b"a,b\n\xff\xfe\n", "is no table: it is not UTF-8 text"),
        ("0/9 1G 0.5 7 31 0.1 0.2 0.3 0.4 0.6", "is no results.txt of YOLOv5: it has no column of image sizes"),
    ],
)
def test_what_is_no_table(text, reason, read):
    with pytest.raises(TableError, match=f"^{reason}$"):
        read(text)


def test_many_large_numbers_have_a_sum(read):
    (column,) = read("a\n" + "1.7e308\n" * 40).columns
    assert math.isfinite(sum(column.values))
