"""Speech of the installed espeak-ng: the sound is a function of the text and the voices alone.

The engine carries the phase of its waves and the flutter of its pitch from one utterance to the
next, and nothing in its interface sets them back. So a separate process renders each text, in each
voice in turn, in a fork of itself: no text hears of those before it, and two runs agree in any
order of the texts. Its random numbers are seeded for the same reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mmjax
from mmjax.core.errors import UserError

RATE = 22_050
"""Samples per second."""

_SYNCHRONOUS = 2
# Voices with an echo lose their last buffer where it is not full: one for a whole utterance.
_BUFFER_MS = 20_000
_CHARACTERS = 1
_UTF8 = 1
_LENGTH = struct.Struct("<I")
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def say(folder: Path, voices: Sequence[str], texts: Sequence[str]) -> Iterator[list[bytes]]:
    """Yield, for each text in turn, its utterance in each voice: int16 little-endian samples at `RATE`.

    `folder` is that of the package with the library and its data.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "mmjax.datasets.espeak", str(folder)], env=_environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        try:
            # A fault of the process shows in what it answers, and in its last words.
            with contextlib.suppress(BrokenPipeError):
                _stream(process.stdin).write(json.dumps([voices, texts]).encode())
                _stream(process.stdin).close()
            for text in texts:
                yield [_answer(process, voice, text) for voice in voices]
        finally:
            process.kill()


def _environment() -> dict[str, str]:
    """Return the environment of a process that finds this very package."""
    paths = [str(Path(mmjax.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _stream(stream: Any) -> Any:
    assert stream is not None
    return stream


def _answer(process: subprocess.Popen[bytes], voice: str, text: str) -> bytes:
    stdout = _stream(process.stdout)
    header = stdout.read(_LENGTH.size)
    size = _LENGTH.unpack(header)[0] if len(header) == _LENGTH.size else -1
    samples = stdout.read(max(size, 0))
    if len(samples) != size:
        words = _stream(process.stderr).read().decode(errors="replace").strip().splitlines()
        reason = words[-1] if words else f"it ended with status {process.wait()}"
        raise UserError(
            f"espeak-ng cannot render '{text}' in the voice {voice}: {reason}."
            " Install the one that mmjax names: pip install 'mmjax[data]'"
        )
    return bytes(samples)


class Engine:
    """The loaded library."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(_library(folder)))
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
            ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, os.fsencode(folder), 0)
        if rate != RATE:
            raise OSError(f"its data give {rate} samples per second, not {RATE}")

    def say(self, voice: str, text: str) -> bytes:
        """Return int16 samples; how they sound depends on the earlier utterances of this process."""
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise OSError(f"it has no voice {voice}")
        parts: list[bytes] = []

        def collect(samples: Any, count: int, events: Any) -> int:
            if samples and count > 0:
                parts.append(ctypes.string_at(samples, 2 * count))
            return 0

        callback, utf8 = _CALLBACK(collect), text.encode()
        self._library.espeak_SetSynthCallback(callback)
        self._library.espeak_ng_SetRandSeed(1)
        if self._library.espeak_Synth(utf8, len(utf8) + 1, 0, _CHARACTERS, 0, _UTF8, None, None):
            raise OSError("it refuses the text")
        self._library.espeak_Synchronize()
        return b"".join(parts)


def _library(folder: Path) -> Path:
    libraries = [path for path in sorted(folder.glob("*espeak-ng*")) if path.suffix in _SUFFIXES]
    if not libraries:
        raise OSError(f"{folder} has no library")
    return libraries[0]


_SUFFIXES = (".so", ".dylib", ".dll")


def _say_in_a_fork(engine: Engine, voices: Sequence[str], text: str) -> None:
    """Write length and samples of each utterance to standard output."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            sys.exit(status if status > 0 else f"a signal ended it: {-status}")
        return
    try:
        utterances = [engine.say(voice, text) for voice in voices]
        with open(1, "wb", closefd=False) as out:
            for samples in utterances:
                out.writelines((_LENGTH.pack(len(samples)), samples))
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{error}\n".encode())
    finally:
        os._exit(1)


def main() -> None:
    """Read `[voices, texts]` as JSON from standard input; write what they sound like, see `say`."""
    voices, texts = json.loads(sys.stdin.buffer.read())
    try:
        engine = Engine(Path(sys.argv[1]))
    except (OSError, AttributeError) as error:
        sys.exit(str(error))
    for text in texts:
        _say_in_a_fork(engine, voices, text)


if __name__ == "__main__":
    main()
