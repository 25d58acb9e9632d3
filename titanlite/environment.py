"""The environment variables that titanlite reads or sets, beside torchrun's own."""

NGPU = "NGPU"  # processes on this machine
CONFIG_FILE = "CONFIG_FILE"  # the TOML file, where --job.config_file does not name one
COMMAND = "TITANLITE_COMMAND"  # how the user started this, for messages
LOG_RANK = "LOG_RANK"  # the ranks that log to the console, separated by commas

# Set by the launcher for its workers: a folder through which it asks them to stop, and they tell it their errors.
LAUNCH_DIR = "TITANLITE_LAUNCH_DIR"
LAUNCHER_PID = "TITANLITE_LAUNCHER_PID"
