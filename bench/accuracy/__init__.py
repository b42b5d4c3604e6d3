"""Lost variance, ratios and ranks compared with exact PCA, and the time of a step, by method."""
