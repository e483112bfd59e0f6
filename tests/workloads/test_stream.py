"""Streams from made-up recordings with a network that hears loudness; silero-vad itself where its package is."""

from __future__ import annotations

import hashlib
import importlib.util
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparingly.guard import Promise
from sparingly.report import html, result, terminal
from sparingly.workloads import _silero, _stream_judged, stream, stream_data
from sparingly.workloads._stream_scout import FEATURES, MOST, Scout, learn
from sparingly.workloads.stream_data import CHUNK, RATE, Recording, Sounds

HAS_SILERO = importlib.util.find_spec("silero_vad") is not None and importlib.util.find_spec("onnxruntime") is not None


def voice(seconds: float, seed: int) -> np.ndarray:
    """A buzz of 100 to 200 Hz, int16."""
    rng = np.random.default_rng(seed)
    at = np.arange(int(seconds * RATE)) / RATE
    pitch = rng.uniform(100, 200)
    wave_ = sum(np.sin(2 * np.pi * pitch * k * at + rng.uniform(0, 6)) / k for k in range(1, 15))
    return (4000 * np.asarray(wave_)).astype(np.int16)


def made_up(n: int = 72) -> Sounds:
    speech = [Recording(f"en/{seed}", voice(1 + seed % 3 / 2, seed)) for seed in range(n)]
    return Sounds(speech, [Recording("en/beep", (3000 * np.sin(np.arange(2000))).astype(np.int16))])


class Loudness:
    """In place of silero: speech where a chunk is loud."""

    def __init__(self, network: Any = None, block: int = 0):
        self.network = self

    def macs(self) -> int:
        return 384_000

    def size_bytes(self, chunks: float) -> float:
        return 1e6 / chunks

    def reset(self) -> None:
        pass

    def step(self, chunk: np.ndarray) -> float:
        return float(self(chunk[None])[0])

    def runs(self, runs: list[np.ndarray]) -> list[np.ndarray]:
        return [self(one) for one in runs]

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        power = (chunks.astype(np.float64) ** 2).mean(axis=1)
        return (power / (power + 3e6)).astype(np.float32)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> stream.Mode:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stream_data, "load", made_up)
    monkeypatch.setattr(stream_data, "_BANK", 1 << 16)
    monkeypatch.setattr(stream_data, "DISTURBANCE_S", 1e9)
    monkeypatch.setattr(stream, "Silero", Loudness)
    monkeypatch.setattr(stream.Network, "load", lambda: None)
    monkeypatch.setattr(_silero, "others", dict)
    monkeypatch.setattr(stream, "DUTIES", (0.1, 0.3))
    monkeypatch.setattr(stream, "TIMED", 500)
    monkeypatch.setattr(stream, "PARTS", {"fit": (0.0, 0.3), "calibration": (0.3, 0.8), "fresh": (0.8, 1.0)})
    return stream.Mode("tiny", None, 0.2, (8, None), 5, 5, (4,), 50)


def nothing(what: str, part: float | None) -> None:
    pass


def test_the_whole_run_has_the_shape_of_the_others(tiny: stream.Mode, tmp_path: Path):
    content = stream.bench(tiny, nothing)
    entry = content["workloads"]["stream"]
    contract = entry["contract"]
    assert contract["metric"] == "events" and contract["setting"] and contract["upper"] <= 0.2
    assert contract["by_recording"]["n"] == 36 and contract["by_recording"]["missed"] <= 4
    assert entry["resplits"]["of"] == 5 and entry["resplits"]["certified"] == 5
    for job in ("batch_1", "best_batch"):
        assert {*entry["inference"][job]["saving"]} == {"cpu_s", "macs", "bytes"}
        # The loud network is woken for a part of the stream only.
        assert 1 < entry["inference"][job]["saving"]["macs"] < 20
    for duty, row in entry["duties"].items():
        assert 0.5 * float(duty) < row["duty"] < 2 * float(duty) and row["agreement"] > 0.6
        assert row["counts"]["awake"] < row["counts"]["items"] == row["n"] and row["events"]["n"] >= 8
    low, high = (entry["duties"][duty]["share_ran"] for duty in ("0.1", "0.3"))
    assert low < high < 1
    assert [row["units"] for row in entry["equal_quality"]["sweep"]] == [16, 4]
    workload = result.parse(content).workloads[0]
    assert workload.is_cascade
    terminal.render(workload)
    page = html.page(result.parse(content))
    assert "Streams by duty" in page and "re-splits" in page
    # What is finished is not done again.
    run: Any = stream.Stream(tiny, nothing)
    run.fit = run.contract = run.quality = run.costs = run.small = lambda *_: pytest.fail("done again")
    assert run.run() == entry


def test_a_scene_has_its_duty_its_noise_and_says_who_speaks():
    sounds, rng = made_up(40), np.random.default_rng(0)
    background = stream_data.noise("pink", rng)
    scene = stream_data.scene(sounds.speech, 0.05, 20, background, [], rng)
    assert scene.chunks.dtype == np.int16 and scene.chunks.shape == (len(scene.owner), CHUNK)
    assert 0.03 < (scene.owner >= 0).mean() < 0.08 and set(scene.owner) == {-1, *range(40)}
    speech, rest = (scene.chunks[where].astype(float) for where in (scene.owner >= 0, scene.owner < 0))
    # Its level wanders, and there are disturbances.
    assert 10 < 10 * np.log10((speech**2).mean() / np.median((rest**2).mean(axis=1))) < 30
    short = stream_data.scene(sounds.speech, 0.05, 20, background, [], rng, longest_gap_s=2.0)
    assert len(short.chunks) < (40 * 2 + 41 * 2 + 1) * RATE / CHUNK


@pytest.mark.parametrize("kind", stream_data.NOISES)
def test_noise_has_power_one(kind: str):
    made = stream_data.noise(kind, np.random.default_rng(0))
    assert made.dtype == np.float32 and float((made**2).mean()) == pytest.approx(1.0, rel=1e-3)


def written(folder: Path, name: str, samples: np.ndarray, rate: int = RATE) -> None:
    file = folder / f"{name}.wav"
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(rate)
        opened.writeframes(samples.tobytes())


def test_recordings_are_checked_and_sorted_by_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    x = voice(0.5, 0)
    names = ["en/beep", "en/digits/1", "en/hello", "en/silence/1"]
    digest = hashlib.sha256()
    for name in names:
        written(tmp_path, name, x)
        digest.update(name.encode() + x.tobytes())
    monkeypatch.setattr(stream_data, "VOICES", {"en": ("voice-en", digest.hexdigest())})
    sounds = stream_data.load(tmp_path)
    assert [one.name for one in sounds.speech] == ["en/digits/1", "en/hello"]
    assert [one.name for one in sounds.tones] == ["en/beep"] and np.array_equal(sounds.speech[0].samples, x)
    written(tmp_path, "en/hello", x[1:])
    with pytest.raises(ValueError, match=r"holds other recordings.*voice-en"):
        stream_data.load(tmp_path)
    written(tmp_path, "en/hello", x, rate=16000)
    with pytest.raises(ValueError, match="must be 8000 Hz"):
        stream_data.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="apt-get install voice-en"):
        stream_data.load(tmp_path / "none")


@pytest.mark.skipif(not stream_data.SOUNDS.is_dir(), reason="Asterisk's recordings are not installed")
def test_the_installed_recordings():
    try:
        sounds = stream_data.load()
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(str(error))
    assert len(sounds.speech) == 3283 and len(sounds.tones) == 42


def chunks(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 300, (n, CHUNK)).astype(np.int16)


def test_the_scout_hears_octaves_above_a_floor_that_follows():
    x, scout = chunks(400), Scout()
    x[300:, :] = np.clip(x[300:].astype(int) + np.resize(voice(1, 1), (100, CHUNK)), -32768, 32767)
    found = scout.features(x)
    assert found.shape == (400, FEATURES) and np.abs(found[100:300, :4].mean()) < 0.6
    # In the buzz the lower octaves rise by more than three octaves of power, and the floor only slowly.
    assert (found[305:310, 3:6] > 3).all() and (found[390:, 3:6] > 2).all()
    # The power of an octave as numbers give it: white noise has the same in each.
    again = Scout()
    again.features(x[:1])
    assert again._state[FEATURES : FEATURES + 3] == pytest.approx(np.log2(2 * 300**2), abs=0.7)


def test_the_scout_is_the_same_in_pieces_and_learns():
    rng, x = np.random.default_rng(0), chunks(3000)
    speech = np.repeat(rng.random(100) < 0.3, 30)
    x[speech] += np.resize(voice(4, 2), (int(speech.sum()), CHUNK)) // 4
    scout, _ = learn(Scout().features(x), speech, 8)
    assert scout.units == 8 and scout.macs() < 1000
    whole = scout(x)
    assert ((whole > 0) == speech).mean() > 0.97
    scout.reset()
    pieces = np.concatenate([scout(x[:7]), [scout.step(one) for one in x[7:50]], scout(x[50:])])
    assert pieces == pytest.approx(whole, abs=1e-3)
    # The kernel's network is PyTorch's.
    twin = Scout(scout.parameters)
    features, p = torch.from_numpy(Scout().features(x)), torch.from_numpy(scout.parameters)
    weight, bias, last = p[: FEATURES * 8].reshape(FEATURES, 8), p[FEATURES * 8 : -9], p[-9:-1]
    assert twin(x) == pytest.approx(((features @ weight + bias).relu() @ last + p[-1]).numpy(), abs=1e-3)
    for wrong in (2, (FEATURES + 2) * (MOST + 1) + 1):
        with pytest.raises(ValueError, match="parameters must be"):
            Scout(np.zeros(wrong, np.float32))


def test_judging():
    says, truth = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert _stream_judged.confusion(says, truth).tolist() == [1, 1, 1]
    assert _stream_judged.f1(np.array([1.0, 1, 1])) == 0.5 and _stream_judged.f1(np.zeros(3)) == 0
    assert _stream_judged.lasting(says[::-1], 1).tolist() == [False, False, True, True]
    assert _stream_judged.lasting(np.array([1, 0, 0, 0, 1], bool), 2).tolist() == [True, True, True, False, True]
    found = _stream_judged.interval(np.array([[9.0, 1, 0], [5, 5, 0], [9, 0, 1]]), 200)
    assert found["lo"] < found["value"] < found["hi"]
    owner = np.array([-1, 0, 0, -1, -1, 1, 1, -1])
    assert _stream_judged.owner_of(np.array([[1, 3], [3, 4], [5, 8]]), owner).tolist() == [0, 0, 1]
    assert _stream_judged.owner_of(np.zeros((0, 2), np.int64), owner).tolist() == []


def test_other_splits_count_what_the_other_recordings_lose():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(500), 2)
    u = rng.random(1000)
    table = {threshold: u < threshold for threshold in (0.01, 0.04, 0.3)}
    found = _stream_judged.resplits(table, owner, Promise(0.1), 20)
    assert found["certified"] == 20 and found["kept"] == 20 and len(found["drops"]) == 20
    assert found["events"] == 20 * 500 and found["missed"] / found["events"] == pytest.approx(0.04, abs=0.02)
    few = _stream_judged.resplits(table, owner, Promise(0.001), 3)
    assert few["certified"] == 0 and few["kept"] == 3 and few["missed"] == 0


@pytest.mark.skipif(not HAS_SILERO, reason="silero-vad is not installed")
def test_silero_answers_alike_in_every_engine_and_in_pieces():
    vad = _silero.Silero(_silero.Network.load(), block=64)
    x = chunks(150)
    x[40:90] = np.resize(voice(2, 3), (50, CHUNK))
    whole = vad(x)
    vad.reset()
    pieces = np.concatenate([[vad.step(one) for one in x[:5]], vad(x[5:20]), vad(x[20:])])
    assert pieces == pytest.approx(whole, abs=1e-4)
    runs: Callable[..., list[np.ndarray]] = vad.runs
    found = runs([x[:30], x[10:150], x[50:80], x[60:75]])
    for one, given in zip(found, (x[:30], x[10:150], x[50:80], x[60:75]), strict=True):
        vad.reset()
        assert vad(given) == pytest.approx(one, abs=1e-4)
    for name, answer in _silero.others().items():
        assert [float(answer(one)) for one in x[:60]] == pytest.approx(whole[:60].tolist(), abs=1e-4), name  # pyright: ignore[reportArgumentType]
    assert vad.network.macs() == 383_616


def test_what_to_install_for_silero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps silero-vad"):
        _silero.file_of("silero_vad.jit")
