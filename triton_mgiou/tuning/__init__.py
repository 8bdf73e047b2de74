"""Which layout a kernel gets: what there is to choose from, how it is measured, and where the choice is kept."""
