"""Fine-tuning from every initialisation, in the paper's four domains and one sized for a GPU."""
