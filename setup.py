"""Packaging of real_openrlhf. A plain `pip install -e .` compiles nothing."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

CORE = [
    "torch>=2.6",
    "transformers>=4.53",
    "numpy",
    "scipy>=1.12",
    "pyarrow>=15",
    "httpx>=0.27",
    "matplotlib>=3.8",
    "tqdm",
    "rich>=13",
]
# OpenRLHF's own pins carry the rest: deepspeed, ray, transformers, vllm, flash-attn.
GPU = ["openrlhf[vllm]==0.11.2", "flash-attn==2.8.3", "liger-kernel==0.8.5"]
DEV = ["pytest>=8", "ruff>=0.8", "mypy>=1.13", "types-tqdm"]

setup(
    name="real_openrlhf",
    version="0.1.0",
    description="Regression-aware RL (REAL) for LLM-as-a-judge models, Ray-native, on top of OpenRLHF",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["real_openrlhf", "real_openrlhf.*"]),
    package_data={"real_openrlhf": ["py.typed", "data/templates/*.txt"]},
    install_requires=CORE,
    extras_require={"gpu": GPU, "dev": DEV},
)
