"""Bringing a fabric up on Ray and down again: what stands behind `kvfabric up` and `down`.

Ray is imported by the launcher, a process of its own (`launcher.py`, `local_ray.py`), and by the
actors (`kvfabric.manager.actor`, `kvfabric_nodes.actor`); by nothing else, so that the command
line is quick, and fails clearly where Ray is not installed.
"""
