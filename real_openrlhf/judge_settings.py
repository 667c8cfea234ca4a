"""Kept for published model cards, which import this name. The code is in `real_openrlhf.export.settings`."""

from real_openrlhf.export.settings import SETTINGS_FILE, ExportError, JudgeSettings

__all__ = ["SETTINGS_FILE", "ExportError", "JudgeSettings"]
