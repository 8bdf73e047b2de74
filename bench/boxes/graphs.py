"""Steps of one peer as replayed CUDA graphs, one line of JSON for each batch; `bench.boxes.speed` runs this.

    python -m bench.boxes.graphs "smooth L1" 512 4096

A process of its own for each peer: a capture that fails can leave PyTorch unfit for the next one, and a node that
autograd made on the default stream, of whatever was run before, cannot be captured. Here nothing runs on that stream.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

import torch

from bench import measure
from bench.arguments import need_gpu, positive
from bench.boxes.peers import pairs, peers, step
from bench.speed import first_line


def main() -> None:
    """Capture and replay; the first failure ends the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer")
    parser.add_argument("batches", type=positive, nargs="+")
    arguments = parser.parse_args()
    need_gpu(parser, "bench.boxes.graphs")
    device = torch.device("cuda")
    known = peers(device)
    if arguments.peer not in known:
        parser.error(f"peer: expected one of {', '.join(known)}, got {arguments.peer}")
    loss = known[arguments.peer]
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for batch in arguments.batches:
            try:
                found: dict[str, object] = {
                    "graph_us": measure.graph_row_us(partial(step, loss, *pairs("cxcywhr", batch, device)))
                }
            except Exception as error:  # of a capture
                found = {"error": first_line(error)}
            sys.stdout.write(json.dumps({"batch": batch, **found}) + "\n")
            sys.stdout.flush()
            if "error" in found:
                return


if __name__ == "__main__":
    main()
