"""Time by calculation: tasks on resources, fits of measured times, and the numbers of a machine.

What comes out of it is simulated and says so, with what it was calibrated by.
"""
