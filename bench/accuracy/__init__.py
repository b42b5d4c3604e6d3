"""Lost variance, ratios and ranks against exact PCA, and the time of a step, method by method."""
