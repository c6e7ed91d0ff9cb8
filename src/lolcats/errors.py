"""The exception for user errors: the command line prints its message without a traceback and exits with 2."""


class LolcatsError(Exception):
    """Bad input, or a problem that the user can fix. The message says what was wrong, what was expected, what to do."""


class Interrupted(LolcatsError):
    """Training was stopped by Ctrl-C after its state had been saved."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a period at its end; its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that memory ran out: PyTorch's own error on a GPU, a plain RuntimeError on a CPU."""
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
