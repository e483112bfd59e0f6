"""`import sparingly` is free: nothing optional, no variable of its own, no device, no network."""

import json
import subprocess
import sys

import pytest

OPTIONAL = (
    "faiss",
    "triton",
    "onnxruntime",
    "onnx",
    "pynvml",
    "wordfreq",
    "codespell_lib",
    "symspellpy",
    "transformers",
)

# PyTorch and Numba are imported first: what they read or touch is theirs, and what is left is ours.
PROBE = """
import json, os, socket, sys
import numba, numpy, safetensors, torch

seen = {"environment": [], "network": [], "device": []}

class Watched(type(os.environ)):
    def __init__(self, inner):
        self.__dict__.update(inner.__dict__)
    def __getitem__(self, key):
        caller, between = sys._getframe(1), ("os", "collections.abc", "_collections_abc", __name__)
        while caller and caller.f_globals.get("__name__", "") in between:
            caller = caller.f_back
        if caller and caller.f_globals.get("__name__", "").startswith("sparingly"):
            seen["environment"].append(key)
        return super().__getitem__(key)

os.environ = Watched(os.environ)
os.getenv = lambda key, default=None: os.environ.get(key, default)
before = set(sys.modules)

def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"):
        seen["network"].append(event)
    if event == "open" and str(arguments[0]).startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri", "/sys/class/powercap")):
        seen["device"].append(str(arguments[0]))

sys.addaudithook(audit)
EXTRA
import sparingly
seen["device"] += ["cuda"] if torch.cuda.is_initialized() else []
seen["loaded"] = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
seen["default"] = [str(torch.get_default_dtype()), torch.get_num_threads()]
print(json.dumps(seen))
"""


def probe(extra: str = "") -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace("EXTRA", extra)], capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def seen() -> dict:
    return probe()


def test_nothing_optional_is_imported(seen):
    assert "sparingly" in seen["loaded"]
    assert sorted(set(OPTIONAL) & set(seen["loaded"])) == []


def test_no_environment_variable_is_read(seen):
    assert seen["environment"] == []


def test_no_device_is_touched(seen):
    assert seen["device"] == []


def test_no_network_is_used(seen):
    assert seen["network"] == []


def test_the_probe_can_fail():
    extra = """
module = type(sys)("sparingly_like")
exec("import os, socket, colorsys\\nos.environ.get('X'); os.getenv('Y')\\ns = socket.socket()\\n"
     "try:\\n    s.connect(('127.0.0.1', 9))\\nexcept OSError:\\n    pass\\n"
     "try:\\n    open('/dev/nvidia_none')\\nexcept OSError:\\n    pass", module.__dict__)
"""
    seen = probe(extra)
    assert seen["environment"] == ["X", "Y"]
    assert seen["network"] == ["socket.connect"]
    assert seen["device"] == ["/dev/nvidia_none"]
    assert "colorsys" in seen["loaded"]
