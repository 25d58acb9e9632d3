"""Start and supervision of the workers: launcher, command line, stop requests, stacks."""
