"""What this machine is, what it has, how fast it computes, and which options that suggests."""
