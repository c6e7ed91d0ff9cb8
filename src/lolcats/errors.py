"""The one exception that is a user's mistake, not ours: the command line prints it as a sentence and exits with 2."""


class LolcatsError(Exception):
    """Bad input or a state the user can mend. The message says what was wrong, what was expected, and what to do."""


class Interrupted(LolcatsError):
    """Training was stopped by Ctrl-C after its state had been saved."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: PyTorch's own error on a GPU, a plain RuntimeError on a CPU."""
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
