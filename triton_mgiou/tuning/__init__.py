"""The layouts of kernels: what there is to choose from, how they are measured, and where the choice is kept."""
