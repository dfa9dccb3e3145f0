"""Generated from `proto/finetuned/v1` by `proto/generate.py`; only this line is written by hand."""
