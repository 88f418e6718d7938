"""Distributed: experts on many devices. One file per system."""
