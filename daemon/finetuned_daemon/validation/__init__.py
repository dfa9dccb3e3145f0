"""Judges parameters: each field alone, fields together, and what they name in the world.

Every rule gives a `Violation` with a stable reason and a sentence in both languages. `check.py` is
the entrance; create, update, start, ValidateParameters and templates all come through it.
"""
