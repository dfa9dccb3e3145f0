"""The 49 parameters, a module a section; the form that they make, and their way to the protos.

What may be asked of them is judged in `validation`.
"""
