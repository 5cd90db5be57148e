"""Models as files that other programs load: merged, written tensor by tensor, and verified by reading them back."""

from ossia.export.export import export_model, merge_shards, verify_export
from ossia.export.merge import write_model

__all__ = ["export_model", "merge_shards", "verify_export", "write_model"]
