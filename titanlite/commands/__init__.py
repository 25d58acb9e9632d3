"""The command ``titanlite``, one file for each subcommand: arguments and output. Other packages do the work."""
