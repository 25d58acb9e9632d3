"""The errors that titanlite raises on purpose; each message states the value, the rule and the fix."""


class ConfigError(Exception):
    """What was asked for cannot be done: a bad option, file, or combination.

    The command line shows the message alone and ends with exit status 2.
    """


class TrainingError(Exception):
    """A run that had started had to be stopped, for example because the loss is no longer finite.

    The command line shows the message alone and ends with exit status 1.
    """


class NothingToDo(Exception):
    """The run that was asked for has been made already. No error: the command line says so and ends with status 0."""
