"""The one exception that is a user's mistake, not ours: the command line prints it as a sentence and exits with 2."""


class LolcatsError(Exception):
    """Bad input or a state the user can mend. The message says what was wrong, what was expected, and what to do."""


class Interrupted(LolcatsError):
    """Training was stopped by Ctrl-C after its state had been saved."""
