"""Whether this machine is ready to train, and what each device can do.

Asked at two prices: which packages the training environment has, in milliseconds and without
importing one; and a probe, a process of its own that imports torch and takes seconds, whose answer
is kept until the environment changes.
"""
