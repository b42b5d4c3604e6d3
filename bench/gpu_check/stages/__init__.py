"""One module a stage, each with ``run(context)``: it returns if all is well, or raises."""
