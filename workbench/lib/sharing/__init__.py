"""Sharing: parameters used at several depths. One file per system."""
