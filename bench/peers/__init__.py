"""The programs that bench/peers.py compares: one driver script each, and what they share.

Drivers run in environments of their own (setup.sh); protocol.py needs nothing but Python.
"""
