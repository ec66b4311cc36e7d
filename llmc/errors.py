"""Every error that llmc raises on purpose.

    LlmcError                 exit code 1
    ├── UsageError            2   a command or a call was wrong
    ├── ImportModelError      3   the model's files cannot be read
    ├── UnsupportedError      4   the model is readable, but not (yet) compilable
    ├── CompileError          5   a pass, the code generator or the linker failed
    ├── ArtifactError         6   the artifact is damaged, foreign or too new
    ├── VerifyError           7   the artifact's numbers are wrong on this device
    ├── CapacityError         8   not enough memory, pages or room in the queue
    └── RequestError          9   one request was malformed (HTTP 4xx)

A message says what happened, the offending value and what was expected; `hint` says what to do.
"""


class LlmcError(Exception):
    """Base of all deliberate errors; carries a hint and the exit code of the command line."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UsageError(LlmcError):
    """A command or a call was used wrongly."""

    exit_code = 2


class ImportModelError(LlmcError):
    """The model's files are missing, truncated or inconsistent."""

    exit_code = 3


class UnsupportedError(LlmcError):
    """The model or option is understood, but not supported; names the operator or feature."""

    exit_code = 4


class CompileError(LlmcError):
    """A pass, the code generator or the linker failed."""

    exit_code = 5


class ArtifactError(LlmcError):
    """The artifact folder is missing a file, damaged, built for another device or too new."""

    exit_code = 6


class VerifyError(LlmcError):
    """`llmc verify` found log-probabilities outside the artifact's tolerance."""

    exit_code = 7


class CapacityError(LlmcError):
    """Not enough memory, KV pages or room in the queue (HTTP 429 or 503)."""

    exit_code = 8


class RequestError(LlmcError):
    """One request is malformed or exceeds a limit (HTTP 4xx); the engine goes on."""

    exit_code = 9

    def __init__(
        self, message: str, *, hint: str | None = None, param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message, hint=hint)
        self.param = param
        self.status = status
