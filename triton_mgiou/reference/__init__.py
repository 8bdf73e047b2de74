"""The definition in plain PyTorch: `DEFINITION.md` in words, the modules in code."""
