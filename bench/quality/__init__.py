"""Fine-tuning from every initialisation, in the four domains of the paper and one for a GPU."""
