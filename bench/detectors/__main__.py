"""Makes `python -m bench.detectors` work."""

import sys

from bench.detectors.run import main

sys.exit(main())
