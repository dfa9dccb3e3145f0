"""The 49 parameters.

Models (the one source of defaults and rules), their check, their way to and from protos.
"""
