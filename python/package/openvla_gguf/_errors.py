"""The exceptions of this package."""

from typing import Optional


class OpenVLAError(RuntimeError):
    """Something cannot be done. `hint` says what to try, if there is something."""

    hint: Optional[str]

    def __init__(self, message: str, hint: Optional[str] = None):
        super().__init__(f"{message}; {hint}" if hint else message)
        self.hint = hint


class InputError(OpenVLAError, ValueError):
    """What was passed is not what the model reads."""
