"""From one command to the workers and back: launcher, command line, stop requests, stacks."""
