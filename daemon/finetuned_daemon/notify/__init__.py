"""Notifications when a run ends or needs somebody: by a command, on the desktop, to a webhook.

`kinds.py` is the table of what is told. A notification is written in the transaction of the event
that causes it (`notifier.py`), and sent beside everything else until it is delivered or given up.
"""
