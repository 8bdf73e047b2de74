"""`python -m triton_mgiou`."""

import sys

from triton_mgiou.cli import main

if __name__ == "__main__":
    sys.exit(main())
