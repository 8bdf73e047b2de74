"""The Triton kernel and the small functions that it is made of."""
