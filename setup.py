"""The part of the build that pyproject.toml cannot say yet: an extension that may fail to compile."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "onehop.transport._native",
            ["src/onehop/transport/_native.c"],
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            optional=True,  # without a compiler the same is done through pyzmq, more slowly
        )
    ]
)
