"""What `eva-kernels init` reads: texts, a model and its config."""
