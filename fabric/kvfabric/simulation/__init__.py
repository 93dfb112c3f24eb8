"""The fabric's own cores under a simulated clock, network and disk: one seed gives one history.

Nothing in here reads a clock, a socket or a file; what a run measures of the machine it
runs on comes through a stopwatch that the caller brings.
"""
