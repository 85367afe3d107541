"""Reads a SoundFont 2 file and plays single notes of its instruments.

A preset (for example an instrument of the General MIDI list) is a list of zones, each for a range of keys
and velocities; a zone names an instrument, itself a list of such zones, each with one recorded
sample and its settings ("generators": loop, tuning, envelopes, filter). A note sounds all zones
that match, and settings of the preset's zone are added to those of the instrument's.

Played here: pitch, loops, the volume envelope, the modulation envelope on filter and pitch, the
low-pass filter, attenuation. Not implemented: low-frequency oscillators, modulators, panning, reverb,
chorus, and envelopes that depend on the key. Chapters are those of the SoundFont Technical
Specification 2.04.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath
from numpy.typing import NDArray

from mmjax.core.errors import UserError
from mmjax.datasets.resample import decimate

Sound = NDArray[np.float64]
Zone = dict[int, int]
"""Generator to amount; a range is its two bytes as (lowest, highest)."""

# Generators, by their numbers in the file (8.1.2).
START, END, LOOP_START, LOOP_END, START_COARSE = 0, 1, 2, 3, 4
MODULATION_TO_PITCH, CUTOFF, RESONANCE, MODULATION_TO_CUTOFF, END_COARSE = 7, 8, 9, 11, 12
MODULATION, VOLUME = 25, 33  # of each six: delay, attack, hold, decay, sustain, release
INSTRUMENT, KEYS, VELOCITIES, LOOP_START_COARSE, ATTENUATION = 41, 43, 44, 45, 48
LOOP_END_COARSE, SEMITONES, CENTS, SAMPLE, LOOPED, SCALE, ROOT = 50, 51, 52, 53, 54, 56, 58

_RANGES = (KEYS, VELOCITIES)
_SHORTEST = -12_000  # timecents of 1 ms
_DEFAULTS: Zone = {
    CUTOFF: 13_500,
    SCALE: 100,
    ROOT: -1,
    **{first + step: _SHORTEST for first in (MODULATION, VOLUME) for step in (0, 1, 2, 3, 5)},
}

_TABLES = {
    b"phdr": "name S20, preset u2, bank u2, bag u2, rest V12",
    b"pbag": "generator u2, modulator u2",
    b"pgen": "operator u2, amount i2",
    b"inst": "name S20, bag u2",
    b"ibag": "generator u2, modulator u2",
    b"igen": "operator u2, amount i2",
    b"shdr": "name S20, start u4, end u4, loop u4, loop_end u4, rate u4, key u1, cents i1, rest V4",
}
_OVERSAMPLED = 4
_FRAME, _HOP = 256, 128  # of the filter, in samples at the final rate


@dataclass(frozen=True)
class Region:
    """A recorded sample and how it is played for one key.

    Attributes:
      samples: int16 [N], the recording.
      rate: its samples per second.
      loop: first sample of the loop and the one after its last; None where it plays once.
      cents: how far above the recording the note is.
      settings: all other generators, in the units of the file.
    """

    samples: NDArray[np.int16]
    rate: int
    loop: tuple[int, int] | None
    cents: float
    settings: Mapping[int, int]


class SoundFont:
    """A file's presets, by (bank, program)."""

    def __init__(self, path: epath.PathLike) -> None:
        """Read it; `UserError` when it is no SoundFont 2 file or is cut off."""
        chunks = _chunks(epath.Path(path))
        try:
            tables = {name: _table(chunks[name], fields) for name, fields in _TABLES.items()}
            self._samples = np.frombuffer(chunks[b"smpl"], "<i2")
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} is no SoundFont 2 file: part {error} is missing.") from error
        self._headers = tables[b"shdr"][:-1]
        presets = tables[b"phdr"]
        self._presets = _zones(presets, tables[b"pbag"], tables[b"pgen"], INSTRUMENT)
        self._instruments = _zones(tables[b"inst"], tables[b"ibag"], tables[b"igen"], SAMPLE)
        self._index = {(int(p["bank"]), int(p["preset"])): i for i, p in enumerate(presets[:-1])}
        self.names = {at: _text(presets[i]["name"]) for at, i in self._index.items()}
        """(bank, program) to the preset's name in the file."""

    def regions(self, bank: int, program: int, key: int, velocity: int) -> list[Region]:
        """Return the regions that sound for a note: MIDI key and velocity, 0 to 127; `UserError` for no preset."""
        if (bank, program) not in self._index:
            raise UserError(f"the SoundFont has no program {program} in bank {bank}.")
        regions_found = []
        for added in _matching(self._presets[self._index[bank, program]], key, velocity):
            for zone in _matching(self._instruments[added[INSTRUMENT]], key, velocity):
                regions_found.append(self._region({**_DEFAULTS, **zone}, added, key))
        return [region for region in regions_found if len(region.samples)]

    def _region(self, zone: Zone, added: Zone, key: int) -> Region:
        settings = dict(zone)
        for generator, amount in added.items():
            if generator not in (*_RANGES, INSTRUMENT):
                settings[generator] = settings.get(generator, 0) + amount
        header = self._headers[zone[SAMPLE]]
        start = int(header["start"]) + _offset(settings, START, START_COARSE)
        end = int(header["end"]) + _offset(settings, END, END_COARSE)
        loop = int(header["loop"]) + _offset(settings, LOOP_START, LOOP_START_COARSE)
        loop_end = int(header["loop_end"]) + _offset(settings, LOOP_END, LOOP_END_COARSE)
        looped = settings.get(LOOPED, 0) in (1, 3) and start <= loop < loop_end <= end
        return Region(
            samples=self._samples[start:end],
            rate=int(header["rate"]),
            loop=(loop - start, loop_end - start) if looped else None,
            cents=_cents(settings, header, key),
            settings=settings,
        )


def _offset(settings: Mapping[int, int], fine: int, coarse: int) -> int:
    return settings.get(fine, 0) + 32_768 * settings.get(coarse, 0)


def _cents(settings: Mapping[int, int], header: np.void, key: int) -> float:
    """Return the distance of a key from the root key, in cents (8.1.3): the root key is the zone's, else the sample's;
    60 where that is unknown.
    """
    sample_root = int(header["key"]) if header["key"] <= 127 else 60
    root = settings[ROOT] if settings[ROOT] >= 0 else sample_root
    tuned = 100 * settings.get(SEMITONES, 0) + settings.get(CENTS, 0) + int(header["cents"])
    return settings[SCALE] * (key - root) + tuned


def _chunks(path: epath.Path) -> dict[bytes, bytes]:
    """Return a dict from name to content of all that lies in the file's lists."""
    content = path.read_bytes()
    if content[:4] != b"RIFF" or content[8:12] != b"sfbk":
        raise UserError(f"{path} is no SoundFont 2 file: it does not begin like one.")
    result: dict[bytes, bytes] = {}
    for name, part in _parts(content[12:], path):
        if name == b"LIST":
            result.update(_parts(part[4:], path))
    return result


def _parts(content: bytes, path: epath.Path) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, at)
        if at + 8 + size > len(content):
            raise UserError(f"{path} is cut off in its part {name.decode('latin-1')}.")
        yield name, content[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _table(content: bytes, fields: str) -> np.ndarray:
    pairs = [field.split() for field in fields.split(", ")]
    return np.frombuffer(content, np.dtype([(name, f"<{kind}") for name, kind in pairs]))


def _text(name: bytes) -> str:
    return name.split(b"\0")[0].decode("latin-1").strip()


def _zones(
    headers: np.ndarray, bags: np.ndarray, generators: np.ndarray, last: int
) -> list[list[Zone]]:
    """Return the zones of each header, with the settings that its global zone gives to all (7.3, 7.7).

    A zone without the generator `last` that names what it plays is the global one if it is the
    first, and is ignored elsewhere.
    """
    edges, operators = bags["generator"].tolist(), generators["operator"].tolist()
    amounts = generators["amount"].tolist()
    result = []
    for first, after in zip(headers["bag"][:-1].tolist(), headers["bag"][1:].tolist(), strict=True):
        zones = [
            dict(zip(operators[low:high], amounts[low:high], strict=True))
            for low, high in zip(edges[first:after], edges[first + 1 : after + 1], strict=True)
        ]
        common = zones[0] if zones and last not in zones[0] else {}
        result.append([{**common, **zone} for zone in zones if last in zone])
    return result


def _matching(zones: Sequence[Zone], key: int, velocity: int) -> Iterator[Zone]:
    for zone in zones:
        if _within(zone.get(KEYS), key) and _within(zone.get(VELOCITIES), velocity):
            yield zone


def _within(limits: int | None, value: int) -> bool:
    return limits is None or (limits & 0xFF) <= value <= (limits >> 8 & 0xFF)


def play(regions: Sequence[Region], seconds: float, pressed: float, rate: int) -> Sound:
    """Return the sum of the regions, `[seconds * rate]`, the key let go after `pressed` seconds.

    In units of the recordings, so that a sum may leave the range of int16.
    """
    sound = np.zeros(round(seconds * rate))
    for region in regions:
        sound += _played(region, len(sound), pressed, rate)
    return sound


def _played(region: Region, length: int, pressed: float, rate: int) -> Sound:
    settings, times = region.settings, np.arange(length) / rate
    modulation = _envelope(settings, MODULATION, times, pressed)
    volume = _envelope(settings, VOLUME, times, pressed)
    bend = settings.get(MODULATION_TO_PITCH, 0) * modulation
    steps = np.exp2((region.cents + bend) / 1200) * region.rate / (_OVERSAMPLED * rate)
    sound = decimate(_read(region, np.repeat(steps, _OVERSAMPLED)), _OVERSAMPLED)
    cutoff = settings[CUTOFF] + settings.get(MODULATION_TO_CUTOFF, 0) * modulation
    sound = _low_pass(sound, cutoff, settings.get(RESONANCE, 0), rate)
    return sound * _gain(settings, volume, times)


def _read(region: Region, steps: NDArray[np.float64]) -> Sound:
    """Return the recording at places that grow by `steps`, between samples on a line, looped or once."""
    places = np.cumsum(steps) - steps
    if region.loop:
        start, end = region.loop
        rounds = np.floor((places - start) / (end - start))
        places -= (end - start) * np.maximum(rounds, 0)
    index = places.astype(np.int64)
    weight = places - index
    after = index + 1
    if region.loop:
        after = np.where(after == region.loop[1], region.loop[0], after)
    recorded = np.concatenate([region.samples, np.zeros(2, np.int16)]).astype(np.float64)
    silent = len(recorded) - 1
    low = recorded[np.minimum(index, silent)]
    return low + weight * (recorded[np.minimum(after, silent)] - low)


def _envelope(settings: Mapping[int, int], first: int, times: Sound, pressed: float) -> Sound:
    """Return the volume envelope (8.1.2): rises to 1, falls to the sustain level, and to 0 when the key is let go.

    For the volume a fall of 1 stands for 100 dB; see `_gain`.
    """
    delay, attack, hold, decay, release = (
        2 ** (settings[first + step] / 1200) for step in (0, 1, 2, 3, 5)
    )
    sustain = 1 - min(max(settings.get(first + 4, 0), 0), 1000) / 1000
    lengths = [delay, attack, hold, decay * (1 - sustain)]
    level = np.interp(times, np.cumsum([0, *lengths]), [0, 0, 1, 1, sustain])
    let_go = np.interp(pressed, np.cumsum([0, *lengths]), [0, 0, 1, 1, sustain])
    falling = np.maximum(let_go - (times - pressed) / release, 0)
    return np.where(times < pressed, level, falling)


def _gain(settings: Mapping[int, int], volume: Sound, times: Sound) -> Sound:
    """Convert an envelope to amplitudes: the attack is linear in amplitude, the stages after it in decibels."""
    rising = times < sum(2 ** (settings[VOLUME + step] / 1200) for step in (0, 1))
    decibels = -100 * (1 - volume) - settings.get(ATTENUATION, 0) / 10
    quiet = 10 ** (-settings.get(ATTENUATION, 0) / 200)
    falling = np.exp2(decibels * (np.log2(10) / 20))
    return np.where(rising, volume * quiet, np.where(volume > 0, falling, 0))


def _low_pass(sound: Sound, cutoff: Sound, resonance: int, rate: int) -> Sound:
    """Apply two poles at `cutoff` (cents over 8.176 Hz, for each sample), peak in tenths of a dB.

    Frame by frame on the spectrum, without a shift in phase.
    """
    if _hertz(cutoff.min()) >= rate / 2:
        return sound
    window = np.sin(np.pi * (np.arange(_FRAME) + 0.5) / _FRAME)
    count = -(-len(sound) // _HOP) + 1
    padded = np.pad(sound, (_HOP, count * _HOP - len(sound)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[::_HOP] * window
    middles = np.minimum(np.arange(count) * _HOP, len(sound) - 1)
    ratio = np.fft.rfftfreq(_FRAME, 1 / rate) / _hertz(cutoff[middles, None])
    quality = 10 ** ((resonance / 10 - 3.01) / 20)
    response = 1 / np.sqrt((1 - ratio**2) ** 2 + (ratio / quality) ** 2)
    filtered = np.fft.irfft(np.fft.rfft(frames) * response, _FRAME) * window
    out = np.zeros_like(padded)
    out[: count * _HOP] += filtered[:, :_HOP].ravel()
    out[_HOP:] += filtered[:, _HOP:].ravel()
    return out[_HOP : _HOP + len(sound)]


def _hertz(cents: NDArray[np.float64]) -> NDArray[np.float64]:
    return 8.176 * np.exp2(cents / 1200)
