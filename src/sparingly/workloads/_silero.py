"""silero-vad for telephone speech: the network of a package, its engines, and what a chunk of 32 ms costs."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparingly.workloads._onnx import opened, session
from sparingly.workloads._parts import check_sha256
from sparingly.workloads.stream_data import CHUNK

INSTALL = "pip install --no-deps silero-vad==6.2.3"
FILES = {
    "silero_vad.jit": "e1122837f4154c511485fe0b9c64455f7b929c96fbb8d79fbdb336383ebd3720",
    "silero_vad.onnx": "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
}
"""Name -> SHA-256. Both hold the same weights."""

CONTEXT, WIDTH = 32, 128
"""Samples before a chunk that it is heard with, and units of the LSTM."""

SWITCH = 64
"""So many chunks at once go through PyTorch: 8.8 µs a chunk at 2,048 chunks, 13 at 64, 32 at 16 and 215 at 1, where
ONNX Runtime takes 18 µs, 18, 18.7 and 38 (the file as shipped 53 at 1, TorchScript 119; one thread of a virtual EPYC).
Sixteen streams at once would be 6.3 µs."""

BESIDE, LIKE = 16, 1.7
"""Runs that go through the LSTM beside one another, the longest at most so many times as long as the shortest."""

BLOCKS = (256, 64)
"""Chunks that go through the encoder together: 5.9 µs and 8.6 µs a chunk, 9.8 in one piece of any length."""


def file_of(name: str) -> bytes:
    """A file of the package, which is not imported (that would need torchaudio).

    Raises FileNotFoundError if the package is missing, ValueError if the file is another one.
    """
    spec = importlib.util.find_spec("silero_vad")
    folders = [Path(folder) / "data" for folder in (spec.submodule_search_locations if spec else None) or []]
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no {name} of silero-vad here: {INSTALL}")
    content = found.read_bytes()
    check_sha256(content, FILES[name], found, INSTALL)
    return content


class Network(nn.Module):
    """The part of silero-vad for 8 kHz. Windows float32 [n, 288] of consecutive chunks and the LSTM's state, two of
    float32 [1, 1, 128] -> chances of speech float32 [n], state.

    The encoder looks at each window by itself, so that many go through it together; only the LSTM goes in order.
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.basis = nn.Parameter(weights["stft.forward_basis_buffer"])
        self.encoder = nn.ModuleList()
        for place, stride in enumerate((1, 2, 2, 1)):
            weight = weights[f"encoder.{place}.reparam_conv.weight"]
            layer = nn.Conv1d(weight.shape[1], weight.shape[0], 3, stride, padding=1)
            layer.load_state_dict({"weight": weight, "bias": weights[f"encoder.{place}.reparam_conv.bias"]})
            self.encoder.append(layer)
        self.lstm, self.out = nn.LSTM(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self.lstm.load_state_dict({f"{name}_l0": weights[f"decoder.rnn.{name}"] for name in names})
        last = "decoder.decoder.2"
        self.out.load_state_dict({"weight": weights[f"{last}.weight"][:, :, 0], "bias": weights[f"{last}.bias"]})
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls) -> Network:
        """With the package's weights; raises as :func:`file_of`."""
        state = _scripted().state_dict()
        return cls({name[len("_model_8k.") :]: value for name, value in state.items() if name.startswith("_model_8k.")})

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.lstm(self._encoded(x).reshape(-1, 1, WIDTH), (h, c))
        return self.out(y.relu()).sigmoid().reshape(-1), h, c

    def encoded(self, x: Tensor) -> Tensor:
        """Windows float32 [n, 288] -> [n, 128], in blocks."""
        parts, at = [], 0
        while at < len(x):
            block = next((size for size in BLOCKS if len(x) - at >= size), BLOCKS[-1])
            part = x[at : at + block]
            parts.append(self._encoded(F.pad(part, (0, 0, 0, block - len(part))))[: len(part), :, 0])
            at += block
        return torch.cat(parts)

    def beside(self, encoded: list[Tensor]) -> Tensor:
        """Several streams from their starts on, float32 [n, 128] each -> chances [streams, longest]; what comes after
        the end of a shorter one means nothing."""
        states = self.lstm(nn.utils.rnn.pad_sequence(encoded))[0]
        return self.out(states.relu()).sigmoid().squeeze(2).T

    def _encoded(self, x: Tensor) -> Tensor:
        """float32 [n, 288] -> [n, 128, 1]."""
        x = F.pad(x.unsqueeze(1), (0, CONTEXT), mode="reflect")
        x = F.conv1d(x, self.basis, stride=64)
        half = self.basis.shape[0] // 2
        x = (x[:, :half] ** 2 + x[:, half:] ** 2).sqrt()
        for layer in self.encoder:
            x = layer(x).relu()
        return x

    def macs(self) -> int:
        """Of a chunk: the weights of each convolution times its places (4 windows of the transform, then 4, 2, 1 and 1;
        what falls on padding is counted), and those of the LSTM and of the last layer."""
        places = (4, 4, 2, 1, 1)
        layers: list[Any] = [self.basis, *(layer.weight for layer in self.encoder)]
        total = sum(count * weight.numel() for count, weight in zip(places, layers, strict=True))
        return total + 8 * WIDTH * WIDTH + WIDTH

    def size_bytes(self, chunks: float) -> float:
        """Weights and samples that a chunk reads where so many come at once: what the LSTM does in order reads its own
        for each chunk, the rest is read once."""
        again = 4 * WIDTH * WIDTH
        return 4 * (again + (sum(one.numel() for one in self.parameters()) - again) / chunks) + 2 * CHUNK


def _scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; the package ships it all the same.
        return torch.jit.load(io.BytesIO(file_of("silero_vad.jit")))


class Silero:
    """The network over a stream: chunks int16 [n, 256] -> chances of speech float32 [n].

    One chunk, or a few, go through ONNX Runtime, more through PyTorch; ``reset()`` begins another stream."""

    def __init__(self, network: Network, block: int = 2048):
        self.network, self.block = network, block
        state = torch.zeros(1, 1, WIDTH)
        axes = {"x": {0: "n"}, "h": {}, "c": {}, "y": {0: "n"}, "h1": {}, "c1": {}}
        self._run = session(network, (torch.zeros(7, CONTEXT + CHUNK), state, state), axes, outputs=3).run
        self.reset()

    def reset(self) -> None:
        """Nothing heard yet."""
        self._h = self._c = np.zeros((1, 1, WIDTH), np.float32)
        self._one = np.zeros((1, CONTEXT + CHUNK), np.float32)

    def step(self, chunk: np.ndarray) -> float:
        """The next chunk int16 [256] -> its chance of speech."""
        one = self._one
        one[0, :CONTEXT] = one[0, CHUNK:]
        np.multiply(chunk, np.float32(1 / 32768), out=one[0, CONTEXT:])
        found, self._h, self._c = self._run(None, {"x": one, "h": self._h, "c": self._c})
        return found[0]

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        if len(chunks) == 1:
            return np.array([self.step(chunks[0])], np.float32)
        parts, at = [], 0
        while at < len(chunks):
            size = next((size for size in (self.block, SWITCH) if len(chunks) - at >= size), SWITCH)
            parts.append(self._some(chunks[at : at + size]))
            at += size
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def runs(self, runs: list[np.ndarray]) -> list[np.ndarray]:
        """Several runs of chunks, each as after a reset -> the chances of each; what is kept is the last one's.

        All go through the encoder together, and those of like length through the LSTM beside one another.
        """
        found: list[np.ndarray] = [np.empty(0, np.float32)] * len(runs)
        with torch.inference_mode():
            if len(runs) > 1:
                windows = torch.cat([self._windows(one) for one in runs[:-1]])
                encoded = self.network.encoded(windows).split([len(one) for one in runs[:-1]])
            order, first = sorted(range(len(runs) - 1), key=lambda place: len(runs[place])), 0
            while first < len(order):
                most = LIKE * len(runs[order[first]])
                group = [place for place in order[first : first + BESIDE] if len(runs[place]) <= most]
                first += len(group)
                chances = self.network.beside([encoded[place] for place in group]).numpy()
                for row, place in zip(chances, group, strict=True):
                    found[place] = row[: len(runs[place])]
        self.reset()
        found[-1] = self(runs[-1])
        return found

    def _windows(self, chunks: np.ndarray) -> Tensor:
        """Of a stream that begins: float32 [n, 288]."""
        samples = np.zeros(CONTEXT + chunks.size, np.float32)
        np.multiply(chunks.reshape(-1), np.float32(1 / 32768), out=samples[CONTEXT:])
        return torch.from_numpy(samples).unfold(0, CONTEXT + CHUNK, CHUNK)

    def _some(self, chunks: np.ndarray) -> np.ndarray:
        samples = np.empty(CONTEXT + chunks.size, np.float32)
        samples[:CONTEXT] = self._one[0, CHUNK:]
        np.multiply(chunks.reshape(-1), np.float32(1 / 32768), out=samples[CONTEXT:])
        self._one[0] = samples[-CHUNK - CONTEXT :]
        if len(chunks) < SWITCH:
            windows = np.lib.stride_tricks.sliding_window_view(samples, CONTEXT + CHUNK)[::CHUNK]
            given = {"x": np.ascontiguousarray(windows), "h": self._h, "c": self._c}
            found, self._h, self._c = self._run(None, given)
            return found
        windows = torch.from_numpy(samples).unfold(0, CONTEXT + CHUNK, CHUNK)
        with torch.inference_mode():
            found, h, c = self.network(windows, torch.from_numpy(self._h), torch.from_numpy(self._c))
        self._h, self._c = h.numpy(), c.numpy()
        return found.numpy()


def others() -> dict[str, Callable[[np.ndarray], object]]:
    """The package's own two files, one chunk int16 [256] at a time, as callables that keep their state."""
    scripted: Any = _scripted()
    run = opened(file_of("silero_vad.onnx")).run
    rate, one = np.array(8000, np.int64), np.zeros((1, CONTEXT + CHUNK), np.float32)
    state = [np.zeros((2, 1, WIDTH), np.float32)]

    def shipped(chunk: np.ndarray) -> object:
        one[0, :CONTEXT] = one[0, CHUNK:]
        np.multiply(chunk, np.float32(1 / 32768), out=one[0, CONTEXT:])
        found, state[0] = run(None, {"input": one, "state": state[0], "sr": rate})
        return found[0, 0]

    @torch.inference_mode()
    def script(chunk: np.ndarray) -> object:
        return scripted(torch.from_numpy(chunk.astype(np.float32) / 32768).unsqueeze(0), 8000)

    return {"onnxruntime, the file as shipped": shipped, "torchscript, the file as shipped": script}
