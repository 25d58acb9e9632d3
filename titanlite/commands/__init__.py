"""The command ``titanlite``, a file for each subcommand: arguments in, text out; what they do stands in other rooms."""
