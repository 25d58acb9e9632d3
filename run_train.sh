#!/usr/bin/env bash
# Train. Sets up on first use; all arguments pass through (./run_train.sh --help).
#   NGPU         processes on this machine (default: the GPUs present, else 1)
#   NNODES       machines (default 1); on each, this command and RDZV_ENDPOINT=host:port, where they meet
#   COMM_MODE    fake: estimate what NGPU devices would hold and send, without them
#   CONFIG_FILE  the TOML file (default: ./train_configs/debug_model.toml)
#   LOG_RANK     the ranks that log to the console (default: 0)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/scripts/setup.sh"
set_up "$root"
export TITANLITE_COMMAND=$0  # what the summary tells to type
exec "$PYTHON" -m titanlite.commands train "$@"
