"""The one exception for a user's mistake: the scripts turn it into one line and exit code 2."""


class UsageError(ValueError):
    """What was given, what is allowed and where to look, in one line."""
