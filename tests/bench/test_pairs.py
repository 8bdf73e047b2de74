"""What `bench.pairs` writes, and the peer that it carries."""

import math

import pytest
import torch

from bench.pairs import __main__ as bench
from bench.pairs import report
from tests.helpers import assert_close


def test_what_there_is_no_time_for_is_named():
    kept = []
    result = bench.run(torch.device("cpu"), 1, 0.0, lambda result: kept.append(len(result)))
    assert len(kept) == 6  # after each row
    assert result["quadrangles"] == {"84 x 20": {"left out": "0 seconds were over"}}
    assert "| keeping apart, 64 | left out: 0 seconds were over |" in bench.table(result)


def test_what_disagrees_ends_the_run():
    first, second = bench.boxes((3, 4), torch.device("cpu"))
    with pytest.raises(SystemExit, match="boxes: off by"):
        bench.check_values("boxes", torch.zeros(3, 4), first, second, bench.exact_boxes)


def test_probiou_is_that_of_gaussians():
    """Two boxes of one shape: the Bhattacharyya distance is an eighth of the squared Mahalanobis distance."""
    boxes = torch.tensor([[0.0, 0, 4, 2, 0], [3, 1, 4, 2, 0]], dtype=torch.float64)
    distance = (3**2 / (4**2 / 12) + 1 / (2**2 / 12)) / 8
    expected = 1 - math.sqrt(1 - math.exp(-distance))
    assert_close(bench.batch_probiou(boxes[:1], boxes[1:]), [[expected]], atol=1e-5)


def test_the_document_shows_what_was_measured():
    results = {
        "machine": {"device": "a GPU", "versions": {"torch": "2"}, "commit": "0123456"},
        "boxes": {"8 x 4": {"us, mean": 10.0, "us, min": 20.0, "us, depth": 30.0}},
        "quadrangles": {"8 x 4": {"left out": "0 seconds were over"}},
        "in a loop": {"8 x 4": {"us, box_mgiou": 2.0, "us, batch_probiou": 8.0, "to batch_probiou": 0.25}},
        "keeping apart": {"64": {"us, ours": 5.0, "mgiou's vmap": "not installed"}},
    }
    text = report.markdown(results)
    assert "| 8 x 4 | 10.0 | 20.0 | 30.0 | - |" in text
    assert "takes 4 times as long" in text
    assert "Quadrangles" not in text
    assert "apart" not in text
