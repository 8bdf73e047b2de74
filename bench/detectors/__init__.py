"""MGIoU in a real detector: `python -m bench.detectors`; the README beside this file says what was found."""
