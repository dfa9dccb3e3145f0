"""Training data: formats, the one reader, scans, and the worker that counts tokens.

`formats`, `reader` and `report` are imported by the runner too: nothing there may need grpc, torch
or transformers.
"""
