"""Hours of quiet with telephone prompts in them: Asterisk's recordings joined with noise at a chosen duty.

Six voices from Debian's ``asterisk-core-sounds-{en,es,fr,it,ru}-wav`` and ``asterisk-prompt-it-menardi-wav``, read from
where they are installed and checked by hash: 3,247 recordings of speech, 8 kHz, 16 bits. Beeps and the like among them
are disturbances here; the recordings of silence are left out, for a stream's gaps have noise of their own.
"""

from __future__ import annotations

import hashlib
import os
import re
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

RATE, CHUNK = 8000, 256
"""Samples of a second and of an item, 32 ms."""

SOUNDS = Path("/usr/share/asterisk/sounds")
VOICES = {
    "en_US_f_Allison": (
        "asterisk-core-sounds-en-wav",
        "974e1fb39654fb02b88e97721a3f36884bfb92e306e71cec4d5191519a7b3ea3",
    ),
    "es_MX_f_Allison": (
        "asterisk-core-sounds-es-wav",
        "b344f1a4e0c5ba67afee73d9e113a91f93ddd44324a78359222a43f147c8cbbf",
    ),
    "fr_CA_f_June": ("asterisk-core-sounds-fr-wav", "0c891d9e70952a8d9ee60169fa1dd851e8c9d9ec017fa0fa297f2408d4df59f6"),
    "it_IT_f_Menardi": (
        "asterisk-prompt-it-menardi-wav",
        "770714b181f29e3763f06b537dcdceafceb0aee9e833f66182cb69990da3a470",
    ),
    "it_IT_m_Carlo": (
        "asterisk-core-sounds-it-wav",
        "3854dd66c0073074e818e3a25e5fb71a202cf4dfd3293ce29018c5f7b1691585",
    ),
    "ru_RU_f_IvrvoiceRU": (
        "asterisk-core-sounds-ru-wav",
        "dc6573d8b995eb74ed518fe0115eeda6c2a700c4e65540db2922dd2a46fadff4",
    ),
}
"""Folder -> package, and SHA-256 over names and samples of its recordings in the order of their names."""

_TONES = re.compile(r"(^|/)(beep|beeperr|(a|de)scending-2tone|confbridge-(join|leave)|tt-monkeys)$")
_SILENCE = re.compile(r"(^|/)silence/")

NOISES = ("white", "pink", "brown", "hum")
SNRS_DB = (10, 20, 30)
"""Speech above noise, mean power of a scene's recordings ÷ that of the noise: a street, an office, a quiet line."""

DISTURBANCE_S = 60.0
"""Seconds from one disturbance to the next, in the mean."""

SHORTEST_GAP_S = 0.5
_BANK = 1 << 20


class Recording(NamedTuple):
    """samples int16 [n] at RATE."""

    name: str
    samples: np.ndarray


class Sounds(NamedTuple):
    """What streams are made of."""

    speech: list[Recording]
    tones: list[Recording]


class Scene(NamedTuple):
    """A stream: chunks int16 [n, CHUNK], and owner int64 [n], the place in the list of the recording that more than
    half of a chunk belongs to, -1 where there is none."""

    chunks: np.ndarray
    owner: np.ndarray


def load(folder: str | os.PathLike[str] = SOUNDS) -> Sounds:
    """Every recording of every voice. Raises FileNotFoundError with what to install, ValueError for other contents."""
    speech, tones = [], []
    for voice, (package, expected) in VOICES.items():
        files = sorted((Path(folder) / voice).glob("**/*.wav"))
        if not files:
            packages = " ".join(package for package, _ in VOICES.values())
            raise FileNotFoundError(f"no recordings in {Path(folder) / voice}: apt-get install {packages}")
        digest = hashlib.sha256()
        for file in files:
            name = file.relative_to(folder).with_suffix("").as_posix()
            samples = _read(file)
            digest.update(name.encode() + samples.tobytes())
            if _TONES.search(name):
                tones.append(Recording(name, samples))
            elif len(samples) and not _SILENCE.search(name):
                speech.append(Recording(name, samples))
        if digest.hexdigest() != expected:
            raise ValueError(
                f"{Path(folder) / voice} holds other recordings: SHA-256 {digest.hexdigest()[:16]}…, expected "
                f"{expected[:16]}…. Install the {package} of Debian 13"
            )
    return Sounds(speech, tones)


def _read(file: Path) -> np.ndarray:
    with wave.open(str(file)) as opened:
        kind = opened.getframerate(), opened.getnchannels(), opened.getsampwidth()
        if kind != (RATE, 1, 2):
            raise ValueError(f"{file} must be {RATE} Hz, one channel of 16 bits, got {kind}")
        return np.frombuffer(opened.readframes(opened.getnframes()), np.int16)


def noise(kind: str, rng: np.random.Generator) -> np.ndarray:
    """float32 [2^20] of mean power 1, which may be repeated: its end goes on at its start."""
    spectrum = np.fft.rfft(rng.standard_normal(_BANK))
    hertz = np.fft.rfftfreq(_BANK, 1 / RATE)
    if kind == "hum":
        # Mains at 50 or 60 Hz with its overtones, over a little white noise.
        spectrum *= 0.1
        mains = rng.choice([50.0, 60.0])
        for overtone in range(1, 9):
            turn = np.exp(2j * np.pi * rng.random())
            spectrum[np.searchsorted(hertz, mains * overtone)] += turn * _BANK / 2 / overtone
    else:
        # Below 40 Hz a telephone has nothing.
        spectrum *= np.maximum(hertz, 40.0) ** -{"white": 0.0, "pink": 0.5, "brown": 1.0}[kind]
    wave_ = np.fft.irfft(spectrum)
    return (wave_ / np.sqrt((wave_**2).mean())).astype(np.float32)


def scene(
    speech: Sequence[Recording],
    duty: float,
    snr_db: float,
    background: np.ndarray,
    tones: Sequence[Recording],
    rng: np.random.Generator,
    longest_gap_s: float = np.inf,
) -> Scene:
    """The recordings one after the other in noise, each after a gap of random length (exponential).

    ``duty``: the share of the time that is recording, in the mean; gaps are then cut at ``longest_gap_s``.
    ``background``: as :func:`noise` gives it; its level wanders by some 3 dB in half a minute. Disturbances come at
    random: clicks, knocks, tones, rustling and the ``tones``, up to 20 dB below the speech.
    """
    seconds = np.array([len(one.samples) / RATE for one in speech])
    gaps = rng.exponential(seconds.sum() * (1 - duty) / duty / (len(speech) + 1), len(speech) + 1)
    gaps = np.clip(gaps, SHORTEST_GAP_S, longest_gap_s)
    starts = np.cumsum(gaps[:-1] * RATE + np.concatenate([[0.0], seconds[:-1] * RATE])).astype(np.int64)
    n = int((gaps.sum() + seconds.sum()) * RATE) // CHUNK
    power = sum(float((one.samples.astype(np.float64) ** 2).sum()) for one in speech) / (seconds.sum() * RATE)
    level = float(np.sqrt(power))
    first = int(rng.integers(len(background)))
    out = np.take(background, np.arange(first, first + n * CHUNK), mode="wrap")
    knots = rng.normal(0, 3, n * CHUNK // (30 * RATE) + 2)
    wander = 10 ** (np.interp(np.arange(n) * CHUNK / (30 * RATE), np.arange(len(knots)), knots) / 20)
    out = (out.reshape(n, CHUNK) * (wander * level * 10 ** (-snr_db / 20)).astype(np.float32)[:, None]).reshape(-1)
    for at in np.flatnonzero(rng.random(n) < CHUNK / RATE / DISTURBANCE_S) * CHUNK:
        sound = _disturbance(tones, rng)
        sound *= level * 10 ** (-rng.uniform(0, 20) / 20) / max(1e-9, float(np.sqrt((sound**2).mean())))
        part = out[at : at + len(sound)]
        part += sound[: len(part)]
    owner = np.full(n * CHUNK, -1, np.int64)
    for place, (start, one) in enumerate(zip(starts, speech, strict=True)):
        part = out[start : start + len(one.samples)]
        part += one.samples[: len(part)]
        owner[start : start + len(part)] = place
    chunks = np.clip(np.rint(out), -32768, 32767).astype(np.int16).reshape(n, CHUNK)
    return Scene(chunks, owner.reshape(n, CHUNK)[:, CHUNK // 2].copy())


def _disturbance(tones: Sequence[Recording], rng: np.random.Generator) -> np.ndarray:
    """float32 [n] of any level: something that is no speech."""
    kind = rng.integers(5 if tones else 4)
    if kind == 4:
        return tones[int(rng.integers(len(tones)))].samples.astype(np.float32)
    length = rng.uniform(*((0.002, 0.01), (0.05, 0.2), (0.1, 1.0), (0.2, 1.5))[kind])
    n = int(length * RATE)
    at = np.arange(n) / n
    if kind == 2:
        sound = np.sin(2 * np.pi * rng.uniform(200, 3000) * length * at)
    else:
        # A click, a knock (dull), rustling (rises and falls).
        sound = rng.standard_normal(n) * (np.sin(np.pi * at) if kind == 3 else np.exp(-5 * at))
        if kind == 1:
            sound = np.convolve(sound, np.ones(16) / 16, mode="same")
    return sound.astype(np.float32)
