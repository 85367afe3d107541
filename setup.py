"""Add `configs/` to the package as `mmjax.configs`; all else of the package stands in setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mmjax", "mmjax.*"]), "mmjax.configs"],
    package_dir={"mmjax.configs": "configs"},
)
