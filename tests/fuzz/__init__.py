"""Input that is not as it should be, made from a seed: what reads files must refuse it in words, and change nothing.

    python -m tests.fuzz adapters              all of a kind: what came of it, and 1 as exit status where something did
    python -m tests.fuzz adapters --only 40    a share of it, as the tests run

A kind is a module here with `cases(folder, seed)`, which gives `harness.Case`s. All input is harmless: a case is a
fault where something shows, never where something breaks.
"""
