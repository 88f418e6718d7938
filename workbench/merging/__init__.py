"""The page of a merge: what the experts of the kept bed changed of their base, and what a merge makes of it.

`measure` has the numbers and knows of no page, `work` the one thread that they are made in, `page` the controls and the
plots, `served` the page as one of `panel serve`.
"""
