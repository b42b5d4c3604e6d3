"""Results of a pass: storage, other ranks, plots and reports."""
