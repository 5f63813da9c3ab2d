"""The network as one file for other runtimes: ONNX, or what torch.export writes."""

from smope.export.files import export_model
from smope.export.network import ExportError

__all__ = ["ExportError", "export_model"]
