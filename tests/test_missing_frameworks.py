"""Adapters where their framework is not installed."""

import pytest

from tests.helpers import run_python


@pytest.mark.parametrize(("adapter", "framework"), [("openmmlab", "mmengine"), ("ultralytics", "ultralytics")])
def test_the_error_says_what_to_install(adapter, framework):
    code = f"""
import sys
sys.modules[{framework!r}] = None
try:
    import triton_mgiou.integrations.{adapter}
except ImportError as error:
    print(error)
"""
    done = run_python("-c", code)
    want = f'this adapter needs {framework}; install it with: pip install "triton-mgiou[{adapter}]"'
    assert (done.stdout, done.stderr) == (f"{want}\n", "")
