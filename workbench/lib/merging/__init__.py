"""Models that were fine-tuned from one base, made into one model: a file for each system."""
