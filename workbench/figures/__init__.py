"""Plotly figures from arrays: pure functions, shared by the notebooks and the live views.

Every function takes plain arrays and returns a ``plotly.graph_objects.Figure`` with a title, units, a legend and its
null line: what the quantity would be if nothing had been learned. None of them computes a measure.
"""
