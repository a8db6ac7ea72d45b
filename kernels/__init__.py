"""Device kernels of FastShift, importable only as `fastshift.kernels`."""

from __future__ import annotations

if __name__ != "fastshift.kernels":
    raise ImportError(
        f"this package is fastshift.kernels, imported as {__name__!r}; "
        "import it as `import fastshift.kernels`"
    )
