"""One module per stage, each with ``run(context)``, which raises if the stage fails."""
