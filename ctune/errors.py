"""The library's errors. Never imports torch.

CtuneError                    code, message, hint, fault, retryable
├── ConfigError               the run asks for something that does not fit together   (user)
├── DataError                 the images, labels or archive cannot be used            (user)
│   └── ArchiveError          an archive is refused as a whole                        (user)
├── EncoderError              the encoder cannot be built or its weights not loaded   (user)
│   └── CheckpointFormatError a file of weights has an unknown form                   (user)
├── DivergedError             the loss or the weights are no longer finite            (user)
├── OutOfMemoryError          the device or host memory does not hold the step        (user)
├── DiskFullError             no space is left                                        (system)
├── RankLostError             one of the processes that train together has ended      (system)
├── CheckpointError           a checkpoint is damaged or belongs to another run       (system)
└── RunInUseError             another process holds the run directory                 (system)
"""

from typing import ClassVar, Literal

FaultSide = Literal["user", "system"]


class CtuneError(Exception):
    """Base: ``message`` says what is wrong with the value, ``hint`` what to do about it."""

    code: ClassVar[str] = "internal"
    fault: FaultSide = "system"
    retryable: bool = False

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.error_code = code or self.code


class ConfigError(CtuneError):
    """The run asks for something that does not fit together."""

    code = "invalid_config"
    fault = "user"


class DataError(CtuneError):
    """The images, labels or archive cannot be used."""

    code = "data_error"
    fault = "user"


class ArchiveError(DataError):
    """An archive is refused as a whole; ``error_code`` names the rule it breaks."""

    code = "invalid_archive"


class EncoderError(CtuneError):
    """The encoder cannot be built or its weights cannot be loaded."""

    code = "encoder_error"
    fault = "user"


class CheckpointFormatError(EncoderError):
    """A file of weights has an unknown form; the message names what was found in it."""

    code = "checkpoint_format"


class DivergedError(CtuneError):
    """The loss or the weights are no longer finite."""

    code = "diverged"
    fault = "user"


class OutOfMemoryError(CtuneError):
    """The device or host memory does not hold the step; never retried unchanged."""

    code = "out_of_memory"
    fault = "user"


class DiskFullError(CtuneError):
    """No space is left; the run goes on from its last checkpoint once there is some."""

    code = "disk_full"
    retryable = True


class RankLostError(CtuneError):
    """One of the processes that train together has ended; the run goes on from its checkpoint."""

    code = "rank_lost"
    retryable = True


class CheckpointError(CtuneError):
    """A checkpoint is damaged or belongs to another run."""

    code = "checkpoint_error"


class RunInUseError(CtuneError):
    """Another process holds the run directory."""

    code = "run_in_use"
    retryable = True
