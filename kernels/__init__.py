"""Triton kernels, installed as ``fastlora.kernels``; the Triton backend imports their modules on first use.

The folder lies at the repository root, so a checkout on ``sys.path`` makes a module of the bare name ``kernels``
importable. Under that name this file does nothing and carries no version, so that libraries which look for another
package of that name do not mistake it for theirs.
"""

if __name__ == "fastlora.kernels":
    __all__: list[str] = []
