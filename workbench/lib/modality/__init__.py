"""Modality: experts for text, images and sound. One file per system."""
