"""The page of sliders: a trained network that answers while one moves a knob.

`networks` says what such a network is, `opening` names them all; each is a file here.
"""
