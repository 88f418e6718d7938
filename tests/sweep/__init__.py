"""Every architecture of the installed transformers, tiny: what holds for all of them, or is refused.

`python -m tests.sweep` says how it is run; it is slow, and the tests run a part of it.
"""
