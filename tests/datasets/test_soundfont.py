"""The SoundFont reader, on files written here, whose notes are known in closed form."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from etils import epath

from mmjax.core.errors import UserError
from mmjax.datasets import soundfont
from mmjax.datasets.soundfont import SoundFont, play

RATE, OUT = 44_100, 11_025
PERIOD = 100  # samples: 441 Hz
HERTZ = RATE / PERIOD
SINE = np.round(10_000 * np.sin(2 * np.pi * np.arange(2000) / PERIOD)).astype("<i2")
LOOP = {soundfont.LOOPED: 1}
TIMECENTS_OF_A_TENTH = round(1200 * np.log2(0.1))


def _chunk(name, content):
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _list(name, **chunks):
    content = b"".join(_chunk(key.encode(), value) for key, value in chunks.items())
    return _chunk(b"LIST", name + content)


def _settings(zones, lasting):
    """Return bags and generators of all zones; `lasting` closes each that has it."""
    bags, generators = b"", b""
    for zone in zones:
        bags += struct.pack("<HH", len(generators) // 4, 0)
        for key, value in sorted(zone.items(), key=lambda item: item[0] == lasting):
            low_high = isinstance(value, tuple)
            generators += struct.pack(
                "<HBB" if low_high else "<Hh", key, *(value if low_high else (value,))
            )
    return bags + struct.pack("<HH", len(generators) // 4, 0), generators + bytes(4)


def _soundfont(presets, instruments, samples):
    """Return a file of presets `{(bank, program): zones}`, instruments `[zones]`, samples `[(array, header)]`."""
    data, headers = b"", b""
    for index, (array, header) in enumerate(samples):
        fields = {"rate": RATE, "key": 60, "cents": 0, "loop": 500, "loop_end": 1500, **header}
        start = len(data) // 2
        data += array.tobytes() + bytes(92)
        headers += struct.pack(
            "<20sIIIIIBbHH", f"sample {index}".encode(), start, start + len(array),
            start + fields["loop"], start + fields["loop_end"], fields["rate"], fields["key"],
            fields["cents"], 0, 1,
        )  # fmt: skip
    phdr, inst, zones, parts = b"", b"", [], []
    for (bank, program), own in presets.items():
        phdr += struct.pack(
            "<20sHHHIII", f"p{program}".encode(), program, bank, len(zones), 0, 0, 0
        )
        zones += own
    phdr += struct.pack("<20sHHHIII", b"EOP", 0, 0, len(zones), 0, 0, 0)
    for own in instruments:
        inst += struct.pack("<20sH", b"i", len(parts))
        parts += own
    inst += struct.pack("<20sH", b"EOI", len(parts))
    pbag, pgen = _settings(zones, soundfont.INSTRUMENT)
    ibag, igen = _settings(parts, soundfont.SAMPLE)
    body = b"sfbk" + _list(b"INFO", ifil=struct.pack("<HH", 2, 1)) + _list(b"sdta", smpl=data)
    body += _list(
        b"pdta", phdr=phdr, pbag=pbag, pmod=bytes(10), pgen=pgen, inst=inst, ibag=ibag,
        imod=bytes(10), igen=igen, shdr=headers + bytes(46),
    )  # fmt: skip
    return _chunk(b"RIFF", body)


@pytest.fixture
def font(tmp_path):
    """Return `font(zone, preset_zone, **header)`: a font of one preset, one instrument, one sine."""

    def make(zone=None, added=None, array=SINE, **header):
        path = epath.Path(tmp_path) / "font.sf2"
        presets = {(0, 5): [{**(added or {}), soundfont.INSTRUMENT: 0}]}
        zones = [[{**LOOP, **(zone or {}), soundfont.SAMPLE: 0}]]
        path.write_bytes(_soundfont(presets, zones, [(array, header)]))
        return SoundFont(path)

    return make


def _note(font, key=60, velocity=100, seconds=0.5, held=1.0):
    return play(font.regions(0, 5, key, velocity), seconds, held, OUT)


def _hertz(sound):
    """Return the frequency and the amplitude of a sine."""
    window = np.hanning(len(sound))
    spectrum = np.abs(np.fft.rfft(sound * window, 1 << 17))
    hertz = np.fft.rfftfreq(1 << 17, 1 / OUT)[spectrum.argmax()]
    return hertz, 2 * spectrum.max() / window.sum()


def _cents(found, expected):
    return abs(1200 * np.log2(found / expected))


# Pitch


@pytest.mark.parametrize(
    ("zone", "added", "header", "key", "semitones"),
    [
        ({}, {}, {}, 60, 0),
        ({}, {}, {}, 72, 12),
        ({}, {}, {}, 53, -7),
        ({}, {}, {"key": 62}, 60, -2),
        ({}, {}, {"key": 255}, 60, 0),  # unknown: 60
        ({}, {}, {"cents": -30}, 60, -0.3),
        ({soundfont.ROOT: 48}, {}, {"key": 62}, 60, 12),
        ({soundfont.SEMITONES: 3, soundfont.CENTS: -25}, {}, {}, 60, 2.75),
        ({soundfont.SEMITONES: 3}, {soundfont.SEMITONES: -5, soundfont.CENTS: 10}, {}, 60, -1.9),
        ({soundfont.SCALE: 50}, {}, {}, 72, 6),
        ({soundfont.SCALE: 0}, {}, {}, 72, 0),
        ({}, {}, {"rate": 22_050}, 72, 0),
    ],
)
def test_pitch(font, zone, added, header, key, semitones):
    hertz, amplitude = _hertz(_note(font(zone, added, **header), key)[1000:])
    assert _cents(hertz, HERTZ * 2 ** (semitones / 12)) < 2
    assert amplitude == pytest.approx(10_000, rel=0.02)


def test_a_note_is_the_sine_itself(font):
    found = _note(font())
    expected = 10_000 * np.sin(2 * np.pi * HERTZ * np.arange(len(found)) / OUT)
    # Within the first 20 ms the envelope rises; loops must not break the sine later.
    assert np.abs(found - expected)[220:-20].max() < 60
    assert len(found) == round(0.5 * OUT)


# Loops


def test_a_sample_without_a_loop_ends(font):
    for zone in ({soundfont.LOOPED: 0}, {soundfont.LOOPED: 2}):
        found = _note(font(zone))
        end = round(len(SINE) / RATE * OUT)
        assert np.abs(found[: end - 20]).max() > 9000
        assert np.abs(found[end + 20 :]).max() < 1


def test_a_loop_is_moved_by_its_settings(font):
    """A sample of 0 with one click: the loop goes round it once every (end - start) samples."""
    click = np.zeros(2000, "<i2")
    click[900:908] = 20_000
    zone = {soundfont.LOOP_START: 300, soundfont.LOOP_END: -300}
    peaks = [_peaks(_note(font(zone_, array=click))) for zone_ in ({}, zone)]
    assert np.diff(peaks[0]) == pytest.approx(1000 / RATE * OUT, abs=1)
    assert np.diff(peaks[1]) == pytest.approx(400 / RATE * OUT, abs=1)
    assert peaks[0][0] == pytest.approx(904 / RATE * OUT, abs=1)


def _peaks(sound):
    middle = np.arange(1, len(sound) - 1)
    high = (sound[middle] > sound[middle - 1]) & (sound[middle] >= sound[middle + 1])
    return middle[high & (sound[middle] > 0.5 * sound.max())]


def test_the_sample_is_cut_by_its_settings(font):
    click = np.zeros(2000, "<i2")
    click[900:908] = 20_000
    zone = {soundfont.LOOPED: 0, soundfont.START: 400}
    assert _peaks(_note(font(zone, array=click)))[0] == pytest.approx(504 / RATE * OUT, abs=1)
    assert np.abs(_note(font({**zone, soundfont.END: -1200}, array=click))).max() < 1


# Envelopes


def _level(sound, at, width=0.02):
    low = round((at - width / 2) * OUT)
    return np.sqrt(2 * np.square(sound[low : low + round(width * OUT)]).mean())


def test_attenuation_and_sustain_in_decibels(font):
    quiet = {soundfont.ATTENUATION: 100, soundfont.VOLUME + 4: 140}
    quiet[soundfont.VOLUME + 3] = TIMECENTS_OF_A_TENTH
    found = _note(font(quiet, {soundfont.ATTENUATION: 60}))
    assert _level(found, 0.4) == pytest.approx(10_000 * 10 ** (-(16 + 14) / 20), rel=0.03)


def test_decay_is_a_hundred_decibels_in_its_time(font):
    zone = {soundfont.VOLUME + 3: 0, soundfont.VOLUME + 4: 1000}  # one second
    found = _note(font(zone))
    fall = 20 * np.log10(_level(found, 0.1) / _level(found, 0.4))
    assert fall == pytest.approx(30, abs=0.5)


def test_attack_rises_in_a_line_after_the_delay(font):
    zone = {
        soundfont.VOLUME: TIMECENTS_OF_A_TENTH,
        soundfont.VOLUME + 1: 2 * TIMECENTS_OF_A_TENTH // 3,
    }
    found = _note(font(zone))
    attack = 2 ** (zone[soundfont.VOLUME + 1] / 1200)
    assert np.abs(found[: round(0.095 * OUT)]).max() < 1
    for part in (0.3, 0.6, 0.9):
        assert _level(found, 0.1 + part * attack) == pytest.approx(part * 10_000, rel=0.06)


def test_release_begins_when_the_key_is_let_go(font):
    found = _note(font({soundfont.VOLUME + 5: TIMECENTS_OF_A_TENTH}), held=0.3)
    assert _level(found, 0.28) == pytest.approx(10_000, rel=0.02)
    assert 20 * np.log10(_level(found, 0.32) / _level(found, 0.36)) == pytest.approx(40, abs=1)
    assert np.abs(found[round(0.41 * OUT) :]).max() < 1


def test_the_modulation_envelope_bends_pitch(font):
    held_at_half = {soundfont.MODULATION + 3: -12_000, soundfont.MODULATION + 4: 500}
    bent = _note(font({**held_at_half, soundfont.MODULATION_TO_PITCH: 1200}))
    assert _cents(_hertz(bent[1000:])[0], HERTZ * 2**0.5) < 2


# The filter


@pytest.mark.parametrize("octaves", [-2, -1, 0, 1, 2])
def test_the_filter_is_a_two_pole_low_pass(font, octaves):
    """Against its response in closed form; at the cutoff it is 3 dB down."""
    cutoff = 1200 * np.log2(HERTZ / 8.176) - 1200 * octaves
    _, amplitude = _hertz(_note(font({soundfont.CUTOFF: round(cutoff)}))[1000:-500])
    ratio = 2.0**octaves
    expected = 1 / np.sqrt((1 - ratio**2) ** 2 + 2 * ratio**2)
    assert 20 * np.log10(amplitude / 10_000) == pytest.approx(20 * np.log10(expected), abs=0.7)


def test_resonance_and_an_envelope_on_the_cutoff(font):
    cutoff = round(1200 * np.log2(HERTZ / 8.176))
    peak = {soundfont.CUTOFF: cutoff, soundfont.RESONANCE: 120}
    assert _hertz(_note(font(peak))[1000:-500])[1] == pytest.approx(
        10_000 * 10 ** (9 / 20), rel=0.1
    )
    zone = {soundfont.CUTOFF: cutoff - 2400, soundfont.MODULATION_TO_CUTOFF: 4800}
    zone |= {soundfont.MODULATION + 3: TIMECENTS_OF_A_TENTH, soundfont.MODULATION + 4: 1000}
    found = _note(font(zone))
    assert _level(found, 0.03) > 9000
    assert _level(found, 0.4) == pytest.approx(10_000 / np.sqrt(15**2 + 32), rel=0.1)


# Zones


def test_keys_and_velocities_choose_zones(tmp_path):
    path = epath.Path(tmp_path) / "font.sf2"
    zones = [
        {soundfont.KEYS: (0, 59), soundfont.SAMPLE: 0},
        {soundfont.KEYS: (60, 127), soundfont.VELOCITIES: (0, 63), soundfont.SAMPLE: 1},
        {soundfont.KEYS: (60, 127), soundfont.VELOCITIES: (64, 127), soundfont.SAMPLE: 2},
    ]
    presets = {
        (0, 5): [{soundfont.INSTRUMENT: 0}],
        (128, 5): [
            {soundfont.KEYS: (70, 80), soundfont.INSTRUMENT: 0},
            {soundfont.VELOCITIES: (100, 127), soundfont.INSTRUMENT: 0},
        ],
    }
    samples = [(SINE[: 1000 + place], {}) for place in range(3)]
    path.write_bytes(_soundfont(presets, [zones], samples))
    font = SoundFont(path)
    assert font.names == {(0, 5): "p5", (128, 5): "p5"}

    def chosen(*note):
        return [len(region.samples) - 1000 for region in font.regions(*note)]

    assert chosen(0, 5, 59, 100) == [0]
    assert chosen(0, 5, 60, 63) == [1] and chosen(0, 5, 60, 64) == [2]
    assert chosen(128, 5, 75, 110) == [2, 2] and chosen(128, 5, 75, 90) == [2]
    assert chosen(128, 5, 60, 90) == []


def test_a_global_zone_gives_to_all(tmp_path):
    path = epath.Path(tmp_path) / "font.sf2"
    zones = [
        {soundfont.SEMITONES: 12, **LOOP},
        {soundfont.SAMPLE: 0},
        {soundfont.SEMITONES: 7, soundfont.SAMPLE: 0},
        {soundfont.SEMITONES: 1},  # names no sample: ignored
    ]
    presets = {(0, 5): [{soundfont.CENTS: 20}, {soundfont.INSTRUMENT: 0}]}
    path.write_bytes(_soundfont(presets, [zones], [(SINE, {})]))
    regions = SoundFont(path).regions(0, 5, 60, 100)
    assert [region.cents for region in regions] == [1220, 720]
    assert all(region.loop == (500, 1500) for region in regions)


def test_regions_add_up(font):
    one = font()
    regions = one.regions(0, 5, 60, 100)
    twice = play(regions * 2, 0.2, 1.0, OUT)
    assert np.allclose(twice, 2 * play(regions, 0.2, 1.0, OUT))
    assert not play([], 0.2, 1.0, OUT).any()


# Errors


def test_what_is_no_soundfont_is_refused(tmp_path, font):
    path = epath.Path(tmp_path) / "other.sf2"
    path.write_bytes(b"RIFF\0\0\0\0WAVE")
    with pytest.raises(UserError, match="no SoundFont 2 file: it does not begin"):
        SoundFont(path)
    font()
    whole = (epath.Path(tmp_path) / "font.sf2").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is cut off in its part RIFF|is cut off in its part LIST"):
        SoundFont(path)
    path.write_bytes(whole.replace(b"igen", b"nope"))
    with pytest.raises(UserError, match="part b'igen' is missing"):
        SoundFont(path)


def test_a_program_that_is_not_there(font):
    with pytest.raises(UserError, match="no program 6 in bank 0"):
        font().regions(0, 6, 60, 100)
