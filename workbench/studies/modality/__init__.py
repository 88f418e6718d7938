"""The studies of the modality family."""
