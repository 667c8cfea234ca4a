"""Published model cards import this name; the home is `real_openrlhf.export.settings`."""

from real_openrlhf.export.settings import SETTINGS_FILE, ExportError, JudgeSettings

__all__ = ["SETTINGS_FILE", "ExportError", "JudgeSettings"]
