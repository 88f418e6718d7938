"""Runs, written as they go and read while they are written: the store, the control channel, probes, trainer and views.

Importing this package imports nothing else; each module says what it needs.
"""
