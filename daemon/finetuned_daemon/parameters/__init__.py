"""The 49 parameters and the extensions, a module a section; the form, and the way to the protos.

What may be asked of them is judged in `validation`.
"""
