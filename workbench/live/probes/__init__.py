"""What is read out of a model while it trains: where to look (`find`), routing, spectra, gradient conflict.

A probe changes nothing: no gradient, random number, training mode, counter or other observer of the model.
"""
