"""WAV files, written by the standard library."""

from __future__ import annotations

import io
import wave

import numpy as np


def wav(samples: np.ndarray, width: int, rate: int = 8000) -> bytes:
    """Return a WAV file of integer samples `[N, channels]`."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            file.writeframes(samples.astype(np.uint8).tobytes())
        else:
            each = [int(s).to_bytes(width, "little", signed=True) for s in samples.ravel()]
            file.writeframes(b"".join(each))
    return out.getvalue()
