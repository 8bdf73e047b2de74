"""The Triton kernels and the small functions that they are made of."""
