"""Test-beds: tasks, and models trained once and kept, that several studies start from.

A bed gives tasks (`workbench.lib.core.task.Task`) and, where studies start from something learned, a function `base`
that trains it once and keeps it by the digest of its recipe (`pretrained`). It stands between `lib` and `studies`: a
bed imports `lib` and other beds, knows nothing of arms, rows and rules, and belongs to no family. It is hard enough
that a plain baseline does not reach its end, for otherwise nothing can be told apart on it.
"""
