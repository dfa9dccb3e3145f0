"""Living under a service manager: what it hands to the daemon, and how it is told of the daemon."""
