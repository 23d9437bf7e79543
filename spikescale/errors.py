"""The one exception that stands for bad input: its message is the line the user sees."""


class UserError(Exception):
    """Bad input. The message is one line naming the file, key or value, and what is allowed.

    Commands print it as `error: <message>` on standard error and exit with `exit_code`.
    """

    exit_code = 2
