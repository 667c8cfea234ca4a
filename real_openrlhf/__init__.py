"""REAL, regression-aware reinforcement learning for LLM-as-a-judge models, on OpenRLHF, Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
