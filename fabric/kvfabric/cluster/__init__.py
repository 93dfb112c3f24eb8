"""Bringing a fabric up on Ray and down again: what stands behind `kvfabric up` and `down`.

One file starts Ray (`launcher.py`, in a process of its own), two are Ray actors
(`kvfabric.manager.actor`, `kvfabric_nodes.actor`); nothing else imports ray, so that the
command line is quick, and fails clearly where Ray is not installed.
"""
