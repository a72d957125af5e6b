"""The one error that users see: one sentence saying what was wrong and what to do."""


class FewstepError(ValueError):
    """Bad input, settings or files. The command line prints the message as one line and exits with 2."""
