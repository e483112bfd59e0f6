"""Networks in ONNX Runtime on one thread."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import nn

INSTALL = 'the dense engines need onnx and onnxruntime: pip install "sparingly[bench]"'


def session(model: nn.Module, given: tuple[Any, ...], axes: dict[str, dict[int, str]], outputs: int = 1) -> Any:
    """``model`` as a session; ``given``: example inputs.

    ``axes``: the name of each input and then of each of the ``outputs``, with the names of its dimensions that vary.
    Raises ImportError without ``onnx`` and ``onnxruntime``.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ImportError(INSTALL) from error
    file, names = io.BytesIO(), list(axes)
    options: Any = {"input_names": names[:-outputs], "output_names": names[-outputs:]}
    varying: Any = {name: dimensions for name, dimensions in axes.items() if dimensions}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The newer exporter needs onnxscript.
        torch.onnx.export(
            model,
            given,
            file,  # pyright: ignore[reportArgumentType] - documented, its annotation lacks it
            dynamo=False,
            dynamic_axes=varying,
            **options,
        )
    return opened(file.getvalue())


def opened(content: bytes) -> Any:
    """The bytes of an ONNX file as a session. Raises ImportError without ``onnxruntime``."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(INSTALL) from error
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
