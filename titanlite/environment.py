"""The environment variables that titanlite reads or sets, beside torchrun's own."""

NGPU = "NGPU"  # processes on this machine
NNODES = "NNODES"  # machines; on each a launcher with the same NNODES, NGPU, RDZV_ENDPOINT and arguments
RDZV_ENDPOINT = "RDZV_ENDPOINT"  # where the launchers of several machines meet: host:port, on one of them
RDZV_ID = "RDZV_ID"  # tells this run from others that meet there
COMM_MODE = "COMM_MODE"  # fake: estimate what NGPU devices would need, without them
CONFIG_FILE = "CONFIG_FILE"  # the TOML file, where --job.config_file does not name one
COMMAND = "TITANLITE_COMMAND"  # how the user started this, for messages
LOG_RANK = "LOG_RANK"  # the ranks that log to the console, separated by commas

# Set by the launcher for its workers: a folder through which it asks them to stop, and they tell it their errors.
LAUNCH_DIR = "TITANLITE_LAUNCH_DIR"
LAUNCHER_PID = "TITANLITE_LAUNCHER_PID"
