"""The studies of the data_mixtures family."""
