"""One thin servicer per proto service: decode, call, encode.

`edge.py` turns errors into status codes.
"""
